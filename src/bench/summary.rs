//! From samples to what is said about them: medians with intervals, and which of two is lower.

use std::collections::BTreeMap;

use serde::Serialize;

use super::results::{Better, Host, Isolation, Metric, Plan, Results, Unit, Value};
use super::stats::{self, Interval, MIN_SAMPLES};

/// A run, condensed. Everything that is printed or drawn comes from this.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The machine.
    pub host: Host,
    /// What was to be done.
    pub plan: Plan,
    /// Whether all of it was done.
    pub complete: bool,
    /// Why not, if known.
    pub why_incomplete: Option<String>,
    /// Seconds that it took, as far as is known.
    pub seconds: f64,
    /// The figures, ordered as probe, metric and executor are in the plan.
    pub series: Vec<Series>,
    /// What is no number, in the same order.
    pub facts: Vec<Fact>,
    /// All pairs of series of the same metric, the one that is first in the plan as `a`.
    pub comparisons: Vec<Comparison>,
    /// Median of the stolen share of processor time over all measurements.
    pub steal: f64,
}

/// The figures of one metric in one executor.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// The probe.
    pub probe: String,
    /// The metric.
    pub metric: String,
    /// The executor.
    pub executor: String,
    /// What the numbers count.
    pub unit: Unit,
    /// Which way is better.
    pub better: Better,
    /// The number is counted and not sampled.
    pub exact: bool,
    /// All of them, in the order of time.
    pub values: Vec<f64>,
    /// Least, greatest and what is between.
    pub quantiles: Quantiles,
    /// In which the median lies, with the plan's confidence. `None`: too few samples to say.
    pub interval: Option<Interval>,
    /// Those of `values` that lie far outside. They count like the others.
    pub outliers: Vec<f64>,
    /// Why samples are missing, each reason once.
    pub failures: Vec<String>,
}

/// Quantiles of a series.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// The least.
    pub min: f64,
    /// 5 %.
    pub p5: f64,
    /// 25 %.
    pub p25: f64,
    /// The middle.
    pub median: f64,
    /// 75 %.
    pub p75: f64,
    /// 95 %.
    pub p95: f64,
    /// 99 %.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
}

/// What is no number.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fact {
    /// The probe.
    pub probe: String,
    /// The metric.
    pub metric: String,
    /// The executor.
    pub executor: String,
    /// What was found; if it was not always the same, each once, in the order of time.
    pub values: Vec<String>,
    /// Why nothing was found, each reason once.
    pub failures: Vec<String>,
}

/// Two series of the same metric set beside each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The probe.
    pub probe: String,
    /// The metric.
    pub metric: String,
    /// One executor. In a comparison of two runs, the executor in the first run.
    pub a: String,
    /// The other; in a comparison of two runs, the same in the second run.
    pub b: String,
    /// Median of `a`.
    pub median_a: f64,
    /// Median of `b`.
    pub median_b: f64,
    /// `median_b / median_a`. `None`: `median_a` is not above zero.
    pub ratio: Option<f64>,
    /// In which the ratio lies, with the plan's confidence.
    pub interval: Option<Interval>,
    /// What can be said of `b`.
    pub verdict: Verdict,
    /// Which way is better.
    pub better: Better,
}

/// What can be said of the second of two series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Its median is lower.
    Lower,
    /// Its median is higher.
    Higher,
    /// The interval holds both.
    NoDifference,
    /// Too few samples to say.
    TooFew,
}

impl Comparison {
    /// Whether `b` is better than `a`: `None` where no difference was found, or neither way is better.
    pub fn b_is_better(&self) -> Option<bool> {
        match (self.verdict, self.better) {
            (Verdict::Lower, Better::Lower) | (Verdict::Higher, Better::Higher) => Some(true),
            (Verdict::Higher, Better::Lower) | (Verdict::Lower, Better::Higher) => Some(false),
            _ => None,
        }
    }

    /// The same with `a` and `b` in each other's place.
    pub fn reversed(&self) -> Comparison {
        let turned = |ratio: f64| (ratio > 0.0).then(|| 1.0 / ratio);
        Comparison {
            a: self.b.clone(),
            b: self.a.clone(),
            median_a: self.median_b,
            median_b: self.median_a,
            ratio: self.ratio.and_then(turned),
            interval: self.interval.and_then(|interval| {
                Some(Interval { low: turned(interval.high)?, high: turned(interval.low)? })
            }),
            verdict: match self.verdict {
                Verdict::Lower => Verdict::Higher,
                Verdict::Higher => Verdict::Lower,
                other => other,
            },
            ..self.clone()
        }
    }
}

impl Summary {
    /// The figures of a metric in an executor.
    pub fn series(&self, probe: &str, metric: &str, executor: &str) -> Option<&Series> {
        let found = |series: &&Series| {
            (series.probe == probe) & (series.metric == metric) & (series.executor == executor)
        };
        self.series.iter().find(found)
    }

    /// The fact of a metric in an executor.
    pub fn fact(&self, probe: &str, metric: &str, executor: &str) -> Option<&Fact> {
        let found =
            |fact: &&Fact| (fact.probe == probe) & (fact.metric == metric) & (fact.executor == executor);
        self.facts.iter().find(found)
    }

    /// What can be said of executor `b`, beside `a`.
    pub fn comparison(&self, probe: &str, metric: &str, a: &str, b: &str) -> Option<Comparison> {
        let of_metric = |found: &&Comparison| found.probe == probe && found.metric == metric;
        let mut of_metric = self.comparisons.iter().filter(of_metric);
        of_metric.find_map(|found| match (found.a.as_str(), found.b.as_str()) {
            found_pair if found_pair == (a, b) => Some(found.clone()),
            found_pair if found_pair == (b, a) => Some(found.reversed()),
            _ => None,
        })
    }

    /// What separates an executor's work from the host.
    pub fn isolation(&self, executor: &str) -> Option<Isolation> {
        self.host.executors.iter().find(|info| info.name == executor).map(|info| info.isolation)
    }
}

/// Condenses a run.
pub fn summarise(results: &Results) -> Summary {
    let (series, facts) = collect(results);
    let mut comparisons = vec![];
    let resampled: Vec<Vec<f64>> = series.iter().map(|series| medians(series, 0)).collect();
    for (index, a) in series.iter().enumerate() {
        for (offset, b) in series[index + 1..].iter().enumerate() {
            if (&a.probe, &a.metric) != (&b.probe, &b.metric) {
                break;
            }
            let resampled = (&resampled[index][..], &resampled[index + 1 + offset][..]);
            comparisons.push(compare(a, b, resampled, results.plan.confidence));
        }
    }
    let mut steal: Vec<f64> = results.samples.iter().map(|sample| sample.noise.steal).collect();
    steal.sort_unstable_by(f64::total_cmp);
    let last = results.samples.last().map_or(0.0, |sample| sample.at);
    Summary {
        host: results.host.clone(),
        plan: results.plan.clone(),
        complete: results.complete(),
        why_incomplete: match &results.end {
            None => Some("the run was killed, or still goes on".into()),
            Some(end) => end.why.clone(),
        },
        seconds: results.end.as_ref().map_or(last, |end| end.at),
        steal: stats::quantile(&steal, 0.5),
        series,
        facts,
        comparisons,
    }
}

/// Sets two runs beside each other: each metric of each executor that both have, the first run's as `a`.
pub fn diff(first: &Results, second: &Results) -> Vec<Comparison> {
    let (ours, _) = collect(first);
    let (theirs, _) = collect(second);
    let same = |a: &Series, b: &Series| {
        (&a.probe, &a.metric, &a.executor, a.unit) == (&b.probe, &b.metric, &b.executor, b.unit)
    };
    let mut comparisons = vec![];
    for a in &ours {
        if let Some(b) = theirs.iter().find(|b| same(a, b)) {
            // Their rounds have nothing in common, so neither have their resamples.
            let (medians_a, medians_b) = (medians(a, 0), medians(b, 1));
            comparisons.push(compare(a, b, (&medians_a, &medians_b), first.plan.confidence));
        }
    }
    comparisons
}

/// Medians of resamples; none where no interval can be given.
fn medians(series: &Series, seed: u64) -> Vec<f64> {
    if series.exact || series.values.len() < MIN_SAMPLES {
        return vec![];
    }
    stats::resampled_medians(&series.values, seed)
}

fn compare(a: &Series, b: &Series, resampled: (&[f64], &[f64]), confidence: f64) -> Comparison {
    let (median_a, median_b) = (a.quantiles.median, b.quantiles.median);
    let ratio = (median_a > 0.0).then(|| median_b / median_a);
    let exact = a.exact && b.exact && !a.values.is_empty() && !b.values.is_empty();
    let pairs = || resampled.0.iter().zip(resampled.1);
    let samples = a.values.len().min(b.values.len());
    let sampled = !resampled.0.is_empty() && !resampled.1.is_empty();
    let verdict = if exact {
        match median_b.total_cmp(&median_a) {
            std::cmp::Ordering::Less => Verdict::Lower,
            std::cmp::Ordering::Greater => Verdict::Higher,
            std::cmp::Ordering::Equal => Verdict::NoDifference,
        }
    } else if !sampled {
        let (above, below) = (stats::lie_apart(&a.values, &b.values), stats::lie_apart(&b.values, &a.values));
        match (above, below) {
            (Some(chance), _) if chance <= 1.0 - confidence => Verdict::Higher,
            (_, Some(chance)) if chance <= 1.0 - confidence => Verdict::Lower,
            _ => Verdict::TooFew,
        }
    } else {
        // The difference has the ratio's sign, and is there when a median is zero.
        let differences = stats::interval(pairs().map(|(a, b)| b - a).collect(), samples, confidence);
        match (differences.low, differences.high) {
            (_, high) if high < 0.0 => Verdict::Lower,
            (low, _) if low > 0.0 => Verdict::Higher,
            _ => Verdict::NoDifference,
        }
    };
    let interval = match ratio {
        Some(ratio) if exact => Some(Interval { low: ratio, high: ratio }),
        Some(_) if sampled && pairs().all(|(a, _)| *a > 0.0) => {
            Some(stats::interval(pairs().map(|(a, b)| b / a).collect(), samples, confidence))
        }
        _ => None,
    };
    Comparison {
        probe: a.probe.clone(),
        metric: a.metric.clone(),
        a: a.executor.clone(),
        b: b.executor.clone(),
        median_a,
        median_b,
        ratio,
        interval,
        verdict,
        better: a.better,
    }
}

/// What was found for one metric in one executor.
struct Group<'a> {
    unit: Unit,
    better: Better,
    numbers: Vec<f64>,
    texts: Vec<&'a str>,
    failures: Vec<&'a str>,
}

fn collect(results: &Results) -> (Vec<Series>, Vec<Fact>) {
    let plan = &results.plan;
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    for sample in &results.samples {
        let key = Key::of(plan, &sample.probe, &sample.metric, &sample.executor);
        let group = groups.entry(key).or_insert_with(|| Group {
            unit: sample.unit,
            better: sample.better,
            numbers: vec![],
            texts: vec![],
            failures: vec![],
        });
        match &sample.value {
            Value::Number(number) => group.numbers.push(*number),
            Value::Text(text) if !group.texts.contains(&text.as_str()) => group.texts.push(text),
            Value::Failed(why) if !group.failures.contains(&why.as_str()) => group.failures.push(why),
            Value::Text(_) | Value::Failed(_) => {}
        }
    }
    let (mut series, mut facts) = (vec![], vec![]);
    for (key, group) in groups {
        let (probe, metric, executor) = (key.probe.1, key.metric.1, key.executor.1);
        let failures = group.failures.into_iter().map(String::from).collect();
        if group.unit == Unit::Text {
            let values = group.texts.into_iter().map(String::from).collect();
            facts.push(Fact { probe, metric, executor, values, failures });
            continue;
        }
        let mut sorted = group.numbers.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let exact = plan.metric(&probe, &metric).is_some_and(|metric: &Metric| metric.exact);
        let mut one = Series {
            unit: group.unit,
            better: group.better,
            exact,
            values: group.numbers,
            quantiles: quantiles(&sorted),
            interval: None,
            outliers: if exact { vec![] } else { stats::outliers(&sorted) },
            failures,
            probe,
            metric,
            executor,
        };
        let resampled = medians(&one, 0);
        one.interval =
            (!resampled.is_empty()).then(|| stats::interval(resampled, one.values.len(), plan.confidence));
        series.push(one);
    }
    (series, facts)
}

fn quantiles(sorted: &[f64]) -> Quantiles {
    let at = |q| stats::quantile(sorted, q);
    Quantiles {
        min: at(0.0),
        p5: at(0.05),
        p25: at(0.25),
        median: at(0.5),
        p75: at(0.75),
        p95: at(0.95),
        p99: at(0.99),
        max: at(1.0),
    }
}

/// Places in the plan, and names; what the plan does not know comes behind what it knows.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    probe: (usize, String),
    metric: (usize, String),
    executor: (usize, String),
}

impl Key {
    fn of(plan: &Plan, probe: &str, metric: &str, executor: &str) -> Key {
        let place = |place: Option<usize>, name: &str| (place.unwrap_or(usize::MAX), name.to_owned());
        Key {
            probe: place(plan.probes.iter().position(|found| found.name == probe), probe),
            metric: place(
                plan.metrics.iter().position(|found| found.probe == probe && found.name == metric),
                metric,
            ),
            executor: place(plan.executors.iter().position(|found| found == executor), executor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::testing::{self, Noisy};

    fn verdict(results: &Results, a: &str, b: &str) -> Verdict {
        summarise(results).comparison("start", "first_output", a, b).unwrap().verdict
    }

    #[test]
    fn slower_executor_is_higher_and_the_other_way_round_lower() {
        let results =
            testing::two(30, Noisy { median: 0.020, spread: 0.05 }, Noisy { median: 0.030, spread: 0.05 }, 3);
        assert_eq!(verdict(&results, "a", "b"), Verdict::Higher);
        assert_eq!(verdict(&results, "b", "a"), Verdict::Lower);
        let found = summarise(&results).comparison("start", "first_output", "a", "b").unwrap();
        assert!(found.interval.unwrap().contains(1.5), "{found:?}");
        assert_eq!(found.b_is_better(), Some(false));
        assert_eq!(found.reversed().reversed().verdict, found.verdict);
    }

    #[test]
    fn few_samples_are_too_few() {
        let noisy = Noisy { median: 0.020, spread: 0.05 };
        assert_eq!(verdict(&testing::two(5, noisy, noisy, 3), "a", "b"), Verdict::TooFew);
        assert_ne!(verdict(&testing::two(6, noisy, noisy, 3), "a", "b"), Verdict::TooFew);
    }

    #[test]
    fn two_samples_far_above_many_are_higher_and_have_no_interval() {
        let mut results =
            testing::two(20, Noisy { median: 1.0, spread: 0.05 }, Noisy { median: 300.0, spread: 0.05 }, 3);
        let mut kept = 0;
        results.samples.retain(|sample| {
            kept += u32::from(sample.executor == "b");
            sample.executor == "a" || kept <= 2
        });
        let found = summarise(&results).comparison("start", "first_output", "a", "b").unwrap();
        assert_eq!((found.verdict, found.interval), (Verdict::Higher, None));
        assert!(found.ratio.unwrap() > 200.0);
        // One beside twenty may be chance.
        results.samples.retain(|sample| sample.executor == "a" || sample.round == 0);
        assert_eq!(verdict(&results, "a", "b"), Verdict::TooFew);
    }

    #[test]
    fn exact_numbers_differ_or_do_not() {
        let mut results = testing::results(1);
        let sample = results.samples.iter().find(|sample| sample.probe == "start").unwrap().clone();
        results.samples.clear();
        results.plan.metrics.iter_mut().for_each(|metric| metric.exact = true);
        for (executor, number) in [("rvmm-native", 5.0), ("crun", 5.0), ("rvmm-microvm", 7.0)] {
            let value = Value::Number(number);
            results.samples.push(super::super::Sample { executor: executor.into(), value, ..sample.clone() });
        }
        let summary = summarise(&results);
        let verdict = |b| summary.comparison("start", &sample.metric, "rvmm-native", b).unwrap().verdict;
        assert_eq!(verdict("crun"), Verdict::NoDifference);
        assert_eq!(verdict("rvmm-microvm"), Verdict::Higher);
    }

    #[test]
    fn zero_has_no_ratio_and_still_a_verdict() {
        let results =
            testing::two(10, Noisy { median: 0.0, spread: 0.0 }, Noisy { median: 1.0, spread: 0.05 }, 3);
        let found = summarise(&results).comparison("start", "first_output", "a", "b").unwrap();
        assert_eq!((found.ratio, found.interval, found.verdict), (None, None, Verdict::Higher));
    }

    #[test]
    fn outliers_count_like_the_others() {
        let mut results =
            testing::two(9, Noisy { median: 1.0, spread: 0.01 }, Noisy { median: 1.0, spread: 0.01 }, 3);
        results.samples[0].value = Value::Number(50.0);
        let summary = summarise(&results);
        let series = summary.series("start", "first_output", &results.samples[0].executor).unwrap();
        assert_eq!(series.outliers, [50.0]);
        assert_eq!((series.values.len(), series.quantiles.max), (9, 50.0));
    }

    #[test]
    fn two_runs_are_compared_executor_by_executor() {
        let noisy = |median| Noisy { median, spread: 0.05 };
        let first = testing::two(30, noisy(1.0), noisy(2.0), 1);
        let second = testing::two(30, noisy(1.0), noisy(3.0), 2);
        let found = diff(&first, &second);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].verdict, Verdict::Higher);
        assert!(found[1].interval.unwrap().contains(1.5));
    }

    #[test]
    fn facts_and_failures_are_kept() {
        let summary = summarise(&testing::results(1));
        assert_eq!(summary.fact("isolation", "kernel", "rvmm-native").unwrap().values, ["the host's"]);
        assert_eq!(summary.fact("isolation", "kernel", "rvmm-microvm").unwrap().values, ["its own"]);
        assert!(summary.series.iter().any(|series| !series.failures.is_empty()));
    }
}
