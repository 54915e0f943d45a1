//! A stream between a process and the host: a pipe or a terminal on one side, a connection on the other.
//!
//! What one side does not take stays on the other: at most one buffer of it is here. So a process whose output nobody
//! reads waits, and a host that sends more than a process reads waits, too.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;
use rustix::io::{Errno, read, write};
use rustix::net::{SendFlags, send};

/// Bytes that are moved at once.
pub const CHUNK_BYTES: usize = 64 << 10;

/// Which way a stream goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the host to a process.
    Input,
    /// From a process to the host.
    Output,
    /// Both ways.
    Terminal,
}

/// What waits for one side to take it.
#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    start: usize,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.start >= self.bytes.len()
    }

    fn left(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    fn taken(&mut self, len: usize) {
        self.start += len;
        if self.is_empty() {
            // Most streams are never in want of one.
            *self = Self::default();
        }
    }

    fn set(&mut self, bytes: &[u8]) {
        *self = Self { bytes: bytes.to_vec(), start: 0 };
    }
}

/// One of a stream's two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The process's.
    Process,
    /// The host's.
    Host,
}

/// A stream.
pub struct Stream {
    kind: Kind,
    /// Whose it is: container and process.
    pub owner: (String, u32),
    /// The agent's end of the pipe, or the terminal.
    end: Option<OwnedFd>,
    /// The host's connection.
    socket: Option<OwnedFd>,
    to_host: Waiting,
    to_process: Waiting,
    /// Nothing more comes from the host.
    input_ended: bool,
    /// Nothing more comes from the process.
    output_ended: bool,
    /// The process has ended; what it has written is still on its way.
    process_ended: bool,
    /// All that it has written has been handed over; what others write is thrown away.
    drained: bool,
}

impl Stream {
    /// A stream whose connection has yet to come.
    pub fn new(kind: Kind, owner: (String, u32), end: OwnedFd) -> Self {
        Self {
            kind,
            owner,
            end: Some(end),
            socket: None,
            to_host: Waiting::default(),
            to_process: Waiting::default(),
            input_ended: kind == Kind::Output,
            output_ended: kind == Kind::Input,
            process_ended: false,
            drained: false,
        }
    }

    /// The host has opened it. False if it has been open, or is at its end.
    pub fn attach(&mut self, socket: OwnedFd) -> bool {
        if self.socket.is_some() || self.drained || self.end.is_none() && self.to_host.is_empty() {
            return false;
        }
        self.socket = Some(socket);
        true
    }

    /// The process has ended. What waits for it is of no use, and what it has written is all there is.
    pub fn end_process(&mut self) {
        self.process_ended = true;
        self.input_ended = true;
        self.to_process = Waiting::default();
        if self.kind == Kind::Input {
            self.close();
            self.drained = true;
        }
    }

    /// Whether the host does not have to wait for more of what the process has written: it has been handed over, or nobody
    /// has opened the stream.
    pub fn is_settled(&self) -> bool {
        self.drained || self.socket.is_none()
    }

    /// The terminal.
    pub fn terminal(&self) -> Option<BorrowedFd<'_>> {
        self.end.as_ref().filter(|_| self.kind == Kind::Terminal).map(AsFd::as_fd)
    }

    /// What to wait for.
    pub fn interests(&self) -> impl Iterator<Item = (Side, BorrowedFd<'_>, PollFlags)> {
        let end = self.end.as_ref().map(AsFd::as_fd);
        let socket = self.socket.as_ref().map(AsFd::as_fd);
        let mut of_end = PollFlags::empty();
        let mut of_socket = PollFlags::empty();
        // Without a connection output waits in the pipe, unless nobody shall have it.
        let reads_end = self.drained || socket.is_some() && self.to_host.is_empty();
        of_end.set(PollFlags::IN, !self.output_ended && reads_end);
        of_end.set(PollFlags::OUT, !self.to_process.is_empty());
        of_socket.set(PollFlags::OUT, !self.to_host.is_empty());
        let reads_socket = if self.kind == Kind::Output {
            // Nothing comes, but the end of the connection does.
            !self.process_ended
        } else {
            !self.input_ended && self.to_process.is_empty()
        };
        of_socket.set(PollFlags::IN, reads_socket);
        let interest = |side, fd: Option<_>, flags: PollFlags| {
            fd.filter(|_| !flags.is_empty()).map(|fd| (side, fd, flags))
        };
        [interest(Side::Process, end, of_end), interest(Side::Host, socket, of_socket)].into_iter().flatten()
    }

    /// Moves what can be moved. `scratch` is a buffer of [`CHUNK_BYTES`].
    pub fn serve(&mut self, side: Side, ready: PollFlags, scratch: &mut [u8]) {
        let readable = ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        let writable = ready.intersects(PollFlags::OUT | PollFlags::HUP | PollFlags::ERR);
        match side {
            Side::Host => {
                if writable && !self.to_host.is_empty() {
                    self.flush_to_host();
                }
                if readable {
                    self.read_from_host(scratch);
                }
            }
            Side::Process => {
                if writable && !self.to_process.is_empty() {
                    self.flush_to_process();
                }
                if readable {
                    self.read_from_process(scratch);
                }
            }
        }
        self.settle(scratch);
    }

    /// After the process's end: reads until there is nothing, and ends the connection when all of it has been taken.
    pub fn settle(&mut self, scratch: &mut [u8]) {
        while self.process_ended && !self.drained && self.socket.is_some() && self.to_host.is_empty() {
            if self.output_ended || !self.read_from_process(scratch) {
                self.drained = true;
                self.socket = None;
            }
        }
        if self.output_ended && self.to_host.is_empty() && self.kind == Kind::Output {
            self.drained = true;
            self.close();
        }
    }

    /// Reads from the process and sends at once what the host takes; false if there was nothing.
    fn read_from_process(&mut self, scratch: &mut [u8]) -> bool {
        let Some(end) = &self.end else { return false };
        let len = match read(end, &mut *scratch) {
            Ok(0) => 0,
            Ok(len) => len,
            Err(Errno::INTR) => return true,
            Err(Errno::AGAIN) => return false,
            // What a terminal says when all of its users are gone.
            Err(_) => 0,
        };
        let bytes = scratch.get(..len).unwrap_or_default();
        if bytes.is_empty() {
            self.output_ended = true;
            // The pipe's end, which has nothing more to say.
            self.end = None;
            return false;
        }
        if !self.drained {
            let sent = self.send(bytes);
            let rest = bytes.get(sent..).unwrap_or_default();
            if !rest.is_empty() && self.socket.is_some() {
                self.to_host.set(rest);
            }
        }
        true
    }

    /// Sends what the connection takes. One that has failed is closed.
    fn send(&mut self, bytes: &[u8]) -> usize {
        let Some(socket) = &self.socket else { return 0 };
        match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(Errno::CONNRESET) => {
                self.lose_host(bytes);
                0
            }
            Err(_) => {
                self.leave_host();
                0
            }
        }
    }

    fn flush_to_host(&mut self) {
        let waiting = std::mem::take(&mut self.to_host);
        let sent = self.send(waiting.left());
        if self.to_host.is_empty() && self.socket.is_some() {
            self.to_host = waiting;
            self.to_host.taken(sent);
        }
    }

    fn read_from_host(&mut self, scratch: &mut [u8]) {
        let Some(socket) = &self.socket else { return };
        match read(socket, &mut *scratch) {
            Ok(0) if self.kind == Kind::Output => self.leave_host(),
            // Either the host types no more, or it is gone: then nothing can be sent to it.
            Ok(0) if self.kind == Kind::Terminal && send(socket, &[], SendFlags::NOSIGNAL).is_err() => {
                self.leave_host();
            }
            Ok(0) => self.end_input(),
            // An output's host has nothing to say.
            Ok(_) if self.kind == Kind::Output => {}
            Ok(len) => {
                self.to_process.set(scratch.get(..len).unwrap_or_default());
                self.flush_to_process();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::CONNRESET) => self.lose_host(&[]),
            Err(_) => self.leave_host(),
        }
    }

    fn flush_to_process(&mut self) {
        let Some(end) = &self.end else { return };
        match write(end, self.to_process.left()) {
            Ok(len) => self.to_process.taken(len),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // It has closed its input.
            Err(_) => {
                self.to_process = Waiting::default();
                self.end_input();
            }
        }
        if self.input_ended && self.to_process.is_empty() && self.kind == Kind::Input {
            self.close();
        }
    }

    fn end_input(&mut self) {
        self.input_ended = true;
        if self.kind == Kind::Input && self.to_process.is_empty() {
            self.close();
        }
    }

    /// The host has closed the stream: to the process that is a closed pipe, or a terminal that hangs up.
    fn leave_host(&mut self) {
        self.close();
        self.to_host = Waiting::default();
        self.to_process = Waiting::default();
        self.output_ended = true;
        self.input_ended = true;
        self.drained = true;
    }

    /// The connection is lost and not closed, as when a VM is restored from a snapshot: the host can open it again.
    fn lose_host(&mut self, unsent: &[u8]) {
        self.socket = None;
        if self.to_host.is_empty() && !unsent.is_empty() {
            self.to_host.set(unsent);
        }
    }

    fn close(&mut self) {
        self.end = None;
        self.socket = None;
    }
}

#[cfg(test)]
mod tests;
