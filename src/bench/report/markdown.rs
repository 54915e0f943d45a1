//! The report for READMEs and issues.

use super::claims;
use super::format;
use super::table::reasons;
use super::verdict::{self, Outcome};
use crate::bench::summary::Summary;

/// The verdict, all figures and the claims, as tables of GitHub's Markdown.
pub fn markdown(summary: &Summary) -> String {
    let host = &summary.host;
    let mut text = format!(
        "# {} compared\n\n{}, {}, Linux {}, KVM: **{}**, {}. {} runs in {}.\n",
        escaped(&summary.plan.image),
        escaped(&host.cpu.model),
        format::counted(host.cpu.count as usize, "processor", "processors"),
        escaped(&host.kernel),
        escaped(&host.kvm),
        escaped(&host.date),
        if summary.complete { "Complete:" } else { "**Partial:**" },
        format::duration(summary.seconds),
    );
    for warning in &host.warnings {
        text.push_str(&format!("\n> **Warning:** {}\n", escaped(&warning.text)));
    }
    let rulings = verdict::rulings(summary);
    text.push_str(&format!("\n## Verdict\n\n{}\n", escaped(&verdict::headline(summary, &rulings))));
    if let (Some((a, b)), false) = (verdict::pair(summary), rulings.is_empty()) {
        let header = [
            "",
            &verdict::title(summary, a),
            &verdict::title(summary, b),
            "better",
            "factor",
            "interval",
            "samples",
        ];
        let rows = rulings.iter().map(|ruling| {
            let figure = |index: usize| {
                ruling.sides.get(index).map_or(String::new(), |side| format::figure(ruling.unit, side.median))
            };
            let (better, by, interval) = match ruling.outcome {
                Outcome::Won { factor, interval, .. } => (
                    ruling.winner().map_or(String::new(), |side| side.title.clone()),
                    factor.map_or(String::new(), format::factor),
                    interval.map_or(String::new(), format::factors),
                ),
                Outcome::NoDifference => ("no difference found".into(), String::new(), String::new()),
                Outcome::TooFew => ("too few samples".into(), String::new(), String::new()),
            };
            let title = marked(&ruling.title, &ruling.warnings);
            vec![title, figure(0), figure(1), better, by, interval, format::samples(ruling)]
        });
        text.push_str(&grid(&header, "lrrlrll", rows));
    }
    text.push_str("\n## Figures\n");
    text.push_str(&grid(
        &["probe", "metric", "executor", "median", "interval", "samples"],
        "lllrlr",
        summary.series.iter().map(|series| {
            let median = series.quantiles.median;
            let (figure, interval) = match series.values.is_empty() {
                true => ("–".into(), reasons(&series.failures)),
                false => (
                    format::figure(series.unit, median),
                    series
                        .interval
                        .map_or(String::new(), |interval| format::interval(series.unit, median, interval)),
                ),
            };
            vec![
                verdict::probe_title(summary, &series.probe),
                verdict::metric_title(summary, &series.probe, &series.metric),
                verdict::title(summary, &series.executor),
                figure,
                interval,
                series.values.len().to_string(),
            ]
        }),
    ));
    text.push_str("\n## Facts\n");
    text.push_str(&grid(
        &["probe", "fact", "executor", ""],
        "llll",
        summary.facts.iter().map(|fact| {
            vec![
                verdict::probe_title(summary, &fact.probe),
                verdict::metric_title(summary, &fact.probe, &fact.metric),
                verdict::title(summary, &fact.executor),
                reasons(if fact.values.is_empty() { &fact.failures } else { &fact.values }),
            ]
        }),
    ));
    text.push_str("\n## Claims\n");
    text.push_str(&grid(
        &["#", "claim", "on this host", "answer", "probes"],
        "rllll",
        claims::claims(summary).into_iter().map(|claim| {
            vec![
                claim.number.to_string(),
                claim.claim.to_owned(),
                marked(claim.judgement.words(), &claim.warnings),
                claim.answer,
                claim.probes.join(", "),
            ]
        }),
    ));
    text
}

/// With the codes of the warnings that touch it.
fn marked(text: &str, warnings: &[String]) -> String {
    if warnings.is_empty() { text.to_owned() } else { format!("{text} (warning: {})", warnings.join(", ")) }
}

/// A table; `align` has a letter for each column.
pub(super) fn grid(header: &[&str], align: &str, rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut text = String::from("\n");
    text.push_str(&line(header.iter().map(|cell| escaped(cell)).collect()));
    text.push_str(&line(
        align.chars().map(|side| if side == 'r' { "---:" } else { "---" }.to_owned()).collect(),
    ));
    for row in rows {
        text.push_str(&line(row.iter().map(|cell| escaped(cell)).collect()));
    }
    text
}

/// Text that stays text: no markup, no HTML, no end of a cell.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in format::clean(text).chars() {
        match c {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' | '#' | '~' => escaped.extend(['\\', c]),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cell_cannot_end_its_table_or_begin_markup() {
        assert_eq!(escaped("a|b\n# <b>*x*"), "a\\|b \\# &lt;b&gt;\\*x\\*");
    }
}
