//! One run of the container, from its preparation to its end; and what clients ask for meanwhile.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::health::Checks;
use super::process::Pipes;
use super::protocol::{Event, Request};
use super::{Error, FAREWELL, Stop, Supervisor};
use crate::container::backend::{Backend, ExitStatus};
use crate::container::log::Source;
use crate::container::prepare;
use crate::container::state::{Status, now_ns};

/// How long output may still come when the container's process has ended: somebody else may hold the streams open. With a process
/// namespace of its own nobody does, and what is late is a slow host's.
const DRAIN: Duration = Duration::from_secs(10);
/// How long SIGKILL may take before its failure is said.
const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// Exit code where nobody knows it.
const UNKNOWN: u8 = 255;

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Signal,
    Listener,
    Exit,
    Output(Source),
    Input,
    Client(usize),
    Health,
}

/// A container that runs, or is about to.
struct Turn {
    backend: Box<dyn Backend>,
    pipes: Pipes,
    checks: Option<Checks>,
    exit: Option<ExitStatus>,
}

impl Supervisor<'_> {
    /// Runs the container once, and clears away what it has left on the host. Returns its exit code.
    pub(super) fn run_once(&mut self) -> Result<u8, Error> {
        let mut prepared = prepare::prepare(self.records, &self.config)?;
        prepared.backend.create(&prepared.bundle)?;
        if let Some(size) = self.window {
            prepared.backend.resize(size)?;
        }
        let streams = prepared.backend.start()?;
        let mut pipes = Pipes::new(streams, self.config.process.terminal).map_err(Error::Wait)?;
        if !self.config.process.stdin {
            pipes.end_input();
        }
        let mut turn = Turn { backend: prepared.backend, pipes, checks: None, exit: None };

        self.state.status = Status::Running;
        self.state.error = None;
        self.state.oom_killed = false;
        self.state.started_ns = Some(now_ns());
        self.state.pid = turn.backend.pid();
        self.state.endpoints = prepared.endpoints;
        self.state.ports = prepared.ports;
        self.write_state();
        self.clients.tell(&Event::Started);
        turn.checks = Checks::new(&self.config);
        self.follow(&mut turn)?;

        self.state.oom_killed = turn.backend.oom_killed().unwrap_or(false);
        // The process is gone and its streams are at their end, so that nothing is lost by clearing.
        drop(turn.pipes);
        if let Err(error) = turn.backend.delete() {
            tracing::error!("{}", crate::error_chain(&error));
        }
        self.clear();
        Ok(turn.exit.map_or(UNKNOWN, ExitStatus::docker_code))
    }

    /// Follows the container to its end.
    fn follow(&mut self, turn: &mut Turn) -> Result<(), Error> {
        let mut drained = None;
        loop {
            let deadlines = [
                drained,
                self.stopping.as_ref().and_then(|stop| stop.deadline),
                turn.checks.as_ref().map(Checks::deadline),
            ];
            let tokens = self.wait(Some(turn), deadlines.into_iter().flatten().min())?;
            for token in tokens {
                match token {
                    Token::Output(source) => {
                        if let Some(bytes) = turn.pipes.read(source) {
                            self.log.write(source, bytes);
                            self.clients.output(source, bytes);
                        }
                    }
                    Token::Input => turn.pipes.flush(),
                    Token::Exit => {
                        turn.exit = turn.backend.exit_status().unwrap_or(Some(ExitStatus::Code(UNKNOWN)));
                        drained = turn.exit.map(|_| Instant::now() + DRAIN);
                        turn.checks = turn.checks.take().filter(|_| turn.exit.is_none());
                    }
                    other => self.attend(other, Some(turn)),
                }
            }
            self.serve(Some(turn));
            self.enforce(turn);
            if let (Some(checks), Some(health)) = (&mut turn.checks, &mut self.state.health)
                && checks.step(&mut *turn.backend, self.records, &self.config, health)
            {
                self.write_state();
            }
            if let Some(end) = drained
                && (turn.pipes.are_at_end() || Instant::now() >= end)
            {
                return Ok(());
            }
        }
    }

    /// Waits, with clients served, until it is time to start the container again.
    pub(super) fn rest(&mut self, delay: Duration) {
        let end = Instant::now() + delay;
        while self.stopping.is_none() && Instant::now() < end {
            match self.wait(None, Some(end)) {
                Ok(tokens) => tokens.into_iter().for_each(|token| self.attend(token, None)),
                Err(_) => return,
            }
            self.serve(None);
        }
    }

    /// Gives clients time to take what was said last.
    pub(super) fn farewell(&mut self) {
        let end = Instant::now() + FAREWELL;
        while self.clients.have_output() && Instant::now() < end {
            let Ok(tokens) = self.wait(None, Some(end)) else { return };
            tokens.into_iter().for_each(|token| self.attend(token, None));
            self.clients.sweep();
        }
    }

    fn attend(&mut self, token: Token, turn: Option<&mut Turn>) {
        match token {
            Token::Signal => {
                while let Ok(Some(_)) = self.signals.read_signal() {
                    // The host shuts down, or an administrator ends us: the container ends as with `stop`.
                    let signal = crate::container::signal::number(&self.config.stop_signal);
                    let timeout = self.config.stop_timeout;
                    self.begin_stop(signal.unwrap_or(libc::SIGTERM), Some(timeout), None);
                }
                if let (Some(turn), Some(_)) = (turn, &self.stopping) {
                    let signal = crate::container::signal::number(&self.config.stop_signal);
                    let _ = turn.backend.signal(signal.unwrap_or(libc::SIGTERM), false);
                }
            }
            Token::Listener => self.clients.accept(),
            Token::Client(at) => {
                if let Some(client) = self.clients.all.get_mut(at) {
                    client.flush();
                    client.fill();
                }
            }
            Token::Exit | Token::Output(_) | Token::Input | Token::Health => {}
        }
    }

    /// Waits until there is something to do.
    fn wait(&self, turn: Option<&Turn>, deadline: Option<Instant>) -> Result<Vec<Token>, Error> {
        let mut tokens = vec![];
        let mut fds = vec![];
        let mut on = |token, fd, flags| {
            tokens.push(token);
            fds.push((fd, flags));
        };
        on(Token::Signal, self.signals.as_fd(), PollFlags::POLLIN);
        if let Some(listener) = self.clients.listener() {
            on(Token::Listener, listener, PollFlags::POLLIN);
        }
        let takes_input = turn.is_none_or(|turn| turn.pipes.take_input());
        for (at, client) in self.clients.all.iter().enumerate() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, takes_input);
            flags.set(PollFlags::POLLOUT, client.has_output());
            on(Token::Client(at), client.as_fd(), flags);
        }
        if let Some(turn) = turn {
            if turn.exit.is_none() {
                on(Token::Exit, turn.backend.exit_event()?, PollFlags::POLLIN);
            }
            for source in [Source::Stdout, Source::Stderr] {
                if let Some(fd) = turn.pipes.output(source).filter(|_| self.clients.keep_up()) {
                    on(Token::Output(source), fd, PollFlags::POLLIN);
                }
            }
            if let Some(fd) = turn.pipes.input() {
                on(Token::Input, fd, PollFlags::POLLOUT);
            }
            for fd in turn.checks.iter().flat_map(Checks::events) {
                on(Token::Health, fd, PollFlags::POLLIN);
            }
        }
        let ready = poll_until(&fds, deadline).map_err(Error::Wait)?;
        Ok(tokens.into_iter().zip(ready).filter_map(|(token, ready)| ready.then_some(token)).collect())
    }

    /// Carries out what clients have asked for.
    fn serve(&mut self, mut turn: Option<&mut Turn>) {
        let mut at = 0;
        while at < self.clients.all.len() {
            while turn.as_ref().is_none_or(|turn| turn.pipes.take_input()) {
                let Some(request) = self.clients.all.get_mut(at).and_then(|client| client.next_request())
                else {
                    break;
                };
                if let Some(answer) = self.carry_out(at, request, turn.as_deref_mut()) {
                    self.clients.all[at].send(&answer);
                }
            }
            at += 1;
        }
        if self.clients.sweep()
            && let Some(turn) = turn
        {
            turn.pipes.end_input();
        }
    }

    fn carry_out(&mut self, at: usize, request: Request, turn: Option<&mut Turn>) -> Option<Event> {
        let done = |result: Result<(), crate::container::backend::Error>| match result {
            Ok(()) => Event::Done,
            Err(error) => Event::Refused(crate::error_chain(&error)),
        };
        match (request, turn) {
            (Request::Attach { closes_stdin }, _) => {
                self.clients.all[at].attach(closes_stdin);
                None
            }
            (Request::Stop { signal, timeout_ms }, turn) => {
                let timeout = timeout_ms.map(Duration::from_millis);
                match turn {
                    Some(turn) => self.begin_stop(signal, timeout, Some(&mut *turn.backend)),
                    None => self.begin_stop(signal, timeout, None),
                }
                Some(Event::Done)
            }
            (Request::Stdin(bytes), Some(turn)) => {
                turn.pipes.write(&bytes);
                None
            }
            (Request::StdinEnd, Some(turn)) => {
                if self.clients.all[at].closes_stdin {
                    turn.pipes.end_input();
                }
                None
            }
            (Request::Resize(size), turn) => {
                self.window = Some(size);
                if let Some(turn) = turn {
                    let _ = turn.backend.resize(size);
                }
                None
            }
            (Request::Stdin(_) | Request::StdinEnd, None) => None,
            (Request::Signal(signal), Some(turn)) => {
                if signal == libc::SIGKILL {
                    self.begin_stop(signal, None, Some(&mut *turn.backend));
                    return Some(Event::Done);
                }
                Some(done(turn.backend.signal(signal, false)))
            }
            (Request::Pause, Some(turn)) => {
                let result = turn.backend.pause();
                if result.is_ok() {
                    self.state.status = Status::Paused;
                    self.write_state();
                }
                Some(done(result))
            }
            (Request::Resume, Some(turn)) => {
                let result = turn.backend.resume();
                if result.is_ok() {
                    self.state.status = Status::Running;
                    self.write_state();
                }
                Some(done(result))
            }
            (Request::Signal(_) | Request::Pause | Request::Resume, None) => {
                Some(Event::Refused("the container is not running".into()))
            }
        }
    }

    /// Begins to end the container, for good.
    fn begin_stop(&mut self, signal: i32, timeout: Option<Duration>, backend: Option<&mut dyn Backend>) {
        let killed = signal == libc::SIGKILL;
        let deadline = if killed { Some(KILL_PATIENCE) } else { timeout };
        self.stopping = Some(Stop { deadline: deadline.map(|time| Instant::now() + time), killed });
        let Some(backend) = backend else { return };
        if let Err(error) = backend.signal(signal, false) {
            tracing::warn!("{}", crate::error_chain(&error));
        }
        // Stopped processes do not even die.
        if self.state.status == Status::Paused && backend.resume().is_ok() {
            self.state.status = Status::Running;
        }
    }

    /// Kills the container when its time to end is over.
    fn enforce(&mut self, turn: &mut Turn) {
        let Some(stop) = &mut self.stopping else { return };
        if turn.exit.is_some() || stop.deadline.is_none_or(|deadline| Instant::now() < deadline) {
            return;
        }
        if stop.killed {
            tracing::warn!("the container does not end although it was killed");
        }
        stop.killed = true;
        stop.deadline = Some(Instant::now() + KILL_PATIENCE);
        if let Err(error) = turn.backend.signal(libc::SIGKILL, true) {
            tracing::warn!("{}", crate::error_chain(&error));
        }
    }
}

/// Waits until one of `fds` is ready or it is `deadline`, and says which are.
fn poll_until(fds: &[(BorrowedFd<'_>, PollFlags)], deadline: Option<Instant>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd> = fds.iter().map(|(fd, flags)| PollFd::new(*fd, *flags)).collect();
    loop {
        let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            // A part of a millisecond is waited for, too.
            Some(left) => PollTimeout::try_from(left.as_millis().saturating_add(1).min(i32::MAX as u128))
                .unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        match poll(&mut polled, timeout) {
            Ok(_) => break,
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(polled.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect())
}
