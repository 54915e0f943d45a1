//! The charts of the page, each a [`Plot`] made from a summary.

use plotters::style::RGBColor;

use super::plot::{BLUE, GREY, Mark, ORANGE, PURPLE, Plot, Row};
use crate::bench::report::format;
use crate::bench::report::verdict::{self, Outcome, Ruling};
use crate::bench::results::{Better, Isolation, Unit};
use crate::bench::stats::Interval;
use crate::bench::summary::{Series, Summary};

/// Samples of one row at most; of more, every so manieth, and the outliers.
const MAX_SAMPLES: usize = 400;

/// The colour of an isolation.
pub fn colour(isolation: Option<Isolation>) -> RGBColor {
    match isolation {
        Some(Isolation::Container) => BLUE,
        Some(Isolation::Microvm) => ORANGE,
        Some(Isolation::FullVm) => PURPLE,
        Some(Isolation::None) | None => GREY,
    }
}

/// How many times better the second of the pair is, dimension by dimension.
pub fn advantages(summary: &Summary, rulings: &[Ruling]) -> Plot {
    let row = |ruling: &Ruling| {
        let (a, b) = (&ruling.sides[0].executor, &ruling.sides[1].executor);
        let comparison = summary.comparison(&ruling.probe, &ruling.metric, a, b)?;
        let upward = if comparison.better == Better::Higher { comparison } else { comparison.reversed() };
        // Reversed, the ratio is that of the first to the second, which is how much better the second is where less is better.
        let ratio = upward.ratio.filter(|ratio| ratio.is_finite() && *ratio > 0.0)?;
        let colour = ruling.winner().map_or(GREY, |winner| colour(winner.isolation));
        let span = upward.interval.map(|Interval { low, high }| (Mark::Span(low, high), colour));
        let figure = match ruling.outcome {
            Outcome::Won { factor: Some(factor), .. } => format!("{}×", format::factor(factor)),
            Outcome::Won { factor: None, .. } => String::new(),
            Outcome::NoDifference => "no difference found".into(),
            Outcome::TooFew => "too few samples".into(),
        };
        let dot = if ruling.winner().is_some() { Mark::Dot(ratio) } else { Mark::Ring(ratio) };
        let marks = span.into_iter().chain([(dot, colour)]).collect();
        Some(Row { label: ruling.title.clone(), figure, marks })
    };
    Plot {
        title: "How many times better each is, by dimension, with intervals".into(),
        unit: None,
        both_ways: true,
        logarithmic: true,
        reference: Some(1.0),
        rows: rulings.iter().filter_map(row).collect(),
    }
}

/// All samples of a metric, its median and its interval, one row for each executor.
pub fn distribution(summary: &Summary, probe: &str, metric: &str) -> Plot {
    let series = measured(summary, probe, metric);
    let row = |series: &&Series| {
        let colour = colour(summary.isolation(&series.executor));
        let every = series.values.len().div_ceil(MAX_SAMPLES).max(1);
        let mut marks: Vec<_> =
            series.values.iter().step_by(every).map(|value| (Mark::Sample(*value), colour)).collect();
        marks.extend(series.outliers.iter().take(MAX_SAMPLES).map(|value| (Mark::Ring(*value), colour)));
        marks.extend(series.interval.map(|interval| (Mark::Span(interval.low, interval.high), colour)));
        marks.push((Mark::Tick(series.quantiles.median), colour));
        row(summary, series, marks)
    };
    Plot {
        title: format!(
            "{}: all samples, medians and intervals",
            verdict::metric_title(summary, probe, metric)
        ),
        unit: series.first().map(|series| series.unit),
        both_ways: false,
        logarithmic: true,
        reference: None,
        rows: series.iter().map(row).collect(),
    }
}

/// Of which parts the memory of an instance consists, in their order and colours.
pub const MEMORY_PARTS: [(&str, RGBColor); 3] = [("workload", BLUE), ("monitor", ORANGE), ("guest", PURPLE)];

/// Memory of one more instance, by its parts; what no part accounts for is grey.
pub fn memory(summary: &Summary) -> Plot {
    let total = ["pss", "system"]
        .into_iter()
        .find(|metric| !measured(summary, "memory", metric).is_empty())
        .unwrap_or("pss");
    let series = measured(summary, "memory", total);
    let row = |series: &&Series| {
        let median = series.quantiles.median;
        let (mut marks, mut from) = (vec![], 0.0);
        for (metric, colour) in MEMORY_PARTS {
            let part =
                summary.series("memory", metric, &series.executor).map_or(0.0, |part| part.quantiles.median);
            let to = (from + part).min(median);
            if total == "pss" && part > 0.0 && to > from {
                marks.push((Mark::Bar(from, to), colour));
                from = to;
            }
        }
        if median > from {
            marks.push((Mark::Bar(from, median), GREY));
        }
        row(summary, series, marks)
    };
    Plot {
        title: "Memory of one more idle instance, by its parts".into(),
        unit: Some(Unit::Bytes),
        both_ways: false,
        logarithmic: false,
        reference: None,
        rows: series.iter().map(row).collect(),
    }
}

/// The stages of a start, one after the other, for the first executor that has them.
pub fn timeline(summary: &Summary) -> Plot {
    let stages = timeline_stages(summary);
    let mut from = 0.0;
    let mut rows = vec![];
    for series in &stages {
        let to = from + series.quantiles.median.max(0.0);
        let colour = colour(summary.isolation(&series.executor));
        rows.push(Row {
            label: verdict::metric_title(summary, "timeline", &series.metric),
            figure: format::figure(series.unit, series.quantiles.median),
            marks: vec![(Mark::Bar(from, to), colour)],
        });
        from = to;
    }
    let whose = stages
        .first()
        .map_or(String::new(), |series| format!(" of {}", verdict::title(summary, &series.executor)));
    Plot {
        title: format!("Where the start{whose} goes, stage by stage"),
        unit: Some(Unit::Seconds),
        both_ways: false,
        logarithmic: false,
        reference: None,
        rows,
    }
}

/// The stages that [`timeline`] draws.
pub fn timeline_stages(summary: &Summary) -> Vec<&Series> {
    let stages = || {
        summary
            .series
            .iter()
            .filter(|s| s.probe == "timeline" && s.unit == Unit::Seconds && !s.values.is_empty())
    };
    let executor = stages().next().map(|series| series.executor.as_str());
    stages().filter(|series| Some(series.executor.as_str()) == executor).collect()
}

/// Services and their percentiles, as they are named in metrics.
pub const SERVICES: [(&str, &str); 3] = [("fastapi", "FastAPI"), ("nginx", "nginx"), ("redis", "redis")];
pub const PERCENTILES: [(&str, &str); 3] = [("p50", "half"), ("p99", "99 %"), ("p999", "99.9 %")];

/// Within which time the answers of a service come.
pub fn latency(summary: &Summary, service: &str, title: &str) -> Plot {
    let row = |executor: &String| {
        let at = |percentile: &str| {
            let series = summary.series("service", &format!("{service}_{percentile}"), executor)?;
            (!series.values.is_empty()).then_some(series.quantiles.median)
        };
        let colour = colour(summary.isolation(executor));
        let found: Vec<f64> = PERCENTILES.iter().filter_map(|(percentile, _)| at(percentile)).collect();
        let (first, last) = (*found.first()?, *found.last()?);
        let mut marks = vec![(Mark::Span(first, last), colour)];
        marks.extend(at("p50").map(|value| (Mark::Dot(value), colour)));
        marks.extend(at("p99").map(|value| (Mark::Square(value), colour)));
        marks.extend(at("p999").map(|value| (Mark::Ring(value), colour)));
        let figure =
            found.iter().map(|value| format::figure(Unit::Seconds, *value)).collect::<Vec<_>>().join(" · ");
        Some(Row { label: verdict::title(summary, executor), figure, marks })
    };
    Plot {
        title: format!("{title}: within which time answers come"),
        unit: Some(Unit::Seconds),
        both_ways: false,
        logarithmic: true,
        reference: None,
        rows: summary.plan.executors.iter().filter_map(row).collect(),
    }
}

/// Probes whose metrics are costs of single operations.
const OPERATIONS: [&str; 5] = ["cpu", "syscall", "fault", "fork", "switch"];

/// Series of operations' costs: metric by metric, the executors that have it.
pub fn operations(summary: &Summary) -> Vec<Vec<&Series>> {
    let mut found: Vec<Vec<&Series>> = vec![];
    for series in &summary.series {
        let wanted = OPERATIONS.contains(&series.probe.as_str())
            && series.unit == Unit::Seconds
            && !series.values.is_empty();
        match found.last_mut() {
            _ if !wanted => {}
            Some(last)
                if last.first().is_some_and(|s| (&s.probe, &s.metric) == (&series.probe, &series.metric)) =>
            {
                last.push(series)
            }
            _ => found.push(vec![series]),
        }
    }
    found
}

/// What operations cost beside the first executor, one of each isolation.
pub fn costs(summary: &Summary) -> Plot {
    let row = |of_metric: &Vec<&Series>| {
        let reference = of_metric.first().filter(|first| first.quantiles.median > 0.0)?;
        let mut seen = vec![];
        let mut marks = vec![];
        for series in of_metric {
            let isolation = summary.isolation(&series.executor);
            if !seen.contains(&isolation) {
                seen.push(isolation);
                let ratio = series.quantiles.median / reference.quantiles.median;
                marks.push((
                    if isolation == Some(Isolation::None) { Mark::Tick(ratio) } else { Mark::Dot(ratio) },
                    colour(isolation),
                ));
            }
        }
        let figure = format!("1× = {}", format::figure(reference.unit, reference.quantiles.median));
        Some(Row {
            label: verdict::metric_title(summary, &reference.probe, &reference.metric),
            figure,
            marks,
        })
    };
    let operations = operations(summary);
    let first = operations
        .first()
        .and_then(|of| of.first())
        .map_or(String::new(), |s| verdict::title(summary, &s.executor));
    Plot {
        title: format!("What operations cost, beside {first}"),
        unit: None,
        both_ways: false,
        logarithmic: true,
        reference: Some(1.0),
        rows: operations.iter().filter_map(row).collect(),
    }
}

/// What was measured of a metric.
pub fn measured<'a>(summary: &'a Summary, probe: &str, metric: &str) -> Vec<&'a Series> {
    summary.series.iter().filter(|s| s.probe == probe && s.metric == metric && !s.values.is_empty()).collect()
}

fn row(summary: &Summary, series: &Series, marks: Vec<(Mark, RGBColor)>) -> Row {
    Row {
        label: verdict::title(summary, &series.executor),
        figure: format::figure(series.unit, series.quantiles.median),
        marks,
    }
}
