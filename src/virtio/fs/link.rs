//! The socket to a file server: FUSE requests out, replies in, none of it waited for.
//!
//! A message is framed by the length that FUSE puts first. Requests carry a number of ours instead of the guest's, by
//! which the reply finds its request, so a guest cannot confuse two requests, nor the server two guests' sessions.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::fuse;

/// Requests are collected up to this size before they are written.
const COLLECT_BYTES: usize = 64 << 10;
/// Bytes that are read from the socket at once.
const ROOM_BYTES: usize = 64 << 10;

/// Why a file server is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// It has ended.
    #[error("the file server has ended")]
    Ended,
    /// The socket failed.
    #[error("the file server cannot be reached")]
    Socket(#[source] io::Error),
    /// What it says is no FUSE reply.
    #[error("the file server sends what is no reply")]
    Nonsense,
}

/// The header of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ReplyHeader {
    /// Length of the whole reply.
    pub(super) len: u32,
    /// 0, or a negative error number.
    pub(super) error: i32,
    /// The request's number.
    pub(super) unique: u64,
}

impl ReplyHeader {
    /// The bytes of it.
    pub(super) fn bytes(self) -> [u8; fuse::OUT_HEADER_BYTES] {
        let number =
            u128::from(self.len) | u128::from(self.error as u32) << 32 | u128::from(self.unique) << 64;
        number.to_le_bytes()
    }

    fn parse(bytes: [u8; fuse::OUT_HEADER_BYTES]) -> Self {
        let number = u128::from_le_bytes(bytes);
        Self { len: number as u32, error: (number >> 32) as i32, unique: (number >> 64) as u64 }
    }
}

/// A piece of a reply.
pub(super) enum Piece<'a> {
    /// A reply begins.
    Header(ReplyHeader),
    /// More of its body.
    Body(&'a [u8]),
}

/// The socket and what waits on both sides of it.
pub(super) struct Link {
    stream: UnixStream,
    outgoing: Vec<u8>,
    /// Bytes of `outgoing` that are written.
    sent: usize,
    room: Vec<u8>,
    /// Where in `room` the bytes are that were read and not yet handed on.
    start: usize,
    end: usize,
    /// Bytes that are left of the reply's body.
    body_left: usize,
}

impl Link {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, outgoing: Vec::new(), sent: 0, room: Vec::new(), start: 0, end: 0, body_left: 0 }
    }

    /// From here on nothing waits. Before, whoever has started the server waits for its first word.
    pub(super) fn start(&self) -> io::Result<()> {
        self.stream.set_nonblocking(true)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Whether no request should be added before some are written.
    pub(super) fn is_full(&self) -> bool {
        self.outgoing.len() - self.sent >= COLLECT_BYTES
    }

    /// Adds a request of `len` bytes, which `fill` writes; on failure it is not added.
    pub(super) fn add<E>(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.sent == self.outgoing.len() {
            self.outgoing.clear();
            self.sent = 0;
        } else if self.sent >= COLLECT_BYTES {
            self.outgoing.drain(..self.sent);
            self.sent = 0;
        }
        let start = self.outgoing.len();
        self.outgoing.resize(start + len, 0);
        let filled = fill(self.outgoing.get_mut(start..).unwrap_or_default());
        if filled.is_err() {
            self.outgoing.truncate(start);
        }
        filled
    }

    /// Writes as much as the socket takes.
    pub(super) fn write(&mut self) -> Result<(), Error> {
        while let Some(rest) = self.outgoing.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(Error::Ended),
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(Error::Ended),
                Err(error) => return Err(Error::Socket(error)),
            }
        }
        // What one large request needed is given back.
        self.outgoing.clear();
        self.outgoing.shrink_to(2 * COLLECT_BYTES);
        self.sent = 0;
        Ok(())
    }

    /// Hands on what has come; false if nothing more is there now.
    pub(super) fn read(
        &mut self,
        mut each: impl FnMut(Piece<'_>) -> Result<(), Error>,
    ) -> Result<bool, Error> {
        self.room.resize(ROOM_BYTES, 0);
        let room = self.room.get_mut(self.end..).unwrap_or_default();
        match self.stream.read(room) {
            Ok(0) => return Err(Error::Ended),
            Ok(len) => self.end += len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Error::Ended),
            Err(error) => return Err(Error::Socket(error)),
        }
        while let Some(piece) = self.next_piece()? {
            match piece {
                Next::Header(header) => each(Piece::Header(header))?,
                Next::Body(from, to) => each(Piece::Body(self.room.get(from..to).unwrap_or_default()))?,
            }
        }
        // Less than a header is left.
        self.room.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        Ok(true)
    }

    fn next_piece(&mut self) -> Result<Option<Next>, Error> {
        let bytes = self.room.get(self.start..self.end).unwrap_or_default();
        if self.body_left > 0 {
            let len = bytes.len().min(self.body_left);
            let from = self.start;
            self.body_left -= len;
            self.start += len;
            return Ok((len > 0).then_some(Next::Body(from, from + len)));
        }
        let Some(header) = bytes.first_chunk().copied().map(ReplyHeader::parse) else { return Ok(None) };
        let body_len = (header.len as usize).checked_sub(fuse::OUT_HEADER_BYTES).ok_or(Error::Nonsense)?;
        let legal_error = (-4095..=0).contains(&header.error) && (header.error == 0 || body_len == 0);
        if header.len as usize > fuse::REPLY_BYTES_MAX || !legal_error {
            return Err(Error::Nonsense);
        }
        self.start += fuse::OUT_HEADER_BYTES;
        self.body_left = body_len;
        Ok(Some(Next::Header(header)))
    }

    /// Waits until the socket takes or has something.
    pub(super) fn wait(&self) -> Result<(), Error> {
        let mut wanted = PollFlags::POLLIN;
        wanted.set(PollFlags::POLLOUT, self.sent < self.outgoing.len());
        match nix::poll::poll(&mut [PollFd::new(self.stream.as_fd(), wanted)], PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(Error::Socket(error.into())),
        }
    }
}

enum Next {
    Header(ReplyHeader),
    /// From and to in the room.
    Body(usize, usize),
}
