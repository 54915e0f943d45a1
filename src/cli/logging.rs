//! The log: lines on standard error.

use std::io::{IsTerminal, stderr};
use std::str::FromStr;

use tracing_subscriber::filter::LevelFilter;

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What went wrong.
    Error,
    /// Also what may go wrong.
    Warn,
    /// Also what rvmm decided by itself, and how the VM ended.
    Info,
    /// Also each step.
    Debug,
    /// Also what the guest does.
    Trace,
}

/// Starts logging.
pub fn start(level: LogLevel) {
    let name = format!("{level:?}");
    let filter = LevelFilter::from_str(&name).unwrap_or(LevelFilter::WARN);
    tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
}
