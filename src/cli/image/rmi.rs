//! `rmi`.

use std::process::ExitCode;

use clap::Args;

use super::print;
use crate::error_chain;
use crate::image::Store;

/// Removes images
#[derive(Args)]
pub struct RmiArguments {
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
    /// Also those that containers use, or that have several names
    #[arg(short, long)]
    force: bool,
}

/// Removes what can be removed; exit code 1 if something could not.
pub fn run(arguments: &RmiArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for image in &arguments.images {
        match store.remove(image, arguments.force) {
            Ok(removed) => {
                for name in removed.untagged {
                    print(&format!("Untagged: {}", name.familiar()))?;
                }
                if let Some(id) = removed.deleted {
                    print(&format!("Deleted: {id}"))?;
                }
            }
            Err(error) => {
                eprintln!("rvmm: cannot remove {image}: {}", error_chain(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    store.gc()?;
    Ok(code)
}
