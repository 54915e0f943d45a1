//! The process that looks after one container: starts it, keeps and passes on its output, checks its health, starts it
//! again, and clears away what is left. There is no daemon behind it.
//!
//! It has one thread, because the native backend forks. It holds the container's life (a lock) until it ends, however
//! that happens; whoever finds the lock free and a container running mends that ([`super::life`]).

mod clients;
mod health;
pub mod process;
pub mod protocol;
mod turn;

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::clients::Clients;
use self::protocol::Event;
use super::backend::{self, WindowSize};
use super::config::{ContainerConfig, Restart};
use super::files::{self, Lock, host};
use super::log;
use super::namespace;
use super::prepare;
use super::records::{self, Records};
use super::state::{State, Status, now_ns};

/// Before the first restart, and the most before later ones.
const RESTART_DELAY_MIN: Duration = Duration::from_millis(100);
const RESTART_DELAY_MAX: Duration = Duration::from_secs(60);
/// How long a container must have run for its next restart to be the first again.
const STEADY: Duration = Duration::from_secs(10);
/// How long clients have to take the last words.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why a container cannot be looked after.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container's directories.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// What goes before the container's start.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// The container.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// The supervisor's own files.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The supervisor's own means.
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
}

impl Error {
    /// The exit code of `run` for it, as Docker has it.
    fn docker_code(&self) -> u8 {
        match self {
            Error::Backend(error) => error.docker_code(),
            _ => 125,
        }
    }
}

/// A client that is there from the beginning.
#[derive(Debug)]
pub struct First {
    /// The connection.
    pub stream: UnixStream,
    /// Whether it gets the output, and then whether the container's input ends with its own.
    pub attach: Option<bool>,
    /// The size of its terminal.
    pub window: Option<WindowSize>,
}

/// Looks after a container from its start to its end.
pub fn supervise(records: &Records, config: ContainerConfig, life: Lock, first: First) {
    let id = config.id.clone();
    if let Err(error) = Supervisor::new(records, config, first).map(|supervisor| supervisor.run()) {
        tracing::error!("{}", crate::error_chain(&error));
    }
    // Before anybody can take the life and find things half cleared.
    drop(life);
    tracing::debug!("container {} has ended", records::short(&id));
}

struct Supervisor<'a> {
    records: &'a Records,
    config: ContainerConfig,
    state: State,
    clients: Clients,
    log: log::Writer,
    signals: SignalFd,
    /// The terminal's size.
    window: Option<WindowSize>,
    /// What the user asked for last: the container ends and is not started again.
    stopping: Option<Stop>,
}

/// An end that was asked for.
struct Stop {
    /// When it is enforced.
    deadline: Option<Instant>,
    /// Whether SIGKILL was sent.
    killed: bool,
}

impl<'a> Supervisor<'a> {
    fn new(records: &'a Records, config: ContainerConfig, first: First) -> Result<Self, Error> {
        let roots = records.roots();
        let socket = roots.container_run(&config.id).join("control.sock");
        let log = roots.container(&config.id).join("log");
        // Only who has the container's life gets here, so a socket that is there is nobody's.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(host("listen at", &socket))?;
        listener.set_nonblocking(true).map_err(host("listen at", &socket))?;
        let mut clients = Clients::new(listener);
        clients.add(first.stream);
        if let (Some(closes_stdin), Some(client)) = (first.attach, clients.all.first_mut()) {
            client.attach(closes_stdin);
        }
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().map_err(|errno| Error::Wait(errno.into()))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(|errno| Error::Wait(errno.into()))?;
        let state = State { health: health::initial(&config), ..State::default() };
        let log = log::Writer::open(&log).map_err(host("write", &log))?;
        let window = first.window;
        Ok(Supervisor { records, config, state, clients, log, signals, window, stopping: None })
    }

    /// Runs the container as often as it is to be run.
    fn run(mut self) {
        let mut delay = RESTART_DELAY_MIN;
        // For who wants the container gone before it runs.
        self.state.supervisor = Some(std::process::id());
        self.write_state();
        loop {
            let begun = Instant::now();
            let code = match self.run_once() {
                Ok(code) => code,
                Err(error) => {
                    self.clear();
                    let (code, message) = (error.docker_code(), crate::error_chain(&error));
                    self.state.error = Some(message.clone());
                    // What has never run is not tried again.
                    if self.state.restarts == 0 {
                        self.end(code, &Event::Failed { code, message });
                        return;
                    }
                    // The next run's success takes it out of the state.
                    tracing::error!("restart {}: {message}", self.state.restarts);
                    code
                }
            };
            if self.stopping.is_some() || !self.starts_again(code) {
                self.end(code, &Event::Exited(code));
                return;
            }
            delay = if begun.elapsed() >= STEADY { RESTART_DELAY_MIN } else { delay };
            self.state.status = Status::Restarting;
            self.state.exit_code = Some(code);
            self.state.finished_ns = Some(now_ns());
            self.state.pid = None;
            self.write_state();
            self.rest(delay);
            if self.stopping.is_some() {
                self.end(code, &Event::Exited(code));
                return;
            }
            delay = (2 * delay).min(RESTART_DELAY_MAX);
            self.state.restarts += 1;
        }
    }

    fn starts_again(&self, code: u8) -> bool {
        match self.config.restart {
            Restart::No => false,
            Restart::OnFailure(most) => code != 0 && (most == 0 || self.state.restarts < most),
            Restart::Always | Restart::UnlessStopped => true,
        }
    }

    /// Keeps how the container ended, tells everybody, and removes it if that was asked for.
    fn end(mut self, code: u8, event: &Event) {
        self.log.finish();
        self.state.status = match event {
            Event::Failed { .. } if self.state.started_ns.is_none() => Status::Created,
            _ => Status::Exited,
        };
        self.state.exit_code = Some(code);
        self.state.finished_ns = Some(now_ns());
        self.state.pid = None;
        self.state.supervisor = None;
        self.state.endpoints = vec![];
        self.state.stopped = self.stopping.is_some();
        self.write_state();
        let roots = self.records.roots();
        let _ = fs::remove_file(roots.container_run(&self.config.id).join("control.sock"));
        if self.config.auto_remove
            && let Err(error) = prepare::remove(self.records, &self.config)
        {
            tracing::error!("{}", crate::error_chain(&error));
        }
        // Whoever hears of the end finds nothing left.
        namespace::leave(roots);
        self.clients.accept();
        self.clients.dismiss(event);
        self.farewell();
    }

    fn clear(&mut self) {
        if let Err(error) = prepare::clear(self.records, &self.config) {
            tracing::error!("{}", crate::error_chain(&error));
        }
    }

    fn write_state(&self) {
        if let Err(error) = self.records.write_state(&self.config.id, &self.state) {
            tracing::error!("{}", crate::error_chain(&error));
        }
    }
}
