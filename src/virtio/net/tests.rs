use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::spec::ack;
use super::*;
use crate::memory;
use crate::virtio::mmio::Transport;
use crate::virtio::rate::Bucket;
use crate::virtio::spec::{register, status};
use crate::virtio::testing::{Desc, Driver, Ring};

#[path = "metadata_tests.rs"]
mod metadata;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const PATIENCE: Duration = Duration::from_secs(20);
const BUFFERS: u64 = 0x10_0000;
const FRAME: u64 = 0x8_0000;
const COMMAND: u64 = 0x7_0000;

/// A network device between a driver and the far ends of its tap's queues.
struct Rig {
    transport: Transport,
    ram: Ram,
    /// Queues of all pairs, then the control queue.
    rings: Vec<Ring>,
    far: Vec<UnixDatagram>,
    limits: (LimitHandle, LimitHandle),
}

impl Rig {
    fn new(pairs: usize, features: u64) -> Self {
        Self::with(pairs, features, NetOptions::new(MAC))
    }

    fn with(pairs: usize, features: u64, options: NetOptions) -> Self {
        Self::made(pairs, features, options, |_| {})
    }

    fn made(pairs: usize, features: u64, options: NetOptions, make: impl FnOnce(&mut Net)) -> Self {
        let (near, far): (Vec<_>, Vec<_>) = (0..pairs).map(|_| UnixDatagram::pair().unwrap()).unzip();
        near.iter().for_each(|near| near.set_nonblocking(true).unwrap());
        far.iter().for_each(|far| far.set_read_timeout(Some(PATIENCE)).unwrap());
        let tap = Tap::stand_in(near.into_iter().map(Into::into).collect(), 1500);
        let mut device = Net::new(tap, None, &options);
        make(&mut device);
        let limits = device.limit_handles();
        let ram = memory::allocate(64 << 20).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = Transport::new(ram.clone(), Box::new(device), irq).unwrap();
        let count = if features & feature::MQ == 0 { 2 } else { pairs * 2 };
        let mut rig = Self { transport, ram, rings: Vec::new(), far, limits };
        rig.bring_up(count, features);
        rig
    }

    fn bring_up(&mut self, count: usize, features: u64) {
        let ring = |index: usize| Ring::new(&self.ram, 0x1000 + 0x4000 * index as u64, 64);
        self.rings = (0..=count).map(ring).collect();
        let rings: Vec<_> = self.rings.iter().collect();
        Driver(&self.transport).bring_up(features, &rings);
        // A device that can rest has started: what arrives from now on is for this driver.
        self.pause();
        self.transport.resume();
    }

    /// Makes `count` empty buffers of `len` bytes available to pair 0.
    fn supply(&mut self, count: u64, len: u32) {
        for index in 0..count {
            self.rings[0].send(&[Desc::writable(BUFFERS + index * 0x2_0000, len)]);
        }
        Driver(&self.transport).notify(0);
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Sends a frame behind a header of zeroes to the guest.
    fn arrive(&self, frame: &[u8]) {
        let packet = [&[0; HEADER_BYTES][..], frame].concat();
        assert_eq!(self.far[0].send(&packet).unwrap(), packet.len());
    }

    fn command(&mut self, bytes: &[u8], answer_len: u32) -> Option<u8> {
        self.ram.write_slice(bytes, GuestAddress(COMMAND)).unwrap();
        self.ram.write_obj(0xeeu8, GuestAddress(COMMAND + 0x100)).unwrap();
        let index = self.rings.len() - 1;
        let descs =
            [Desc::readable(COMMAND, bytes.len() as u32), Desc::writable(COMMAND + 0x100, answer_len)];
        let head = self.rings[index].send(&descs);
        Driver(&self.transport).notify(index as u32);
        let (used, len) = self.rings[index].wait_used();
        assert_eq!(used, head);
        (len == 1).then(|| self.ram.read_obj(GuestAddress(COMMAND + 0x100)).unwrap())
    }

    fn pause(&self) {
        self.transport.pause(PATIENCE).unwrap();
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn large_packet_is_spread_over_buffers_that_are_used_together() {
    let mut rig = Rig::new(1, u64::MAX);
    rig.supply(40, 4096);
    let frame = pattern(65000, 1);
    rig.arrive(&frame);
    rig.rings[0].wait_used();
    // The index moves once for all buffers of a packet.
    assert_eq!(rig.rings[0].used_index(), 16);
    let mut got = rig.bytes(BUFFERS, 4096);
    assert_eq!(got[10..12], [16, 0], "num_buffers");
    for index in 1..16 {
        let (_, len) = rig.rings[0].wait_used();
        got.extend(rig.bytes(BUFFERS + index * 0x2_0000, len as usize));
    }
    assert_eq!(got[HEADER_BYTES..], frame);
    // A small packet takes one.
    rig.arrive(&pattern(60, 2));
    assert_eq!(rig.rings[0].wait_used(), (16, 72));
    let got = rig.bytes(BUFFERS + 16 * 0x2_0000, 72);
    assert_eq!(got[10..12], [1, 0]);
    assert_eq!(got[HEADER_BYTES..], pattern(60, 2));
}

#[test]
fn many_packets_come_whole_and_in_order() {
    let mut rig = Rig::new(1, u64::MAX);
    rig.supply(60, 2048);
    // Packets go before buffers do, so that the device must wait now and then.
    for round in 0..2000u32 {
        rig.arrive(&[&round.to_le_bytes()[..], &pattern(60 + round as usize % 1400, round as u8)].concat());
        let (head, len) = rig.rings[0].wait_used();
        let addr = BUFFERS + u64::from(head) * 0x2_0000;
        let got = rig.bytes(addr, len as usize);
        assert_eq!(got[12..16], round.to_le_bytes());
        assert_eq!(got[16..], pattern(60 + round as usize % 1400, round as u8));
        // The same buffer again, in the descriptor that is now the oldest.
        rig.rings[0].write_desc(head, Desc::writable(addr, 2048));
        rig.rings[0].offer(head);
        Driver(&rig.transport).notify(0);
    }
}

#[test]
fn packet_without_room_is_lost_and_the_next_one_comes() {
    let mut rig = Rig::new(1, !feature::MRG_RXBUF);
    rig.supply(2, 1526);
    rig.arrive(&pattern(1515, 3));
    rig.arrive(&pattern(1514, 4));
    assert_eq!(rig.rings[0].wait_used(), (0, 1526));
    let got = rig.bytes(BUFFERS, 1526);
    assert_eq!(got[HEADER_BYTES..], pattern(1514, 4));
    assert_eq!(got[10..12], [1, 0]);
    // Something shorter than a header is no packet.
    rig.far[0].send(&[1, 2, 3]).unwrap();
    rig.arrive(&pattern(100, 5));
    assert_eq!(rig.rings[0].wait_used(), (1, 112));
}

#[test]
fn buffers_without_room_go_back_in_their_turn() {
    let mut rig = Rig::new(1, !feature::MRG_RXBUF);
    rig.supply(1, 1526);
    rig.rings[0].send(&[Desc::writable(BUFFERS, 11)]);
    rig.supply(1, 1526);
    // Chains that were taken and not used are as if they never were.
    rig.pause();
    assert_eq!(rig.rings[0].used_index(), 0);
    rig.transport.resume();
    rig.arrive(&pattern(100, 4));
    assert_eq!(rig.rings[0].wait_used(), (0, 112));
    rig.arrive(&pattern(100, 5));
    assert_eq!(rig.rings[0].wait_used(), (1, 0));
    assert_eq!(rig.rings[0].wait_used(), (2, 112));
}

#[test]
fn driver_without_checksums_hears_nothing_of_them() {
    for (features, flags) in [(u64::MAX, 2), (!feature::GUEST_CSUM, 0)] {
        let mut rig = Rig::new(1, features);
        rig.supply(20, 4096);
        let mut packet = pattern(HEADER_BYTES + 60, 1);
        packet[0] = 2; // VIRTIO_NET_HDR_F_DATA_VALID
        rig.far[0].send(&packet).unwrap();
        assert_eq!(rig.rings[0].wait_used(), (0, 72));
        assert_eq!(rig.bytes(BUFFERS, 1), [flags]);
    }
}

#[test]
fn packets_for_an_earlier_driver_are_lost() {
    let mut rig = Rig::new(1, u64::MAX);
    Driver(&rig.transport).reset();
    rig.arrive(&pattern(100, 1));
    rig.bring_up(2, u64::MAX);
    rig.supply(20, 4096);
    rig.arrive(&pattern(200, 2));
    assert_eq!(rig.rings[0].wait_used(), (0, 212));
}

#[test]
fn packets_wait_for_buffers() {
    let mut rig = Rig::new(1, u64::MAX);
    rig.arrive(&pattern(100, 6));
    rig.supply(1, 4096);
    // A driver that takes 64 KiB gets nothing before there is room for it.
    rig.pause();
    assert_eq!(rig.rings[0].used_index(), 0);
    rig.transport.resume();
    for index in 1..18 {
        rig.rings[0].send(&[Desc::writable(BUFFERS + index * 0x2_0000, 4096)]);
    }
    Driver(&rig.transport).notify(0);
    assert_eq!(rig.rings[0].wait_used(), (0, 112));
}

#[test]
fn sent_frames_reach_the_tap_however_they_are_cut() {
    let mut rig = Rig::new(1, u64::MAX);
    for (len, cut) in [(14, 5), (60, 12), (1514, 13), (65000, 30000)] {
        let packet = [&[0; HEADER_BYTES][..], &pattern(len, 7)].concat();
        rig.ram.write_slice(&packet, GuestAddress(FRAME)).unwrap();
        let head = rig.rings[1].send(&[
            Desc::readable(FRAME, cut),
            Desc::readable(FRAME + u64::from(cut), 2),
            Desc::readable(FRAME + u64::from(cut) + 2, packet.len() as u32 - cut - 2),
        ]);
        Driver(&rig.transport).notify(1);
        let mut got = vec![0; 70000];
        let received = rig.far[0].recv(&mut got).unwrap();
        assert_eq!(got[..received], packet);
        assert_eq!(rig.rings[1].wait_used(), (head, 0));
    }
}

#[test]
fn what_is_no_frame_is_dropped_and_completed() {
    let mut rig = Rig::new(1, u64::MAX);
    for descs in [
        vec![Desc::readable(FRAME, 1)],
        vec![Desc::readable(FRAME, 25)],
        vec![Desc::readable(FRAME, 65536 + 30)],
        vec![Desc::readable(FRAME, 40 << 20)],
        vec![Desc::writable(FRAME, 100)],
        vec![Desc::readable(FRAME, 0)],
    ] {
        let head = rig.rings[1].send(&descs);
        Driver(&rig.transport).notify(1);
        assert_eq!(rig.rings[1].wait_used(), (head, 0));
    }
    // The same with buffers to receive into: no room for a header, or none at all.
    for desc in [Desc::writable(BUFFERS, 11), Desc::readable(BUFFERS, 4096)] {
        let head = rig.rings[0].send(&[desc]);
        Driver(&rig.transport).notify(0);
        assert_eq!(rig.rings[0].wait_used(), (head, 0));
    }
    assert_eq!(Driver(&rig.transport).status() & status::DEVICE_NEEDS_RESET, 0);
    rig.far[0].set_nonblocking(true).unwrap();
    assert!(rig.far[0].recv(&mut [0; 100]).is_err());
}

#[test]
fn full_tap_holds_the_queue_and_nothing_else() {
    let mut rig = Rig::new(1, u64::MAX);
    rig.supply(20, 4096);
    rig.ram.write_slice(&pattern(8000, 8), GuestAddress(FRAME)).unwrap();
    let count = rig.rings[1].size;
    for _ in 0..count {
        rig.rings[1].send(&[Desc::readable(FRAME, 8000)]);
    }
    Driver(&rig.transport).notify(1);
    // The stand-in takes a few packets and no more; the other direction works meanwhile.
    rig.rings[1].wait_used();
    rig.arrive(&pattern(60, 9));
    assert_eq!(rig.rings[0].wait_used(), (0, 72));
    rig.pause();
    assert!(rig.rings[1].used_index() < count, "the stand-in never was full");
    rig.transport.resume();
    for _ in 0..count {
        let mut got = [0; 9000];
        assert_eq!(rig.far[0].recv(&mut got).unwrap(), 8000);
        assert_eq!(got[..8000], pattern(8000, 8));
    }
    until("not all were sent", || rig.rings[1].used_index() == count);
}

#[test]
fn paused_device_touches_nothing_and_goes_on() {
    let mut rig = Rig::new(1, u64::MAX);
    rig.supply(30, 4096);
    for round in 0..3u16 {
        rig.pause();
        rig.arrive(&pattern(80, 10));
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(rig.rings[0].used_index(), round);
        rig.transport.resume();
        assert_eq!(rig.rings[0].wait_used(), (round, 92));
    }
}

#[test]
fn device_that_is_reset_again_and_again_works() {
    let mut rig = Rig::new(2, u64::MAX);
    for round in 0..200 {
        rig.supply(20, 4096);
        if round % 3 == 0 {
            rig.arrive(&pattern(80, 11));
            rig.rings[0].wait_used();
        }
        Driver(&rig.transport).reset();
        let features = if round % 2 == 0 { !feature::MQ } else { u64::MAX };
        rig.bring_up(if round % 2 == 0 { 2 } else { 4 }, features);
        assert_eq!(Driver(&rig.transport).status() & status::DEVICE_NEEDS_RESET, 0);
    }
    rig.supply(20, 4096);
    rig.arrive(&pattern(80, 12));
    assert_eq!(rig.rings[0].wait_used(), (0, 92));
}

#[test]
fn pairs_are_used_as_the_driver_says() {
    let mut rig = Rig::new(3, u64::MAX);
    assert_eq!(rig.command(&[4, 0, 3, 0], 1), Some(ack::OK));
    for pairs in [0, 4, 0x8000] {
        let [low, high] = u16::to_le_bytes(pairs);
        assert_eq!(rig.command(&[4, 0, low, high], 1), Some(ack::ERR), "{pairs}");
    }
    for index in 0..18 {
        rig.rings[4].send(&[Desc::writable(BUFFERS + index * 0x2_0000, 4096)]);
    }
    Driver(&rig.transport).notify(4);
    rig.far[2].send(&[0; 72]).unwrap();
    assert_eq!(rig.rings[4].wait_used(), (0, 72));
    let head = rig.rings[5].send(&[Desc::readable(FRAME, 72)]);
    Driver(&rig.transport).notify(5);
    assert_eq!(rig.rings[5].wait_used(), (head, 0));
    assert_eq!(rig.far[2].recv(&mut [0; 100]).unwrap(), 72);
    // Pairs that are not used get nothing.
    assert_eq!(rig.command(&[4, 0, 1, 0], 1), Some(ack::OK));
    rig.far[2].send(&[0; 72]).unwrap();
    rig.pause();
    assert_eq!(rig.rings[4].used_index(), 1);
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    for (pairs, features) in [(1, u64::MAX), (2, !feature::MQ)] {
        let mut rig = Rig::new(pairs, features);
        let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
        assert_eq!(rig.command(&set(feature::GUEST_CSUM | feature::GUEST_TSO4), 1), Some(ack::OK));
        assert_eq!(rig.command(&set(0), 1), Some(ack::OK));
        assert_eq!(rig.command(&set(feature::MAC), 1), Some(ack::ERR));
        for bytes in [
            &[][..],
            &[4],
            &[4, 0],
            &[4, 0, 1],
            &[4, 0, 1, 0],
            &[5, 0, 0],
            &[1, 1, 2, 0, 0, 0, 0, 1],
            &[9, 9],
        ] {
            assert_eq!(rig.command(bytes, 1), Some(ack::ERR), "{bytes:?}");
        }
        assert_eq!(rig.command(&[4, 0, 1, 0], 0), None);
        assert_eq!(rig.command(&[9; 200], 100), Some(ack::ERR));
    }
}

#[test]
fn driver_learns_address_mtu_and_features() {
    let mut options = NetOptions::new(MAC);
    options.mtu = Some(9000);
    let rig = Rig::with(2, u64::MAX, options);
    let driver = Driver(&rig.transport);
    let config: Vec<u8> =
        (0..3).flat_map(|at| driver.read(register::CONFIG + at * 4).to_le_bytes()).collect();
    assert_eq!(config[..6], MAC);
    assert_eq!(config[8..], [2, 0, 0x28, 0x23]);
    let offered = driver.offered();
    for wanted in
        [feature::MAC, feature::MTU, feature::MRG_RXBUF, feature::MQ, feature::CTRL_VQ, OFFLOADS[0].0]
    {
        assert_ne!(offered & wanted, 0, "{wanted:#x}");
    }
    assert_eq!(Driver(&Rig::new(1, u64::MAX).transport).offered() & feature::MQ, 0);
}

#[test]
fn host_is_told_what_the_driver_takes() {
    assert_eq!(host_offloads(0), 0);
    assert_eq!(host_offloads(feature::GUEST_TSO4), 0, "no large packets without checksums");
    assert_eq!(host_offloads(feature::GUEST_CSUM | feature::GUEST_TSO6), offload::CSUM | offload::TSO6);
    let one = feature::GUEST_CSUM | feature::GUEST_USO4;
    assert_eq!(host_offloads(one), offload::CSUM, "the host takes both kinds or none");
    assert_eq!(host_offloads(one | feature::GUEST_USO6), offload::CSUM | offload::USO);
}

#[test]
fn limits_hold_packets_until_they_are_lifted() {
    let mut options = NetOptions::new(MAC);
    let hour = Bucket { size: 3, one_time_burst: 0, refill_time: 3_600_000 };
    let limits = Limits { operations: Some(hour), bandwidth: None };
    (options.receive_limits, options.transmit_limits) = (limits, limits);
    let mut rig = Rig::with(1, u64::MAX, options);
    rig.supply(30, 4096);
    for _ in 0..5 {
        rig.arrive(&pattern(60, 13));
        rig.rings[1].send(&[Desc::readable(FRAME, 72)]);
    }
    Driver(&rig.transport).notify(1);
    until("three packets each way", || rig.rings[0].used_index() == 3 && rig.rings[1].used_index() == 3);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((rig.rings[0].used_index(), rig.rings[1].used_index()), (3, 3));
    rig.limits.0.set(Limits::default());
    until("the rest is received", || rig.rings[0].used_index() == 5);
    assert_eq!(rig.rings[1].used_index(), 3);
    rig.limits.1.set(Limits::default());
    until("the rest is sent", || rig.rings[1].used_index() == 5);
}
