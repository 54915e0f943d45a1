//! The far end of the guest's connections: answers ARP, and TCP on port 80 by smoltcp.
//!
//! Ethernet is not smoltcp's affair here: there is one guest on the wire, so each answer goes to where the last frame
//! came from, and no neighbour is ever looked for. What the guest can have open and in flight is bounded; what is beyond
//! that is lost, or refused, as on a wire.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Time;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::Service;
use super::http::{self, REQUEST_BYTES_MAX};
use crate::metrics::mmds as counters;

/// Bytes at the start of a frame that say whether it is for the service: Ethernet's header and an ARP packet.
pub const HEAD_BYTES: usize = ETHERNET_BYTES + ARP_BYTES;

const ETHERNET_BYTES: usize = 14;
const ARP_BYTES: usize = 28;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet, IPv4, and the lengths of their addresses.
const ARP_KIND: [u8; 6] = [0, 1, 0x08, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: [u8; 2] = [0, 2];

/// The service's Ethernet address: Firecracker's.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
const PORT: u16 = 80;
/// Bytes of an IP packet at most.
const MTU: usize = 1500;
/// Connections at once.
const CONNECTIONS_MAX: usize = 30;
/// Frames that wait for the guest.
const FRAMES_MAX: usize = 64;
/// What each connection has for what is on its way.
const RECEIVE_BYTES: usize = REQUEST_BYTES_MAX;
const SEND_BYTES: usize = 8192;
/// A connection on which nothing moves as long as this is given up. Guests may be slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// One on which nothing moves as long as this makes room, if there is none for another.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);

/// The service's end of one network device.
pub struct Stack {
    service: Arc<Service>,
    address: Ipv4Addr,
    /// Where the last frame came from.
    guest: [u8; 6],
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    wire: Wire,
    began: Instant,
}

struct Connection {
    socket: SocketHandle,
    request: Vec<u8>,
    answer: Vec<u8>,
    /// Bytes of the answer that smoltcp has.
    sent: usize,
    last: bool,
    /// Nobody has come yet.
    fresh: bool,
    /// When something moved, since somebody came.
    moved: Duration,
}

/// What smoltcp takes for a network device.
#[derive(Default)]
struct Wire {
    /// An IP packet from the guest.
    incoming: Option<Vec<u8>>,
    /// IP packets to it.
    outgoing: VecDeque<Vec<u8>>,
}

impl Stack {
    /// An end for a device, with an address on its guest's network.
    pub fn new(service: Arc<Service>, address: Ipv4Addr) -> Result<Self, getrandom::Error> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from_le_bytes(seed);
        let mut wire = Wire::default();
        let mut interface = Interface::new(config, &mut wire, Time::ZERO);
        interface.update_ip_addrs(|addresses| {
            // All addresses are the guest's. There is room for one.
            let _ = addresses.push(IpCidr::new(address.into(), 0));
        });
        Ok(Self {
            service,
            address,
            guest: [0; 6],
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            wire,
            began: Instant::now(),
        })
    }

    /// Whether a frame that begins so is for the service.
    pub fn wants(&self, head: &[u8]) -> bool {
        let target = match head.get(12..ETHERNET_BYTES) {
            Some(kind) if kind == ETHERTYPE_IPV4 => 30..34,
            Some(kind) if kind == ETHERTYPE_ARP => 38..42,
            _ => return false,
        };
        head.get(target).is_some_and(|target| target == self.address.octets())
    }

    /// Takes a frame from the guest.
    pub fn receive(&mut self, frame: &[u8]) {
        let Some((header, packet)) = frame.split_at_checked(ETHERNET_BYTES) else { return };
        if !self.wants(frame) || self.wire.outgoing.len() >= FRAMES_MAX {
            counters::LOST.add(1);
            return;
        }
        counters::RECEIVED.add(1);
        if let Some(source) = header.get(6..12).and_then(|source| source.first_chunk()) {
            self.guest = *source;
        }
        if header.get(12..) == Some(&ETHERTYPE_ARP) {
            let reply = self.arp_reply(packet);
            self.wire.outgoing.extend(reply);
            return;
        }
        self.wire.incoming = Some(packet.to_vec());
        self.poll();
    }

    /// What an ARP packet is answered with, if it is a question.
    fn arp_reply(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let packet: &[u8; ARP_BYTES] = packet.first_chunk()?;
        let (kind, rest) = packet.split_at(ARP_KIND.len());
        let (operation, rest) = rest.split_at(ARP_REQUEST.len());
        if kind != ARP_KIND || operation != ARP_REQUEST {
            return None;
        }
        // Who asks is the target of the answer.
        let (asker, _) = rest.split_at(10);
        Some([&ARP_KIND[..], &ARP_REPLY, &MAC, &self.address.octets(), asker].concat())
    }

    /// Carries on with what is due.
    pub fn poll(&mut self) {
        let now = self.began.elapsed();
        self.give_up(now);
        loop {
            self.listen(now);
            self.interface.poll(time(now), &mut self.wire, &mut self.sockets);
            if !self.serve(now) {
                return;
            }
        }
    }

    /// When [`Self::poll`] is to be called again, if it is at all; not while frames wait that fill the wire.
    pub fn due(&mut self) -> Option<Duration> {
        let now = self.began.elapsed();
        let patience = |connection: &Connection| (connection.moved + PATIENCE).saturating_sub(now);
        let silent = self.connections.iter().filter(|connection| !connection.fresh).map(patience).min();
        if self.wire.outgoing.len() >= FRAMES_MAX {
            return silent;
        }
        let due = self.interface.poll_delay(time(now), &self.sockets);
        due.map(Duration::from).into_iter().chain(silent).min()
    }

    /// The next frame for the guest, behind so many bytes for whoever hands it over.
    pub fn frame(&self, room: usize) -> Option<Vec<u8>> {
        let packet = self.wire.outgoing.front()?;
        let kind = if packet.starts_with(&ARP_KIND) { ETHERTYPE_ARP } else { ETHERTYPE_IPV4 };
        Some([&*vec![0; room], &self.guest, &MAC, &kind, packet].concat())
    }

    /// Takes note that the guest has it, or never will.
    pub fn sent(&mut self) {
        if self.wire.outgoing.pop_front().is_some() {
            counters::SENT.add(1);
        }
        if self.wire.outgoing.len() + 1 == FRAMES_MAX {
            // Others may have waited for the place.
            self.poll();
        }
    }

    /// Forgets all connections: the guest's driver begins anew.
    pub fn reset(&mut self) {
        self.connections.clear();
        self.sockets = SocketSet::new(Vec::new());
        self.wire = Wire::default();
    }

    /// Goes on as if so much time had passed: for tests and fuzz targets.
    #[doc(hidden)]
    pub fn advance(&mut self, time: Duration) {
        self.began = self.began.checked_sub(time).unwrap_or(self.began);
        self.poll();
    }

    /// Ends connections on which nothing moves.
    fn give_up(&mut self, now: Duration) {
        for connection in &self.connections {
            let socket = self.sockets.get_mut::<Socket<'_>>(connection.socket);
            if !connection.fresh && now.saturating_sub(connection.moved) >= PATIENCE {
                socket.abort();
            }
        }
    }

    /// Sees to it that another connection can be taken, if there may be one more.
    fn listen(&mut self, now: Duration) {
        let listens =
            |connection: &Connection| self.sockets.get::<Socket<'_>>(connection.socket).is_listening();
        if self.connections.iter().any(listens) {
            return;
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            let oldest = self.connections.iter().min_by_key(|connection| connection.moved);
            if let Some(oldest) = oldest.filter(|oldest| now.saturating_sub(oldest.moved) >= SHORT_PATIENCE) {
                // Makes room when it has said so, for the next attempt.
                self.sockets.get_mut::<Socket<'_>>(oldest.socket).abort();
            }
            return;
        }
        let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
        let mut socket = Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // Fails only for port 0, and for a socket that is open.
        if socket.listen(PORT).is_ok() {
            let socket = self.sockets.add(socket);
            let (request, answer) = (Vec::new(), Vec::new());
            self.connections.push(Connection {
                socket,
                request,
                answer,
                sent: 0,
                last: false,
                fresh: true,
                moved: now,
            });
        }
    }

    /// Reads requests and writes answers; returns whether there is something to send.
    fn serve(&mut self, now: Duration) -> bool {
        let Self { service, sockets, connections, .. } = self;
        let mut moved = false;
        connections.retain_mut(|connection| {
            let socket = sockets.get_mut::<Socket<'_>>(connection.socket);
            if socket.is_open() {
                moved |= connection.serve(service, socket, now);
                return true;
            }
            counters::CONNECTIONS.add(1);
            sockets.remove(connection.socket);
            false
        });
        moved
    }
}

impl Connection {
    fn serve(&mut self, service: &Service, socket: &mut Socket<'_>, now: Duration) -> bool {
        if socket.is_listening() {
            return false;
        }
        // It may have waited for long.
        let mut moved = std::mem::take(&mut self.fresh);
        loop {
            // Nothing more is read before what was asked for is on its way.
            if self.answer.is_empty() && !self.last {
                moved |= self.read(socket);
                if let Some(served) = http::serve(service, &self.request).filter(|_| !self.request.is_empty())
                {
                    counters::REQUESTS.add(1);
                    self.request.drain(..served.taken.min(self.request.len()));
                    (self.answer, self.sent, self.last) = (served.answer, 0, served.last);
                }
            }
            let rest = self.answer.get(self.sent..).unwrap_or_default();
            let sent = if socket.can_send() { socket.send_slice(rest).unwrap_or(0) } else { 0 };
            self.sent += sent;
            moved |= sent > 0;
            if self.answer.is_empty() || self.sent < self.answer.len() {
                break;
            }
            self.answer = Vec::new();
        }
        let said_all = self.last || socket.state() == State::CloseWait && !socket.can_recv();
        if said_all && self.answer.is_empty() && socket.may_send() {
            socket.close();
            moved = true;
        }
        if moved {
            self.moved = now;
        }
        moved
    }

    fn read(&mut self, socket: &mut Socket<'_>) -> bool {
        let before = self.request.len();
        while socket.can_recv() && self.request.len() < REQUEST_BYTES_MAX {
            let room = REQUEST_BYTES_MAX - self.request.len();
            let request = &mut self.request;
            let taken = socket.recv(|bytes| {
                let part = bytes.get(..room).unwrap_or(bytes);
                request.extend_from_slice(part);
                (part.len(), part.len())
            });
            if !taken.is_ok_and(|taken| taken > 0) {
                break;
            }
        }
        self.request.len() > before
    }
}

/// smoltcp's time.
fn time(now: Duration) -> Time {
    Time::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Time) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Time) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < FRAMES_MAX).then_some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // The guest leaves its own to whoever comes last, which is nobody here.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct Outgoing<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut packet = vec![0; len];
        let result = fill(&mut packet);
        self.0.push_back(packet);
        result
    }
}

#[cfg(test)]
#[path = "stack_tests.rs"]
mod tests;
