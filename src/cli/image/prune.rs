//! `image prune`.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;

use super::print;
use super::table::size;
use crate::image::Store;

/// Removes images that nothing needs, and broken-off downloads
#[derive(Args)]
pub struct PruneArguments {
    /// All that no container uses, not only those without a name
    #[arg(short, long)]
    all: bool,
    /// Do not ask
    #[arg(short, long)]
    force: bool,
}

/// Asks on a terminal, then removes.
pub fn run(arguments: &PruneArguments, store: &Store) -> anyhow::Result<ExitCode> {
    if !arguments.force {
        let which =
            if arguments.all { "all images that no container uses" } else { "all images without a name" };
        if !io::stdin().is_terminal() {
            bail!("this removes {which}; there is no terminal to ask on: use --force");
        }
        write!(io::stderr(), "This removes {which}. Go on? [y/N] ")?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !answer.trim().eq_ignore_ascii_case("y") {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let pruned = store.prune(arguments.all)?;
    if !pruned.deleted.is_empty() {
        print("Deleted Images:")?;
    }
    for name in &pruned.untagged {
        print(&format!("untagged: {}", name.familiar()))?;
    }
    for id in &pruned.deleted {
        print(&format!("deleted: {id}"))?;
    }
    if !pruned.deleted.is_empty() {
        print("")?;
    }
    print(&format!("Total reclaimed space: {}", size(pruned.reclaimed.bytes)))?;
    Ok(ExitCode::SUCCESS)
}
