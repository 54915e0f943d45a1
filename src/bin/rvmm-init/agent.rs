//! The agent: one loop that waits for everything at once.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signalfd::SignalFd;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, getpeername, listen, socket,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{PidfdFlags, WaitOptions, getpid, pidfd_open, wait};
use rvmm::guest::frame::Greeting;
use rvmm::guest::protocol::{Event, ExitStatus, FIRST_PROCESS, Failure, FromAgent, PORT, Reply};
use rvmm::guest::spec::Namespace;

use crate::archive::{Direction, Job};
use crate::cgroup::Controllers;
use crate::container::Container;
use crate::control::{Control, Greeted, Greeter};
use crate::disks::Disks;
use crate::failure::Doing;
use crate::power;
use crate::share::Share;
use crate::stream::{CHUNK_BYTES, Side, Stream};
use crate::system::Stack;

/// Connections that have not said what they are at most.
const GREETERS_MAX: usize = 256;
/// Connections for frames at most.
const CONTROLS_MAX: usize = 64;
/// `SI_KERNEL`: nobody has sent the signal.
const FROM_KERNEL: i32 = 0x80;
/// How long to wait between looks at what tells nobody of its end: a control group that empties.
const RETRY: Duration = Duration::from_millis(20);
/// How long killed processes may take to be gone when the machine stops.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// An archive that was asked for and whose stream has not come.
pub struct Asked {
    /// Connection and request.
    pub by: (u64, u32),
    /// The container.
    pub container: String,
    /// Which way.
    pub direction: Direction,
    /// The path inside.
    pub path: String,
}

/// The machine is being stopped.
pub struct Stopping {
    /// When processes are killed, or then given up.
    pub deadline: Instant,
    /// Whether they were killed.
    pub killed: bool,
}

/// The agent.
pub struct Agent {
    listener: OwnedFd,
    signals: SignalFd,
    /// This process, whose namespaces are the sandbox's.
    pub own: OwnedFd,
    power_button: Option<File>,
    greeters: BTreeMap<u64, Greeter>,
    pub controls: BTreeMap<u64, Control>,
    next_connection: u64,
    pub streams: BTreeMap<u64, Stream>,
    pub containers: BTreeMap<String, Container>,
    /// Archives that wait for their streams, by these.
    pub asked: BTreeMap<u64, Asked>,
    /// Archives under way, by their processes.
    jobs: BTreeMap<i32, ((u64, u32), Job)>,
    pub disks: Disks,
    pub share: Share,
    pub controllers: Controllers,
    pub stack: Stack,
    scratch: Vec<u8>,
    pub last_capability: u32,
    pub stopping: Option<Stopping>,
}

/// What a descriptor that is ready stands for, in the order in which they are served: a request that announces a
/// stream comes before the stream.
#[derive(Clone, Copy, Debug)]
enum Token {
    Control(u64),
    Signals,
    Stream(u64, Side),
    Greeter(u64),
    Listener,
    Memory,
    PowerButton,
}

impl Agent {
    /// Listens, with nothing to do yet.
    pub fn new(signals: SignalFd) -> Result<Self, Failure> {
        let doing = || format!("listen at vsock port {PORT}");
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None).doing(doing)?;
        let any = VsockAddr::new(libc::VMADDR_CID_ANY, PORT);
        bind(listener.as_raw_fd(), &any).doing(doing)?;
        let backlog = Backlog::new(64).doing(doing)?;
        listen(&listener, backlog).doing(doing)?;
        let last = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").ok();
        Ok(Self {
            listener,
            signals,
            own: pidfd_open(getpid(), PidfdFlags::empty()).doing(|| "open this process".to_owned())?,
            power_button: power::open_button(),
            greeters: BTreeMap::new(),
            controls: BTreeMap::new(),
            next_connection: 0,
            streams: BTreeMap::new(),
            containers: BTreeMap::new(),
            asked: BTreeMap::new(),
            jobs: BTreeMap::new(),
            disks: Disks::default(),
            share: Share::default(),
            controllers: Controllers::read(),
            stack: Stack::new().doing(|| "make a stack".to_owned())?,
            scratch: vec![0; CHUNK_BYTES],
            last_capability: last.and_then(|text| text.trim().parse().ok()).unwrap_or(40),
            stopping: None,
        })
    }

    /// Serves until the machine is to stop.
    pub fn run(mut self) {
        while !self.is_stopped() {
            for (token, flags) in self.wait() {
                self.serve(token, flags);
            }
            self.announce();
            self.finish_deletions();
            self.controls.retain(|_, control| !control.broken);
            self.asked.retain(|_, asked| self.controls.contains_key(&asked.by.0));
        }
        // Containers' file systems are unmounted as they go.
    }

    /// Waits until something is ready.
    fn wait(&self) -> Vec<(Token, PollFlags)> {
        let mut tokens = Vec::new();
        let mut fds = Vec::new();
        let mut add = |token, fd, flags| {
            tokens.push(token);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        for (id, control) in &self.controls {
            let (fd, flags) = control.interest();
            add(Token::Control(*id), fd, flags);
        }
        add(Token::Signals, self.signals.as_fd(), PollFlags::IN);
        for (id, stream) in &self.streams {
            for (side, fd, flags) in stream.interests() {
                add(Token::Stream(*id, side), fd, flags);
            }
        }
        for (id, greeter) in &self.greeters {
            add(Token::Greeter(*id), greeter.fd(), PollFlags::IN);
        }
        if self.greeters.len() < GREETERS_MAX {
            add(Token::Listener, self.listener.as_fd(), PollFlags::IN);
        }
        let watched = self.containers.values().filter(|container| container.watches_memory);
        for file in watched.filter_map(|container| container.cgroup.memory_events()) {
            add(Token::Memory, file.as_fd(), PollFlags::PRI);
        }
        if let Some(button) = &self.power_button {
            add(Token::PowerButton, button.as_fd(), PollFlags::IN);
        }
        let timeout = self.timeout().and_then(|timeout| Timespec::try_from(timeout).ok());
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return Vec::new();
        }
        let ready = tokens.into_iter().zip(fds.iter().map(PollFd::revents));
        ready.filter(|(_, flags)| !flags.is_empty()).collect()
    }

    fn timeout(&self) -> Option<Duration> {
        let is_deleting = self.containers.values().any(|container| !container.deleting.is_empty());
        let stop = self.stopping.as_ref().map(|stop| stop.deadline.saturating_duration_since(Instant::now()));
        let retry = (is_deleting || stop.is_some()).then_some(RETRY);
        stop.into_iter().chain(retry).min()
    }

    fn serve(&mut self, token: Token, flags: PollFlags) {
        match token {
            Token::Control(id) => self.serve_control(id, flags),
            Token::Signals => self.take_signals(),
            Token::Stream(id, side) => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.serve(side, flags, &mut self.scratch);
                }
            }
            Token::Greeter(id) => self.greet(id),
            Token::Listener => self.accept(),
            Token::Memory => self.look_at_memory(),
            Token::PowerButton => {
                if self.power_button.as_mut().is_some_and(power::was_pressed) {
                    self.begin_stop(power::PATIENCE);
                }
            }
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while self.greeters.len() < GREETERS_MAX {
            let Ok(connection) = accept_with(&self.listener, flags) else { return };
            // A container's process could call, too: from this very machine.
            let caller = getpeername::<VsockAddr>(connection.as_raw_fd());
            if caller.is_ok_and(|caller| caller.cid() != libc::VMADDR_CID_HOST) {
                continue;
            }
            self.greeters.insert(self.next_connection, Greeter::new(connection));
            self.next_connection += 1;
        }
    }

    fn greet(&mut self, id: u64) {
        let Some(greeter) = self.greeters.get_mut(&id) else { return };
        let greeting = match greeter.read() {
            Greeted::Incomplete => return,
            Greeted::Wrong => None,
            Greeted::As(greeting) => Some(greeting),
        };
        let Some(connection) = self.greeters.remove(&id).map(Greeter::into_socket) else { return };
        match greeting {
            Some(Greeting::Control) if self.controls.len() < CONTROLS_MAX => {
                self.controls.insert(id, Control::new(connection));
                self.serve_control(id, PollFlags::IN);
            }
            Some(Greeting::Stream(stream)) => self.open_stream(stream, connection),
            // Closed: it is no greeting, or there are too many.
            _ => {}
        }
    }

    fn open_stream(&mut self, id: u64, connection: OwnedFd) {
        if let Some(asked) = self.asked.remove(&id) {
            return self.start_archive(asked, connection);
        }
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.attach(connection)
        {
            stream.settle(&mut self.scratch);
        }
    }

    fn start_archive(&mut self, asked: Asked, connection: OwnedFd) {
        let started = self
            .container(&asked.container)
            .and_then(|container| match asked.direction {
                Direction::Changes => container.changes(),
                Direction::Read | Direction::Write => container.view(),
            })
            .and_then(|view| Job::start(asked.direction, &view, &asked.path, connection));
        match started {
            Ok((pid, job)) => {
                self.jobs.insert(pid, (asked.by, job));
            }
            Err(failure) => self.reply(asked.by, Err(failure)),
        }
    }

    fn serve_control(&mut self, id: u64, flags: PollFlags) {
        let Some(control) = self.controls.get_mut(&id) else { return };
        if flags.contains(PollFlags::OUT) {
            control.flush();
        }
        if !flags.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            return;
        }
        for request in control.receive() {
            let by = (id, request.id);
            if let Some(reply) = self.carry_out(by, request.request).transpose() {
                self.reply(by, reply);
            }
        }
    }

    /// Answers a request, if its connection is still there.
    pub fn reply(&mut self, (connection, id): (u64, u32), reply: Result<Reply, Failure>) {
        if let Some(control) = self.controls.get_mut(&connection) {
            control.send(&FromAgent::Reply(id, reply));
        }
    }

    /// Tells all that want to know.
    fn tell(&mut self, event: &Event) {
        for control in self.controls.values_mut().filter(|control| control.events) {
            control.send(&FromAgent::Event(event.clone()));
        }
    }

    /// The container of this id.
    pub fn container(&self, id: &str) -> Result<&Container, Failure> {
        self.containers.get(id).ok_or_else(|| Failure::NoContainer(id.to_owned()))
    }

    /// The same, to change it.
    pub fn container_mut(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.get_mut(id).ok_or_else(|| Failure::NoContainer(id.to_owned()))
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match signal.ssi_signo as i32 {
                libc::SIGCHLD => self.reap(),
                // Ctrl-Alt-Del. A container's process that shares the sandbox's namespace of processes may send one, too.
                libc::SIGINT | libc::SIGPWR if signal.ssi_code == FROM_KERNEL => {
                    self.begin_stop(power::PATIENCE);
                }
                _ => {}
            }
        }
    }

    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get();
            let status = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => ExitStatus::Code(code as u8),
                (None, Some(signal)) => ExitStatus::Signal(signal as u8),
                (None, None) => continue,
            };
            if let Some((by, job)) = self.jobs.remove(&pid) {
                let result = job.finish(status == ExitStatus::Code(0));
                self.reply(by, result.map(|()| Reply::Done));
            } else {
                self.end_process(pid, status);
            }
        }
    }

    fn end_process(&mut self, pid: i32, status: ExitStatus) {
        for container in self.containers.values_mut() {
            let found = container
                .processes
                .iter_mut()
                .find(|(_, process)| process.pid == pid && process.status.is_none());
            let Some((number, process)) = found else { continue };
            process.status = Some(status);
            // What reads the terminal then sees its end, unless somebody else uses it.
            process.terminal = None;
            for id in &process.streams {
                if let Some(stream) = self.streams.get_mut(id) {
                    stream.end_process();
                    stream.settle(&mut self.scratch);
                }
            }
            if *number == FIRST_PROCESS {
                container.first = None;
                container.paused = false;
                // With a namespace of its own all others have ended with the first.
                if container.spec.namespaces.pid != Namespace::Own {
                    container.cgroup.kill();
                }
            }
            return;
        }
    }

    /// Tells of processes that have ended and whose output has been handed over.
    fn announce(&mut self) {
        let mut events = Vec::new();
        for (id, container) in &mut self.containers {
            let mut told = Vec::new();
            for (number, process) in &container.processes {
                let is_settled = || {
                    let mut streams = process.streams.iter().filter_map(|id| self.streams.get(id));
                    streams.all(Stream::is_settled)
                };
                if let Some(status) = process.status.filter(|_| !process.told)
                    && is_settled()
                {
                    told.push((*number, status));
                }
            }
            for (number, status) in told {
                let kills = container.cgroup.oom_kills();
                if kills > container.oom_kills {
                    container.oom_kills = kills;
                    events.push(Event::OutOfMemory { container: id.clone() });
                }
                if let Some(process) = container.processes.get_mut(&number) {
                    process.told = true;
                }
                events.push(exited(id, number, status, kills > 0));
            }
        }
        for event in events {
            self.tell(&event);
        }
    }

    /// Has a connection get events, and those that it may have missed first.
    pub fn subscribe(&mut self, connection: u64) {
        let mut events = Vec::new();
        for (id, container) in &self.containers {
            for (number, process) in container.processes.iter().filter(|(_, process)| process.told) {
                events.extend(
                    process.status.map(|status| exited(id, *number, status, container.oom_kills > 0)),
                );
            }
        }
        if let Some(control) = self.controls.get_mut(&connection) {
            control.events = true;
            for event in events {
                control.send(&FromAgent::Event(event));
            }
        }
    }

    fn look_at_memory(&mut self) {
        let mut events = Vec::new();
        for (id, container) in self.containers.iter_mut().filter(|(_, container)| container.watches_memory) {
            let kills = container.cgroup.oom_kills();
            if kills > container.oom_kills {
                container.oom_kills = kills;
                events.push(Event::OutOfMemory { container: id.clone() });
            }
        }
        for event in events {
            self.tell(&event);
        }
    }

    /// Removes containers that are to be removed and of which nothing is left.
    fn finish_deletions(&mut self) {
        let ready = self.containers.iter().filter(|(_, container)| {
            !container.deleting.is_empty()
                && container.processes.values().all(|process| process.status.is_none_or(|_| process.told))
                && container.is_at_rest()
        });
        let ready: Vec<_> = ready.map(|(id, _)| id.clone()).collect();
        for id in ready {
            let Some(container) = self.containers.get_mut(&id) else { continue };
            // Something that is still ending; the next look comes soon.
            if container.cgroup.remove().is_err() {
                container.cgroup.kill();
                continue;
            }
            let waiting = std::mem::take(&mut container.deleting);
            self.forget_streams(&id, None);
            self.containers.remove(&id);
            for by in waiting {
                self.reply(by, Ok(Reply::Done));
            }
        }
    }

    /// Closes the streams of a container, or of one process of it.
    pub fn forget_streams(&mut self, container: &str, process: Option<u32>) {
        self.streams.retain(|_, stream| {
            let (owner, number) = &stream.owner;
            owner != container || process.is_some_and(|process| process != *number)
        });
    }

    /// Starts to stop the machine.
    pub fn begin_stop(&mut self, timeout: Duration) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Stopping { deadline: Instant::now() + timeout, killed: false });
        for container in self.containers.values_mut() {
            for pid in container.cgroup.processes() {
                // One that has ended meanwhile needs no signal.
                let _ = crate::system::kill(pid, libc::SIGTERM);
                let _ = crate::system::kill(pid, libc::SIGCONT);
            }
            if container.paused {
                container.paused = container.cgroup.freeze(false).is_err();
            }
        }
    }

    fn is_stopped(&mut self) -> bool {
        let Some(stopping) = &mut self.stopping else { return false };
        if self.containers.values().all(|container| container.is_at_rest() && container.cgroup.is_empty()) {
            return true;
        }
        if Instant::now() < stopping.deadline {
            return false;
        }
        if stopping.killed {
            return true;
        }
        stopping.killed = true;
        stopping.deadline = Instant::now() + KILL_PATIENCE;
        for container in self.containers.values() {
            container.cgroup.kill();
        }
        false
    }
}

fn exited(container: &str, process: u32, status: ExitStatus, out_of_memory: bool) -> Event {
    Event::Exited { container: container.to_owned(), process, status, out_of_memory }
}
