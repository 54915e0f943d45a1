//! `load`.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;

use super::{print, pull};
use crate::image::registry::Progress;
use crate::image::{Store, archive};

/// Loads images from an archive or a folder
#[derive(Args)]
pub struct LoadArguments {
    /// A file of `docker save`, `podman save` or skopeo, compressed or not, or an OCI layout; standard input without
    #[arg(short, long, value_name = "PATH")]
    input: Option<PathBuf>,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
}

/// Loads, and unpacks what was loaded.
pub fn run(arguments: &LoadArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let images = match &arguments.input {
        Some(path) => archive::load_path(store, path)?,
        None if io::stdin().is_terminal() => bail!("there is nothing on standard input; use --input"),
        None => archive::load(store, io::stdin().lock(), "on standard input")?,
    };
    let progress = Progress::detect(arguments.quiet);
    for image in images {
        pull::unpack(store, &image, &progress)?;
        let tags = image.tags();
        tags.iter().try_for_each(|tag| print(&format!("Loaded image: {tag}")))?;
        if tags.is_empty() {
            print(&format!("Loaded image ID: {}", image.id))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
