use std::io::{Read, Write};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::bus::BusDevice;
use crate::memory;
use crate::virtio::mmio::Transport;
use crate::virtio::spec::register;
use crate::virtio::testing::{Desc, Driver, Ring};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
/// Each request has its place in memory, and its reply a page behind.
const PLACE: u64 = 2 * MIB;
const PLACES: u64 = 2 * MIB;
const REPLY: u64 = MIB + 0x8000;
const BODY: &[u8] = b"what is asked";

/// A file system device with a driver in front, and the test itself as the server behind.
struct Rig {
    transport: Transport,
    ram: Ram,
    rings: [Ring; 2],
    server: UnixStream,
}

impl Rig {
    fn new() -> Self {
        let (ours, server) = UnixStream::pair().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let ram = memory::allocate(64 * MIB).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = Box::new(Fs::new(ours, &FsOptions { tag: "files".into(), queues: 1 }));
        let transport = Transport::new(ram.clone(), device, irq).unwrap();
        let mut rig = Self { transport, rings: Self::rings(&ram), ram, server };
        rig.bring_up();
        rig
    }

    fn rings(ram: &Ram) -> [Ring; 2] {
        [Ring::new(ram, 0x1000, 16), Ring::new(ram, 0x4000, 64)]
    }

    fn bring_up(&mut self) {
        self.rings = Self::rings(&self.ram);
        Driver(&self.transport).bring_up(u64::MAX, &[&self.rings[0], &self.rings[1]]);
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Writes a request to place `n`; returns its descriptors, with room for a reply of `reply_len`.
    fn place(&self, n: u64, request: &[u8], reply_len: u32) -> Vec<Desc> {
        let at = PLACE + n * PLACES;
        self.put(at, request);
        self.put(at + REPLY, &[0xee; 64]);
        let mut descs = vec![Desc::readable(at, request.len() as u32)];
        if reply_len > 0 {
            descs.push(Desc::writable(at + REPLY, reply_len));
        }
        descs
    }

    fn reply(&self, n: u64, len: usize) -> Vec<u8> {
        self.get(PLACE + n * PLACES + REPLY, len)
    }

    fn send(&mut self, queue: usize, descs: &[Desc]) -> u16 {
        let head = self.rings[queue].send(descs);
        Driver(&self.transport).notify(queue as u32);
        head
    }

    /// Sends a request from place `n`, with room for 4096 bytes.
    fn ask(&mut self, n: u64, request: &[u8]) -> u16 {
        let descs = self.place(n, request, 4096);
        self.send(1, &descs)
    }

    /// What the server gets next.
    fn serve(&mut self) -> Vec<u8> {
        let mut len = [0; 4];
        self.server.read_exact(&mut len).unwrap();
        let mut request = len.to_vec();
        request.resize(u32::from_le_bytes(len) as usize, 0);
        self.server.read_exact(&mut request[4..]).unwrap();
        request
    }

    fn answer(&mut self, request: &[u8], error: i32, body: &[u8]) {
        let header = ReplyHeader { len: 16 + body.len() as u32, error, unique: header_fields(request).1 };
        self.server.write_all(&[&header.bytes()[..], body].concat()).unwrap();
    }

    fn fails(&mut self, n: u64, unique: u64) {
        assert_eq!(self.rings[1].wait_used().1, 16);
        assert_eq!(self.reply(n, 16), ReplyHeader { len: 16, error: -libc::EIO, unique }.bytes());
    }
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let mut request = vec![0; 40];
    request.extend(body);
    let len = request.len() as u32;
    request[4..8].copy_from_slice(&opcode.to_le_bytes());
    set_header(&mut request, len, unique);
    request
}

#[test]
fn requests_reach_the_server_and_replies_the_guest() {
    let mut rig = Rig::new();
    let head = rig.ask(0, &request(opcode::LOOKUP, 77, BODY));
    let seen = rig.serve();
    assert_eq!((&seen[40..], header_fields(&seen).0), (BODY, opcode::LOOKUP));
    assert_eq!(seen[16..40], [0; 24]);
    rig.answer(&seen, 0, b"the answer");
    assert_eq!(rig.rings[1].wait_used(), (head, 26));
    let header = ReplyHeader { len: 26, error: 0, unique: 77 };
    assert_eq!(rig.reply(0, 26), [&header.bytes()[..], b"the answer"].concat());
    assert_eq!(rig.reply(0, 27)[26], 0xee, "nothing behind it is written");
}

#[test]
fn configuration_space_has_tag_and_queues() {
    let rig = Rig::new();
    let mut config = [0xff; 44];
    for (at, part) in (0..).step_by(4).zip(config.chunks_mut(4)) {
        rig.transport.read(register::CONFIG + at, part);
    }
    assert_eq!(&config[..36], [&b"files"[..], &[0; 31]].concat());
    assert_eq!(&config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn device_is_saved_until_its_server_was_asked_and_restored_by_its_tag() {
    let mut rig = Rig::new();
    let saved = |rig: &Rig| {
        rig.transport.pause(PATIENCE).unwrap();
        let state = rig.transport.save();
        rig.transport.resume();
        state
    };
    let state = saved(&rig).unwrap();
    let restored = |tag: &str| {
        let (ours, its) = UnixStream::pair().unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = Box::new(Fs::new(ours, &FsOptions { tag: tag.into(), queues: 1 }));
        let mut transport = Transport::new(rig.ram.clone(), device, irq).unwrap();
        (transport.restore(state.clone()), its)
    };
    assert_eq!(restored("files").0, Ok(()));
    assert_eq!(restored("others").0, Err(RestoreError::Nonsense(ID)));

    rig.ask(0, &request(opcode::LOOKUP, 1, BODY));
    let seen = rig.serve();
    rig.answer(&seen, 0, b"x");
    rig.rings[1].wait_used();
    assert!(saved(&rig).is_err());
}

#[test]
fn framing_does_not_matter() {
    let mut rig = Rig::new();
    let bytes = request(opcode::LOOKUP, 5, BODY);
    rig.put(PLACE, &bytes);
    let head = rig.send(
        1,
        &[
            Desc::readable(PLACE, 3),
            Desc::readable(PLACE + 3, 38),
            Desc::readable(PLACE + 41, bytes.len() as u32 - 41),
            Desc::writable(PLACE + REPLY, 5),
            Desc::writable(PLACE + REPLY + 5, 12),
            Desc::writable(PLACE + REPLY + 17, 100),
        ],
    );
    let seen = rig.serve();
    assert_eq!(&seen[40..], BODY);
    // A byte at a time.
    let header = ReplyHeader { len: 20, error: 0, unique: header_fields(&seen).1 };
    for byte in [&header.bytes()[..], b"body"].concat() {
        rig.server.write_all(&[byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(rig.rings[1].wait_used(), (head, 20));
    assert_eq!(&rig.reply(0, 20)[16..], b"body");
}

#[test]
fn requests_in_flight_are_answered_in_any_order() {
    let mut rig = Rig::new();
    // All with one number, as only a broken guest would.
    let heads: Vec<u16> = (0..8).map(|n| rig.ask(n, &request(opcode::READ, 9, &[n as u8]))).collect();
    let mut seen: Vec<Vec<u8>> = (0..8).map(|_| rig.serve()).collect();
    seen.sort_by_key(|request| std::cmp::Reverse(request[40]));
    for (request, n) in seen.iter().zip((0..8).rev()) {
        rig.answer(request, 0, &[n; 9]);
        assert_eq!(rig.rings[1].wait_used(), (heads[usize::from(n)], 25));
        assert_eq!(rig.reply(n.into(), 25)[16..], [n; 9]);
    }
}

#[test]
fn what_has_no_reply_is_done_at_once() {
    let mut rig = Rig::new();
    for code in [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT] {
        let descs = rig.place(0, &request(code, 1, &[1; 8]), 0);
        let head = rig.send(0, &descs);
        assert_eq!(rig.rings[0].wait_used(), (head, 0));
    }
    // Interrupts go no further.
    assert_eq!(header_fields(&rig.serve()).0, opcode::FORGET);
    assert_eq!(header_fields(&rig.serve()).0, opcode::BATCH_FORGET);
    let head = rig.ask(0, &request(opcode::GETATTR, 1, &[]));
    let seen = rig.serve();
    assert_eq!(header_fields(&seen).0, opcode::GETATTR);
    rig.answer(&seen, -libc::ENOENT, &[]);
    assert_eq!(rig.rings[1].wait_used(), (head, 16));
}

#[test]
fn hostile_requests_are_answered() {
    let mut rig = Rig::new();
    // No header, no room for an answer, too little of it.
    let short = rig.place(0, &[0xff; 39], 4096);
    let head = rig.send(1, &short);
    assert_eq!(rig.rings[1].wait_used(), (head, 0));
    let head = rig.send(1, &[Desc::writable(PLACE, 4096)]);
    assert_eq!(rig.rings[1].wait_used(), (head, 0));
    for room in [0, 1, 15] {
        let descs = rig.place(0, &request(opcode::GETATTR, 1, &[]), room);
        let head = rig.send(1, &descs);
        let seen = rig.serve();
        rig.answer(&seen, 0, &[7; 100]);
        assert_eq!(rig.rings[1].wait_used(), (head, 0));
        assert!(rig.reply(0, 16).iter().all(|byte| *byte == 0xee));
    }
    let descs = rig.place(0, &request(opcode::GETATTR, 3, &[]), 115);
    rig.send(1, &descs);
    let seen = rig.serve();
    rig.answer(&seen, 0, &[7; 100]);
    rig.fails(0, 3);
    // Longer than any request.
    let long = request(opcode::WRITE, 4, &vec![1; fuse::REQUEST_BYTES_MAX - 39]);
    rig.put(8 * MIB, &long);
    rig.put(PLACE + REPLY, &[0xee; 16]);
    rig.send(1, &[Desc::readable(8 * MIB, long.len() as u32), Desc::writable(PLACE + REPLY, 16)]);
    rig.fails(0, 4);
    // The length in it does not matter.
    let mut lying = request(opcode::GETATTR, 5, &[]);
    lying[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    rig.ask(0, &lying);
    assert_eq!(rig.serve()[..4], 40u32.to_le_bytes());
}

#[test]
fn longest_requests_and_replies_pass_while_the_server_is_slow() {
    let mut rig = Rig::new();
    let body: Vec<u8> = (0..fuse::DATA_BYTES_MAX + 40).map(|n| (n / 3) as u8).collect();
    let long = request(opcode::WRITE, 1, &body);
    let mut heads = vec![];
    for n in 0..6 {
        heads.push(rig.ask(n, &long));
    }
    // The worker does not wait for the server, which has read nothing yet.
    let descs = rig.place(10, &request(opcode::INTERRUPT, 1, &[]), 0);
    let head = rig.send(0, &descs);
    let end = std::time::Instant::now() + PATIENCE;
    while rig.rings[0].used_index() == 0 && std::time::Instant::now() < end {
        // It may have to wait for its turn behind a full socket.
        if rig.server.peek_some() {
            break;
        }
    }
    for head in heads {
        let seen = rig.serve();
        assert!(seen[40..] == body);
        rig.answer(&seen, 0, &[1; 8]);
        assert_eq!(rig.rings[1].wait_used(), (head, 24));
    }
    assert_eq!(rig.rings[0].wait_used(), (head, 0));
    let at = PLACE + 11 * PLACES;
    rig.put(at, &request(opcode::READ, 1, &[]));
    let room = fuse::REPLY_BYTES_MAX as u32;
    let head = rig.send(1, &[Desc::readable(at, 40), Desc::writable(at + 0x1000, room)]);
    let seen = rig.serve();
    let data = &body[..fuse::DATA_BYTES_MAX];
    rig.answer(&seen, 0, data);
    assert_eq!(rig.rings[1].wait_used(), (head, 16 + data.len() as u32));
    assert!(rig.get(at + 0x1010, data.len()) == data);
}

trait Peek {
    fn peek_some(&self) -> bool;
}

impl Peek for UnixStream {
    /// Whether there is something to read.
    fn peek_some(&self) -> bool {
        use std::os::fd::AsFd;
        let mut fds = [nix::poll::PollFd::new(self.as_fd(), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, 100u16).unwrap() > 0
    }
}

#[test]
fn end_of_the_server_is_an_io_error_and_not_the_end() {
    let mut rig = Rig::new();
    for n in 0..3 {
        rig.ask(n, &request(opcode::READ, n, &[]));
    }
    let seen = rig.serve();
    // It dies in the middle of an answer.
    let header = ReplyHeader { len: 100, error: 0, unique: header_fields(&seen).1 };
    rig.server.write_all(&header.bytes()).unwrap();
    rig.server = UnixStream::pair().unwrap().0;
    for _ in 0..3 {
        assert_eq!(rig.rings[1].wait_used().1, 16);
    }
    for n in 0..3 {
        assert_eq!(rig.reply(n, 16), ReplyHeader { len: 16, error: -libc::EIO, unique: n }.bytes());
    }
    rig.ask(5, &request(opcode::GETATTR, 55, &[]));
    rig.fails(5, 55);
    let descs = rig.place(6, &request(opcode::FORGET, 1, &[]), 0);
    let head = rig.send(0, &descs);
    assert_eq!(rig.rings[0].wait_used(), (head, 0));
    rig.bring_up();
    rig.ask(5, &request(opcode::INIT, 56, &[]));
    rig.fails(5, 56);
}

#[test]
fn nonsense_from_the_server_ends_the_talk_with_it() {
    let header = |len, error| ReplyHeader { len, error, unique: 0 };
    let too_long = fuse::REPLY_BYTES_MAX as u32 + 1;
    for header in
        [header(15, 0), header(0, 0), header(16, 1), header(16, -4096), header(17, -5), header(too_long, 0)]
    {
        let mut rig = Rig::new();
        rig.ask(0, &request(opcode::READ, 3, &[]));
        rig.serve();
        rig.server.write_all(&header.bytes()).unwrap();
        rig.fails(0, 3);
    }
    // An answer that nobody waits for is no harm.
    let mut rig = Rig::new();
    let head = rig.ask(0, &request(opcode::READ, 3, &[]));
    let seen = rig.serve();
    for unique in [0, 1, 2, u64::MAX, header_fields(&seen).1 ^ 1 << 32] {
        let header = ReplyHeader { len: 20, error: 0, unique };
        rig.server.write_all(&[&header.bytes()[..], b"body"].concat()).unwrap();
    }
    rig.answer(&seen, 0, &[]);
    assert_eq!(rig.rings[1].wait_used(), (head, 16));
    // Nor is a second one to the same request.
    rig.answer(&seen, 0, &[]);
    let head = rig.ask(1, &request(opcode::READ, 4, &[]));
    let next = rig.serve();
    rig.answer(&seen, 0, b"late");
    rig.answer(&next, 0, b"right");
    assert_eq!(rig.rings[1].wait_used(), (head, 21));
    assert_eq!(&rig.reply(1, 21)[16..], b"right");
}

#[test]
fn answers_to_a_driver_that_is_gone_go_nowhere() {
    let mut rig = Rig::new();
    for n in 0..4 {
        rig.ask(n, &request(opcode::READ, n, &[]));
    }
    let old: Vec<Vec<u8>> = (0..4).map(|_| rig.serve()).collect();
    // Half of an answer before the reset, half of it after.
    let header = ReplyHeader { len: 20, error: 0, unique: header_fields(&old[0]).1 };
    rig.server.write_all(&[&header.bytes()[..], b"bo"].concat()).unwrap();
    rig.bring_up();
    assert_eq!(header_fields(&rig.serve()).0, opcode::DESTROY, "the server is told");
    rig.server.write_all(b"dy").unwrap();
    let head = rig.ask(4, &request(opcode::INIT, 4, &[]));
    let seen = rig.serve();
    for request in &old[1..] {
        rig.answer(request, 0, b"old");
    }
    rig.answer(&seen, 0, b"new");
    assert_eq!(rig.rings[1].wait_used(), (head, 19));
    assert_eq!(&rig.reply(4, 19)[16..], b"new");
    assert_eq!(rig.rings[1].used(), None);
}

#[test]
fn pause_waits_for_what_the_server_has() {
    let mut rig = Rig::new();
    let head = rig.ask(0, &request(opcode::READ, 1, &[]));
    let seen = rig.serve();
    assert!(
        rig.transport.pause(Duration::from_millis(50)).is_err(),
        "it rests although a request is in flight"
    );
    rig.answer(&seen, 0, b"in time");
    rig.transport.pause(PATIENCE).unwrap();
    assert_eq!(rig.rings[1].used(), Some((head, 23)));
    let head = rig.ask(1, &request(opcode::READ, 2, &[]));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.rings[1].used(), None);
    rig.transport.resume();
    let seen = rig.serve();
    rig.answer(&seen, 0, &[]);
    assert_eq!(rig.rings[1].wait_used(), (head, 16));
}

#[test]
fn a_thousand_drivers_one_after_the_other_leave_nothing() {
    let mut rig = Rig::new();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for n in 0..1000 {
        let head = rig.ask(0, &request(opcode::INIT, n, &[]));
        let forgotten = rig.ask(1, &request(opcode::READ, n, &[]));
        let init = rig.serve();
        assert_eq!(header_fields(&init).0, opcode::INIT);
        assert_eq!(header_fields(&rig.serve()).0, opcode::READ);
        rig.answer(&init, 0, &[]);
        assert_eq!(rig.rings[1].wait_used(), (head, 16));
        assert_ne!(head, forgotten);
        rig.bring_up();
        assert_eq!(header_fields(&rig.serve()).0, opcode::DESTROY);
    }
    // Other tests of this process open some meanwhile.
    assert!(descriptors() < before + 500, "{} descriptors more", descriptors() - before);
}
