//! What people see while layers are on their way: bars on a terminal, a line for each layer elsewhere.

use std::io::{IsTerminal, Write};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

const BAR: &str = "{prefix}: {msg:<18} [{bar:30}] {bytes}/{total_bytes}";

/// Where progress is shown: always on standard error.
#[derive(Clone)]
pub enum Progress {
    /// Bars.
    Bars(MultiProgress),
    /// Lines.
    Lines,
    /// Nothing.
    Quiet,
}

/// The progress of one layer.
pub struct Bar {
    bar: Option<ProgressBar>,
    name: String,
    lines: bool,
}

impl Progress {
    /// What fits standard error; nothing with `quiet`.
    pub fn detect(quiet: bool) -> Self {
        match quiet {
            true => Self::Quiet,
            false if std::io::stderr().is_terminal() => Self::Bars(MultiProgress::new()),
            false => Self::Lines,
        }
    }

    /// A line above the bars.
    pub fn say(&self, line: &str) {
        match self {
            Self::Bars(bars) => drop(bars.println(line)),
            Self::Lines => print(line),
            Self::Quiet => {}
        }
    }

    /// For a layer of so many bytes.
    pub fn layer(&self, name: &str, bytes: u64) -> Bar {
        let bar = match self {
            Self::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(bytes));
                if let Ok(style) = ProgressStyle::with_template(BAR) {
                    bar.set_style(style);
                }
                bar.set_prefix(name.to_owned());
                Some(bar)
            }
            _ => None,
        };
        Bar { bar, name: name.to_owned(), lines: matches!(self, Self::Lines) }
    }
}

impl Bar {
    /// What is being done.
    pub fn doing(&self, what: &'static str) {
        if let Some(bar) = &self.bar {
            bar.set_message(what);
        }
    }

    /// Bytes so far.
    pub fn set(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// It is done.
    pub fn finish(&self, what: &'static str) {
        if let Some(bar) = &self.bar {
            if let Ok(style) = ProgressStyle::with_template("{prefix}: {msg}") {
                bar.set_style(style);
            }
            bar.finish_with_message(what);
        } else if self.lines {
            print(&format!("{}: {what}", self.name));
        }
    }
}

/// Whoever reads this may be gone; that is no reason to stop.
fn print(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
