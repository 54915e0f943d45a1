//! The command line: from arguments to plain configurations, one file for each subcommand.

mod boot;
mod completions;
mod doctor;
mod file_server;
mod hint;
pub mod image;
mod logging;
mod man;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::vm::{EXIT_FAILED, Timeline};

/// Boots a Linux guest in a KVM microVM, and tells what this host can do.
#[derive(Parser)]
#[command(
    name = "rvmm",
    version,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true,
    arg_required_else_help = true,
    max_term_width = 100,
    after_long_help = boot::EXAMPLES
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    boot: boot::BootArguments,
    /// Print an error's causes one under the other
    #[arg(long, global = true)]
    verbose: bool,
}

#[derive(Subcommand)]
enum Command {
    Completions(completions::CompletionsArguments),
    Doctor(doctor::DoctorArguments),
    Man(man::ManArguments),
    #[command(name = crate::fileserver::SUBCOMMAND, hide = true)]
    FileServer(file_server::FileServerArguments),
}

/// The whole command line as clap knows it, for completions and manual pages.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Does what the arguments say; errors are printed here.
pub fn main(timeline: Timeline) -> ExitCode {
    let arguments = Arguments::parse();
    let verbose = arguments.verbose;
    let result = match arguments.command {
        None => boot::run(arguments.boot, timeline),
        Some(Command::Completions(arguments)) => completions::run(&arguments),
        Some(Command::Doctor(arguments)) => doctor::run(&arguments),
        Some(Command::Man(arguments)) => man::run(&arguments),
        Some(Command::FileServer(arguments)) => file_server::run(&arguments),
    };
    result.unwrap_or_else(|error| {
        report(&error, verbose);
        ExitCode::from(EXIT_FAILED)
    })
}

/// Prints an error: in one line with what to try, or as a list of causes.
fn report(error: &anyhow::Error, verbose: bool) {
    let hint = hint::for_error(error);
    if verbose {
        eprintln!("rvmm: {error}");
        for cause in error.chain().skip(1) {
            eprintln!("  because: {cause}");
        }
        if let Some(hint) = hint {
            eprintln!("  try: {hint}");
        }
    } else {
        let hint = hint.map_or(String::new(), |hint| format!(" ({hint})"));
        let line = format!("{error:#}{hint}").replace('\n', " ");
        eprintln!("rvmm: {}", line.trim_end());
    }
}
