//! Connections of the host: the greeting, and frames in both directions.

use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::{Errno, read};
use rustix::net::{SendFlags, send};
use rvmm::guest::frame::{Assembler, GREETING_BYTES, Greeting, REPLY_BYTES_MAX, REQUEST_BYTES_MAX, encode};
use rvmm::guest::protocol::{FromAgent, ToAgent};

/// Bytes that may wait for a host that does not read; a connection beyond that is closed.
const WAITING_BYTES_MAX: usize = 4 * REPLY_BYTES_MAX;

/// A connection that has not yet said what it is.
pub struct Greeter {
    socket: OwnedFd,
    bytes: [u8; GREETING_BYTES],
    len: usize,
}

/// What a greeting has come to.
pub enum Greeted {
    /// More has to come.
    Incomplete,
    /// It has ended, or is none.
    Wrong,
    /// It is whole.
    As(Greeting),
}

impl Greeter {
    /// A new connection.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, bytes: [0; GREETING_BYTES], len: 0 }
    }

    /// What to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Reads what has come of the greeting, and nothing behind it.
    pub fn read(&mut self) -> Greeted {
        let Some(rest) = self.bytes.get_mut(self.len..) else { return Greeted::Wrong };
        match read(&self.socket, rest) {
            Ok(0) => Greeted::Wrong,
            Ok(len) => {
                self.len += len;
                if self.len < GREETING_BYTES {
                    return Greeted::Incomplete;
                }
                Greeting::from_bytes(&self.bytes).map_or(Greeted::Wrong, Greeted::As)
            }
            Err(Errno::AGAIN | Errno::INTR) => Greeted::Incomplete,
            Err(_) => Greeted::Wrong,
        }
    }

    /// The connection, for what it has said.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }
}

/// Reads from a descriptor as [`Assembler`] wants it.
struct Reader<'a>(BorrowedFd<'a>);

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        Ok(read(self.0, buffer)?)
    }
}

/// A connection for frames.
pub struct Control {
    socket: OwnedFd,
    assembler: Assembler,
    waiting: Vec<u8>,
    /// Whether the first request has come and was answered.
    pub greeted: bool,
    /// Whether it gets events.
    pub events: bool,
    /// It is to be closed.
    pub broken: bool,
}

impl Control {
    /// A connection whose greeting has been read.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            assembler: Assembler::new(REQUEST_BYTES_MAX),
            waiting: Vec::new(),
            greeted: false,
            events: false,
            broken: false,
        }
    }

    /// What to wait for.
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        let mut flags = PollFlags::IN;
        flags.set(PollFlags::OUT, !self.waiting.is_empty());
        (self.socket.as_fd(), flags)
    }

    /// The requests that have come whole. A connection that says something else is broken.
    pub fn receive(&mut self) -> Vec<ToAgent> {
        let mut requests = Vec::new();
        loop {
            match self.assembler.fill(&mut Reader(self.socket.as_fd())) {
                Ok(0) => self.broken = true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return requests,
                Err(_) => self.broken = true,
            }
            while !self.broken {
                match self.assembler.take() {
                    Ok(Some(request)) => requests.push(request),
                    Ok(None) => break,
                    Err(_) => self.broken = true,
                }
            }
            if self.broken {
                return requests;
            }
        }
    }

    /// Sends a message, now or when the host reads.
    pub fn send(&mut self, message: &FromAgent) {
        match encode(message, REPLY_BYTES_MAX) {
            Ok(bytes) if self.waiting.len() + bytes.len() <= WAITING_BYTES_MAX => {
                self.waiting.extend_from_slice(&bytes);
                self.flush();
            }
            _ => self.broken = true,
        }
    }

    /// Sends what waits, as far as the host reads.
    pub fn flush(&mut self) {
        while !self.waiting.is_empty() && !self.broken {
            match send(&self.socket, &self.waiting, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(len) => {
                    self.waiting.drain(..len);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.broken = true,
            }
        }
    }
}
