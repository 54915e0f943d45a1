//! The container's standard streams, as the supervisor holds them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::clients::read_some;
use crate::container::backend::Streams;
use crate::container::log::Source;

/// Bytes that are read at once.
const BUFFER_BYTES: usize = 64 << 10;
/// Bytes of input that may wait before clients have to.
const INPUT_BYTES: usize = 64 << 10;

/// The host's ends of a container's standard streams.
#[derive(Debug)]
pub struct Pipes {
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
    terminal: bool,
    input: VecDeque<u8>,
    /// Whether input ends when what waits was written.
    input_ends: bool,
    buffer: Vec<u8>,
}

impl Pipes {
    /// Takes the streams of a container with or without a terminal.
    pub fn new(streams: Streams, terminal: bool) -> std::io::Result<Pipes> {
        let file = |fd| -> std::io::Result<File> {
            let file = File::from(fd);
            fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
            Ok(file)
        };
        Ok(Pipes {
            stdin: streams.stdin.map(file).transpose()?,
            stdout: Some(file(streams.stdout)?),
            stderr: streams.stderr.map(file).transpose()?,
            terminal,
            input: VecDeque::new(),
            input_ends: false,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// A stream of output, until its end.
    pub fn output(&self, source: Source) -> Option<BorrowedFd<'_>> {
        let file = if source == Source::Stdout { &self.stdout } else { &self.stderr };
        file.as_ref().map(AsFd::as_fd)
    }

    /// What can be written to when input waits.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input_file().filter(|_| !self.input.is_empty()).map(AsFd::as_fd)
    }

    fn input_file(&self) -> Option<&File> {
        if self.terminal { self.stdout.as_ref() } else { self.stdin.as_ref() }
    }

    /// Whether clients may send more input.
    pub fn take_input(&self) -> bool {
        self.input.len() < INPUT_BYTES
    }

    /// Input for the container.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.input_file().is_some() && !self.input_ends {
            self.input.extend(bytes);
            self.flush();
        }
    }

    /// The end of input. A terminal has none.
    pub fn end_input(&mut self) {
        if !self.terminal {
            self.input_ends = true;
            self.flush();
        }
    }

    /// Writes what waits.
    pub fn flush(&mut self) {
        while !self.input.is_empty() {
            let Some(mut file) = self.input_file() else { break };
            match file.write(self.input.as_slices().0) {
                Ok(len) => drop(self.input.drain(..len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Nobody reads it any more.
                Err(_) => {
                    self.input.clear();
                    self.stdin = None;
                }
            }
        }
        if self.input_ends
            && self.input.is_empty()
            && let Some(stdin) = self.stdin.take()
        {
            // A socket's other half may be in use; a pipe says that it is no socket.
            let _ = rustix::net::shutdown(&stdin, rustix::net::Shutdown::Write);
        }
    }

    /// Reads a stream of output once.
    pub fn read(&mut self, source: Source) -> Option<&[u8]> {
        let file = if source == Source::Stdout { &mut self.stdout } else { &mut self.stderr };
        let read = file.as_mut().map(|file| read_some(file, &mut self.buffer))?;
        if read.is_none() {
            *file = None;
        }
        self.buffer.get(..read.unwrap_or(0))
    }

    /// Whether all output has come.
    pub fn are_at_end(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none()
    }
}
