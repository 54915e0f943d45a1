//! A hostile guest against the metadata service: any frames, and connections that are real up to a point.
//!
//! Holds: no panic, no hang, nothing that is due for ever; frames are of a size that a wire takes and go to who sent last; what waits for the guest is
//! bounded; afterwards, and after a reset, a guest that behaves is served.
#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::mmds::{ADDRESS, Service, Stack, Store, Version};

const GUEST: [u8; 4] = [172, 16, 0, 2];
const SYN: u8 = 2;
const PSH_ACK: u8 = 0x18;

#[derive(Arbitrary, Debug)]
enum Act {
    /// Any bytes.
    Frame(Vec<u8>),
    /// A packet of any protocol to the service.
    Packet { protocol: u8, source: [u8; 4], bytes: Vec<u8> },
    /// A question, or what looks like one.
    Arp { at: u8, xor: u8 },
    /// A segment near to what the service expects.
    Segment { port: u8, flags: u8, seq: i16, ack: i16, window: u16, options: Vec<u8>, data: Vec<u8> },
    /// A whole handshake.
    Open { port: u8 },
    /// Data in their turn, acknowledged.
    Say { port: u8, bytes: Vec<u8> },
    /// A request with these parts in it.
    Ask { port: u8, put: bool, path: u8, headers: Vec<(u8, Vec<u8>)>, old: bool },
    /// Frames are taken from the service, or left.
    Take(u8),
    Pass(u16),
    Reset,
}

#[derive(Arbitrary, Debug)]
struct Input {
    second: bool,
    acts: Vec<Act>,
}

#[derive(Default)]
struct Line {
    seq: u32,
    ack: u32,
}

struct Guest {
    stack: Stack,
    lines: BTreeMap<u8, Line>,
    received: Vec<u8>,
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

fn ethernet(kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
    [&[6, 1, 0x23, 0x45, 0x67, 1][..], &[2, 0, 0, 0, 0, 1], &kind, packet].concat()
}

fn ip(protocol: u8, source: [u8; 4], bytes: &[u8]) -> Vec<u8> {
    let len = (20 + bytes.len()) as u16;
    let mut packet = vec![0x45, 0, (len >> 8) as u8, len as u8, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(source);
    packet.extend(ADDRESS.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(bytes);
    ethernet([8, 0], &packet)
}

impl Guest {
    fn segment(&mut self, port: u8, flags: u8, seq: u32, ack: u32, window: u16, options: &[u8], data: &[u8]) {
        let mut options = options.get(..40).unwrap_or(options).to_vec();
        options.resize(options.len().next_multiple_of(4), 0);
        let mut tcp = vec![0x40, port, 0, 80];
        tcp.extend(seq.to_be_bytes());
        tcp.extend(ack.to_be_bytes());
        tcp.extend([((5 + options.len() / 4) << 4) as u8, flags]);
        tcp.extend(window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.extend(data);
        self.stack.receive(&ip(6, GUEST, &tcp));
    }

    fn take(&mut self, most: usize) {
        for _ in 0..most {
            let Some(frame) = self.stack.frame(12) else { return };
            self.stack.sent();
            assert!(frame.len() >= 12 + 14 + 20 && frame.len() <= 12 + 14 + 1500, "{} bytes", frame.len());
            let Some(ip) = frame.get(26..).filter(|_| frame[24..26] == [8, 0] && frame[35] == 6) else { continue };
            let tcp = &ip[usize::from(ip[0] & 15) * 4..];
            let data = &tcp[usize::from(tcp[12] >> 4) * 4..];
            let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            let control = u32::from(tcp[13] & 1 != 0) + u32::from(tcp[13] & 2 != 0);
            self.lines.entry(tcp[3]).or_default().ack = seq.wrapping_add(data.len() as u32 + control);
            self.received.extend(data);
        }
    }

    fn open(&mut self, port: u8) {
        let line = self.lines.entry(port).or_default();
        line.seq = line.seq.wrapping_add(100_000);
        let seq = line.seq;
        self.segment(port, SYN, seq, 0, 60_000, &[], &[]);
        self.take(200);
        let line = self.lines.entry(port).or_default();
        line.seq = seq.wrapping_add(1);
        self.say(port, &[]);
    }

    fn say(&mut self, port: u8, bytes: &[u8]) {
        let line = self.lines.entry(port).or_default();
        let (seq, ack) = (line.seq, line.ack);
        line.seq = seq.wrapping_add(bytes.len() as u32);
        self.segment(port, PSH_ACK, seq, ack, 60_000, &[], bytes);
    }
}

fuzz_target!(|input: Input| {
    let store = Store::default();
    let metadata = serde_json::json!({"latest": {"meta-data": {"id": "i-1"}, "long": "x".repeat(20_000)}, "n": [1]});
    store.put(metadata).expect("metadata that fit");
    let version = if input.second { Version::V2 } else { Version::V1 };
    let service = Service::new(Arc::new(store), version, false).expect("a service");
    let stack = Stack::new(Arc::new(service), ADDRESS).expect("a stack");
    let mut guest = Guest { stack, lines: BTreeMap::new(), received: Vec::new() };
    for act in input.acts.iter().take(300) {
        match act {
            Act::Frame(bytes) => {
                guest.stack.wants(bytes);
                guest.stack.receive(bytes);
            }
            Act::Packet { protocol, source, bytes } => guest.stack.receive(&ip(*protocol, *source, bytes)),
            Act::Arp { at, xor } => {
                let mut packet = [&[0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1][..], &GUEST, &[0; 6], &ADDRESS.octets()].concat();
                let at = usize::from(*at) % packet.len();
                packet[at] ^= xor;
                guest.stack.receive(&ethernet([8, 6], &packet));
            }
            Act::Segment { port, flags, seq, ack, window, options, data } => {
                let line = guest.lines.entry(*port).or_default();
                let (seq, ack) = (line.seq.wrapping_add_signed((*seq).into()), line.ack.wrapping_add_signed((*ack).into()));
                guest.segment(*port, *flags, seq, ack, *window, options, data);
            }
            Act::Open { port } => guest.open(*port),
            Act::Say { port, bytes } => guest.say(*port, bytes),
            Act::Ask { port, put, path, headers, old } => {
                let paths = ["/", "/latest", "/latest/long", "/latest/api/token", "/n", "//n/0/", "/latest/meta-data/id/"];
                let names = ["X-metadata-token", "X-metadata-token-ttl-seconds", "Accept", "Content-Length", "Connection", "X-Forwarded-For"];
                let method = if *put { "PUT" } else { "GET" };
                let mut request = format!("{method} {} HTTP/1.{}\r\n", paths[usize::from(*path) % paths.len()], u8::from(!old)).into_bytes();
                for (name, value) in headers.iter().take(8) {
                    request.extend(names[usize::from(*name) % names.len()].as_bytes());
                    request.extend(b": ");
                    request.extend(value);
                    request.extend(b"\r\n");
                }
                request.extend(b"\r\n");
                guest.say(*port, &request);
            }
            Act::Take(most) => guest.take((*most).into()),
            Act::Pass(millis) => guest.stack.advance(Duration::from_millis((*millis).into())),
            Act::Reset => guest.stack.reset(),
        }
        // With nothing in the way of frames, there is nothing left that is due at once, or the device would never rest.
        let mut rounds = 0;
        while guest.stack.frame(0).is_none() && guest.stack.due() == Some(Duration::ZERO) {
            guest.stack.poll();
            rounds += 1;
            assert!(rounds < 10, "something is due for ever");
        }
    }
    // What waits is bounded, and whoever behaves now is served.
    let mut waiting = 0;
    while guest.stack.frame(0).is_some() {
        guest.stack.sent();
        waiting += 1;
        assert!(waiting < 10_000, "there is no end of frames");
    }
    guest.stack.advance(Duration::from_secs(60));
    guest.stack.advance(Duration::from_secs(60));
    guest.take(10_000);
    if input.acts.len() % 2 == 0 {
        guest.stack.reset();
    }
    guest.open(255);
    guest.received.clear();
    guest.say(255, b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n");
    guest.take(200);
    assert!(guest.received.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&guest.received));
});
