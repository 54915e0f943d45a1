//! The command line: from arguments to plain configurations, one file for each subcommand.

mod boot;
mod completions;
mod container;
mod doctor;
mod engine_program;
mod file_server;
mod hint;
mod image;
mod listing;
mod logging;
mod man;
pub mod network;
mod restore;
mod snapshot;
pub mod volume;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::container::roots::Roots;
use crate::image::Store;
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
struct Arguments<C: Subcommand> {
    #[command(subcommand)]
    command: Option<C>,
    #[command(flatten)]
    boot: boot::BootArguments,
    /// Print an error's causes one under the other
    #[arg(long, global = true)]
    verbose: bool,
}

/// What the monitor's program does itself beside running VMs. Everything else is the engine's: a command line of many
/// subcommands takes time and memory to describe, which every VM would pay.
#[derive(Subcommand)]
enum MonitorCommand {
    #[command(name = crate::fileserver::SUBCOMMAND, hide = true)]
    FileServer(file_server::FileServerArguments),
    Restore(Box<restore::RestoreArguments>),
    #[command(external_subcommand)]
    Engine(Vec<OsString>),
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Container(Box<container::ContainerCommand>),
    #[command(flatten)]
    Image(image::ImageCommand),
    #[command(subcommand)]
    Network(network::NetworkCommand),
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    Completions(completions::CompletionsArguments),
    Doctor(doctor::DoctorArguments),
    Man(man::ManArguments),
    Restore(Box<restore::RestoreArguments>),
    Snapshot(snapshot::SnapshotArguments),
}

/// The whole command line as clap knows it, for completions and manual pages.
pub fn command() -> clap::Command {
    Arguments::<Command>::command()
}

/// `rvmm`: runs a VM, or the engine for everything else. Errors are printed here.
pub fn monitor(timeline: Timeline) -> ExitCode {
    let first = std::env::args_os().nth(1);
    // The engine knows all that there is to help with.
    if first.is_none_or(|first| first == "-h" || first == "--help") {
        return end(engine_program::replace(std::env::args_os().skip(1)), false);
    }
    let arguments = Arguments::<MonitorCommand>::parse();
    let result = match arguments.command {
        None => boot::run(arguments.boot, timeline),
        Some(MonitorCommand::FileServer(arguments)) => file_server::run(&arguments),
        Some(MonitorCommand::Restore(arguments)) => restore::run(&arguments, timeline),
        Some(MonitorCommand::Engine(command)) => engine_program::replace(command),
    };
    end(result, arguments.verbose)
}

/// `rvmm-engine`: all subcommands. Errors are printed here.
pub fn engine() -> ExitCode {
    let arguments = Arguments::<Command>::parse();
    // Restoring has its own level.
    if arguments.command.as_ref().is_some_and(|command| !matches!(command, Command::Restore(_))) {
        logging::start(logging::LogLevel::Warn);
    }
    let result = match arguments.command {
        None => boot::run(arguments.boot, Timeline::start()),
        Some(Command::Container(command)) => container::run(&command),
        Some(Command::Image(command)) => Roots::find_images()
            .map_err(Into::into)
            .and_then(|place| image::run(command, &Store::open(&place)?)),
        Some(Command::Network(command)) => on_roots(|roots| network::run(&command, &roots.data, &roots.run)),
        Some(Command::Volume(command)) => on_roots(|roots| volume::run(&command, &roots.data)),
        Some(Command::Completions(arguments)) => completions::run(&arguments),
        Some(Command::Doctor(arguments)) => doctor::run(&arguments),
        Some(Command::Man(arguments)) => man::run(&arguments),
        Some(Command::Restore(arguments)) => restore::run(&arguments, Timeline::start()),
        Some(Command::Snapshot(arguments)) => snapshot::run(&arguments),
    };
    end(result, arguments.verbose)
}

fn on_roots(work: impl FnOnce(&Roots) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    work(&Roots::find()?)
}

fn end(result: anyhow::Result<ExitCode>, verbose: bool) -> ExitCode {
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
