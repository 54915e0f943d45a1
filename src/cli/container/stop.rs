//! `rvmm stop`, `kill`, `pause`, `unpause`, `wait`, `rm` and `rename`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use crate::container::life;
use crate::container::records::Records;
use crate::container::signal;
use crate::container::supervisor::protocol::Request;

/// End containers: their stop signal, and SIGKILL after a while
#[derive(clap::Args)]
pub struct StopArguments {
    /// Seconds until a container is killed [default: the container's, or 10]
    #[arg(short, long, value_name = "SECONDS", visible_alias = "timeout", allow_hyphen_values = true)]
    time: Option<i64>,
    /// Another signal than the container's
    #[arg(short, long)]
    signal: Option<String>,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Send a signal to containers
#[derive(clap::Args)]
pub struct KillArguments {
    /// The signal
    #[arg(short, long, default_value = "KILL")]
    signal: String,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Stop all processes of containers as they are
#[derive(clap::Args)]
pub struct PauseArguments {
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Let the processes of paused containers go on
#[derive(clap::Args)]
pub struct UnpauseArguments {
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Wait for containers to end, and print their exit codes
#[derive(clap::Args)]
pub struct WaitArguments {
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Remove containers
#[derive(clap::Args)]
pub struct RmArguments {
    /// Also those that run, or whose files are damaged
    #[arg(short, long)]
    force: bool,
    /// Also the volumes without a name of their own
    #[arg(short, long)]
    volumes: bool,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Give a container another name
#[derive(clap::Args)]
pub struct RenameArguments {
    /// The container
    container: String,
    /// The name
    name: String,
}

fn parse(text: &str) -> anyhow::Result<i32> {
    signal::number(text).with_context(|| format!("there is no signal {text:?}"))
}

/// Ends containers.
pub fn stop(arguments: &StopArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let signal = arguments.signal.as_deref().map(parse).transpose()?;
    super::each(records, &arguments.containers, |id| {
        let config = records.read(id)?.config;
        let signal = signal.or_else(|| signal::number(&config.stop_signal)).unwrap_or(libc::SIGTERM);
        let timeout = match arguments.time {
            // For ever.
            Some(seconds) if seconds < 0 => None,
            Some(seconds) => Some(Duration::from_secs(seconds.unsigned_abs())),
            None => Some(config.stop_timeout),
        };
        Ok(life::stop(records, id, signal, timeout)?)
    })
}

/// Sends signals.
pub fn kill(arguments: &KillArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let signal = parse(&arguments.signal)?;
    super::each(records, &arguments.containers, |id| {
        if signal == libc::SIGKILL {
            let mut connection = life::connect(records, id)?;
            connection.send(&Request::Signal(signal))?;
            connection.wait()?;
            return Ok(());
        }
        Ok(life::call(records, id, &Request::Signal(signal))?)
    })
}

/// Stops processes as they are.
pub fn pause(arguments: &PauseArguments, records: &Records) -> anyhow::Result<ExitCode> {
    super::each(records, &arguments.containers, |id| Ok(life::call(records, id, &Request::Pause)?))
}

/// Lets them go on.
pub fn unpause(arguments: &UnpauseArguments, records: &Records) -> anyhow::Result<ExitCode> {
    super::each(records, &arguments.containers, |id| Ok(life::call(records, id, &Request::Resume)?))
}

/// Waits for containers.
pub fn wait(arguments: &WaitArguments, records: &Records) -> anyhow::Result<ExitCode> {
    for name in &arguments.containers {
        let id = records.find(name)?;
        let code = match life::connect(records, &id) {
            Ok(mut connection) => connection.wait()?,
            Err(life::Error::NotRunning(_)) => records.read(&id)?.state.exit_code.unwrap_or(0),
            Err(error) => return Err(error.into()),
        };
        println!("{code}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Removes containers.
pub fn rm(arguments: &RmArguments, records: &Records) -> anyhow::Result<ExitCode> {
    super::each(records, &arguments.containers, |id| {
        let removed = life::remove(records, id, arguments.force)?;
        if let Some(config) = removed.filter(|_| arguments.volumes) {
            crate::container::prepare::remove_own_volumes(records, &config)?;
        }
        Ok(())
    })
}

/// Renames a container.
pub fn rename(arguments: &RenameArguments, records: &Records) -> anyhow::Result<ExitCode> {
    records.rename(&records.find(&arguments.container)?, &arguments.name)?;
    Ok(ExitCode::SUCCESS)
}
