//! `push`.

use std::process::ExitCode;

use clap::Args;

use super::{RegistryArguments, print};
use crate::image::registry::{self, Progress};
use crate::image::{Reference, Store};

/// Puts an image into its registry
#[derive(Args)]
pub struct PushArguments {
    /// NAME[:TAG], with the registry's host
    image: String,
    /// Print the image's name only
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// Pushes under the name that the image has here.
pub fn run(arguments: &PushArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let reference = Reference::parse(&arguments.image)?.or_latest();
    let image = store.resolve(&reference.to_string())?;
    let progress = Progress::detect(arguments.quiet);
    let digest = registry::push(store, &image, &reference, &arguments.registry.options(), &progress)?;
    if arguments.quiet {
        print(&reference.to_string())?;
    } else {
        let size = store.raw_manifest(&image)?.len();
        print(&format!("{}: digest: {digest} size: {size}", reference.tag().unwrap_or_default()))?;
    }
    Ok(ExitCode::SUCCESS)
}
