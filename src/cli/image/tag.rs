//! `tag`.

use std::process::ExitCode;

use clap::Args;

use crate::image::{Reference, Store};

/// Gives an image another name
#[derive(Args)]
pub struct TagArguments {
    /// Its name or id
    source: String,
    /// NAME[:TAG]
    target: String,
}

/// Gives it; another image that had the name loses it.
pub fn run(arguments: &TagArguments, store: &Store) -> anyhow::Result<ExitCode> {
    store.tag(&arguments.source, &Reference::parse(&arguments.target)?)?;
    Ok(ExitCode::SUCCESS)
}
