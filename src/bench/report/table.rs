//! The report for a terminal: verdict first.

use unicode_width::UnicodeWidthStr;

use super::claims::{self, Judgement};
use super::format;
use super::verdict::{self, Outcome, Ruling};
use crate::bench::summary::{Series, Summary, Verdict};

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const GREEN: &str = "\x1b[32m";
const YELLOW: &str = "\x1b[33m";
const RESET: &str = "\x1b[0m";

/// Paints, or does not.
#[derive(Clone, Copy)]
pub(super) struct Paint(pub bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 && !text.is_empty() { format!("{code}{text}{RESET}") } else { text.to_owned() }
    }
    pub fn bold(self, text: &str) -> String {
        self.with(BOLD, text)
    }
    pub fn dim(self, text: &str) -> String {
        self.with(DIM, text)
    }
    pub fn good(self, text: &str) -> String {
        self.with(GREEN, text)
    }
    pub fn warn(self, text: &str) -> String {
        self.with(YELLOW, text)
    }
}

/// The whole report, for people at a terminal; `colour` where standard output is one.
pub fn table(summary: &Summary, colour: bool) -> String {
    let paint = Paint(colour);
    let mut text = head(summary, paint);
    let rulings = verdict::rulings(summary);
    text.push_str(&format!("\n{}\n{}\n", paint.bold("Verdict"), verdict::headline(summary, &rulings)));
    if let (Some((a, b)), false) = (verdict::pair(summary), rulings.is_empty()) {
        let header = [
            "dimension",
            &verdict::title(summary, a),
            &verdict::title(summary, b),
            "better",
            "by",
            "interval",
            "samples",
            "",
        ];
        let rows: Vec<Vec<Cell>> = rulings.iter().map(|ruling| verdict_row(ruling, paint)).collect();
        text.push('\n');
        text.push_str(&columns(&header, &rows, paint));
        text.push_str(&paint.dim(&format!(
            "Intervals hold the factor with {} confidence; fewer than six samples have none, and are better if all of them are. \
             ! marks figures that a warning above touches.\n",
            format::percent(summary.plan.confidence)
        )));
    }
    text.push_str(&figures(summary, paint));
    text.push_str(&facts(summary, paint));
    text.push_str(&claims_part(summary, paint));
    text
}

/// What was run where, and what makes it unrepresentative.
fn head(summary: &Summary, paint: Paint) -> String {
    let host = &summary.host;
    let mut text = format!(
        "{}\n{}, {}, Linux {}, KVM: {}\n",
        paint.bold(&format!("{} compared on this host", format::clean(&summary.plan.image))),
        format::clean(&host.cpu.model),
        format::counted(host.cpu.count as usize, "processor", "processors"),
        format::clean(&host.kernel),
        format::clean(&host.kvm),
    );
    if !summary.complete {
        let why = summary.why_incomplete.as_deref().unwrap_or("the run did not come to its end");
        text.push_str(&paint.warn(&format!("Partial: {}.\n", format::clean(why))));
    }
    for warning in &host.warnings {
        text.push_str(&paint.warn(&format!("Warning: {}\n", format::clean(&warning.text))));
    }
    text
}

fn verdict_row(ruling: &Ruling, paint: Paint) -> Vec<Cell> {
    let side = |index: usize| {
        ruling.sides.get(index).map_or(String::new(), |side| format::figure(ruling.unit, side.median))
    };
    let (better, by, interval) = match ruling.outcome {
        Outcome::Won { factor, interval, .. } => (
            Cell::left(paint.good(ruling.winner().map_or("", |side| &side.title))),
            factor.map_or(String::new(), |factor| format!("{}×", format::factor(factor))),
            interval.map_or(String::new(), format::factors),
        ),
        Outcome::NoDifference => (Cell::left(paint.dim("no difference found")), String::new(), String::new()),
        Outcome::TooFew => (Cell::left(paint.dim("too few samples")), String::new(), String::new()),
    };
    let mark = if ruling.warnings.is_empty() { String::new() } else { paint.warn("!") };
    vec![
        Cell::left(ruling.title.clone()),
        Cell::right(side(0)),
        Cell::right(side(1)),
        better,
        Cell::right(by),
        Cell::left(interval),
        Cell::left(format::samples(ruling)),
        Cell::left(mark),
    ]
}

/// All figures, probe by probe and metric by metric.
fn figures(summary: &Summary, paint: Paint) -> String {
    let mut text = String::new();
    let header = ["", "median", "interval", "beside the baseline", "samples", ""];
    for of_probe in summary.series.chunk_by(|a, b| a.probe == b.probe) {
        let Some(first) = of_probe.first() else { continue };
        text.push_str(&format!("\n{}\n", paint.bold(&verdict::probe_title(summary, &first.probe))));
        let absent = absent(of_probe);
        let is_absent = |series: &Series| absent.iter().any(|(name, _)| *name == series.executor);
        let mut rows: Vec<Vec<Cell>> = vec![];
        for of_metric in of_probe.chunk_by(|a, b| a.metric == b.metric) {
            let shown: Vec<&Series> = of_metric.iter().filter(|series| !is_absent(series)).collect();
            let Some(first) = shown.first() else { continue };
            rows.push(vec![Cell::left(verdict::metric_title(summary, &first.probe, &first.metric))]);
            let measured = shown.iter().filter(|series| !series.values.is_empty());
            rows.extend(measured.map(|series| figure_row(summary, series, paint)));
            let missing = shown.iter().filter(|series| series.values.is_empty());
            let missing = missing.map(|series| (series.executor.as_str(), reasons(&series.failures)));
            rows.extend(without(summary, missing, paint));
        }
        if !rows.is_empty() {
            text.push_str(&columns(&header, &rows, paint));
        }
        let lines = without(summary, absent.into_iter(), paint);
        text.extend(lines.iter().flatten().map(|cell| format!("{}\n", cell.text)));
    }
    text
}

/// Executors for which none of a probe's metrics has a figure, all for the same reason, and the reason.
fn absent(of_probe: &[Series]) -> Vec<(&str, String)> {
    let mut found: Vec<(&str, Option<String>)> = vec![];
    for series in of_probe {
        let why = series.values.is_empty().then(|| reasons(&series.failures));
        match found.iter_mut().find(|(name, _)| *name == series.executor) {
            Some((_, known)) if *known == why => {}
            Some((_, known)) => *known = None,
            None => found.push((&series.executor, why)),
        }
    }
    found.into_iter().filter_map(|(name, why)| Some((name, why?))).collect()
}

/// A line for each reason, with everything that it holds for.
fn without<'a>(
    summary: &Summary,
    missing: impl Iterator<Item = (&'a str, String)>,
    paint: Paint,
) -> Vec<Vec<Cell>> {
    let mut lines: Vec<(String, Vec<String>)> = vec![];
    for (executor, why) in missing {
        let title = verdict::title(summary, executor);
        // Reasons that name their own executor are the same for all of them.
        let why = match why.strip_prefix(executor) {
            Some(rest) => format!("it{rest}"),
            None => why,
        };
        match lines.iter_mut().find(|(known, _)| *known == why) {
            Some((_, titles)) => titles.push(title),
            None => lines.push((why, vec![title])),
        }
    }
    let line = |(why, titles): (String, Vec<String>)| {
        vec![Cell::left(paint.dim(&format!("  without {}: {why}", titles.join(", "))))]
    };
    lines.into_iter().map(line).collect()
}

fn figure_row(summary: &Summary, series: &Series, paint: Paint) -> Vec<Cell> {
    let name = Cell::left(format!("  {}", verdict::title(summary, &series.executor)));
    let median = series.quantiles.median;
    let baseline = &summary.plan.baseline;
    let measured =
        summary.series(&series.probe, &series.metric, baseline).filter(|found| !found.values.is_empty());
    let beside =
        measured.and_then(|_| summary.comparison(&series.probe, &series.metric, baseline, &series.executor));
    let beside = beside.map_or(String::new(), |found| match (found.verdict, found.ratio) {
        (Verdict::NoDifference, _) => paint.dim("no difference found"),
        (Verdict::TooFew, _) => paint.dim("too few samples"),
        (_, Some(ratio)) => match found.interval {
            Some(interval) if interval.low < interval.high => {
                format!("{}× ({})", format::factor(ratio), format::factors(interval))
            }
            _ => format!("{}×", format::factor(ratio)),
        },
        (Verdict::Lower, None) => "lower".into(),
        (Verdict::Higher, None) => "higher".into(),
    });
    let mut notes = vec![];
    if !series.outliers.is_empty() {
        notes.push(format::counted(series.outliers.len(), "outlier", "outliers"));
    }
    if !series.failures.is_empty() {
        notes.push(reasons(&series.failures));
    }
    vec![
        name,
        Cell::right(format::figure(series.unit, median)),
        Cell::left(
            series.interval.map_or(String::new(), |interval| format::interval(series.unit, median, interval)),
        ),
        Cell::left(beside),
        Cell::right(series.values.len().to_string()),
        Cell::left(paint.dim(&notes.join("; "))),
    ]
}

/// Why figures are missing.
pub(super) fn reasons(failures: &[String]) -> String {
    failures.iter().map(|why| format::clean(why)).collect::<Vec<_>>().join("; ")
}

fn facts(summary: &Summary, paint: Paint) -> String {
    if summary.facts.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{}\n", paint.bold("Facts"));
    let mut rows = vec![];
    for of_metric in summary.facts.chunk_by(|a, b| (&a.probe, &a.metric) == (&b.probe, &b.metric)) {
        let Some(first) = of_metric.first() else { continue };
        rows.push(vec![Cell::left(verdict::metric_title(summary, &first.probe, &first.metric))]);
        // What holds for several is said once.
        let mut lines: Vec<(String, Vec<String>)> = vec![];
        for fact in of_metric {
            let values = match fact.values.is_empty() {
                true => paint.dim(&reasons(&fact.failures)),
                false => reasons(&fact.values),
            };
            let title = verdict::title(summary, &fact.executor);
            match lines.iter_mut().find(|(known, _)| *known == values) {
                Some((_, titles)) => titles.push(title),
                None => lines.push((values, vec![title])),
            }
        }
        for (values, titles) in lines {
            rows.push(vec![Cell::left(format!("  {}", titles.join(", "))), Cell::left(values)]);
        }
    }
    text.push_str(&columns(&["", ""], &rows, paint));
    text
}

fn claims_part(summary: &Summary, paint: Paint) -> String {
    let mut text = format!("\n{}\n", paint.bold("Claims"));
    for claim in claims::claims(summary) {
        let words = match claim.judgement {
            Judgement::Confirmed | Judgement::Refuted | Judgement::Mixed => {
                paint.good(claim.judgement.words())
            }
            _ => paint.dim(claim.judgement.words()),
        };
        text.push_str(&format!("{:>2}. {}: {words}\n", claim.number, claim.claim));
        if !claim.evidence.is_empty() {
            text.push_str(&format!("    {}\n", claim.answer));
        }
    }
    text
}

/// A cell, its width counted without the codes that paint it.
pub(super) struct Cell {
    text: String,
    right: bool,
}

impl Cell {
    pub fn left(text: String) -> Cell {
        Cell { text, right: false }
    }
    pub fn right(text: String) -> Cell {
        Cell { text, right: true }
    }
}

/// Columns as wide as their widest cell; a row of one cell is a heading, and as wide as it likes.
pub(super) fn columns(header: &[&str], rows: &[Vec<Cell>], paint: Paint) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.width()).collect();
    for row in rows.iter().filter(|row| row.len() > 1) {
        // The last cell of a row pushes nothing.
        for (width, cell) in widths.iter_mut().zip(&row[..row.len() - 1]) {
            *width = (*width).max(width_of(&cell.text));
        }
    }
    let rights: Vec<bool> = (0..header.len())
        .map(|at| rows.iter().any(|row| row.get(at).is_some_and(|cell| cell.right)))
        .collect();
    let mut text = String::new();
    if header.iter().any(|name| !name.is_empty()) {
        let cells = header.iter().zip(&rights).map(|(name, right)| (*name, *right));
        text.push_str(&(paint.dim(&line(cells, &widths)) + "\n"));
    }
    for row in rows {
        text.push_str(&(line(row.iter().map(|cell| (cell.text.as_str(), cell.right)), &widths) + "\n"));
    }
    text
}

fn line<'a>(cells: impl Iterator<Item = (&'a str, bool)>, widths: &[usize]) -> String {
    let mut text = String::new();
    for (at, ((cell, right), width)) in cells.zip(widths).enumerate() {
        let space = " ".repeat(width.saturating_sub(width_of(cell)));
        text.push_str(if at == 0 { "" } else { "  " });
        match right {
            true => text.push_str(&(space + cell)),
            false => text.push_str(&(cell.to_owned() + &space)),
        }
    }
    text.trim_end().to_owned()
}

/// Columns of a terminal that a text takes; our own codes take none.
fn width_of(text: &str) -> usize {
    let mut plain = text.to_owned();
    for code in [BOLD, DIM, GREEN, YELLOW, RESET] {
        plain = plain.replace(code, "");
    }
    plain.width()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_paints_them() {
        let paint = Paint(true);
        let rows = vec![
            vec![Cell::left(paint.good("ab")), Cell::right("1".into()), Cell::left("x".into())],
            vec![Cell::left("abcd".into()), Cell::right("100".into()), Cell::left("x".into())],
        ];
        let text = columns(&["", "n", ""], &rows, Paint(false));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(width_of(lines[1]), width_of(lines[2]));
        assert_eq!(lines[2], "abcd  100  x");
    }
}
