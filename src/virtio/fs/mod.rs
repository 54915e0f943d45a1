//! The file system device (virtio 1.2 §5.11): passes a guest's FUSE requests on to a file server in another process.
//!
//! Requests and replies are copied through a socket, so the server sees nothing of the guest's memory, and the monitor
//! needs no right to anybody's files. When the server ends, requests fail with `EIO` and the VM goes on.

mod link;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};

use self::link::{Error, Link, Piece, ReplyHeader};
use super::Chain;
use super::chain::TooShort;
use super::device::{Activation, Completion, Completions, Device, Handled, Source};
use super::spec::fs::{ID, TAG_BYTES};
use super::state::{DeviceState, RestoreError};
use crate::fuse::{self, opcode};
use crate::memory::Ram;
use crate::sandbox;

/// Size of the queue for what must not wait behind other requests.
const HIGH_PRIORITY_SIZE: u16 = 128;
/// Size of a request queue: a request of the longest kind has 256 pages and some descriptors more.
const REQUEST_SIZE: u16 = 512;

/// How a file system device looks to its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsOptions {
    /// The name by which the guest mounts it, of 1 to 36 bytes.
    pub tag: String,
    /// Number of request queues.
    pub queues: u16,
}

/// What a snapshot keeps of a file system device. Which files a guest has open is the server's to know, so there is none of one
/// that was mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    tag: String,
}

/// A file system device with a file server behind it.
pub struct Fs {
    tag: [u8; TAG_BYTES],
    queue_sizes: Vec<u16>,
    /// `None` when the server is given up.
    link: Option<Link>,
    pending: Pending,
    /// The request whose reply's body is coming in.
    current: Option<Current>,
    /// The socket may have something to read, as far as is known.
    readable: bool,
    /// While the driver is ready.
    active: Option<Activation>,
    /// The server has been asked for something, and may remember it.
    asked: bool,
}

/// A request that the server has.
struct Request {
    queue: u16,
    chain: Chain,
    /// The guest's number for it.
    unique: u64,
}

/// A request whose reply is coming in.
struct Current {
    request: Request,
    /// Bytes that are written to the chain.
    written: u32,
    /// All bytes of the reply.
    len: u32,
}

/// Requests that the server has, by the number that they have there.
#[derive(Default)]
struct Pending {
    slots: Vec<Slot>,
    free: VecDeque<u32>,
}

#[derive(Default)]
struct Slot {
    request: Option<Request>,
    /// Grows with each request, so that the reply to one that was given up belongs to no other.
    generation: u32,
}

impl Pending {
    /// A place, and the number of the request that will be there.
    fn reserve(&mut self) -> (u32, u64) {
        let index = self.free.pop_front().unwrap_or(self.slots.len() as u32);
        if index as usize == self.slots.len() {
            self.slots.push(Slot::default());
        }
        let generation = self.slots.get_mut(index as usize).map_or(0, |slot| {
            slot.generation = slot.generation.wrapping_add(1);
            slot.generation
        });
        (index, u64::from(generation) << 32 | u64::from(index))
    }

    fn fill(&mut self, index: u32, request: Request) {
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.request = Some(request);
        }
    }

    fn release(&mut self, index: u32) {
        self.free.push_back(index);
    }

    fn take(&mut self, number: u64) -> Option<Request> {
        let (index, generation) = (number as u32, (number >> 32) as u32);
        let slot = self.slots.get_mut(index as usize).filter(|slot| slot.generation == generation)?;
        let request = slot.request.take()?;
        self.free.push_back(index);
        Some(request)
    }

    fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    fn take_all(&mut self) -> Vec<Request> {
        let mut requests = vec![];
        for (index, slot) in (0..).zip(&mut self.slots) {
            if let Some(request) = slot.request.take() {
                self.free.push_back(index);
                requests.push(request);
            }
        }
        requests
    }
}

/// The number of a request that nobody waits for.
const NOBODY: u64 = u64::MAX;

impl Fs {
    /// A device for the file server at the other end of `stream`; `options.queues` of 0 count as 1.
    pub fn new(stream: UnixStream, options: &FsOptions) -> Self {
        let mut tag = [0; TAG_BYTES];
        for (to, from) in tag.iter_mut().zip(options.tag.bytes()) {
            *to = from;
        }
        let requests = usize::from(options.queues.max(1));
        let mut queue_sizes = vec![HIGH_PRIORITY_SIZE];
        queue_sizes.resize(1 + requests, REQUEST_SIZE);
        Self {
            tag,
            queue_sizes,
            link: Some(Link::new(stream)),
            pending: Pending::default(),
            current: None,
            readable: true,
            active: None,
            asked: false,
        }
    }

    /// Gives the server up: what it has fails, and so does all that comes.
    fn give_up(&mut self, error: &Error, done: &mut Completions) {
        if self.link.take().is_none() {
            return;
        }
        let tag = String::from_utf8_lossy(&self.tag);
        let tag = tag.trim_end_matches('\0');
        tracing::warn!("shared folder {tag:?}: {}; the guest sees I/O errors", crate::error_chain(error));
        let Some(active) = &self.active else { return };
        let current = self.current.take().map(|current| current.request);
        for request in current.into_iter().chain(self.pending.take_all()) {
            let written = fail(&active.ram, &request.chain, request.unique);
            done.push(Completion { queue: request.queue, chain: request.chain, written });
        }
    }

    /// Passes a request on, or says how many bytes of an answer there are already.
    fn pass_on(&mut self, queue: u16, chain: Chain) -> Handled {
        let Some(active) = &self.active else { return Handled::Done(chain, 0) };
        let ram = &active.ram;
        let mut header = [0; fuse::IN_HEADER_BYTES];
        let (opcode, unique) = match chain.reader(ram).read_exact(&mut header) {
            Ok(()) => header_fields(&header),
            Err(TooShort) => return Handled::Done(chain, 0),
        };
        let len = chain.readable_len();
        let Some(link) = self.link.as_mut().filter(|_| len as usize <= fuse::REQUEST_BYTES_MAX) else {
            let written = if fuse::has_no_reply(opcode) { 0 } else { fail(ram, &chain, unique) };
            return Handled::Done(chain, written);
        };
        // The server has one request at a time, and none can be interrupted.
        if opcode == opcode::INTERRUPT {
            return Handled::Done(chain, 0);
        }
        self.asked = true;
        let forgotten = fuse::has_no_reply(opcode);
        let (index, number) = if forgotten { (0, NOBODY) } else { self.pending.reserve() };
        let added = link.add(len as usize, |bytes| {
            chain.reader(ram).read_exact(bytes)?;
            set_header(bytes, len, number);
            // The guest can have changed it since.
            if header_fields(bytes).0 == opcode { Ok(()) } else { Err(TooShort) }
        });
        match added {
            Ok(()) if forgotten => Handled::Done(chain, 0),
            Ok(()) => {
                self.pending.fill(index, Request { queue, chain, unique });
                Handled::Deferred
            }
            Err(TooShort) => {
                if !forgotten {
                    self.pending.release(index);
                }
                let written = fail(ram, &chain, unique);
                Handled::Done(chain, written)
            }
        }
    }

    /// Reads what the server has sent; false if there is nothing more.
    fn read(&mut self, done: &mut Completions) -> Result<bool, Error> {
        let Self { link: Some(link), pending, current, active: Some(active), .. } = self else {
            return Ok(false);
        };
        link.read(|piece| {
            match piece {
                Piece::Header(header) => *current = begin(&active.ram, pending, header, done),
                Piece::Body(bytes) => {
                    if let Some(current) = current {
                        current.append(&active.ram, bytes)?;
                    }
                }
            }
            if let Some(ready) = current.take_if(|current| current.written == current.len) {
                let Request { queue, chain, .. } = ready.request;
                done.push(Completion { queue, chain, written: ready.len });
            }
            Ok(())
        })
    }

    /// Writes and reads as much as there is.
    fn exchange(&mut self, done: &mut Completions) {
        let mut exchange = || -> Result<(), Error> {
            if let Some(link) = &mut self.link {
                link.write()?;
            }
            while self.readable {
                self.readable = self.read(done)?;
            }
            Ok(())
        };
        if let Err(error) = exchange() {
            self.give_up(&error, done);
        }
    }
}

/// Finds the request that a reply is for, and writes the reply's header.
fn begin(ram: &Ram, pending: &mut Pending, header: ReplyHeader, done: &mut Completions) -> Option<Current> {
    // Of a driver that is no more.
    let request = pending.take(header.unique)?;
    let reply = ReplyHeader { unique: request.unique, ..header };
    if header.len > request.chain.writable_len() {
        let written = fail(ram, &request.chain, request.unique);
        done.push(Completion { queue: request.queue, chain: request.chain, written });
        return None;
    }
    let mut current = Current { request, written: 0, len: header.len };
    // There is room, so this cannot fail; if it did, the reply would be short.
    let _ = current.append(ram, &reply.bytes());
    Some(current)
}

impl Current {
    fn append(&mut self, ram: &Ram, bytes: &[u8]) -> Result<(), Error> {
        let rest = self.request.chain.writer(ram).split_at(self.written);
        let appended = rest.and_then(|(_, mut rest)| rest.write_all(bytes));
        self.written += bytes.len() as u32;
        appended.map_err(|TooShort| Error::Nonsense)
    }
}

/// Answers a request with an I/O error; returns the number of bytes written.
fn fail(ram: &Ram, chain: &Chain, unique: u64) -> u32 {
    let reply = ReplyHeader { len: fuse::OUT_HEADER_BYTES as u32, error: -libc::EIO, unique };
    let mut writer = chain.writer(ram);
    writer.write_all(&reply.bytes()).map_or(0, |()| writer.written())
}

/// Opcode and number of a request.
fn header_fields(bytes: &[u8]) -> (u32, u64) {
    let number = bytes.first_chunk().map_or(0, |bytes| u128::from_le_bytes(*bytes));
    ((number >> 32) as u32, (number >> 64) as u64)
}

/// Gives a request its true length, and a number.
fn set_header(bytes: &mut [u8], len: u32, unique: u64) {
    if let Some(front) = bytes.first_chunk_mut::<16>() {
        let opcode = (u128::from_le_bytes(*front) >> 32) as u32;
        *front = (u128::from(len) | u128::from(opcode) << 32 | u128::from(unique) << 64).to_le_bytes();
    }
}

impl Device for Fs {
    fn id(&self) -> u32 {
        ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `struct virtio_fs_config`, §5.11.4.
    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend((self.queue_sizes.len() as u32 - 1).to_le_bytes()); // num_request_queues
        config
    }

    fn walls(&self) -> sandbox::Kind {
        sandbox::Kind::Fs
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        if let Some(link) = &self.link {
            link.start()?;
        }
        self.active = Some(activation);
        self.readable = true;
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        // By edge: the socket is nearly always writable, and reading goes on until nothing is left.
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let link = self.link.as_ref().filter(|_| self.active.is_some());
        link.map(|link| Source { fd: link.fd(), token: 0, events }).into_iter().collect()
    }

    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        if let Some(link) = &mut self.link
            && link.is_full()
        {
            // A failure is seen again when the batch ends.
            let _ = link.write();
            if link.is_full() {
                return Handled::Wait(chain);
            }
        }
        self.pass_on(queue, chain)
    }

    fn flush(&mut self, done: &mut Completions) {
        self.exchange(done);
    }

    fn event(&mut self, _token: u32) {
        self.readable = true;
    }

    fn drain(&mut self, done: &mut Completions) {
        loop {
            self.exchange(done);
            if self.pending.is_empty() && self.current.is_none() {
                return;
            }
            let Some(link) = &self.link else { return };
            if let Err(error) = link.wait() {
                return self.give_up(&error, done);
            }
            self.readable = true;
        }
    }

    fn save(&self) -> Option<DeviceState> {
        let tag = self.tag.split(|byte| *byte == 0).next().unwrap_or_default();
        let state = || FsState { tag: String::from_utf8_lossy(tag).into_owned() };
        (!self.asked).then(|| DeviceState::Fs(state()))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        match (self.save(), state) {
            (Some(own), saved) if own == saved => Ok(()),
            _ => Err(RestoreError::Nonsense(ID)),
        }
    }

    /// The server goes on with what it has, and its replies are for nobody. It is told to forget the guest's files.
    fn stop(&mut self) {
        self.pending.take_all();
        self.current = None;
        self.active = None;
        if let Some(link) = &mut self.link {
            let len = fuse::IN_HEADER_BYTES as u32;
            let _ = link.add::<()>(len as usize, |bytes| {
                if let Some(front) = bytes.first_chunk_mut::<16>() {
                    *front = (u128::from(opcode::DESTROY) << 32).to_le_bytes();
                }
                set_header(bytes, len, NOBODY);
                Ok(())
            });
            // If it does not go now it goes with the next driver's first request.
            let _ = link.write();
        }
    }
}

#[cfg(test)]
mod tests;
