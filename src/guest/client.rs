//! The host's side: calls the agent of a VM through the unix socket of its vsock device.
//!
//! Nothing here waits without looking at whether the VM still is, and nothing that an agent sends is trusted: frames,
//! lists and events that wait have bounds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::frame::{self, Assembler, Greeting, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, encode};
use super::protocol::{AgentInfo, Event, Failure, FromAgent, PORT, Reply, Request, ToAgent, VERSION};
use super::spec::ContainerSpec;

mod calls;

/// Between the first attempts to reach an agent, and between later ones: attempts cost a slow guest time.
const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_millis(25);
/// Bytes of the vsock device's answer at most: `OK 4294967295\n`.
const ANSWER_BYTES_MAX: usize = 16;
/// Events that wait to be taken at most.
const EVENTS_MAX: usize = 4096;

/// Why a call has failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent has refused or could not do it.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// The connection has ended, and the VM may still be there.
    #[error("the agent has closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("the agent has not answered for {0:?}")]
    Patience(Duration),
    /// The connection has failed.
    #[error("cannot talk to the agent through {path:?}")]
    Connection {
        /// The vsock device's socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host cannot wait.
    #[error("cannot wait for the agent")]
    Wait(#[source] io::Error),
    /// What came is no message, or the request is none.
    #[error("the agent's messages make no sense")]
    Message(#[from] frame::Error),
    /// What came does not fit what was asked.
    #[error("the agent has sent {0}")]
    Unexpected(&'static str),
}

/// A request whose answer has not been taken.
#[derive(Debug)]
#[must_use]
pub struct Pending(u32);

/// A connection to an agent.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    stream: UnixStream,
    ended: Option<OwnedFd>,
    patience: Option<Duration>,
    assembler: Assembler,
    next_id: u32,
    pending: BTreeSet<u32>,
    replies: BTreeMap<u32, Result<Reply, Failure>>,
    events: VecDeque<Event>,
    info: AgentInfo,
}

impl Client {
    /// Calls the agent behind `socket`, again and again until it answers, `ended` can be read (a pidfd of the VM, say), or
    /// `patience` is over. With `events` this connection gets events: at first those of all processes that have ended and
    /// were not deleted, so that none is missed when a connection is made anew.
    pub fn connect(
        socket: &Path,
        ended: Option<BorrowedFd<'_>>,
        patience: Duration,
        events: bool,
    ) -> Result<Self, Error> {
        let deadline = Deadline::after(Some(patience));
        let at = |source| Error::Connection { path: socket.into(), source };
        let ended = ended.map(|fd| fd.try_clone_to_owned()).transpose().map_err(at)?;
        let mut pause = RETRY_MIN;
        let stream = loop {
            match dial(socket, ended.as_ref(), deadline) {
                Ok(stream) => break stream,
                // Nobody listens there yet: the monitor, or the agent.
                Err(Error::Closed) => {}
                Err(Error::Connection { source, .. })
                    if matches!(
                        source.kind(),
                        ErrorKind::NotFound
                            | ErrorKind::ConnectionRefused
                            | ErrorKind::BrokenPipe
                            | ErrorKind::ConnectionReset
                    ) => {}
                Err(error) => return Err(error),
            }
            wait(None, ended.as_ref(), deadline.min(pause)).or_else(|error| match error {
                Error::Patience(_) if !deadline.is_over() => Ok(()),
                other => Err(other),
            })?;
            pause = (pause * 3 / 2).min(RETRY_MAX);
        };
        stream.set_nonblocking(true).map_err(at)?;
        let mut client = Self {
            socket: socket.into(),
            stream,
            ended,
            patience: Some(patience),
            assembler: Assembler::new(REPLY_BYTES_MAX),
            next_id: 1,
            pending: BTreeSet::new(),
            replies: BTreeMap::new(),
            events: VecDeque::new(),
            info: AgentInfo::default(),
        };
        client.write(&Greeting::Control.to_bytes())?;
        match client.call(Request::Hello { version: VERSION, events })? {
            Reply::Hello(info) => client.info = info,
            _ => return Err(Error::Unexpected("another answer than one to a greeting")),
        }
        Ok(client)
    }

    /// How long a call waits for its answer; `None` for as long as the VM is there. At first what [`Self::connect`] got.
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// What the agent said of itself.
    pub fn info(&self) -> &AgentInfo {
        &self.info
    }

    /// Sends a request without waiting for its answer.
    pub fn begin(&mut self, request: Request) -> Result<Pending, Error> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let bytes = encode(&ToAgent { id, request }, REQUEST_BYTES_MAX)?;
        self.write(&bytes)?;
        self.pending.insert(id);
        Ok(Pending(id))
    }

    /// Waits for the answer to a request.
    pub fn finish(&mut self, pending: Pending) -> Result<Reply, Error> {
        let deadline = Deadline::after(self.patience);
        loop {
            if let Some(reply) = self.replies.remove(&pending.0) {
                return Ok(reply?);
            }
            if !self.take_messages()? {
                wait(Some((&self.stream, PollFlags::IN)), self.ended.as_ref(), deadline)?;
            }
        }
    }

    /// Sends a request and waits for its answer.
    pub fn call(&mut self, request: Request) -> Result<Reply, Error> {
        let pending = self.begin(request)?;
        self.finish(pending)
    }

    /// The next event, if one has come; does not wait. [`AsFd`] gives what to wait on, but calls in between may have
    /// taken events in already, so ask until there is none before waiting.
    pub fn next_event(&mut self) -> Result<Option<Event>, Error> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if !self.take_messages()? {
                return Ok(None);
            }
        }
    }

    /// Waits for an event, as long as calls wait for an answer.
    pub fn wait_event(&mut self) -> Result<Event, Error> {
        let deadline = Deadline::after(self.patience);
        loop {
            if let Some(event) = self.next_event()? {
                return Ok(event);
            }
            wait(Some((&self.stream, PollFlags::IN)), self.ended.as_ref(), deadline)?;
        }
    }

    /// A number for a stream that no other stream has.
    pub fn new_stream(&self) -> Result<u64, Error> {
        getrandom::u64().map_err(|error| self.failed(io::Error::other(error)))
    }

    /// Opens a stream of a process. What is written goes to the process, and shutting the writing half down is the end of
    /// its input; what is read comes from it. Closing a stream of output is for the process what a closed pipe is, and
    /// closing a terminal's hangs it up.
    pub fn open_stream(&self, id: u64) -> Result<UnixStream, Error> {
        let deadline = Deadline::after(self.patience);
        let mut stream = dial(&self.socket, self.ended.as_ref(), deadline)?;
        stream.write_all(&Greeting::Stream(id).to_bytes()).map_err(|error| self.failed(error))?;
        Ok(stream)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Connection { path: self.socket.clone(), source }
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        let deadline = Deadline::after(self.patience);
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(Some((&self.stream, PollFlags::OUT)), self.ended.as_ref(), deadline)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Err(Error::Closed),
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    /// Reads once what has come, and sorts it; false if there is nothing.
    fn take_messages(&mut self) -> Result<bool, Error> {
        match self.assembler.fill(&mut self.stream) {
            Ok(0) if self.assembler.is_within_frame() => return Err(frame::Error::Ended.into()),
            Ok(0) => return Err(Error::Closed),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(Error::Closed),
            Err(error) => return Err(self.failed(error)),
        }
        while let Some(message) = self.assembler.take::<FromAgent>()? {
            match message {
                FromAgent::Reply(id, reply) if self.pending.remove(&id) => {
                    self.replies.insert(id, reply);
                }
                FromAgent::Reply(..) => return Err(Error::Unexpected("an answer that nobody asked for")),
                FromAgent::Event(event) => {
                    let (Event::Exited { container, .. } | Event::OutOfMemory { container }) = &event;
                    if container.len() > ContainerSpec::ID_BYTES_MAX {
                        return Err(Error::Unexpected("an event of a container that cannot be"));
                    }
                    if self.events.len() == EVENTS_MAX {
                        return Err(Error::Unexpected("more events than can wait"));
                    }
                    self.events.push_back(event);
                }
            }
        }
        Ok(true)
    }
}

impl AsFd for Client {
    /// Can be read when an answer or an event has come, or the connection has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// When to give up.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Option<Instant>,
    patience: Duration,
}

impl Deadline {
    fn after(patience: Option<Duration>) -> Self {
        let at = patience.and_then(|patience| Instant::now().checked_add(patience));
        Self { at, patience: patience.unwrap_or_default() }
    }

    /// This one, or after `patience` if that is sooner.
    fn min(self, patience: Duration) -> Self {
        let other = Self::after(Some(patience));
        if self.at.is_none_or(|at| other.at.is_some_and(|other| other < at)) { other } else { self }
    }

    fn is_over(self) -> bool {
        self.at.is_some_and(|at| at <= Instant::now())
    }
}

/// Waits until a stream is ready; an error if the VM ends or the time is over before.
fn wait(
    stream: Option<(&UnixStream, PollFlags)>,
    ended: Option<&OwnedFd>,
    deadline: Deadline,
) -> Result<(), Error> {
    let mut fds: Vec<_> = stream.iter().map(|(stream, flags)| PollFd::new(stream, *flags)).collect();
    fds.extend(ended.map(|ended| PollFd::new(ended, PollFlags::IN)));
    loop {
        let left = deadline.at.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => return Err(Error::Patience(deadline.patience)),
            // What has come is read first: the last words of a VM that has ended.
            Ok(_) if stream.is_some() && !fds[0].revents().is_empty() => return Ok(()),
            Ok(_) => return Err(Error::Ended),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::Wait(error.into())),
        }
    }
}

/// Connects to the agent's port through the vsock device. The stream waits when it is read.
fn dial(socket: &Path, ended: Option<&OwnedFd>, deadline: Deadline) -> Result<UnixStream, Error> {
    let at = |source| Error::Connection { path: socket.into(), source };
    let mut stream = UnixStream::connect(socket).map_err(at)?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).map_err(at)?;
    let mut answer = Vec::new();
    // Byte by byte: what follows belongs to whoever gets the stream.
    while answer.last() != Some(&b'\n') {
        wait(Some((&stream, PollFlags::IN)), ended, deadline)?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(Error::Closed),
            Ok(_) if answer.len() < ANSWER_BYTES_MAX => answer.extend_from_slice(&byte),
            Ok(_) => return Err(Error::Unexpected("no greeting of a vsock device")),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(at(error)),
        }
    }
    if !answer.starts_with(b"OK ") {
        return Err(Error::Unexpected("no greeting of a vsock device"));
    }
    Ok(stream)
}

/// Ends the writing half of a stream; one that has ended already is no error.
fn end_writing(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests;
