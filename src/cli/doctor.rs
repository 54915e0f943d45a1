//! `rvmm doctor`.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use crate::doctor::{self, render};

/// Tells what this host can do for rvmm, and what mends what is missing.
#[derive(clap::Args, Debug)]
pub struct DoctorArguments {
    /// Print JSON, for programs
    #[arg(long)]
    json: bool,
}

/// Prints the report. Exit code 0 if VMs can run, 1 if not.
pub fn run(arguments: &DoctorArguments) -> anyhow::Result<ExitCode> {
    let report = doctor::examine();
    let mut output = std::io::stdout().lock();
    let colour = output.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let text = if arguments.json { render::json(&report)? } else { render::text(&report, colour) };
    output.write_all(text.as_bytes())?;
    Ok(if report.can_run_vms { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
