//! The part of rvmm that deals with images and containers; `rvmm` runs it.

use std::process::ExitCode;

use clap::Parser;
use rvmm::cli::image;

/// Images and containers.
#[derive(Parser)]
#[command(name = "rvmm", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: image::ImageCommand,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = image::open_store().and_then(|store| image::run(arguments.command, &store));
    result.unwrap_or_else(|error| {
        eprintln!("rvmm: {error:#}");
        ExitCode::from(125)
    })
}
