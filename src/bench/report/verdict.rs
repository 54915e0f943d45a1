//! Who wins in what: one ruling for each dimension of the choice between a container and a virtual machine.

use serde::Serialize;

use super::format;
use crate::bench::results::{Better, Isolation, Unit};
use crate::bench::stats::Interval;
use crate::bench::summary::{Comparison, Series, Summary, Verdict};

/// A dimension: its title, its probe, the metrics that can speak for it, and what the winner does.
struct Dimension(&'static str, &'static str, &'static [&'static str], &'static str);

/// All dimensions, in the order in which they are shown. The first metric that was measured speaks.
const DIMENSIONS: &[Dimension] = &[
    Dimension("Start", "start", &["first_output", "first_instruction", "whole"], "starts sooner"),
    Dimension("First HTTP answer", "start", &["first_http"], "answers sooner"),
    Dimension("Stop", "start", &["stop"], "is gone sooner"),
    Dimension("Many at once", "start", &["parallel_50", "parallel_10"], "is up sooner"),
    Dimension("Memory", "memory", &["pss", "system"], "takes less memory"),
    Dimension("Density", "density", &["instances"], "fits more often"),
    Dimension("Computing", "cpu", &["integer", "float"], "computes faster"),
    Dimension("Memory bandwidth", "cpu", &["bandwidth"], "copies faster"),
    Dimension("Random memory", "cpu", &["random"], "reads faster"),
    Dimension("System calls", "syscall", &["getppid", "read", "stat"], "calls faster"),
    Dimension("Page faults", "fault", &["anonymous", "file"], "gets pages faster"),
    Dimension("New processes", "fork", &["fork", "exec"], "forks faster"),
    Dimension("Context switches", "switch", &["pipe"], "switches faster"),
    Dimension("Disk reads", "disk", &["root_random_read", "root_read", "volume_random_read"], "reads faster"),
    Dimension(
        "Disk writes",
        "disk",
        &["root_random_write", "root_write", "volume_random_write"],
        "writes faster",
    ),
    Dimension("Disk sync", "disk", &["root_fsync", "volume_fsync"], "syncs faster"),
    Dimension("Network throughput", "network", &["host_throughput", "peer_throughput"], "moves more"),
    Dimension("Network latency", "network", &["host_latency", "peer_latency"], "answers sooner"),
    Dimension(
        "Connections",
        "network",
        &["host_connections", "published_connections", "peer_connections"],
        "connects faster",
    ),
    Dimension("Service", "service", &["fastapi_requests", "nginx_requests", "redis_requests"], "serves more"),
    Dimension(
        "Service, slowest answers",
        "service",
        &["fastapi_p99", "nginx_p99", "redis_p99"],
        "answers sooner",
    ),
    Dimension("Disk space", "size", &["instance", "unpacked", "image"], "takes less space"),
    Dimension(
        "Attack surface",
        "isolation",
        &["syscalls_allowed", "syscalls_used"],
        "shows less of the host's kernel",
    ),
    Dimension("Effort", "effort", &["first_answer", "commands", "files"], "takes less effort"),
];

/// One dimension, decided or not.
#[derive(Clone, Debug, Serialize)]
pub struct Ruling {
    /// The dimension.
    pub title: String,
    /// The probe behind it.
    pub probe: String,
    /// The metric that speaks.
    pub metric: String,
    /// The metric for people.
    pub metric_title: String,
    /// What its numbers count.
    pub unit: Unit,
    /// The two that were set beside each other, the run's baseline first.
    pub sides: [Side; 2],
    /// What came out.
    pub outcome: Outcome,
    /// What the winner does, by how much and how sure, in a sentence.
    pub sentence: String,
    /// The best of all executors that isolate, if it is neither of the two.
    pub best: Option<Side>,
    /// Codes of the warnings that touch it.
    pub warnings: Vec<String>,
}

/// An executor's figure.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// The executor.
    pub executor: String,
    /// For people.
    pub title: String,
    /// What separates its work from the host, if known.
    pub isolation: Option<Isolation>,
    /// Its median.
    pub median: f64,
    /// In which the median lies.
    pub interval: Option<Interval>,
    /// Out of how many samples.
    pub samples: usize,
}

/// What came out of a dimension.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Outcome {
    /// One of the two is better.
    Won {
        /// Which of the two: 0 or 1.
        by: usize,
        /// How many times better; `None`: one of the figures is zero.
        factor: Option<f64>,
        /// In which the factor lies; `None`: counted, or one of the figures may be zero.
        interval: Option<Interval>,
    },
    /// The interval holds both.
    NoDifference,
    /// Too few samples to say.
    TooFew,
}

impl Ruling {
    /// Who won, if anybody.
    pub fn winner(&self) -> Option<&Side> {
        match self.outcome {
            Outcome::Won { by, .. } => self.sides.get(by),
            _ => None,
        }
    }
}

/// The two executors that a run is about: its baseline, and the least virtual machine beside it.
pub fn pair(summary: &Summary) -> Option<(&str, &str)> {
    let measured =
        |name: &str| summary.series.iter().any(|series| series.executor == name && !series.values.is_empty());
    let mut there = summary.plan.executors.iter().map(String::as_str).filter(|name| measured(name));
    let baseline = match measured(&summary.plan.baseline) {
        true => &summary.plan.baseline,
        false => there
            .clone()
            .find(|name| summary.isolation(name) == Some(Isolation::Container))
            .or_else(|| there.clone().next())?,
    };
    let of = |isolation| {
        there.clone().find(|name| summary.isolation(name) == Some(isolation) && *name != baseline)
    };
    let other = of(Isolation::Microvm)
        .or_else(|| of(Isolation::FullVm))
        .or_else(|| of(Isolation::Container))
        .or_else(|| there.find(|name| *name != baseline))?;
    Some((baseline, other))
}

/// Rules on every dimension that was measured in both of the [`pair`].
pub fn rulings(summary: &Summary) -> Vec<Ruling> {
    let Some((a, b)) = pair(summary) else { return vec![] };
    DIMENSIONS.iter().filter_map(|dimension| ruling(summary, dimension, a, b)).collect()
}

fn ruling(summary: &Summary, dimension: &Dimension, a: &str, b: &str) -> Option<Ruling> {
    let Dimension(title, probe, metrics, does) = dimension;
    let speaks = |metric: &&&str| {
        let there = |executor| {
            summary.series(probe, metric, executor).is_some_and(|series| !series.values.is_empty())
        };
        there(a) && there(b)
    };
    let metric = metrics.iter().find(speaks)?;
    let comparison = summary.comparison(probe, metric, a, b)?;
    let series = [summary.series(probe, metric, a)?, summary.series(probe, metric, b)?];
    let sides = series.map(|series| side(summary, series));
    let outcome = outcome(&comparison);
    let mut of_metric: Vec<&Series> = summary
        .series
        .iter()
        .filter(|s| s.probe == *probe && s.metric == **metric && !s.values.is_empty())
        .collect();
    of_metric.sort_by(|x, y| match comparison.better {
        Better::Higher => y.quantiles.median.total_cmp(&x.quantiles.median),
        _ => x.quantiles.median.total_cmp(&y.quantiles.median),
    });
    // What isolates nothing is no choice, and what may be no better than the two is no news.
    let best = of_metric.iter().find(|series| summary.isolation(&series.executor) != Some(Isolation::None));
    let best = best.filter(|best| {
        let beats = |side: &str| {
            summary.comparison(probe, metric, side, &best.executor).and_then(|found| found.b_is_better())
        };
        [a, b].iter().all(|side| beats(side) == Some(true))
    });
    Some(Ruling {
        title: (*title).into(),
        probe: (*probe).into(),
        metric: (**metric).into(),
        metric_title: metric_title(summary, probe, metric),
        unit: series[0].unit,
        sentence: sentence(&sides, outcome, does, summary.plan.confidence),
        best: best.map(|series| side(summary, series)),
        warnings: warnings(summary, probe, &[a, b]),
        sides,
        outcome,
    })
}

/// What a comparison says, with a factor that is above one for the winner.
pub fn outcome(comparison: &Comparison) -> Outcome {
    match (comparison.b_is_better(), comparison.verdict) {
        (_, Verdict::TooFew) => Outcome::TooFew,
        (None, _) => Outcome::NoDifference,
        (Some(b_wins), _) => {
            let turn = (comparison.verdict == Verdict::Lower).then(|| comparison.reversed());
            let upward = turn.as_ref().unwrap_or(comparison);
            let factor = upward.ratio.filter(|ratio| ratio.is_finite());
            let interval = upward.interval.filter(|_| factor.is_some()).filter(|i| i.low < i.high);
            Outcome::Won { by: usize::from(b_wins), factor, interval }
        }
    }
}

fn sentence(sides: &[Side; 2], outcome: Outcome, does: &str, confidence: f64) -> String {
    match outcome {
        Outcome::Won { by, factor, interval } => {
            let winner = sides.get(by).map_or("", |side| side.title.as_str());
            let percent = format::percent(confidence);
            let how_sure = interval.map_or(String::new(), |interval| {
                format!(" ({percent} interval {})", format::factors(interval))
            });
            let by_how_much =
                factor.map_or(String::new(), |factor| format!(", by a factor of {}", format::factor(factor)));
            format!("{winner} {does}{by_how_much}{how_sure}.")
        }
        Outcome::NoDifference => "No difference found.".into(),
        Outcome::TooFew => "Too few samples to say.".into(),
    }
}

/// An executor's figure with what is needed to show it.
pub fn side(summary: &Summary, series: &Series) -> Side {
    Side {
        executor: series.executor.clone(),
        title: title(summary, &series.executor),
        isolation: summary.isolation(&series.executor),
        median: series.quantiles.median,
        interval: series.interval,
        samples: series.values.len(),
    }
}

/// An executor's title, fit to be shown.
pub fn title(summary: &Summary, executor: &str) -> String {
    format::clean(summary.host.title(executor))
}

/// A metric's title, fit to be shown; one that the plan does not know is its own title.
pub fn metric_title(summary: &Summary, probe: &str, metric: &str) -> String {
    format::clean(summary.plan.metric(probe, metric).map_or(metric, |metric| &metric.title))
}

/// A probe's title, fit to be shown.
pub fn probe_title(summary: &Summary, probe: &str) -> String {
    format::clean(
        summary.plan.probes.iter().find(|found| found.name == probe).map_or(probe, |found| &found.title),
    )
}

/// Codes of the warnings that touch a probe in any of some executors.
pub fn warnings(summary: &Summary, probe: &str, executors: &[&str]) -> Vec<String> {
    let touches = |warning: &&crate::bench::results::Warning| {
        let probes = warning.probes.is_empty() || warning.probes.iter().any(|found| found == probe);
        let of = warning.executors.is_empty()
            || warning.executors.iter().any(|found| executors.contains(&found.as_str()));
        probes && of
    };
    summary.host.warnings.iter().filter(touches).map(|warning| format::clean(&warning.code)).collect()
}

/// The whole in a sentence: how many dimensions each of the two wins.
pub fn headline(summary: &Summary, rulings: &[Ruling]) -> String {
    let Some((a, b)) = pair(summary) else {
        return "Nothing was measured in two executors, so there is nothing to compare.".into();
    };
    let won = |side: usize| {
        rulings.iter().filter(|r| matches!(r.outcome, Outcome::Won { by, .. } if by == side)).count()
    };
    let [open, few] =
        [Outcome::NoDifference, Outcome::TooFew].map(|is| rulings.iter().filter(|r| r.outcome == is).count());
    let mut parts = vec![
        format!("{} is better in {}", title(summary, a), format::counted(won(0), "dimension", "dimensions")),
        format!("{} in {}", title(summary, b), won(1)),
    ];
    if open > 0 {
        parts.push(format!("no difference was found in {open}"));
    }
    if few > 0 {
        parts.push(format!("{few} had too few samples to say"));
    }
    parts.join("; ") + "."
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{catalogue, summarise, testing};

    #[test]
    fn dimensions_are_of_metrics_that_there_are() {
        for Dimension(title, probe, metrics, _) in DIMENSIONS {
            let info = catalogue::probe(probe).expect(title);
            for metric in *metrics {
                assert!(info.metrics.iter().any(|found| found.0 == *metric), "{title}: {probe}.{metric}");
            }
        }
    }

    #[test]
    fn container_and_microvm_are_the_pair() {
        let summary = summarise(&testing::results(1));
        assert_eq!(pair(&summary), Some(("rvmm-native", "rvmm-microvm")));
    }

    #[test]
    fn factor_is_above_one_whoever_wins() {
        for ruling in rulings(&summarise(&testing::results(1))) {
            if let Outcome::Won { factor: Some(factor), .. } = ruling.outcome {
                assert!(factor > 1.0, "{ruling:?}");
            }
        }
    }

    #[test]
    fn start_is_won_by_the_container_and_the_surface_by_the_microvm() {
        let rulings = rulings(&summarise(&testing::results(1)));
        let winner = |title| {
            rulings.iter().find(|r| r.title == title).and_then(Ruling::winner).map(|s| s.executor.as_str())
        };
        assert_eq!(winner("Start"), Some("rvmm-native"));
        assert_eq!(winner("Attack surface"), Some("rvmm-microvm"));
    }

    #[test]
    fn equals_are_no_difference_and_few_are_too_few() {
        let same = testing::Noisy { median: 0.02, spread: 0.0 };
        let found = rulings(&summarise(&testing::two(9, same, same, 1)));
        assert_eq!(found[0].outcome, Outcome::NoDifference);
        let found = rulings(&summarise(&testing::two(3, same, same, 1)));
        assert_eq!(found[0].outcome, Outcome::TooFew);
    }
}
