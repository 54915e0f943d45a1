//! `rvmm man`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

/// Write the manual pages into a directory
#[derive(clap::Args)]
#[command(after_help = "Example:\n  rvmm man /usr/local/share/man/man1")]
pub struct ManArguments {
    /// The directory; it is made if it is missing
    directory: PathBuf,
}

/// Writes one page for each command.
pub fn run(arguments: &ManArguments) -> anyhow::Result<ExitCode> {
    let directory = &arguments.directory;
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        clap_mangen::generate_to(super::command(), directory)
    };
    write().with_context(|| format!("cannot write the manual pages into {directory:?}"))?;
    Ok(ExitCode::SUCCESS)
}
