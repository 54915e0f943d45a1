//! A supervisor's clients: connections that send requests and get what the container prints.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::protocol::{CHUNK_BYTES, Event, FRAME_BYTES_MAX, Request};
use crate::container::log::Source;
use crate::guest::frame::{Assembler, encode};

/// Bytes that may wait for a client before the container has to wait for it.
const BACKLOG_BYTES: usize = 256 << 10;
/// Clients at most; further ones wait to be accepted.
const CLIENTS_MAX: usize = 256;

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    assembler: Assembler,
    output: VecDeque<u8>,
    attached: bool,
    /// Whether the container's input ends with this client's.
    pub closes_stdin: bool,
    gone: bool,
    /// Whether the last word was said: the client goes when it has it.
    last: bool,
}

impl Client {
    /// Makes the client get the container's output.
    pub fn attach(&mut self, closes_stdin: bool) {
        self.attached = true;
        self.closes_stdin = closes_stdin;
    }

    /// Sends a message, as soon as the client takes it.
    pub fn send(&mut self, event: &Event) {
        match encode(event, FRAME_BYTES_MAX) {
            Ok(bytes) => self.output.extend(bytes),
            Err(_) => self.gone = true,
        }
        self.flush();
    }

    /// The next request that has come whole.
    pub fn next_request(&mut self) -> Option<Request> {
        match self.assembler.take() {
            Ok(request) => request,
            // Whoever sends nonsense is no client.
            Err(_) => {
                self.gone = true;
                None
            }
        }
    }

    /// Takes what the client has sent.
    pub fn fill(&mut self) {
        match self.assembler.fill(&mut self.stream) {
            Ok(0) => self.gone = true,
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.gone = true,
        }
    }

    /// Sends what waits.
    pub fn flush(&mut self) {
        while !self.output.is_empty() && !self.gone {
            match self.stream.write(self.output.as_slices().0) {
                Ok(len) => drop(self.output.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.gone = true,
            }
        }
    }

    /// Whether something waits to be sent.
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Whether the connection has ended.
    pub fn is_gone(&self) -> bool {
        self.gone || self.last && self.output.is_empty()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// All clients of a supervisor.
#[derive(Debug)]
pub struct Clients {
    listener: UnixListener,
    /// The connections.
    pub all: Vec<Client>,
}

impl Clients {
    /// Those who connect to `listener`, which must not wait.
    pub fn new(listener: UnixListener) -> Clients {
        Clients { listener, all: vec![] }
    }

    /// What can be read when somebody wants to become a client.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        (self.all.len() < CLIENTS_MAX).then(|| self.listener.as_fd())
    }

    /// Adds a connection.
    pub fn add(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_ok() {
            self.all.push(Client {
                stream,
                assembler: Assembler::new(FRAME_BYTES_MAX),
                output: VecDeque::new(),
                attached: false,
                closes_stdin: false,
                gone: false,
                last: false,
            });
        }
    }

    /// Takes whoever wants to become a client.
    pub fn accept(&mut self) {
        while self.all.len() < CLIENTS_MAX {
            match self.listener.accept() {
                Ok((stream, _)) => self.add(stream),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Whether all who get the container's output can take more of it.
    pub fn keep_up(&self) -> bool {
        self.all.iter().all(|client| !client.attached || client.gone || client.output.len() < BACKLOG_BYTES)
    }

    /// Sends the container's output to whoever is attached.
    pub fn output(&mut self, source: Source, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK_BYTES) {
            let event = match source {
                Source::Stdout => Event::Stdout(chunk.to_vec()),
                Source::Stderr => Event::Stderr(chunk.to_vec()),
            };
            self.all.iter_mut().filter(|client| client.attached).for_each(|client| client.send(&event));
        }
    }

    /// Sends a message to everybody.
    pub fn tell(&mut self, event: &Event) {
        self.all.iter_mut().for_each(|client| client.send(event));
    }

    /// Sends the last message to everybody.
    pub fn dismiss(&mut self, event: &Event) {
        self.tell(event);
        self.all.iter_mut().for_each(|client| client.last = true);
    }

    /// Lets go of those who have gone; true if one of them held the container's input.
    pub fn sweep(&mut self) -> bool {
        let held = self.all.iter().any(|client| client.is_gone() && client.closes_stdin);
        self.all.retain(|client| !client.is_gone());
        held
    }

    /// Whether somebody has not got all that was said.
    pub fn have_output(&self) -> bool {
        self.all.iter().any(|client| client.has_output() && !client.gone)
    }
}

/// Reads what is there; `None` at the end of the stream.
pub fn read_some(stream: &mut impl Read, buffer: &mut [u8]) -> Option<usize> {
    loop {
        return match stream.read(buffer) {
            Ok(0) => None,
            Ok(len) => Some(len),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Some(0),
            // A terminal that nobody holds open any more.
            Err(_) => None,
        };
    }
}
