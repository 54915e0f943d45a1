//! `logout`.

use std::process::ExitCode;

use clap::Args;

use super::print;
use crate::image::reference::DEFAULT_REGISTRY;
use crate::image::registry::{self, Options};

/// Forgets the credentials for a registry
#[derive(Args)]
pub struct LogoutArguments {
    /// Host and port; Docker's registry if there is none
    #[arg(default_value = DEFAULT_REGISTRY)]
    server: String,
}

/// Forgets them; it is no error if there are none.
pub fn run(arguments: &LogoutArguments) -> anyhow::Result<ExitCode> {
    let forgotten = registry::logout(&arguments.server, &Options::default())?;
    let what = if forgotten { "Removed the credentials for" } else { "Not logged in to" };
    print(&format!("{what} {}", arguments.server))?;
    Ok(ExitCode::SUCCESS)
}
