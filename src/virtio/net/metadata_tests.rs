use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::mmds::{ADDRESS, Service, Store, Version};

const GUEST: [u8; 4] = [172, 16, 0, 2];
const SERVICE_MAC: [u8; 6] = [6, 1, 0x23, 0x45, 0x67, 1];

fn rig(features: u64) -> Rig {
    let store = Store::default();
    store.put(json!({"a": "b"})).unwrap();
    let service = Service::new(Arc::new(store), Version::V1, false).unwrap();
    let rig = Rig::made(1, features, NetOptions::new(MAC), |device| {
        device.serve_metadata(Stack::new(Arc::new(service), ADDRESS).unwrap());
    });
    rig.far[0].set_nonblocking(true).unwrap();
    rig
}

impl Rig {
    /// Sends a frame as the guest, cut after `cut` bytes.
    fn send(&mut self, frame: &[u8], cut: u32) {
        let packet = [&[0; HEADER_BYTES][..], frame].concat();
        self.ram.write_slice(&packet, GuestAddress(FRAME)).unwrap();
        let len = packet.len() as u32;
        let cut = cut.clamp(1, len - 1);
        let descs = [Desc::readable(FRAME, cut), Desc::readable(FRAME + u64::from(cut), len - cut)];
        let head = self.rings[1].send(&descs);
        Driver(&self.transport).notify(1);
        assert_eq!(self.rings[1].wait_used(), (head, 0));
    }

    fn tap_has_nothing(&self) {
        assert!(self.far[0].recv(&mut [0; 2000]).is_err(), "a frame for the service reached the tap");
    }
}

fn frame(kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
    [&SERVICE_MAC[..], &MAC, &kind, packet].concat()
}

fn question() -> Vec<u8> {
    let packet = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &MAC, &GUEST, &[0; 6], &ADDRESS.octets()].concat();
    frame([8, 6], &packet)
}

fn answer() -> Vec<u8> {
    let packet = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &SERVICE_MAC, &ADDRESS.octets(), &MAC, &GUEST].concat();
    [&MAC[..], &SERVICE_MAC, &[8, 6], &packet].concat()
}

/// A wish for a connection to the service, its checksum left to others.
fn syn(target: [u8; 4]) -> Vec<u8> {
    let mut packet = [&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0][..], &GUEST, &target].concat();
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    frame([8, 0], &packet)
}

#[test]
fn frames_for_the_service_are_answered_and_never_reach_the_tap() {
    for cut in [1, 12, 26, 40, 53] {
        let mut rig = rig(u64::MAX);
        rig.supply(20, 4096);
        rig.send(&question(), cut);
        assert_eq!(rig.rings[0].wait_used(), (0, 54));
        let got = rig.bytes(BUFFERS, 54);
        assert_eq!((&got[..10], &got[10..12]), (&[0; 10][..], &[1, 0][..]));
        assert_eq!(got[HEADER_BYTES..], answer());
        rig.send(&syn(ADDRESS.octets()), cut);
        let (head, len) = rig.rings[0].wait_used();
        let got = rig.bytes(BUFFERS + u64::from(head) * 0x2_0000, len as usize);
        let tcp = &got[HEADER_BYTES + 34..];
        assert_eq!((&tcp[..4], tcp[13]), (&[0, 80, 0x9c, 0x40][..], 0x12), "SYN and ACK");
        rig.tap_has_nothing();
    }
}

#[test]
fn all_else_goes_to_the_tap_as_it_is() {
    let mut rig = rig(u64::MAX);
    let mut others = vec![syn([169, 254, 169, 253]), pattern(14, 1), pattern(15, 2), pattern(1514, 3)];
    let mut foreign = question();
    foreign[41] ^= 1;
    others.extend([foreign, question()[..41].to_vec(), frame([0x81, 0], &question()[12..])]);
    for other in others {
        for cut in [1, 12, 30, 54, 60] {
            rig.send(&other, cut);
            let mut got = [0; 2000];
            let len = rig.far[0].recv(&mut got).unwrap();
            assert_eq!(got[HEADER_BYTES..len], other);
        }
    }
}

#[test]
fn answers_wait_for_buffers_and_take_as_many_as_they_need() {
    let mut rig = rig(u64::MAX);
    rig.send(&question(), 20);
    rig.pause();
    assert_eq!(rig.rings[0].used_index(), 0);
    rig.transport.resume();
    rig.supply(3, 30);
    assert_eq!((rig.rings[0].wait_used(), rig.rings[0].wait_used()), ((0, 30), (1, 24)));
    let got = [rig.bytes(BUFFERS, 30), rig.bytes(BUFFERS + 0x2_0000, 24)].concat();
    assert_eq!(got[10..12], [2, 0], "num_buffers");
    assert_eq!(got[HEADER_BYTES..], answer());
    // What has no room in the only buffer of a driver that wants whole packets is lost.
    let mut rig = super::metadata::rig(!feature::MRG_RXBUF);
    rig.supply(1, 53);
    rig.send(&question(), 20);
    rig.arrive(&pattern(20, 1));
    assert_eq!(rig.rings[0].wait_used(), (0, 32));
    rig.supply(1, 54);
    rig.send(&question(), 20);
    assert_eq!(rig.rings[0].wait_used(), (1, 54));
}

#[test]
fn silence_of_the_guest_is_noticed() {
    let mut rig = rig(u64::MAX);
    rig.supply(20, 4096);
    rig.send(&syn(ADDRESS.octets()), 20);
    // Nobody takes the answer, so the timer has it sent again.
    for _ in 0..2 {
        let (head, len) = rig.rings[0].wait_used();
        let got = rig.bytes(BUFFERS + u64::from(head) * 0x2_0000, len as usize);
        assert_eq!(got[HEADER_BYTES + 34 + 13], 0x12);
    }
}

#[test]
fn driver_that_begins_anew_is_answered_again() {
    let mut rig = rig(u64::MAX);
    for _ in 0..20 {
        rig.send(&syn(ADDRESS.octets()), 20);
        Driver(&rig.transport).reset();
        rig.bring_up(2, u64::MAX);
        rig.supply(2, 4096);
        rig.send(&question(), 20);
        assert_eq!(rig.rings[0].wait_used(), (0, 54));
    }
    rig.tap_has_nothing();
}
