//! Two runs beside each other.

use super::format;
use super::table::{Cell, Paint, columns};
use super::verdict::{self, Outcome};
use crate::bench::summary::{Comparison, Series, Summary};

/// What changed from the first run to the second. `comparisons` is what [`diff`](crate::bench::summary::diff) made of the same two.
pub fn diff(first: &Summary, second: &Summary, comparisons: &[Comparison], colour: bool) -> String {
    let paint = Paint(colour);
    let run = |summary: &Summary| {
        let partial = if summary.complete { "" } else { ", partial" };
        format!("{} of {}{partial}", format::clean(&summary.plan.run), format::clean(&summary.host.date))
    };
    let mut text = format!("{}\n{}  →  {}\n", paint.bold("Two runs compared"), run(first), run(second));
    text.push_str(&conditions(first, second, paint));

    let outcomes: Vec<(&Comparison, Outcome)> =
        comparisons.iter().map(|found| (found, verdict::outcome(found))).collect();
    let part = |wanted: fn(&Outcome) -> bool| outcomes.iter().filter(move |(_, outcome)| wanted(outcome));
    let worse = |outcome: &Outcome| matches!(outcome, Outcome::Won { by: 0, .. });
    let better = |outcome: &Outcome| matches!(outcome, Outcome::Won { by: 1, .. });
    let rows = |wanted: fn(&Outcome) -> bool| -> Vec<Vec<Cell>> {
        part(wanted).map(|(found, outcome)| row(first, found, *outcome)).collect()
    };
    let header = ["what", "executor", "first", "second", "factor", "interval"];
    for (title, rows) in [("Worse", rows(worse)), ("Better", rows(better))] {
        if !rows.is_empty() {
            text.push_str(&format!("\n{}\n{}", paint.bold(title), columns(&header, &rows, paint)));
        }
    }
    let same = part(|outcome| *outcome == Outcome::NoDifference).count();
    let few = part(|outcome| *outcome == Outcome::TooFew).count();
    text.push_str(&format!("\nNo difference found in {}", format::counted(same, "figure", "figures")));
    text.push_str(&if few > 0 { format!("; too few samples to say in {few}.\n") } else { ".\n".into() });
    let sampled = outcomes.iter().filter(|(found, outcome)| {
        *outcome != Outcome::TooFew && found.interval.is_some_and(|i| i.low < i.high)
    });
    let expected = sampled.count() as f64 * (1.0 - first.plan.confidence);
    if expected >= 0.5 {
        text.push_str(&paint.dim(&format!(
            "Between equal runs, about {expected:.0} of these would be found to differ by chance.\n"
        )));
    }
    text.push_str(&facts(first, second, paint));
    text.push_str(&only_in(first, second, "first", paint));
    text.push_str(&only_in(second, first, "second", paint));
    text
}

fn row(first: &Summary, found: &Comparison, outcome: Outcome) -> Vec<Cell> {
    let unit = first.series(&found.probe, &found.metric, &found.a).map(|series| series.unit);
    let figure = |value| unit.map_or(String::new(), |unit| format::figure(unit, value));
    let (factor, interval) = match outcome {
        Outcome::Won { factor, interval, .. } => (factor, interval),
        _ => (None, None),
    };
    vec![
        Cell::left(format!(
            "{}: {}",
            verdict::probe_title(first, &found.probe),
            verdict::metric_title(first, &found.probe, &found.metric)
        )),
        Cell::left(verdict::title(first, &found.a)),
        Cell::right(figure(found.median_a)),
        Cell::right(figure(found.median_b)),
        Cell::right(factor.map_or(String::new(), |factor| format!("{}×", format::factor(factor)))),
        Cell::left(interval.map_or(String::new(), format::factors)),
    ]
}

/// Where hosts, versions and plans differ: then differences of figures may come from these.
fn conditions(first: &Summary, second: &Summary, paint: Paint) -> String {
    let (a, b) = (&first.host, &second.host);
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".into());
    let host = [
        ("processor", a.cpu.model.clone(), b.cpu.model.clone()),
        ("processors", a.cpu.count.to_string(), b.cpu.count.to_string()),
        ("governor", or_none(&a.cpu.governor), or_none(&b.cpu.governor)),
        ("memory", a.memory_bytes.to_string(), b.memory_bytes.to_string()),
        ("kernel", a.kernel.clone(), b.kernel.clone()),
        ("distribution", a.os.clone(), b.os.clone()),
        ("KVM", a.kvm.clone(), b.kvm.clone()),
        ("virtualisation", or_none(&a.virtualisation), or_none(&b.virtualisation)),
        ("control groups", a.cgroups.clone(), b.cgroups.clone()),
    ];
    let mut other = vec![
        ("rvmm".to_owned(), a.rvmm.version.clone(), b.rvmm.version.clone()),
        ("commit".to_owned(), or_none(&a.commit), or_none(&b.commit)),
        ("image".to_owned(), first.plan.image.clone(), second.plan.image.clone()),
        ("digest".to_owned(), or_none(&first.plan.image_id), or_none(&second.plan.image_id)),
    ];
    for mine in &a.executors {
        if let Some(its) = b.executors.iter().find(|its| its.name == mine.name) {
            let versions = (mine.version.clone(), its.version.clone());
            if let (Some(mine_version), Some(its_version)) = versions {
                other.push((mine.title.clone(), mine_version, its_version));
            }
        }
    }
    let differ = |lines: Vec<(String, String, String)>| -> Vec<String> {
        let differs = lines.into_iter().filter(|(_, a, b)| a != b);
        differs
            .map(|(what, a, b)| {
                format!("  {}: {} → {}\n", format::clean(&what), format::clean(&a), format::clean(&b))
            })
            .collect()
    };
    let host = differ(host.into_iter().map(|(what, a, b)| (what.to_owned(), a, b)).collect());
    let other = differ(other);
    let mut text = String::new();
    if !host.is_empty() {
        text.push_str(&paint.warn("The hosts differ, so differences may be theirs:\n"));
        text.extend(host);
    }
    if !other.is_empty() {
        text.push_str(&paint.warn("What was measured differs:\n"));
        text.extend(other);
    }
    text
}

fn facts(first: &Summary, second: &Summary, paint: Paint) -> String {
    let mut rows = vec![];
    for mine in &first.facts {
        let Some(its) = second.fact(&mine.probe, &mine.metric, &mine.executor) else { continue };
        if its.values != mine.values {
            let text = |values: &[String]| {
                if values.is_empty() { "–".into() } else { super::table::reasons(values) }
            };
            rows.push(vec![
                Cell::left(format!(
                    "{}: {}",
                    verdict::probe_title(first, &mine.probe),
                    verdict::metric_title(first, &mine.probe, &mine.metric)
                )),
                Cell::left(verdict::title(first, &mine.executor)),
                Cell::left(text(&mine.values)),
                Cell::left(text(&its.values)),
            ]);
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "\n{}\n{}",
        paint.bold("Facts that differ"),
        columns(&["what", "executor", "first", "second"], &rows, paint)
    )
}

/// What one run measured and the other did not.
fn only_in(one: &Summary, other: &Summary, name: &str, paint: Paint) -> String {
    let measured = |summary: &Summary, series: &Series| {
        summary
            .series(&series.probe, &series.metric, &series.executor)
            .is_some_and(|found| !found.values.is_empty())
    };
    let mut parts: Vec<String> = vec![];
    for series in one.series.iter().filter(|series| measured(one, series) && !measured(other, series)) {
        let part = format!("{} of {}", format::clean(&series.probe), verdict::title(one, &series.executor));
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    if parts.is_empty() {
        String::new()
    } else {
        format!("{} {}\n", paint.dim(&format!("Only in the {name} run:")), parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing::{self, Noisy};
    use crate::bench::{Results, summarise, summary};

    fn text(first: &Results, second: &Results) -> String {
        diff(&summarise(first), &summarise(second), &summary::diff(first, second), false)
    }

    fn run(median: f64, seed: u64) -> Results {
        testing::two(30, Noisy { median: 1.0, spread: 0.05 }, Noisy { median, spread: 0.05 }, seed)
    }

    #[test]
    fn slower_executor_is_worse_and_faster_better() {
        let slower = text(&run(1.0, 1), &run(2.0, 2));
        assert!(slower.contains("Worse\n") && !slower.contains("Better\n"), "{slower}");
        let faster = text(&run(2.0, 1), &run(1.0, 2));
        assert!(faster.contains("Better\n") && !faster.contains("Worse\n"), "{faster}");
    }

    #[test]
    fn same_run_has_no_difference_and_no_other_host() {
        let same = text(&run(1.0, 1), &run(1.0, 1));
        assert!(same.contains("No difference found in 2 figures"), "{same}");
        assert!(!same.contains("hosts differ"), "{same}");
    }

    #[test]
    fn other_host_is_said() {
        let mut other = run(1.0, 1);
        other.host.kvm = "pvm".into();
        other.host.rvmm.version = "rvmm 0.2.0".into();
        let found = text(&run(1.0, 1), &other);
        assert!(found.contains("The hosts differ") && found.contains("KVM: hardware → pvm"), "{found}");
        assert!(found.contains("rvmm: rvmm 0.1.0 → rvmm 0.2.0"), "{found}");
    }

    #[test]
    fn what_only_one_run_has_is_named() {
        let mut second = run(1.0, 1);
        second.samples.retain(|sample| sample.executor != "b");
        assert!(text(&run(1.0, 1), &second).contains("Only in the first run: start of b"));
    }
}
