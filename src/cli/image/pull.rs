//! `pull`.

use std::process::ExitCode;

use clap::Args;

use super::{RegistryArguments, print};
use crate::image::archive::{self, Daemon};
use crate::image::registry::{self, Progress};
use crate::image::{Error, Image, Reference, Store};

/// Fetches an image from its registry
#[derive(Args)]
pub struct PullArguments {
    /// NAME[:TAG][@DIGEST]; docker-daemon:NAME and podman:NAME take it from there
    image: String,
    /// Print the image's name only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// Fetches, and unpacks what was fetched.
pub fn run(arguments: &PullArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let progress = Progress::detect(arguments.quiet);
    if let Some((daemon, name)) = Daemon::split(&arguments.image) {
        let image = archive::import(store, daemon, name)?;
        unpack(store, &image, &progress)?;
        print(&image.tags().first().cloned().unwrap_or(image.id.to_string()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let reference = Reference::parse(&arguments.image)?.or_latest();
    if !arguments.quiet && !arguments.image.contains([':', '@']) {
        print("Using default tag: latest")?;
    }
    let pulled = registry::pull(store, &reference, &arguments.registry.options(), &progress)?;
    unpack(store, &pulled.image, &progress)?;
    if !arguments.quiet {
        print(&format!("Digest: {}", pulled.digest))?;
        let what = if pulled.is_new { "Downloaded newer image for" } else { "Image is up to date for" };
        print(&format!("Status: {what} {}", reference.familiar()))?;
    }
    print(&reference.to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// So that the first container starts as fast as the next ones.
pub(super) fn unpack(store: &Store, image: &Image, progress: &Progress) -> anyhow::Result<()> {
    let unpacked = store.layer_dirs_with(image, |layer, unpacked| {
        if unpacked {
            progress.say(&format!("{}: Pull complete", layer.digest.short()));
        }
    });
    match unpacked {
        // Another process has removed it since; it was here.
        Err(_) if matches!(store.image(&image.id), Err(Error::NotFound(_))) => Ok(()),
        result => Ok(result.map(drop)?),
    }
}
