//! The network device (virtio 1.2 §5.1) on a host's tap.
//!
//! Packets are read into guest memory and written from it by the host's kernel, with the virtio header before each, so
//! checksums and segmentation are done by whoever comes last, and no byte is copied here. One thread serves all pairs
//! of queues; it waits in epoll for the tap and the driver alike.
#![allow(unsafe_code)]

mod control;
mod metadata;
mod receive;
pub mod spec;
mod vhost;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::EventSet;
use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use self::control::Command;
use self::metadata::{Looked, Metadata};
use self::receive::{Received, Receiver, Shape};
use self::spec::feature;
pub use self::vhost::Vhost;
use super::Chain;
use super::chain::TooShort;
use super::device::{Activation, Completions, Device, Handled, Handover, Source};
use super::rate::{LimitHandle, Limiter, Limits};
use super::state::{DeviceState, RestoreError};
use crate::memory::Ram;
use crate::mmds::{self, Stack};
use crate::tap::{HEADER_BYTES, Piece, Tap, offload};
use crate::{metrics, sandbox};

/// The largest packet: 64 KiB of IP behind Ethernet's header with a VLAN tag, behind the virtio header.
const MAX_PACKET_BYTES: usize = HEADER_BYTES + 18 + 65535;
/// The smallest packet that is one: an Ethernet header behind the virtio header.
const MIN_PACKET_BYTES: usize = HEADER_BYTES + 14;
/// Packets in a row that the guest has no room for, after which the next one is waited for.
const LOST_MAX: u32 = 256;
/// Size of the control queue.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Entries of the other queues.
const QUEUE_SIZE: u16 = 256;

/// What the driver takes, with what the host's kernel has to know of it.
const OFFLOADS: [(u64, u32); 6] = [
    (feature::GUEST_CSUM, offload::CSUM),
    (feature::GUEST_TSO4, offload::TSO4),
    (feature::GUEST_TSO6, offload::TSO6),
    (feature::GUEST_ECN, offload::TSO_ECN),
    (feature::GUEST_USO4, offload::USO),
    (feature::GUEST_USO6, offload::USO),
];
/// With one of these, packets may be larger than the MTU.
const LARGE: u64 = feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_USO4 | feature::GUEST_USO6;

/// Event tokens: a pair's number, or one of these.
const RECEIVE_TIMER: u32 = 1 << 16;
const TRANSMIT_TIMER: u32 = RECEIVE_TIMER + 1;
const CALL: u32 = RECEIVE_TIMER + 2;
const METADATA_TIMER: u32 = RECEIVE_TIMER + 3;

/// How a network device looks to its guest, and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// Its name in metrics.
    pub id: String,
    /// The guest's address.
    pub mac: [u8; 6],
    /// The MTU that the guest is told; `None` for the tap's.
    pub mtu: Option<u16>,
    /// Size of each queue, a power of two.
    pub queue_size: u16,
    /// Limits on what the guest receives.
    pub receive_limits: Limits,
    /// Limits on what the guest sends.
    pub transmit_limits: Limits,
}

impl NetOptions {
    /// A device with this address and all defaults.
    pub fn new(mac: [u8; 6]) -> Self {
        let (receive_limits, transmit_limits) = Default::default();
        Self { id: String::new(), mac, mtu: None, queue_size: QUEUE_SIZE, receive_limits, transmit_limits }
    }
}

/// A network device on a tap.
pub struct Net {
    tap: Tap,
    mac: [u8; 6],
    mtu: u16,
    queue_sizes: Vec<u16>,
    receive_limiter: Limiter,
    transmit_limiter: Limiter,
    vhost: Option<Vhost>,
    metadata: Option<Metadata>,
    counters: Arc<metrics::Device>,
    /// What the driver chose before the VM was restored, until the device is started.
    chosen: Option<State>,
    /// While the driver is ready.
    active: Option<Active>,
}

/// What a snapshot keeps of a network device: packets in flight are lost, as on a wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    mac: [u8; 6],
    mtu: u16,
    chosen: Option<State>,
}

struct Active {
    ram: Ram,
    features: u64,
    state: State,
    shape: Shape,
    receivers: Vec<Receiver>,
    /// The packet that is being sent.
    pieces: Vec<Piece>,
    error_logged: bool,
    /// The host's kernel serves the queues.
    handed: bool,
    /// It has asked for an interrupt.
    called: bool,
}

/// What the driver has chosen since it became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Pairs of queues that are used.
    pairs: u16,
    /// Features whose packets it takes.
    offloads: u64,
}

/// What a queue is for.
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
}

/// Passes a slice of guest memory on as a piece for the tap.
fn push_pieces(push: &mut dyn FnMut(Piece), slice: &VolatileSlice<'_>) {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the slice lies in guest memory, which the activation keeps mapped until after the last use of its pieces,
    // and to which nothing in this program holds references.
    push(unsafe { Piece::new(guard.as_ptr(), slice.len()) });
}

impl Net {
    /// A device on `tap`, with a pair of queues for each of its queues, which `vhost` serves as long as nothing limits
    /// what passes.
    pub fn new(tap: Tap, vhost: Option<Vhost>, options: &NetOptions) -> Self {
        let mut queue_sizes = vec![options.queue_size; tap.queue_count() * 2];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        Self {
            mac: options.mac,
            mtu: options.mtu.unwrap_or(tap.mtu()),
            queue_sizes,
            receive_limiter: Limiter::new(options.receive_limits),
            transmit_limiter: Limiter::new(options.transmit_limits),
            counters: metrics::Device::new("net", &*options.id, metrics::Own::Net(Box::default())),
            tap,
            vhost,
            metadata: None,
            chosen: None,
            active: None,
        }
    }

    /// Has the metadata service answer what its guest sends to it. The host's kernel knows nothing of that, so vhost-net
    /// is out of the question.
    pub fn serve_metadata(&mut self, stack: Stack) {
        self.vhost = None;
        self.metadata = Some(Metadata::new(stack));
    }

    /// What changes the limits on what the guest receives, and on what it sends.
    pub fn limit_handles(&self) -> (LimitHandle, LimitHandle) {
        (self.receive_limiter.handle(), self.transmit_limiter.handle())
    }

    fn pairs(&self) -> usize {
        self.tap.queue_count()
    }

    /// §5.1.2: the control queue comes after all pairs that the driver knows of.
    fn control_queue(&self) -> usize {
        let multi = self.active.as_ref().is_some_and(|active| active.features & feature::MQ != 0);
        if multi { self.pairs() * 2 } else { 2 }
    }

    fn has_limits(&self) -> bool {
        [&self.receive_limiter, &self.transmit_limiter].iter().any(|limiter| limiter.has_limits())
    }

    fn role(&self, queue: u16) -> Role {
        match usize::from(queue) {
            queue if queue >= self.control_queue() => Role::Control,
            queue if queue % 2 == 0 => Role::Receive(queue / 2),
            queue => Role::Transmit(queue / 2),
        }
    }

    /// Hands the guest what the metadata service has for it.
    fn deliver(&mut self, done: &mut Completions) {
        let (Some(metadata), Some(active)) = (&mut self.metadata, &mut self.active) else { return };
        let Some(receiver) = active.receivers.first_mut() else { return };
        while let Some(packet) = metadata.packet() {
            match receiver.put(&active.ram, &packet, 0, active.shape, done) {
                Received::NoRoom => break,
                _ => metadata.sent(),
            }
        }
        metadata.arm();
    }

    /// Moves packets from the tap to the guest, until either has no more.
    fn receive(&mut self, pair: usize, done: &mut Completions) {
        let Some(active) = &mut self.active else { return };
        let Some(receiver) = active.receivers.get_mut(pair) else { return };
        let mut lost = 0;
        while receiver.readable {
            if !self.receive_limiter.ready() {
                self.counters.limiter_waits.add(1);
                return;
            }
            match receiver.receive(&active.ram, &self.tap, pair, active.shape, done) {
                Ok(Received::Packet(bytes)) => {
                    self.receive_limiter.take(bytes);
                    if let Some(net) = self.counters.net() {
                        net.received_packets.add(1);
                        net.received_bytes.add(bytes);
                    }
                }
                Ok(Received::Lost) => {
                    if let Some(net) = self.counters.net() {
                        net.lost_packets.add(1);
                    }
                    tracing::debug!("a packet does not fit the guest's buffers");
                    lost += 1;
                    // Each uses up no buffer, so nothing else would end this as long as they come.
                    receiver.readable = lost < LOST_MAX;
                }
                Ok(Received::Empty | Received::NoRoom) => return,
                Err(error) => return active.log(self.tap.name(), &error),
            }
        }
    }

    /// Sends one packet. What the host refuses is lost, as on a wire.
    fn transmit(&mut self, pair: usize, chain: Chain) -> Handled {
        let Some(active) = &mut self.active else { return Handled::Done(chain, 0) };
        let len = chain.readable_len() as usize;
        if !(MIN_PACKET_BYTES..=MAX_PACKET_BYTES).contains(&len) {
            return Handled::Done(chain, 0);
        }
        if !self.transmit_limiter.ready() {
            self.counters.limiter_waits.add(1);
            return Handled::Wait(chain);
        }
        let Active { ram, pieces, .. } = active;
        pieces.clear();
        let mut head = [0; HEADER_BYTES + mmds::HEAD_BYTES];
        let mut rest = chain.reader(ram);
        if let Some(metadata) = &mut self.metadata {
            match metadata.look(rest.clone(), &mut head) {
                Ok(Looked::Other(bytes, behind)) => {
                    // The guest may change it meanwhile, and what is for the service must not reach the tap.
                    // SAFETY: the array outlives the call that the piece is used in, after which the piece is taken away,
                    // and nothing else refers to its bytes meanwhile.
                    pieces.push(unsafe { Piece::new(head.as_mut_ptr(), bytes) });
                    rest = behind;
                }
                Ok(Looked::Taken) | Err(TooShort) => return Handled::Done(chain, 0),
            }
        }
        let pushed = rest.for_each_slice(|slice| push_pieces(&mut |piece| pieces.push(piece), &slice));
        let written = pushed.map(|()| self.tap.write(pair, pieces));
        pieces.clear();
        let Ok(written) = written else { return Handled::Done(chain, 0) };
        if let Some(net) = self.counters.net() {
            match &written {
                Ok(_) => {
                    net.sent_packets.add(1);
                    net.sent_bytes.add((len - HEADER_BYTES) as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => net.refused_packets.add(1),
            }
        }
        match written {
            Ok(_) => {}
            // The tap says when it has room.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Handled::Wait(chain),
            // A header that makes no sense is the guest's affair.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => active.log(self.tap.name(), &error),
        }
        self.transmit_limiter.take((len - HEADER_BYTES) as u64);
        Handled::Done(chain, 0)
    }

    fn control(&mut self, chain: Chain) -> Handled {
        let Some(ram) = self.active.as_ref().map(|active| active.ram.clone()) else {
            return Handled::Done(chain, 0);
        };
        let result = match control::decode(&ram, &chain) {
            Command::Pairs(pairs) => self.set_pairs(pairs),
            Command::Offloads(offloads) => self.set_offloads(offloads),
            Command::Unknown => Err(io::ErrorKind::Unsupported.into()),
        };
        if let Err(error) = &result {
            tracing::debug!(%error, "a command of the guest's network driver is refused");
        }
        let written = control::answer(&ram, &chain, result.is_ok());
        Handled::Done(chain, written)
    }

    fn set_pairs(&mut self, pairs: u16) -> io::Result<()> {
        let most = self.pairs();
        let active = self.active.as_mut().ok_or(io::ErrorKind::InvalidInput)?;
        if active.features & feature::MQ == 0 || pairs == 0 || usize::from(pairs) > most {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.tap.set_active(pairs.into())?;
        active.state.pairs = pairs;
        Ok(())
    }

    /// §5.1.6.5.8: any subset of what was negotiated.
    fn set_offloads(&mut self, offloads: u64) -> io::Result<()> {
        let active = self.active.as_mut().ok_or(io::ErrorKind::InvalidInput)?;
        let known = OFFLOADS.iter().fold(0, |bits, (bit, _)| bits | bit);
        if active.features & feature::CTRL_GUEST_OFFLOADS == 0 || offloads & !(active.features & known) != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.tap.set_offloads(host_offloads(offloads))?;
        active.state.offloads = offloads;
        Ok(())
    }
}

/// What the host's kernel need not do for a driver that takes these packets. The host knows no large packets without
/// checksums to be filled in.
fn host_offloads(features: u64) -> u32 {
    if features & feature::GUEST_CSUM == 0 {
        return 0;
    }
    let both = feature::GUEST_USO4 | feature::GUEST_USO6;
    let usable = if features & both == both { features } else { features & !both };
    OFFLOADS.iter().filter(|(bit, _)| usable & bit != 0).fold(0, |bits, (_, host)| bits | host)
}

impl Active {
    /// A failing tap is worth one line, not one for each packet.
    fn log(&mut self, tap: &str, error: &io::Error) {
        if !std::mem::replace(&mut self.error_logged, true) {
            tracing::warn!(%error, "tap {tap} refuses packets; the guest loses them");
        }
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        spec::ID
    }

    fn features(&self) -> u64 {
        let device = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;
        let driver = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
        let other = feature::MAC | feature::MTU | feature::MRG_RXBUF;
        let control = feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS;
        let udp = feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6;
        let udp = if self.tap.has_udp_segmentation() { udp } else { 0 };
        let queues = if self.pairs() > 1 { feature::MQ } else { 0 };
        device | driver | other | control | udp | queues
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `struct virtio_net_config`, §5.1.4.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.mac);
        config.extend(0u16.to_le_bytes()); // status: not offered
        config.extend((self.pairs() as u16).to_le_bytes()); // max_virtqueue_pairs
        config.extend(self.mtu.to_le_bytes());
        config
    }

    fn metrics(&self) -> Arc<metrics::Device> {
        Arc::clone(&self.counters)
    }

    fn walls(&self) -> sandbox::Kind {
        sandbox::Kind::Net
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { ram, features } = activation;
        self.receive_limiter.start()?;
        self.transmit_limiter.start()?;
        if let Some(metadata) = &mut self.metadata {
            metadata.start()?;
        }
        self.tap.set_active(1)?;
        self.tap.set_offloads(host_offloads(features))?;
        // What waits there was meant for another driver, which may have taken packets that this one does not.
        self.tap.discard();
        let shape = Shape {
            mergeable: features & feature::MRG_RXBUF != 0,
            checksums: features & feature::GUEST_CSUM != 0,
            largest: receive::largest(features & LARGE != 0, self.mtu),
        };
        self.active = Some(Active {
            ram,
            features,
            state: State { pairs: 1, offloads: features },
            shape,
            receivers: std::iter::repeat_with(Receiver::new).take(self.pairs()).collect(),
            pieces: Vec::new(),
            error_logged: false,
            handed: false,
            called: false,
        });
        if let Some(State { pairs, offloads }) = self.chosen.take() {
            if pairs != 1 {
                self.set_pairs(pairs)?;
            }
            if offloads != features {
                self.set_offloads(offloads)?;
            }
        }
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        // By edge: a packet that the guest has no buffer for must not keep the thread awake.
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let handed = self.active.as_ref().is_some_and(|active| active.handed);
        // Nobody here is to wake up for packets that the host's kernel moves.
        let pairs = if handed { 0 } else { self.pairs() };
        let call = self
            .vhost
            .as_ref()
            .filter(|_| handed)
            .map(|vhost| (vhost.call().as_raw_fd(), CALL, EventSet::IN));
        let taps = (0..pairs).filter_map(|pair| Some((self.tap.fd(pair)?, pair as u32, events)));
        let timers = [(&self.receive_limiter, RECEIVE_TIMER), (&self.transmit_limiter, TRANSMIT_TIMER)];
        let timers =
            timers.into_iter().filter_map(|(limiter, token)| Some((limiter.fd()?, token, EventSet::IN)));
        let metadata = self.metadata.as_ref().and_then(Metadata::fd);
        let metadata = metadata.map(|fd| (fd, METADATA_TIMER, EventSet::IN));
        taps.chain(timers)
            .chain(call)
            .chain(metadata)
            .map(|(fd, token, events)| Source { fd, token, events })
            .collect()
    }

    fn hand_over(&mut self, queues: &[Handover<'_>]) -> u16 {
        let limited = self.has_limits();
        let count = self.control_queue();
        let (Some(vhost), Some(active), false) = (&self.vhost, &mut self.active, limited) else { return 0 };
        let queues: Vec<_> =
            queues.iter().filter(|queue| usize::from(queue.index) < count).copied().collect();
        match vhost.start(&active.ram, active.features, &self.tap, &queues) {
            Ok(()) => {
                active.handed = true;
                count as u16
            }
            Err(error) => {
                tracing::warn!(%error, "vhost-net does not work on tap {}; rvmm does its work", self.tap.name());
                vhost.stop();
                self.vhost = None;
                0
            }
        }
    }

    fn take_back(&mut self) -> Vec<Option<u16>> {
        let handed = self.active.as_mut().is_some_and(|active| std::mem::take(&mut active.handed));
        self.vhost.as_ref().filter(|_| handed).map(Vhost::stop).unwrap_or_default()
    }

    /// The host's kernel knows no limits.
    fn wants_back(&self) -> bool {
        self.has_limits()
    }

    fn has_interrupt(&mut self) -> bool {
        self.active.as_mut().is_some_and(|active| std::mem::take(&mut active.called))
    }

    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        match self.role(queue) {
            Role::Receive(pair) => {
                let Some(active) = &mut self.active else { return Handled::Done(chain, 0) };
                let Some(receiver) = active.receivers.get_mut(pair) else { return Handled::Done(chain, 0) };
                if receiver.is_full(active.shape) {
                    return Handled::Wait(chain);
                }
                match receiver.hold(&active.ram, chain) {
                    Ok(()) => Handled::Deferred,
                    Err(chain) => Handled::Done(chain, 0),
                }
            }
            Role::Transmit(pair) => self.transmit(pair, chain),
            Role::Control => self.control(chain),
        }
    }

    fn flush(&mut self, done: &mut Completions) {
        self.deliver(done);
        for pair in 0..self.active.as_ref().map_or(0, |active| usize::from(active.state.pairs)) {
            self.receive(pair, done);
        }
    }

    fn event(&mut self, token: u32) {
        match token {
            RECEIVE_TIMER => self.receive_limiter.fired(),
            TRANSMIT_TIMER => self.transmit_limiter.fired(),
            METADATA_TIMER => {
                if let Some(metadata) = &mut self.metadata {
                    metadata.fired();
                }
            }
            CALL => {
                if let (Some(vhost), Some(active)) = (&self.vhost, &mut self.active) {
                    active.called |= vhost.call().read().is_ok();
                }
            }
            pair => {
                let active = self.active.as_mut();
                if let Some(receiver) = active.and_then(|active| active.receivers.get_mut(pair as usize)) {
                    receiver.readable = true;
                }
            }
        }
    }

    fn give_back(&mut self, untouched: &mut Vec<(u16, Chain)>) {
        if let Some(active) = &mut self.active {
            for (pair, receiver) in active.receivers.iter_mut().enumerate() {
                receiver.give_back(pair, untouched);
            }
        }
    }

    fn save(&self) -> Option<DeviceState> {
        let chosen = self.active.as_ref().map(|active| active.state).or(self.chosen);
        Some(DeviceState::Net(NetState { mac: self.mac, mtu: self.mtu, chosen }))
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Net(state) = state else { return Err(RestoreError::Nonsense(spec::ID)) };
        (self.mac, self.mtu, self.chosen) = (state.mac, state.mtu, state.chosen);
        Ok(())
    }

    fn stop(&mut self) {
        self.chosen = None;
        // Before guest memory goes.
        self.take_back();
        self.active = None;
        if let Some(metadata) = &mut self.metadata {
            metadata.stop();
        }
    }
}

#[cfg(test)]
mod tests;
