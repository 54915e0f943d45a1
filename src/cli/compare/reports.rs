//! Which report goes where.

use std::fs;
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;

use anyhow::Context;

use crate::bench::report::{self, Needs};
use crate::bench::{Results, diff, summarise};

/// How to print a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// Everything, for programs
    Json,
    /// A line for each figure
    Csv,
    /// For READMEs and issues
    Markdown,
}

/// How to print two runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DiffFormat {
    /// For people
    Table,
    /// All comparisons, for programs
    Json,
}

/// What to make of results.
#[derive(clap::Args)]
pub struct ReportArguments {
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Also write a page with charts
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also recommend, for needs such as untrusted,kernel,start=200ms,instances=50,memory=8G
    #[arg(long, value_name = "NEEDS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    advise: Option<Needs>,
}

/// Prints a run, and writes its page if asked to.
pub fn print(results: &Results, arguments: &ReportArguments) -> anyhow::Result<()> {
    let summary = summarise(results);
    let colour = stdout().is_terminal();
    let mut text = match arguments.format {
        Format::Table => report::table(&summary, colour),
        Format::Json => report::json(&summary),
        Format::Csv => report::csv(&summary),
        Format::Markdown => report::markdown(&summary),
    };
    if let Some(needs) = &arguments.advise {
        let advice = report::advice(&summary, needs);
        match arguments.format {
            Format::Table => text += &format!("\n{}", report::advice_text(&advice, colour)),
            // What programs read stays what they expect.
            _ => eprint!("{}", report::advice_text(&advice, false)),
        }
    }
    write(&text)?;
    if let Some(path) = &arguments.html {
        fs::write(path, report::html(&summary, results)).with_context(|| format!("cannot write {path:?}"))?;
    }
    Ok(())
}

/// Prints what differs between two runs.
pub fn print_diff(first: &Results, second: &Results, format: DiffFormat) -> anyhow::Result<()> {
    let found = diff(first, second);
    let text = match format {
        DiffFormat::Json => serde_json::to_string_pretty(&found)? + "\n",
        DiffFormat::Table => {
            report::diff(&summarise(first), &summarise(second), &found, stdout().is_terminal())
        }
    };
    write(&text)
}

fn write(text: &str) -> anyhow::Result<()> {
    match stdout().lock().write_all(text.as_bytes()) {
        // A reader that has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
