//! `rvmm logs`.

use std::io::{stderr, stdout};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};

use super::session::print;
use super::values::HealthDuration;
use crate::container::log::{Reader, Source};
use crate::container::records::Records;
use crate::container::{state, time};

/// How often a log is looked at for more.
const INTERVAL: Duration = Duration::from_millis(50);

/// Show what a container has printed
#[derive(clap::Args)]
pub struct LogsArguments {
    /// Go on as the container prints more
    #[arg(short, long)]
    follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N", default_value = "all")]
    tail: String,
    /// With the time of each line
    #[arg(short, long)]
    timestamps: bool,
    /// Only what was printed since: a time (2026-01-02T03:04:05Z), or how long ago (10m)
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only what was printed until then
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// The container
    container: String,
}

/// Shows a log.
pub fn run(arguments: &LogsArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let id = records.find(&arguments.container)?;
    let since = arguments.since.as_deref().map(point).transpose()?;
    let until = arguments.until.as_deref().map(point).transpose()?;
    let path = records.roots().container(&id).join("log");
    if !path.exists() && !arguments.follow {
        return Ok(ExitCode::SUCCESS);
    }
    while !path.exists() {
        if records.read(&id).is_err() {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(INTERVAL);
    }
    let mut reader = Reader::open(&path).with_context(|| format!("cannot read {path:?}"))?;
    if arguments.tail != "all" {
        let Ok(count) = arguments.tail.parse() else { bail!("{:?} is no number of lines", arguments.tail) };
        reader.skip_to_last(count)?;
    }
    loop {
        // Asked before the log is read: what is printed until the end is seen.
        let live = records.is_supervised(&id);
        while let Some(entry) = reader.next_entry()? {
            let early = since.as_ref().is_some_and(|since| entry.time < *since);
            if early || until.as_ref().is_some_and(|until| entry.time > *until) {
                continue;
            }
            let stamp = if arguments.timestamps { format!("{} ", entry.time) } else { String::new() };
            let text = format!("{stamp}{}", entry.log);
            let read = match entry.stream {
                Source::Stdout => print(stdout(), text.as_bytes())?,
                Source::Stderr => print(stderr(), text.as_bytes())?,
            };
            if !read {
                return Ok(ExitCode::SUCCESS);
            }
        }
        if !arguments.follow || !live {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(INTERVAL);
    }
}

/// A moment, in a form that sorts as times of entries do.
fn point(text: &str) -> anyhow::Result<String> {
    if let Ok(HealthDuration(ago)) = text.parse() {
        let ago = u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX);
        return Ok(time::rfc3339(state::now_ns().saturating_sub(ago)));
    }
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(time::rfc3339(seconds.saturating_mul(1_000_000_000)));
    }
    let plausible = text.len() >= 10
        && text.bytes().zip(b"0000-00-00T00:00:00".iter()).all(|(byte, form)| match form {
            b'0' => byte.is_ascii_digit(),
            _ => byte == *form,
        });
    if !plausible {
        bail!("{text:?} is no time: 2026-01-02T03:04:05Z, seconds since 1970, or how long ago (10m)");
    }
    Ok(text.trim_end_matches('Z').into())
}
