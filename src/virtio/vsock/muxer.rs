//! All connections of a device: packets of the guest on one side, streams of the host on the other.
//!
//! Fair: connections that have something to say take turns, a packet each. Bounded: in the number of connections, in
//! what each may have waiting, and in answers that the guest does not fetch.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use super::connection::{Connection, Phase, Say};
use super::packet::Header;
use crate::virtio::spec::vsock::{HEADER_BYTES, HOST_CID, PORT_ANY, TYPE_STREAM, op, shutdown};
use crate::virtio::{Reader, Writer};

/// Connections at once.
pub const CONNECTIONS_MAX: usize = 1024;
/// Answers that wait for the guest to fetch them, beyond those to connections that were open.
const RESETS_MAX: usize = 1024;
/// Room for the guest's data on the first connections, and on those that are opened when there are as many: with a
/// slow host program behind each, 46 MiB in all.
const WIDE: u32 = 256 << 10;
const WIDE_MAX: usize = 64;
const NARROW: u32 = 32 << 10;
/// Largest data packet for the guest.
const PACKET_BYTES_MAX: u32 = 64 << 10;
/// The first port that the host's ends of its own connections get.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Attempts to reach a host program that has too many callers, each after [`Host::call_again`].
const ATTEMPTS_MAX: u32 = 200;

/// A stream to a program on the host. None of this blocks.
pub trait Stream {
    /// Reads at most as many bytes as fit; 0 at the end of data.
    fn read(&mut self, to: Writer<'_>) -> io::Result<usize>;
    /// Writes bytes of the guest.
    fn write(&mut self, from: Reader<'_>) -> io::Result<usize>;
    /// Writes bytes.
    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize>;
    /// The guest receives, or sends, no more.
    fn shut_down(&mut self, end: End);
}

/// A direction of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// To the guest.
    ToGuest,
    /// From the guest.
    FromGuest,
}

/// Where streams come from.
pub trait Host {
    /// Its streams.
    type Stream: Stream;

    /// Reaches the program that listens for the guest at `port`. [`io::ErrorKind::WouldBlock`]: not now.
    fn connect(&mut self, port: u32) -> io::Result<Self::Stream>;

    /// Reports from now on when the stream of `key` can be read or has ended, and with `writable` when it can be
    /// written to.
    fn watch(&mut self, key: Key, stream: &Self::Stream, writable: bool) -> io::Result<()>;

    /// Changes whether it is reported that the stream can be written to.
    fn rewatch(&mut self, key: Key, stream: &Self::Stream, writable: bool) -> io::Result<()>;

    /// Has [`Muxer::call_again`] called some milliseconds later.
    fn call_again(&mut self);
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Port on the guest's side.
    pub guest: u32,
    /// Port on the host's side.
    pub host: u32,
}

/// What a stream can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There are bytes, or the end of them.
    pub readable: bool,
    /// There is room for bytes.
    pub writable: bool,
    /// Neither direction works any more, but for bytes that wait.
    pub ended: bool,
}

/// A connection with its stream, which a snapshot does not keep.
struct Entry<S> {
    connection: Connection,
    stream: Option<S>,
    readable: bool,
    ended: bool,
    /// It is watched for being writable.
    blocked: bool,
    /// Its turn is to come.
    queued: bool,
    /// The end from the guest was passed on.
    write_shut: bool,
    attempts: u32,
}

/// A packet that ends what the guest takes for a connection.
#[derive(Clone, Copy)]
struct Reset {
    cid: u64,
    key: Key,
    kind: u16,
}

/// All connections.
pub struct Muxer<S> {
    guest_cid: u64,
    entries: BTreeMap<Key, Entry<S>>,
    turns: VecDeque<Key>,
    resets: VecDeque<Reset>,
    wide: usize,
    next_port: u32,
}

impl<S: Stream> Muxer<S> {
    /// No connections yet, of the guest with this address.
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            entries: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            wide: 0,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the guest that wait for the host, in all.
    pub fn waiting_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.connection.backlog_len()).sum()
    }

    /// The port that the host's next connection gets, if it is free.
    pub fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with that port, so that new connections are not taken for those that the guest still remembers.
    pub fn go_on_at(&mut self, port: u32) {
        self.next_port = port.clamp(FIRST_HOST_PORT, PORT_ANY - 1);
    }

    /// Ends all connections at once, without a word to the guest.
    pub fn clear(&mut self) {
        // Ports go on, so that a late packet meets no new connection.
        *self = Self { next_port: self.next_port, ..Self::new(self.guest_cid) };
    }

    /// Takes a packet from the guest: its header, and the bytes behind it.
    pub fn from_guest(&mut self, host: &mut impl Host<Stream = S>, header: &Header, data: &Reader<'_>) {
        if header.src_cid != self.guest_cid {
            return tracing::debug!(cid = header.src_cid, "vsock packet with another sender than this guest");
        }
        let key = Key { guest: header.src_port, host: header.dst_port };
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM || key.host == PORT_ANY {
            return self.refuse(header);
        }
        let Some(entry) = self.entries.get_mut(&key) else {
            return match header.op {
                op::REQUEST => self.request(host, key, header),
                _ => self.refuse(header),
            };
        };
        entry.connection.take_credit(header);
        let legal = match (entry.connection.phase(), header.op) {
            (_, op::RST) => {
                self.reset_by_guest(key);
                true
            }
            (Phase::Orphaned, _) => {
                self.refuse(header);
                true
            }
            (Phase::Requested, op::RESPONSE) => self.answered(key),
            (Phase::Open, op::RW) => self.data(key, header, data),
            (Phase::Open, op::SHUTDOWN) => {
                entry.guest_shuts(header.flags);
                true
            }
            (Phase::Open, op::CREDIT_REQUEST) => {
                entry.connection.owe_credit();
                true
            }
            (Phase::Open, op::CREDIT_UPDATE) => true,
            _ => false,
        };
        if !legal {
            tracing::debug!(?key, op = header.op, "vsock connection reset: not a packet for its state");
            self.reset(key);
        }
        self.settle(host, key);
    }

    /// Writes the next packet for the guest; returns its length, or `None` if there is nothing to say.
    pub fn to_guest(&mut self, host: &mut impl Host<Stream = S>, packet: &Writer<'_>) -> Option<u32> {
        if packet.remaining() <= HEADER_BYTES {
            return Some(0);
        }
        let Ok((mut head, body)) = packet.split_at(HEADER_BYTES) else { return Some(0) };
        let mut header =
            Header { src_cid: HOST_CID, dst_cid: self.guest_cid, kind: TYPE_STREAM, ..Header::default() };
        loop {
            if let Some(reset) = self.resets.pop_front() {
                (header.src_cid, header.kind, header.op) = (reset.cid, reset.kind, op::RST);
                (header.src_port, header.dst_port) = (reset.key.host, reset.key.guest);
                break;
            }
            let key = self.turns.pop_front()?;
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            entry.queued = false;
            (header.op, header.flags, header.len) = match entry.connection.next(entry.readable) {
                None => continue,
                Some(Say::Control(op, flags)) => (op, flags, 0),
                Some(Say::Data(credit)) => match entry.read(&body, credit.min(PACKET_BYTES_MAX)) {
                    Ok(0) => {
                        self.settle(host, key);
                        continue;
                    }
                    Ok(len) => (op::RW, 0, len),
                    Err(error) => {
                        tracing::debug!(?key, %error, "vsock connection reset by the host");
                        self.reset(key);
                        continue;
                    }
                },
            };
            (header.src_port, header.dst_port) = (key.host, key.guest);
            entry.connection.said(&mut header);
            self.settle(host, key);
            break;
        }
        match header.write(&mut head) {
            Ok(()) => Some(HEADER_BYTES + header.len),
            Err(_) => Some(0),
        }
    }

    /// A program on the host has called the guest's `port`; its stream is dropped if that cannot be.
    pub fn from_host(&mut self, host: &mut impl Host<Stream = S>, stream: S, port: u32) {
        let Some(key) = self.free_key(port) else {
            return tracing::debug!(port, "vsock connection to the guest refused: there are too many");
        };
        if let Err(error) = host.watch(key, &stream, false) {
            return tracing::warn!(port, %error, "cannot watch a vsock connection");
        }
        let window = self.window();
        self.insert(key, Entry::new(Connection::requested(window), Some(stream)));
        self.settle(host, key);
    }

    /// A stream has changed.
    pub fn ready(&mut self, host: &mut impl Host<Stream = S>, key: Key, now: Readiness) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.readable |= now.readable;
        if now.ended {
            entry.ended = true;
            entry.readable = true;
            // What the host has written last still goes to the guest.
            entry.connection.host_shuts(shutdown::RECEIVE);
            if entry.connection.phase() == Phase::Requested {
                self.reset(key);
            }
        } else if now.writable {
            entry.flush();
        }
        self.settle(host, key);
    }

    /// Calls those host programs again that had too many callers.
    pub fn call_again(&mut self, host: &mut impl Host<Stream = S>) {
        let waiting = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.connection.phase() == Phase::Waiting)
            .map(|(key, _)| *key);
        for key in waiting.collect::<Vec<_>>() {
            self.call(host, key);
            self.settle(host, key);
        }
    }

    /// The guest calls the host.
    fn request(&mut self, host: &mut impl Host<Stream = S>, key: Key, header: &Header) {
        if self.entries.len() >= CONNECTIONS_MAX || self.resets.len() >= RESETS_MAX {
            tracing::debug!(?key, "vsock connection to the host refused: there are too many");
            return self.refuse(header);
        }
        let window = self.window();
        self.insert(key, Entry::new(Connection::waiting(window, header), None));
        self.call(host, key);
        self.settle(host, key);
    }

    fn call(&mut self, host: &mut impl Host<Stream = S>, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let called = host.connect(key.host).and_then(|stream| {
            host.watch(key, &stream, false)?;
            Ok(stream)
        });
        match called {
            Ok(stream) => {
                entry.stream = Some(stream);
                entry.connection.accept();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && entry.attempts < ATTEMPTS_MAX => {
                entry.attempts += 1;
                host.call_again();
            }
            Err(error) => {
                tracing::debug!(port = key.host, %error, "vsock connection refused by the host");
                self.reset(key);
            }
        }
    }

    /// The guest has taken the host's call.
    fn answered(&mut self, key: Key) -> bool {
        let Some(entry) = self.entries.get_mut(&key) else { return true };
        if !entry.connection.is_known_to_guest() {
            return false;
        }
        entry.connection.accepted();
        let greeting = format!("OK {}\n", key.host);
        let written = entry.stream.as_mut().map(|stream| stream.write_bytes(greeting.as_bytes()));
        matches!(written, Some(Ok(len)) if len == greeting.len())
    }

    fn data(&mut self, key: Key, header: &Header, data: &Reader<'_>) -> bool {
        let Some(entry) = self.entries.get_mut(&key) else { return true };
        let Ok((data, _)) = data.split_at(header.len) else { return false };
        match entry.connection.receive(header.len) {
            Ok(()) => entry.write(&data),
            Err(violation) => {
                tracing::debug!(?key, %violation, "vsock connection reset");
                false
            }
        }
    }

    fn reset_by_guest(&mut self, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        // A guest that had sent all does not wait for ever that a slow host takes it.
        if entry.connection.guest_shut() & shutdown::SEND != 0 && entry.connection.has_backlog() {
            entry.connection.orphan();
        } else {
            self.remove(key);
        }
    }

    /// Ends a connection; the guest is told if it knows of it.
    fn reset(&mut self, key: Key) {
        if let Some(entry) = self.remove(key)
            && entry.connection.is_known_to_guest()
            && entry.connection.phase() != Phase::Orphaned
        {
            self.resets.push_back(Reset { cid: HOST_CID, key, kind: TYPE_STREAM });
        }
    }

    /// Tells the guest that there is no such connection (§5.10.6.4.2). One that does not fetch answers gets no more.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST && self.resets.len() < RESETS_MAX {
            let key = Key { guest: header.src_port, host: header.dst_port };
            self.resets.push_back(Reset { cid: header.dst_cid, key, kind: header.kind });
        }
    }

    /// After any change of a connection: passes on what follows from it.
    fn settle(&mut self, host: &mut impl Host<Stream = S>, key: Key) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        let (guest_shut, backlog) = (entry.connection.guest_shut(), entry.connection.has_backlog());
        if guest_shut & shutdown::SEND != 0 && !backlog && !std::mem::replace(&mut entry.write_shut, true) {
            entry.shut_down(End::FromGuest);
        }
        let orphaned = entry.connection.phase() == Phase::Orphaned;
        if !backlog && (orphaned || guest_shut == shutdown::BOTH) {
            return self.reset(key);
        }
        if entry.ended && guest_shut & shutdown::RECEIVE != 0 {
            // What the host has written last is for nobody.
            entry.connection.host_shuts(shutdown::SEND);
        }
        if entry.connection.host_shut() == shutdown::BOTH {
            entry.stream = None;
            entry.readable = false;
        }
        if let Some(stream) = &entry.stream
            && entry.blocked != backlog
        {
            entry.blocked = backlog;
            if let Err(error) = host.rewatch(key, stream, backlog) {
                tracing::warn!(?key, %error, "cannot watch a vsock connection");
                return self.reset(key);
            }
        }
        if !entry.queued && entry.connection.next(entry.readable).is_some() {
            entry.queued = true;
            self.turns.push_back(key);
        }
    }

    fn insert(&mut self, key: Key, entry: Entry<S>) {
        self.wide += usize::from(entry.connection.window() == WIDE);
        self.entries.insert(key, entry);
    }

    fn remove(&mut self, key: Key) -> Option<Entry<S>> {
        let entry = self.entries.remove(&key)?;
        self.wide -= usize::from(entry.connection.window() == WIDE);
        if entry.queued {
            self.turns.retain(|turn| *turn != key);
        }
        Some(entry)
    }

    /// What a new connection promises the guest.
    fn window(&self) -> u32 {
        if self.wide < WIDE_MAX { WIDE } else { NARROW }
    }

    /// A name for a connection to the guest's `port`, if there may be one more.
    fn free_key(&mut self, port: u32) -> Option<Key> {
        if self.entries.len() >= CONNECTIONS_MAX || self.resets.len() >= RESETS_MAX {
            return None;
        }
        loop {
            let key = Key { guest: port, host: self.next_port };
            self.next_port =
                if self.next_port >= PORT_ANY - 1 { FIRST_HOST_PORT } else { self.next_port + 1 };
            if !self.entries.contains_key(&key) {
                return Some(key);
            }
        }
    }
}

impl<S: Stream> Entry<S> {
    fn new(connection: Connection, stream: Option<S>) -> Self {
        Self {
            connection,
            stream,
            readable: false,
            ended: false,
            blocked: false,
            queued: false,
            write_shut: false,
            attempts: 0,
        }
    }

    /// Reads at most `max` bytes from the host into a packet; 0 if there are none now.
    fn read(&mut self, body: &Writer<'_>, max: u32) -> io::Result<u32> {
        let room = max.min(body.remaining());
        let Some(stream) = self.stream.as_mut().filter(|_| room > 0) else {
            self.readable = false;
            return Ok(0);
        };
        let (body, _) = body.split_at(room).map_err(|_| io::ErrorKind::InvalidInput)?;
        match stream.read(body) {
            Ok(0) => {
                self.readable = false;
                let both = if self.ended { shutdown::BOTH } else { shutdown::SEND };
                self.connection.host_shuts(both);
                Ok(0)
            }
            // Whether there is more is known when a read fails.
            Ok(len) => Ok(len as u32),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    /// Passes the guest's bytes on, or keeps them; false if they cannot be read.
    fn write(&mut self, data: &Reader<'_>) -> bool {
        let len = data.remaining();
        let mut written = 0;
        if self.connection.host_shut() & shutdown::RECEIVE != 0 {
            written = len;
        } else if !self.connection.has_backlog()
            && let Some(stream) = &mut self.stream
        {
            written = match stream.write(data.clone()) {
                Ok(written) => len.min(written as u32),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.connection.host_shuts(shutdown::RECEIVE);
                    len
                }
            };
        }
        self.connection.forward(written);
        let Ok((_, mut rest)) = data.split_at(written) else { return false };
        self.connection.keep(&mut rest)
    }

    /// Passes on what was kept.
    fn flush(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        while self.connection.has_backlog() {
            match stream.write_bytes(self.connection.backlog()) {
                Ok(0) => return,
                Ok(len) => self.connection.drain(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.connection.host_shuts(shutdown::RECEIVE),
            }
        }
    }

    fn guest_shuts(&mut self, flags: u32) {
        let before = self.connection.guest_shut();
        self.connection.guest_shuts(flags);
        if self.connection.guest_shut() & !before & shutdown::RECEIVE != 0 {
            self.readable = false;
            self.shut_down(End::ToGuest);
        }
    }

    fn shut_down(&mut self, end: End) {
        if let Some(stream) = &mut self.stream {
            stream.shut_down(end);
        }
    }
}

#[cfg(test)]
#[path = "muxer_tests.rs"]
mod tests;
