//! `rvmm exec`.

use std::io::{self, stdin, stdout};
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context, bail};
use nix::sys::signal::Signal;

use super::configure;
use super::session::{self, Input, Typed, print, wait_for};
use super::values::EnvVariable;
use crate::container::backend::{Execution, Streams};
use crate::container::config::Process;
use crate::container::log::Source;
use crate::container::prepare;
use crate::container::records::Records;
use crate::container::state::Status;
use crate::container::supervisor::process::Pipes;
use crate::terminal::RawTerminal;

/// Run a command in a running container
#[derive(clap::Args)]
#[command(after_help = "Example:\n  rvmm exec -it web sh")]
pub struct ExecArguments {
    /// Do not wait for the command
    #[arg(short, long)]
    detach: bool,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<EnvVariable>,
    /// Another user than the container's
    #[arg(short, long)]
    user: Option<String>,
    /// Another working directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// With all capabilities
    #[arg(long)]
    privileged: bool,
    /// Keys that leave a terminal's session
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    /// The container, and the command: all that comes after the container, also what looks like an option
    #[arg(trailing_var_arg = true, num_args = 2.., required = true, value_names = ["CONTAINER", "COMMAND"])]
    container_and_command: Vec<String>,
}

/// Runs a command in a container.
pub fn run(arguments: &ExecArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let Some((container, command)) = arguments.container_and_command.split_first() else {
        anyhow::bail!("there is no container to run a command in");
    };
    let id = records.find(container)?;
    let record = records.read(&id)?;
    match record.state.status {
        Status::Running => {}
        Status::Paused => bail!("container {container} is paused: unpause it first"),
        _ => bail!("container {container} is not running"),
    }
    if !arguments.detach {
        session::check_terminal(arguments.tty, arguments.interactive)?;
    }
    let keys = session::detach_keys(&arguments.detach_keys).map_err(anyhow::Error::msg)?;
    let mut env = vec![];
    arguments.env.iter().for_each(|variable| configure::set(&mut env, variable));
    let process = Process {
        args: command.to_vec(),
        env,
        cwd: arguments.workdir.clone().unwrap_or_default(),
        user: arguments.user.clone().unwrap_or_default(),
        terminal: arguments.tty,
        stdin: arguments.interactive,
        ..Process::default()
    };
    let process = prepare::exec_process(records, &record, &process, arguments.privileged)?;
    let mut backend = prepare::open(records, &record)?;
    let (mut execution, mut streams) = match backend.exec(&process) {
        Ok(started) => started,
        Err(error) => {
            let code = error.docker_code();
            crate::cli::report(&error.into(), false);
            return Ok(ExitCode::from(code));
        }
    };
    if !arguments.interactive || arguments.detach {
        streams.stdin = None;
    }
    if arguments.detach {
        return Ok(ExitCode::SUCCESS);
    }
    follow(arguments, &mut *execution, streams, &keys)
}

fn follow(
    arguments: &ExecArguments,
    execution: &mut dyn Execution,
    streams: Streams,
    keys: &[u8],
) -> anyhow::Result<ExitCode> {
    let mut pipes = Pipes::new(streams, arguments.tty).context("cannot set the command's streams up")?;
    let signals = session::signals()?;
    if let Some(size) = session::window_size().filter(|_| arguments.tty) {
        execution.resize(size)?;
    }
    let _raw = if arguments.tty && arguments.interactive {
        RawTerminal::enter_whole().context("cannot set up the terminal")?
    } else {
        None
    };
    let input_stream = stdin();
    let mut input = Input::new(arguments.interactive, if arguments.tty { keys } else { &[] });
    let mut exit = None;
    while exit.is_none() || !pipes.are_at_end() {
        let wanted = input.fd(&input_stream).filter(|_| pipes.take_input());
        let ready = wait_for(&[
            Some(signals.as_fd()),
            wanted,
            pipes.output(Source::Stdout),
            pipes.output(Source::Stderr),
            exit.is_none().then(|| execution.exit_event()),
        ])?;
        if ready[0] {
            while let Ok(Some(signal)) = signals.read_signal() {
                if signal.ssi_signo as i32 != Signal::SIGWINCH as i32 {
                    execution.signal(signal.ssi_signo as i32)?;
                } else if let Some(size) = session::window_size().filter(|_| arguments.tty) {
                    execution.resize(size)?;
                }
            }
        }
        if ready[1] {
            match input.read() {
                Typed::Bytes(bytes) => pipes.write(&bytes),
                Typed::End => pipes.end_input(),
                Typed::Detach => return Ok(ExitCode::SUCCESS),
            }
        }
        for (at, source) in [(2, Source::Stdout), (3, Source::Stderr)] {
            if ready[at]
                && let Some(bytes) = pipes.read(source)
            {
                match source {
                    Source::Stdout => print(stdout(), bytes)?,
                    Source::Stderr => print(io::stderr(), bytes)?,
                };
            }
        }
        pipes.flush();
        if ready[4] {
            exit = execution.exit_status()?;
        }
    }
    Ok(exit.map_or(ExitCode::FAILURE, |status| ExitCode::from(status.docker_code())))
}
