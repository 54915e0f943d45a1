//! `rvmm file-server`: the process behind a shared folder. rvmm starts it, users do not.

use std::process::ExitCode;

use clap::Args;

use crate::fileserver::{self, Cache, Options};

/// Serves a shared folder to a monitor; started by rvmm itself
#[derive(Args)]
pub struct FileServerArguments {
    /// Refuse all changes
    #[arg(long)]
    readonly: bool,
    /// Allow device files to be made
    #[arg(long)]
    devices: bool,
    /// What the guest may rely on
    #[arg(long, default_value = "auto")]
    cache: Cache,
}

/// Serves until the monitor is gone. The monitor reports what goes wrong before, so there is nothing to print.
pub fn run(arguments: &FileServerArguments) -> anyhow::Result<ExitCode> {
    let options =
        Options { readonly: arguments.readonly, devices: arguments.devices, cache: arguments.cache };
    fileserver::run(&options)?;
    Ok(ExitCode::SUCCESS)
}
