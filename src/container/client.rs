//! A connection to a container's supervisor.

use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::roots::Roots;
use super::supervisor::protocol::{Event, FRAME_BYTES_MAX, Request};
use crate::guest::frame::{self, Assembler, encode};

/// Why a supervisor could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection.
    #[error("cannot talk to the container's supervisor")]
    Host(#[from] io::Error),
    /// What came is no message.
    #[error("the container's supervisor makes no sense")]
    Message(#[from] frame::Error),
    /// It has ended without saying how the container has.
    #[error("the container's supervisor has ended")]
    Gone,
    /// It refuses.
    #[error("{0}")]
    Refused(String),
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    assembler: Assembler,
}

impl Connection {
    /// Over a stream whose other end a supervisor has.
    pub fn over(stream: UnixStream) -> Connection {
        Connection { stream, assembler: Assembler::new(FRAME_BYTES_MAX) }
    }

    /// To the supervisor of the container `id`; `None` if there is none.
    pub fn open(roots: &Roots, id: &str) -> Result<Option<Connection>, Error> {
        match UnixStream::connect(roots.container_run(id).join("control.sock")) {
            Ok(stream) => Ok(Some(Connection::over(stream))),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a request.
    pub fn send(&mut self, request: &Request) -> Result<(), Error> {
        let bytes = encode(request, FRAME_BYTES_MAX)?;
        match self.stream.write_all(&bytes) {
            // What it said last can still be read.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Waits for the next event.
    pub fn next_event(&mut self) -> Result<Event, Error> {
        loop {
            if let Some(event) = self.buffered_event()? {
                return Ok(event);
            }
            self.fill()?;
        }
    }

    /// The next event that has come already.
    pub fn buffered_event(&mut self) -> Result<Option<Event>, Error> {
        Ok(self.assembler.take()?)
    }

    /// Takes what has come, and waits if there is nothing.
    pub fn fill(&mut self) -> Result<(), Error> {
        match self.assembler.fill(&mut self.stream) {
            Ok(0) => Err(Error::Gone),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(Error::Gone),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends a request and waits until it has been carried out.
    pub fn call(&mut self, request: &Request) -> Result<(), Error> {
        self.send(request)?;
        loop {
            match self.next_event()? {
                Event::Done => return Ok(()),
                Event::Refused(why) => return Err(Error::Refused(why)),
                // It has ended by itself meanwhile.
                Event::Exited(_) | Event::Failed { .. } => return Err(Error::Gone),
                _ => {}
            }
        }
    }

    /// Waits for the container's end, and returns its exit code.
    pub fn wait(&mut self) -> Result<u8, Error> {
        loop {
            match self.next_event()? {
                Event::Exited(code) | Event::Failed { code, .. } => return Ok(code),
                _ => {}
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
