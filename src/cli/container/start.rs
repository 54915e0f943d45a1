//! `rvmm start`, `rvmm restart` and `rvmm attach`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;

use super::session::{self, Options, Outcome};
use crate::container::life;
use crate::container::records::Records;
use crate::container::signal;
use crate::container::supervisor::protocol::Request;

/// Start containers that do not run
#[derive(clap::Args)]
pub struct StartArguments {
    /// Show the output, and pass signals on
    #[arg(short, long)]
    attach: bool,
    /// Also pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Stop containers and start them again
#[derive(clap::Args)]
pub struct RestartArguments {
    /// Seconds until a container is killed
    #[arg(short, long, value_name = "SECONDS")]
    time: Option<u64>,
    /// The containers
    #[arg(required = true)]
    containers: Vec<String>,
}

/// Show a running container's output, and pass input and signals on
#[derive(clap::Args)]
pub struct AttachArguments {
    /// Do not pass standard input on
    #[arg(long)]
    no_stdin: bool,
    /// Keep signals from the container's process
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
    /// Keys that leave a terminal's session
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// The container
    container: String,
}

/// Starts containers.
pub fn start(arguments: &StartArguments, records: &Records) -> anyhow::Result<ExitCode> {
    if !(arguments.attach || arguments.interactive) {
        return super::each(records, &arguments.containers, |id| start_detached(records, id));
    }
    let [container] = &arguments.containers[..] else {
        bail!("only one container can be attached to at a time");
    };
    let id = records.find(container)?;
    let config = records.read(&id)?.config;
    let stdin = arguments.interactive && config.process.stdin;
    session::check_terminal(config.process.terminal, stdin)?;
    let window = session::window_size().filter(|_| config.process.terminal);
    let mut starting = life::start(records, &id, Some(stdin), window)?;
    let options = Options {
        stdin,
        terminal: config.process.terminal,
        pass_signals: true,
        detach_keys: session::detach_keys("ctrl-p,ctrl-q").map_err(anyhow::Error::msg)?,
    };
    finish(session::follow(&mut starting.connection, &options)?)
}

fn start_detached(records: &Records, id: &str) -> anyhow::Result<()> {
    match life::start(records, id, None, None) {
        Ok(mut starting) => match starting.wait()? {
            Ok(()) => Ok(()),
            Err((_, message)) => bail!("{message}"),
        },
        // As Docker has it: it runs, and that is what was wanted.
        Err(life::Error::Running(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Stops containers and starts them again.
pub fn restart(arguments: &RestartArguments, records: &Records) -> anyhow::Result<ExitCode> {
    super::each(records, &arguments.containers, |id| {
        let config = records.read(id)?.config;
        let signal = signal::number(&config.stop_signal).unwrap_or(libc::SIGTERM);
        let timeout = arguments.time.map_or(config.stop_timeout, Duration::from_secs);
        life::stop(records, id, signal, Some(timeout))?;
        // Its supervisor may still be about to let go.
        drop(records.await_life(id)?);
        start_detached(records, id)
    })
}

/// Follows a running container.
pub fn attach(arguments: &AttachArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let id = records.find(&arguments.container)?;
    let config = records.read(&id)?.config;
    let stdin = !arguments.no_stdin && config.process.stdin;
    session::check_terminal(config.process.terminal, stdin)?;
    let detach_keys = session::detach_keys(&arguments.detach_keys).map_err(anyhow::Error::msg)?;
    let mut connection = life::connect(records, &id)?;
    connection.send(&Request::Attach { closes_stdin: false })?;
    if let Some(size) = session::window_size().filter(|_| config.process.terminal) {
        connection.send(&Request::Resize(size))?;
    }
    let options =
        Options { stdin, terminal: config.process.terminal, pass_signals: arguments.sig_proxy, detach_keys };
    finish(session::follow(&mut connection, &options)?)
}

/// What a session's end means for ours.
pub fn finish(outcome: Outcome) -> anyhow::Result<ExitCode> {
    match outcome {
        Outcome::Exited(code) => Ok(ExitCode::from(code)),
        Outcome::Detached => Ok(ExitCode::SUCCESS),
        Outcome::Failed { code, message } => {
            eprintln!("rvmm: {}", message.replace('\n', " "));
            Ok(ExitCode::from(code))
        }
    }
}
