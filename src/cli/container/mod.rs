//! Containers on the command line, as users of Docker know it.

mod commit;
mod configure;
mod cp;
mod diff;
mod exec;
pub(super) mod format;
mod inspect;
mod logs;
mod names;
mod options;
mod prune;
mod ps;
mod run;
mod session;
mod start;
mod stats;
mod stop;
pub(super) mod values;

use std::process::ExitCode;

use crate::container::life;
use crate::container::native;
use crate::container::records::Records;
use crate::container::roots::{self, Roots};

/// Subcommands about containers.
#[derive(clap::Subcommand)]
pub enum ContainerCommand {
    Run(run::RunArguments),
    Create(run::CreateArguments),
    Start(start::StartArguments),
    Restart(start::RestartArguments),
    Attach(start::AttachArguments),
    Exec(exec::ExecArguments),
    Ps(ps::PsArguments),
    Logs(logs::LogsArguments),
    Stop(stop::StopArguments),
    Kill(stop::KillArguments),
    Pause(stop::PauseArguments),
    Unpause(stop::UnpauseArguments),
    Wait(stop::WaitArguments),
    Rm(stop::RmArguments),
    Rename(stop::RenameArguments),
    Inspect(inspect::InspectArguments),
    Port(inspect::PortArguments),
    Stats(stats::StatsArguments),
    Top(stats::TopArguments),
    Cp(cp::CpArguments),
    Commit(commit::CommitArguments),
    Diff(diff::DiffArguments),
    #[command(subcommand)]
    Container(ManageCommand),
}

/// Manage containers
#[derive(clap::Subcommand)]
pub enum ManageCommand {
    #[command(alias = "list", alias = "ps")]
    Ls(ps::PsArguments),
    #[command(alias = "remove")]
    Rm(stop::RmArguments),
    Inspect(inspect::InspectArguments),
    Cp(cp::CpArguments),
    Commit(commit::CommitArguments),
    Diff(diff::DiffArguments),
    Prune(prune::PruneArguments),
}

/// Runs one of them.
pub fn run(command: &ContainerCommand, roots: &Roots) -> anyhow::Result<ExitCode> {
    use ContainerCommand::*;
    if matches!(command, Run(_) | Start(_) | Restart(_) | Exec(_)) {
        // It would take itself for the host's root there, and look where that one has its containers.
        native::protect_own_program(&[
            (roots::DATA_VARIABLE, &roots.data),
            (roots::RUN_VARIABLE, &roots.run),
        ])?;
    }
    let records = Records::open(roots)?;
    // What was killed without a chance to clear away is mended by whoever comes next.
    life::mend_all(&records)?;
    match command {
        Run(arguments) => run::run(arguments, &records),
        Create(arguments) => run::create(arguments, &records),
        Start(arguments) => start::start(arguments, &records),
        Restart(arguments) => start::restart(arguments, &records),
        Attach(arguments) => start::attach(arguments, &records),
        Exec(arguments) => exec::run(arguments, &records),
        Ps(arguments) | Container(ManageCommand::Ls(arguments)) => ps::run(arguments, &records),
        Logs(arguments) => logs::run(arguments, &records),
        Stop(arguments) => stop::stop(arguments, &records),
        Kill(arguments) => stop::kill(arguments, &records),
        Pause(arguments) => stop::pause(arguments, &records),
        Unpause(arguments) => stop::unpause(arguments, &records),
        Wait(arguments) => stop::wait(arguments, &records),
        Rm(arguments) | Container(ManageCommand::Rm(arguments)) => stop::rm(arguments, &records),
        Rename(arguments) => stop::rename(arguments, &records),
        Inspect(arguments) | Container(ManageCommand::Inspect(arguments)) => {
            inspect::run(arguments, &records)
        }
        Port(arguments) => inspect::port(arguments, &records),
        Stats(arguments) => stats::stats(arguments, &records),
        Top(arguments) => stats::top(arguments, &records),
        Cp(arguments) | Container(ManageCommand::Cp(arguments)) => cp::run(arguments, &records),
        Commit(arguments) | Container(ManageCommand::Commit(arguments)) => commit::run(arguments, &records),
        Diff(arguments) | Container(ManageCommand::Diff(arguments)) => diff::run(arguments, &records),
        Container(ManageCommand::Prune(arguments)) => prune::run(arguments, &records),
    }
}

/// Does something with each of several containers. What fails is said, and the others are done nevertheless; the names of
/// those that were done are printed.
fn each(
    records: &Records,
    names: &[String],
    mut work: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for name in names {
        match records.find(name).map_err(Into::into).and_then(|id| work(&id)) {
            Ok(()) => println!("{name}"),
            Err(error) => {
                super::report(&error, false);
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
