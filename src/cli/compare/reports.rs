//! Which report goes where.

use std::io::Write;

use crate::bench::results::{Results, Unit};
use crate::bench::{Comparison, Summary, Verdict};

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// Everything, for programs
    Json,
}

/// What to make of results.
#[derive(clap::Args)]
pub struct ReportArguments {
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

/// Prints a run.
pub fn print(summary: &Summary, arguments: &ReportArguments) -> anyhow::Result<()> {
    let text = match arguments.format {
        Format::Json => serde_json::to_string_pretty(summary)? + "\n",
        Format::Table => lines(summary),
    };
    write(&text)
}

/// Prints what differs between two runs.
pub fn print_diff(found: &[Comparison], _: &Results, _: &Results, format: Format) -> anyhow::Result<()> {
    let text = match format {
        Format::Json => serde_json::to_string_pretty(found)? + "\n",
        Format::Table => {
            let line = |found: &Comparison| {
                let interval =
                    found.interval.map_or(String::new(), |i| format!(" [{:.3}, {:.3}]", i.low, i.high));
                let ratio = found.ratio.map_or("-".into(), |ratio| format!("{ratio:.3}"));
                let verdict = match found.verdict {
                    Verdict::Lower => "lower",
                    Verdict::Higher => "higher",
                    Verdict::NoDifference => "no difference found",
                    Verdict::TooFew => "too few samples",
                };
                format!("{} {} {}: {ratio}{interval} {verdict}\n", found.probe, found.metric, found.a)
            };
            found.iter().map(line).collect()
        }
    };
    write(&text)
}

/// One line for each figure and fact.
fn lines(summary: &Summary) -> String {
    let mut text = String::new();
    for warning in &summary.host.warnings {
        text += &format!("warning: {}\n", warning.text);
    }
    for info in summary.host.executors.iter() {
        if let Some(why) = &info.left_out {
            text += &format!("left out: {}: {why}\n", info.title);
        }
    }
    for series in &summary.series {
        let interval = series.interval.map_or(String::new(), |interval| {
            format!("  [{}, {}]", figure(interval.low, series.unit), figure(interval.high, series.unit))
        });
        let value = match series.values.is_empty() {
            true => format!("none: {}", series.failures.join("; ")),
            false => format!(
                "{}{interval}  n={}",
                figure(series.quantiles.median, series.unit),
                series.values.len()
            ),
        };
        text += &format!("{:<12} {:<20} {:<14} {value}\n", series.probe, series.metric, series.executor);
    }
    for fact in &summary.facts {
        let value = if fact.values.is_empty() { fact.failures.join("; ") } else { fact.values.join("; ") };
        text += &format!("{:<12} {:<20} {:<14} {value}\n", fact.probe, fact.metric, fact.executor);
    }
    text
}

fn figure(value: f64, unit: Unit) -> String {
    match unit {
        Unit::Seconds => match value.abs() {
            v if v < 1e-6 => format!("{:.1} ns", value * 1e9),
            v if v < 1e-3 => format!("{:.2} us", value * 1e6),
            v if v < 1.0 => format!("{:.2} ms", value * 1e3),
            _ => format!("{value:.2} s"),
        },
        Unit::Bytes => format!("{:.2} MiB", value / 1_048_576.0),
        Unit::BytesPerSecond => format!("{:.1} MB/s", value / 1e6),
        Unit::PerSecond => format!("{value:.0}/s"),
        Unit::Share => format!("{:.2} %", value * 100.0),
        Unit::Count | Unit::Text => format!("{value}"),
    }
}

fn write(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // A reader that has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
