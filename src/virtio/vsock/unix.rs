//! The host's side: unix sockets.
//!
//! A program on the host connects to the socket, writes `CONNECT PORT\n` and reads `OK HOSTPORT\n` when the guest has
//! accepted. A guest that connects to the host's port P reaches the socket whose path is this one's with `_P` behind it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::muxer::{End, Host, Key, Readiness, Stream};
use crate::sandbox;
use crate::socket::SocketFile;
use crate::virtio::spec::vsock::PORT_ANY;
use crate::virtio::{Reader, Writer};

/// Bytes that a socket's path may have so that a port's number still fits behind it (`sun_path` has 108 with its end).
pub const PATH_BYTES_MAX: usize = 107 - "_4294967295".len();

/// Programs that have connected and not said where to; beyond that the oldest is dropped.
const GREETINGS_MAX: usize = 256;
/// `CONNECT 4294967295\n`, and what blanks somebody may put there.
const GREETING_BYTES_MAX: usize = 32;
/// The shortest one, `CONNECT 1\n`, so that as many bytes can be read at once.
const GREETING_BYTES_MIN: usize = 10;
/// Events that are taken at once.
const EVENTS: usize = 64;
/// Connections that are taken at once.
const ACCEPT_BATCH: usize = 32;
/// When to try again what the host could not do for lack of descriptors, or of room at a listener.
const RETRY: Duration = Duration::from_millis(10);

/// Event data: a connection's [`Key`], or one of these with a port that no connection has.
const LISTENER: u64 = PORT_ANY as u64;
const TIMER: u64 = 1 << 32 | PORT_ANY as u64;
const FIRST_GREETING: u64 = 2;

/// What has happened on the host.
#[derive(Debug)]
pub enum Event {
    /// A connection's stream has changed.
    Ready(Key, Readiness),
    /// A program wants to reach the guest's port.
    Call(UnixStream, u32),
    /// What was to be tried again can be.
    Retry,
}

/// The socket that programs on the host connect to.
pub struct UnixHost {
    listener: UnixListener,
    file: SocketFile,
    /// While the driver is ready.
    watched: Option<Watched>,
}

struct Watched {
    epoll: Epoll,
    timer: TimerFd,
    greetings: BTreeMap<u64, Greeting>,
    next_greeting: u64,
    /// The listener is not looked at until the timer ends.
    deaf: bool,
    /// The log says that already.
    said_deaf: bool,
}

/// A program that has connected and not yet said where to.
struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

/// What a greeting has come to.
enum Greeted {
    Incomplete,
    Port(u32),
    /// It ended, or is none.
    Wrong,
}

impl UnixHost {
    /// Listens at `path`. To be called while there is one thread only.
    pub fn listen(path: &Path) -> Result<Self, crate::socket::Error> {
        let (listener, file) = crate::socket::listen(path)?;
        Ok(Self { listener, file, watched: None })
    }

    /// Starts to look at the socket; [`Self::fd`] can be read from then on when [`Self::take_events`] has something.
    pub fn start(&mut self) -> io::Result<()> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        epoll.add(&self.listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        let next_greeting = FIRST_GREETING;
        let greetings = BTreeMap::new();
        self.watched =
            Some(Watched { epoll, timer, greetings, next_greeting, deaf: false, said_deaf: false });
        Ok(())
    }

    /// Ends that, and drops those that have not said where to.
    pub fn stop(&mut self) {
        self.watched = None;
    }

    /// What to wait on.
    pub fn fd(&self) -> Option<RawFd> {
        self.watched.as_ref().map(|watched| watched.epoll.0.as_raw_fd())
    }

    /// Takes what has happened, or a part of it: then the descriptor can be read still.
    pub fn take_events(&mut self) -> Vec<Event> {
        let mut happened = Vec::new();
        let Some(watched) = &mut self.watched else { return happened };
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = watched.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
        for event in events.iter().take(count) {
            let flags = event.events();
            match event.data() {
                LISTENER => watched.accept(&self.listener),
                TIMER => {
                    watched.rest_is_over(&self.listener);
                    happened.push(Event::Retry);
                }
                data if data as u32 == PORT_ANY => happened.extend(watched.greet(data)),
                data => {
                    let ended = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
                    let readable = flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP);
                    let writable = flags.contains(EpollFlags::EPOLLOUT);
                    let key = Key { guest: (data >> 32) as u32, host: data as u32 };
                    happened.push(Event::Ready(key, Readiness { readable, writable, ended }));
                }
            }
        }
        happened
    }

    fn control(
        &self,
        key: Key,
        stream: &UnixStream,
        writable: bool,
        call: impl Fn(&Epoll, &UnixStream, EpollEvent) -> nix::Result<()>,
    ) -> io::Result<()> {
        // By edge: the connection remembers, so that one whose peer is slow costs no wake-ups.
        let mut flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        flags.set(EpollFlags::EPOLLOUT, writable);
        let watched = self.watched.as_ref().ok_or(ErrorKind::NotConnected)?;
        let event = EpollEvent::new(flags, u64::from(key.guest) << 32 | u64::from(key.host));
        Ok(call(&watched.epoll, stream, event)?)
    }
}

impl Watched {
    fn accept(&mut self, listener: &UnixListener) {
        for _ in 0..ACCEPT_BATCH {
            match listener.accept() {
                Ok((stream, _)) => self.add_greeting(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    if !std::mem::replace(&mut self.said_deaf, true) {
                        tracing::warn!(%error, "connections to the vsock device's socket have to wait");
                    }
                    self.deaf = true;
                    let _ = self.epoll.modify(listener, &mut EpollEvent::new(EpollFlags::empty(), LISTENER));
                    return self.rest();
                }
            }
        }
    }

    fn add_greeting(&mut self, stream: UnixStream) {
        let token = self.next_greeting << 32 | u64::from(PORT_ANY);
        // The number is reused after 2^32 - 2 others.
        self.next_greeting = (self.next_greeting + 1) % (1 << 32);
        self.next_greeting = self.next_greeting.max(FIRST_GREETING);
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, token);
        if let Err(error) = stream.set_nonblocking(true).and_then(|()| Ok(self.epoll.add(&stream, event)?)) {
            return tracing::warn!(%error, "cannot watch a connection to the vsock device's socket");
        }
        if self.greetings.len() >= GREETINGS_MAX {
            self.greetings.pop_first();
        }
        self.greetings.insert(token, Greeting { stream, line: Vec::new() });
    }

    /// Reads on in a greeting.
    fn greet(&mut self, token: u64) -> Option<Event> {
        let greeted = self.greetings.get_mut(&token)?.read();
        if matches!(greeted, Greeted::Incomplete) {
            return None;
        }
        let greeting = self.greetings.remove(&token)?;
        let Greeted::Port(port) = greeted else {
            tracing::debug!(line = %greeting.line.escape_ascii(), "not the greeting of a vsock connection");
            return None;
        };
        // Under another name it is watched again.
        self.epoll.delete(&greeting.stream).ok()?;
        Some(Event::Call(greeting.stream, port))
    }

    fn rest(&self) {
        let soon = Expiration::OneShot(RETRY.into());
        if let Err(error) = self.timer.set(soon, TimerSetTimeFlags::empty()) {
            tracing::warn!(%error, "cannot set the vsock device's timer");
        }
    }

    fn rest_is_over(&mut self, listener: &UnixListener) {
        let _ = self.timer.wait();
        if std::mem::take(&mut self.deaf) {
            let _ = self.epoll.modify(listener, &mut EpollEvent::new(EpollFlags::EPOLLIN, LISTENER));
        }
    }
}

impl Greeting {
    /// Reads up to the end of the line and not a byte further, since those are for the guest.
    fn read(&mut self) -> Greeted {
        let mut buffer = [0; GREETING_BYTES_MIN];
        loop {
            let max = GREETING_BYTES_MIN.saturating_sub(self.line.len()).max(1);
            let part = buffer.get_mut(..max).unwrap_or_default();
            match Read::read(&mut self.stream, part) {
                Ok(0) => return Greeted::Wrong,
                Ok(len) => self.line.extend(part.iter().take(len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Greeted::Incomplete,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Greeted::Wrong,
            }
            if let Some((b'\n', line)) = self.line.split_last() {
                return parse_greeting(line).map_or(Greeted::Wrong, Greeted::Port);
            }
            if self.line.len() >= GREETING_BYTES_MAX || self.line.contains(&b'\n') {
                return Greeted::Wrong;
            }
        }
    }
}

/// The port in `CONNECT PORT`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (verb, port) = (words.next()?, words.next()?);
    let port = port.parse().ok().filter(|port| *port != PORT_ANY)?;
    (verb.eq_ignore_ascii_case("CONNECT") && words.next().is_none()).then_some(port)
}

/// Connects without waiting for room at the listener.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

impl Host for UnixHost {
    type Stream = UnixStream;

    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let path = self.file.path();
        let name = path.file_name().filter(|_| sandbox::is_jailed());
        let mut path = name.unwrap_or(path.as_os_str()).to_owned();
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }

    fn watch(&mut self, key: Key, stream: &UnixStream, writable: bool) -> io::Result<()> {
        self.control(key, stream, writable, |epoll, stream, event| epoll.add(stream, event))
    }

    fn rewatch(&mut self, key: Key, stream: &UnixStream, writable: bool) -> io::Result<()> {
        self.control(key, stream, writable, |epoll, stream, mut event| epoll.modify(stream, &mut event))
    }

    fn call_again(&mut self) {
        if let Some(watched) = &self.watched {
            watched.rest();
        }
    }
}

impl Stream for UnixStream {
    fn read(&mut self, to: Writer<'_>) -> io::Result<usize> {
        let mut transfer = Transfer::default();
        to.for_each_slice(|mut slice| transfer.step(slice.len(), || self.as_fd().read_volatile(&mut slice)))
            .map_err(|_| ErrorKind::InvalidInput)?;
        transfer.result()
    }

    fn write(&mut self, from: Reader<'_>) -> io::Result<usize> {
        let mut transfer = Transfer::default();
        from.for_each_slice(|slice| transfer.step(slice.len(), || self.as_fd().write_volatile(&slice)))
            .map_err(|_| ErrorKind::InvalidInput)?;
        transfer.result()
    }

    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize> {
        Write::write(self, from)
    }

    fn shut_down(&mut self, end: End) {
        let how = match end {
            End::ToGuest => std::net::Shutdown::Read,
            End::FromGuest => std::net::Shutdown::Write,
        };
        // Fails if the other side is gone, which is noticed elsewhere.
        let _ = UnixStream::shutdown(self, how);
    }
}

/// Several system calls that count as one.
#[derive(Default)]
struct Transfer {
    total: usize,
    over: bool,
    error: Option<io::Error>,
}

impl Transfer {
    /// Makes the next call, for `len` bytes, unless one before it fell short.
    fn step(&mut self, len: usize, mut call: impl FnMut() -> Result<usize, VolatileMemoryError>) {
        while !self.over {
            match call() {
                Ok(done) => {
                    self.total += done;
                    self.over = done < len;
                    return;
                }
                Err(VolatileMemoryError::IOError(error)) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.over = true;
                    self.error = Some(match error {
                        VolatileMemoryError::IOError(error) => error,
                        other => io::Error::other(other),
                    });
                }
            }
        }
    }

    fn result(self) -> io::Result<usize> {
        match self.error {
            Some(error) if self.total == 0 => Err(error),
            _ => Ok(self.total),
        }
    }
}
