//! The command line: from arguments to plain configurations, one file for each subcommand.

mod boot;
mod compare;
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
mod network_relay;
mod outputs;
mod restore;
mod snapshot;
mod template;
pub mod volume;
mod walls;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::container::namespace;
use crate::container::roots::Roots;
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
    Compare(Box<compare::CompareArguments>),
    #[command(name = crate::bench::compare::GUARD, hide = true)]
    CompareGuard(compare::GuardArguments),
    Completions(completions::CompletionsArguments),
    Doctor(doctor::DoctorArguments),
    Man(man::ManArguments),
    #[command(name = crate::container::network::relay::SUBCOMMAND, hide = true)]
    NetworkRelay(network_relay::RelayArguments),
    Restore(Box<restore::RestoreArguments>),
    Snapshot(snapshot::SnapshotArguments),
    #[command(subcommand)]
    Template(template::TemplateCommand),
}

/// The whole command line as clap knows it, for completions and manual pages.
pub fn command() -> clap::Command {
    Arguments::<Command>::command()
}

/// `rvmm`: runs a VM, or the engine for everything else. Errors are printed here.
pub fn monitor(timeline: Timeline) -> ExitCode {
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    // Clients of Firecracker start a program of that name, which may be a link to this one.
    let firecracker = Path::new(&program).file_name().is_some_and(|name| name == "firecracker");
    let first = words.next();
    if firecracker {
        return as_firecracker(first.as_deref(), timeline);
    }
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

/// `firecracker`: the monitor alone, which waits for clients unless it is told not to.
fn as_firecracker(first: Option<&OsStr>, timeline: Timeline) -> ExitCode {
    if first.is_some_and(|first| first == "--version") {
        println!("Firecracker v{} (rvmm)", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    // A command line without arguments would get help.
    let words = std::env::args_os()
        .chain([OsString::from("--log-level=warn")].into_iter().filter(|_| first.is_none()));
    let mut arguments = Arguments::<MonitorCommand>::parse_from(words);
    let result = match arguments.command {
        None => {
            arguments.boot.use_firecrackers_defaults();
            boot::run(arguments.boot, timeline)
        }
        Some(MonitorCommand::FileServer(arguments)) => file_server::run(&arguments),
        Some(MonitorCommand::Engine(_) | MonitorCommand::Restore(_)) => {
            Err(anyhow::anyhow!("firecracker has no subcommands"))
        }
    };
    end(result, arguments.verbose)
}

/// `rvmm-engine`: all subcommands. Errors are printed here.
pub fn engine() -> ExitCode {
    let arguments = match Arguments::<Command>::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let is_mistake = error.use_stderr();
            let code =
                if is_mistake && names_docker_verb(std::env::args_os().skip(1)) { EXIT_FAILED } else { 2 };
            let _ = error.print();
            return if is_mistake { ExitCode::from(code) } else { ExitCode::SUCCESS };
        }
    };
    // Restoring has its own level.
    if arguments.command.as_ref().is_some_and(|command| !matches!(command, Command::Restore(_))) {
        logging::start(logging::LogLevel::Warn);
    }
    let result = match arguments.command {
        None => boot::run(arguments.boot, Timeline::start()),
        Some(Command::Container(command)) => on_roots(|roots| container::run(&command, roots)),
        Some(Command::Image(command)) => on_image_roots(|roots| image::run(command, &roots.images())),
        Some(Command::Network(command)) => on_roots(|roots| network::run(&command, &roots.data, &roots.run)),
        Some(Command::Volume(command)) => on_roots(|roots| volume::run(&command, &roots.data)),
        Some(Command::Compare(arguments)) => compare::run(&arguments),
        Some(Command::CompareGuard(arguments)) => compare::guard(&arguments),
        Some(Command::Completions(arguments)) => completions::run(&arguments),
        Some(Command::Doctor(arguments)) => doctor::run(&arguments),
        Some(Command::Man(arguments)) => man::run(&arguments),
        Some(Command::NetworkRelay(arguments)) => network_relay::run(arguments),
        Some(Command::Restore(arguments)) => restore::run(&arguments, Timeline::start()),
        Some(Command::Snapshot(arguments)) => snapshot::run(&arguments),
        Some(Command::Template(command)) => on_roots(|roots| template::run(&command, roots)),
    };
    end(result, arguments.verbose)
}

/// Whether a command line is one of the verbs that users know from Docker, whose exit code for a wrong command line is its
/// own. For a VM's it is what all programs have.
fn names_docker_verb(arguments: impl Iterator<Item = OsString>) -> bool {
    const OTHERS: [&str; 3] = ["completions", "doctor", "man"];
    let mut verbs = arguments.skip_while(|argument| argument == "--verbose");
    let verb = verbs.next().unwrap_or_default();
    let known = command();
    let found = known.find_subcommand(&verb);
    found.is_some_and(|found| !OTHERS.contains(&found.get_name()))
}

/// Does something with this user's containers: root's on the host, or those of a user in namespaces of that user's.
fn on_roots(work: impl FnOnce(&Roots) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    let roots = Roots::find()?;
    namespace::enter(&roots)?;
    let result = work(&roots);
    namespace::leave(&roots);
    result
}

/// The same with images, which a user can keep on a host without user namespaces too.
fn on_image_roots(work: impl FnOnce(&Roots) -> anyhow::Result<ExitCode>) -> anyhow::Result<ExitCode> {
    let roots = Roots::find()?;
    if let Err(error) = namespace::enter(&roots) {
        tracing::debug!("{}", crate::error_chain(&error));
    }
    let result = work(&roots);
    namespace::leave(&roots);
    result
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_of_docker_are_told_from_a_vms_command_line() {
        let is_verb = |line: &str| names_docker_verb(line.split(' ').map(OsString::from));
        for line in ["run --bad", "--verbose ps -x", "container ls", "network create", "images"] {
            assert!(is_verb(line), "{line}");
        }
        for line in ["--kernel run", "doctor --bad", "nothing", "", "--bad run"] {
            assert!(!is_verb(line), "{line}");
        }
    }
}
