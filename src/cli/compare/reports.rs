//! Which report goes where.

use std::fs;
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;

use anyhow::Context;

use crate::bench::report::{self, Needs};
use crate::bench::{Results, diff, summarise};
use crate::vm::config::Size;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people at a terminal
    Table,
    /// Everything, for programs
    Json,
    /// A line for each figure
    Csv,
    /// Tables for a document
    Markdown,
}

/// What to make of results.
#[derive(clap::Args)]
pub struct ReportArguments {
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// Also write a page with charts there
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    needs: NeedsArguments,
}

/// What a recommendation is to rest on.
#[derive(clap::Args)]
struct NeedsArguments {
    /// Also recommend an isolation, with reasons, and say which figure would change that
    #[arg(long)]
    advise: bool,
    /// For --advise: the code is not trusted, and must not reach the host's kernel
    #[arg(long, requires = "advise")]
    untrusted: bool,
    /// For --advise: it needs kernel modules, parameters or features of its own
    #[arg(long, requires = "advise")]
    own_kernel: bool,
    /// For --advise: time from the command to the first output, in milliseconds, at most
    #[arg(long, value_name = "MS", requires = "advise", value_parser = clap::value_parser!(u64).range(1..))]
    start_within: Option<u64>,
    /// For --advise: instances at once, at least
    #[arg(long, value_name = "N", requires = "advise", value_parser = clap::value_parser!(u64).range(1..))]
    instances: Option<u64>,
    /// For --advise: memory for all of them, as 8G [default: the host's]
    #[arg(long, value_name = "SIZE", requires = "advise")]
    memory: Option<Size>,
}

impl NeedsArguments {
    fn needs(&self) -> Needs {
        Needs {
            untrusted: self.untrusted,
            own_kernel: self.own_kernel,
            start: self.start_within.map(|milliseconds| milliseconds as f64 / 1e3),
            instances: self.instances,
            memory: self.memory.map(Size::bytes),
        }
    }
}

/// Prints a run, and writes its page.
pub fn print(results: &Results, arguments: &ReportArguments) -> anyhow::Result<()> {
    let summary = summarise(results);
    let colour = stdout().is_terminal();
    let mut text = match arguments.format {
        Format::Table => report::table(&summary, colour),
        Format::Json => report::json(&summary),
        Format::Csv => report::csv(&summary),
        Format::Markdown => report::markdown(&summary),
    };
    if arguments.needs.advise {
        let advice = report::advice(&summary, &arguments.needs.needs());
        let advice = report::advice_text(&advice, colour && arguments.format == Format::Table);
        match arguments.format {
            Format::Table | Format::Markdown => text += &format!("\n{advice}"),
            // Programs read the rest.
            Format::Json | Format::Csv => eprint!("{advice}"),
        }
    }
    if let Some(path) = &arguments.html {
        let page = report::html(&summary, results);
        fs::write(path, page).with_context(|| format!("cannot write {path:?}"))?;
    }
    write(&text)
}

/// Prints what differs between two runs.
pub fn print_diff(first: &Results, second: &Results, format: Format) -> anyhow::Result<()> {
    let comparisons = diff(first, second);
    write(&match format {
        Format::Json => serde_json::to_string_pretty(&comparisons)? + "\n",
        Format::Table | Format::Csv | Format::Markdown => {
            let colour = stdout().is_terminal() && format == Format::Table;
            report::diff(&summarise(first), &summarise(second), &comparisons, colour)
        }
    })
}

fn write(text: &str) -> anyhow::Result<()> {
    match stdout().lock().write_all(text.as_bytes()) {
        // A reader that has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}
