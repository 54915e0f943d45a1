//! Reports for programs: JSON and CSV.

use serde::Serialize;

use super::claims::{self, Claim};
use super::verdict::{self, Ruling};
use crate::bench::results::Unit;
use crate::bench::summary::{Fact, Series, Summary};

/// Everything that is known, for programs: the summary, the verdict and the claims. Numbers that are not finite are `null`.
pub fn json(summary: &Summary) -> String {
    #[derive(Serialize)]
    struct Whole<'a> {
        verdict: Vec<Ruling>,
        claims: Vec<Claim>,
        #[serde(flatten)]
        summary: &'a Summary,
    }
    let whole = Whole { verdict: verdict::rulings(summary), claims: claims::claims(summary), summary };
    // Structures and lists alone: nothing in them can fail to be written.
    serde_json::to_string_pretty(&whole).unwrap_or_default() + "\n"
}

const COLUMNS: [&str; 18] = [
    "probe",
    "metric",
    "executor",
    "isolation",
    "unit",
    "better",
    "samples",
    "median",
    "low",
    "high",
    "min",
    "p5",
    "p25",
    "p75",
    "p95",
    "p99",
    "max",
    "text",
];

/// One line for each metric of each executor; medians and quantiles in basic units, facts and reasons as text. RFC 4180.
pub fn csv(summary: &Summary) -> String {
    let mut text = line(COLUMNS.iter().map(|name| (*name).to_owned()));
    for series in &summary.series {
        text.push_str(&line(of_series(summary, series).into_iter()));
    }
    for fact in &summary.facts {
        text.push_str(&line(of_fact(summary, fact).into_iter()));
    }
    text
}

fn of_series(summary: &Summary, series: &Series) -> Vec<String> {
    let q = &series.quantiles;
    let number = |value: f64| {
        if series.values.is_empty() || !value.is_finite() { String::new() } else { value.to_string() }
    };
    let end = |end: Option<f64>| end.map_or(String::new(), number);
    let mut cells = vec![
        series.probe.clone(),
        series.metric.clone(),
        series.executor.clone(),
        isolation(summary, &series.executor),
    ];
    cells.extend([
        name(&series.unit),
        name(&series.better),
        series.values.len().to_string(),
        number(q.median),
    ]);
    cells.extend([end(series.interval.map(|i| i.low)), end(series.interval.map(|i| i.high))]);
    cells.extend([q.min, q.p5, q.p25, q.p75, q.p95, q.p99, q.max].map(number));
    cells.push(series.failures.join("; "));
    cells
}

fn of_fact(summary: &Summary, fact: &Fact) -> Vec<String> {
    let mut cells = vec![
        fact.probe.clone(),
        fact.metric.clone(),
        fact.executor.clone(),
        isolation(summary, &fact.executor),
    ];
    cells.extend([name(&Unit::Text), "none".into(), fact.values.len().to_string()]);
    cells.resize(COLUMNS.len() - 1, String::new());
    cells.push(if fact.values.is_empty() { fact.failures.join("; ") } else { fact.values.join("; ") });
    cells
}

fn isolation(summary: &Summary, executor: &str) -> String {
    summary.isolation(executor).map_or(String::new(), |isolation| name(&isolation))
}

/// The name that a value has in files.
pub(super) fn name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

fn line(cells: impl Iterator<Item = String>) -> String {
    cells.map(|cell| field(&cell)).collect::<Vec<_>>().join(",") + "\r\n"
}

/// A field in quotation marks where it needs them. What a spreadsheet would take for a formula is marked as text.
fn field(cell: &str) -> String {
    let formula =
        cell.starts_with(['=', '+', '@', '\t']) || cell.starts_with('-') && cell.parse::<f64>().is_err();
    let mark = if formula { "'" } else { "" };
    match formula || cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{mark}{}\"", cell.replace('"', "\"\"")),
        false => cell.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn field_is_quoted_where_it_must_be() {
        assert_eq!(field("plain"), "plain");
        assert_eq!(field("a,b"), "\"a,b\"");
        assert_eq!(field("say \"no\""), "\"say \"\"no\"\"\"");
        assert_eq!(field("=1+1"), "\"'=1+1\"");
        assert_eq!(field("-1.5"), "-1.5");
    }
}
