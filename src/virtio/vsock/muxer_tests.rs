use std::cell::RefCell;
use std::rc::Rc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{self, Ram};
use crate::virtio::queue::Queue;
use crate::virtio::spec::vsock::op::{CREDIT_REQUEST, CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, SHUTDOWN};
use crate::virtio::testing::{Desc, Ring};

const CID: u64 = 3;
const IN: u64 = 0x10000;
const OUT: u64 = 0x40000;
const DATA_BYTES: usize = 4096;

/// What both ends of a stream see.
#[derive(Default)]
struct Pipe {
    to_guest: VecDeque<u8>,
    from_guest: Vec<u8>,
    /// Bytes that the program takes before it has read.
    room: usize,
    ended: bool,
    broken: bool,
    shut: Vec<End>,
    wants_room: bool,
    dropped: bool,
}

struct MockStream(Rc<RefCell<Pipe>>);

impl Drop for MockStream {
    fn drop(&mut self) {
        self.0.borrow_mut().dropped = true;
    }
}

impl Stream for MockStream {
    fn read(&mut self, mut to: Writer<'_>) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.to_guest.is_empty() && !pipe.ended {
            let kind = if pipe.broken { io::ErrorKind::ConnectionReset } else { io::ErrorKind::WouldBlock };
            return Err(kind.into());
        }
        let len = pipe.to_guest.len().min(to.remaining() as usize);
        let bytes: Vec<u8> = pipe.to_guest.drain(..len).collect();
        to.write_all(&bytes).unwrap();
        Ok(len)
    }

    fn write(&mut self, mut from: Reader<'_>) -> io::Result<usize> {
        let mut bytes = vec![0; from.remaining() as usize];
        from.read_exact(&mut bytes).unwrap();
        self.write_bytes(&bytes)
    }

    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = from.len().min(pipe.room);
        if len == 0 && !from.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        pipe.room -= len;
        pipe.from_guest.extend(&from[..len]);
        Ok(len)
    }

    fn shut_down(&mut self, end: End) {
        self.0.borrow_mut().shut.push(end);
    }
}

/// A host on which each even port has a listener.
#[derive(Default)]
struct MockHost {
    made: Vec<Rc<RefCell<Pipe>>>,
    busy: bool,
    calls_due: u32,
}

impl Host for MockHost {
    type Stream = MockStream;

    fn connect(&mut self, port: u32) -> io::Result<MockStream> {
        if self.busy {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if port % 2 == 1 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let pipe = Rc::new(RefCell::new(Pipe { room: 1 << 30, ..Pipe::default() }));
        self.made.push(Rc::clone(&pipe));
        Ok(MockStream(pipe))
    }

    fn watch(&mut self, _key: Key, stream: &MockStream, writable: bool) -> io::Result<()> {
        stream.0.borrow_mut().wants_room = writable;
        Ok(())
    }

    fn rewatch(&mut self, key: Key, stream: &MockStream, writable: bool) -> io::Result<()> {
        self.watch(key, stream, writable)
    }

    fn call_again(&mut self) {
        self.calls_due += 1;
    }
}

struct Rig {
    ram: Ram,
    ring: Ring,
    queue: Queue,
    muxer: Muxer<MockStream>,
    host: MockHost,
}

const READABLE: Readiness = Readiness { readable: true, writable: false, ended: false };
const WRITABLE: Readiness = Readiness { readable: false, writable: true, ended: false };
const ENDED: Readiness = Readiness { readable: true, writable: true, ended: true };

impl Rig {
    fn new() -> Self {
        let ram = memory::allocate(16 << 20).unwrap();
        let ring = Ring::new(&ram, 0x1000, 16);
        let queue = ring.queue(0);
        Self { ram, ring, queue, muxer: Muxer::new(CID), host: MockHost::default() }
    }

    fn send_header(&mut self, header: &Header, data: &[u8]) {
        self.ram.write_slice(data, GuestAddress(OUT)).unwrap();
        // Cut anywhere.
        let half = (data.len() / 3) as u32;
        self.ring.send(&[
            Desc::readable(OUT, half),
            Desc::readable(OUT + u64::from(half), data.len() as u32 - half),
        ]);
        let chain = self.queue.pop().unwrap().unwrap();
        self.muxer.from_guest(&mut self.host, header, &chain.reader(&self.ram));
        self.queue.complete(chain, 0).unwrap();
    }

    fn header(key: Key, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: key.guest,
            dst_port: key.host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        }
    }

    /// The guest sends a packet without data.
    fn say(&mut self, key: Key, op: u16, flags: u32) {
        self.send_header(&Header { flags, ..Self::header(key, op) }, &[]);
    }

    fn data(&mut self, key: Key, data: &[u8]) {
        self.send_header(&Header { len: data.len() as u32, ..Self::header(key, RW) }, data);
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.ring.send(&[Desc::writable(IN, 20), Desc::writable(IN + 20, 24 + DATA_BYTES as u32)]);
        let chain = self.queue.pop().unwrap().unwrap();
        let Some(len) = self.muxer.to_guest(&mut self.host, &chain.writer(&self.ram)) else {
            self.queue.complete(chain, 0).unwrap();
            return None;
        };
        self.queue.complete(chain, 0).unwrap();
        self.ring.send(&[Desc::readable(IN, len)]);
        let chain = self.queue.pop().unwrap().unwrap();
        let mut reader = chain.reader(&self.ram);
        let header = Header::read(&mut reader).unwrap();
        let mut data = vec![0; reader.remaining() as usize];
        reader.read_exact(&mut data).unwrap();
        self.queue.complete(chain, 0).unwrap();
        assert_eq!(header.len as usize, data.len());
        assert_eq!((header.dst_cid, header.kind), (CID, TYPE_STREAM));
        Some((header, data))
    }

    #[track_caller]
    fn expect(&mut self, key: Key, op: u16) -> Header {
        let (header, _) = self.receive().expect("a packet");
        assert_eq!((header.dst_port, header.src_port, header.op), (key.guest, key.host, op));
        header
    }

    #[track_caller]
    fn silent(&mut self) {
        assert_eq!(self.receive(), None);
    }

    /// A connection that the guest has opened.
    fn open(&mut self, guest: u32) -> (Key, Rc<RefCell<Pipe>>) {
        let key = Key { guest, host: 80 };
        self.say(key, REQUEST, 0);
        self.expect(key, RESPONSE);
        (key, self.host.made.last().unwrap().clone())
    }

    /// One that the host has opened.
    fn open_from_host(&mut self) -> (Key, Rc<RefCell<Pipe>>) {
        let stream = self.host.connect(2).unwrap();
        let pipe = stream.0.clone();
        self.muxer.from_host(&mut self.host, stream, 99);
        let (header, _) = self.receive().expect("a request");
        assert_eq!((header.op, header.dst_port), (REQUEST, 99));
        let key = Key { guest: 99, host: header.src_port };
        self.say(key, RESPONSE, 0);
        assert_eq!(pipe.borrow().from_guest, format!("OK {}\n", key.host).into_bytes());
        pipe.borrow_mut().from_guest.clear();
        (key, pipe)
    }

    fn ready(&mut self, key: Key, now: Readiness) {
        self.muxer.ready(&mut self.host, key, now);
    }
}

#[test]
fn bytes_go_both_ways_on_connections_of_both_kinds() {
    let mut rig = Rig::new();
    for (key, pipe) in [rig.open(1000), rig.open_from_host()] {
        rig.data(key, b"to the host");
        assert_eq!(pipe.borrow().from_guest, b"to the host");
        pipe.borrow_mut().to_guest.extend(b"to the guest");
        rig.silent();
        rig.ready(key, READABLE);
        let (header, data) = rig.receive().unwrap();
        assert_eq!((header.op, data.as_slice()), (RW, b"to the guest".as_slice()));
        assert_eq!(header.fwd_cnt, 11);
        rig.silent();
    }
    assert_eq!(rig.muxer.len(), 2);
}

#[test]
fn unknown_connection_port_address_and_kind_get_a_reset() {
    let mut rig = Rig::new();
    let nobody = Key { guest: 5, host: 81 };
    rig.say(nobody, REQUEST, 0);
    rig.expect(nobody, RST);
    for op in [RESPONSE, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, u16::MAX] {
        rig.say(nobody, op, 3);
        rig.expect(nobody, RST);
    }
    rig.say(nobody, RST, 0);
    rig.silent();
    let other_host = Header { dst_cid: 77, ..Rig::header(nobody, REQUEST) };
    rig.send_header(&other_host, &[]);
    assert_eq!(rig.receive().unwrap().0.src_cid, 77);
    let any = Key { guest: 5, host: PORT_ANY };
    rig.say(any, REQUEST, 0);
    rig.expect(any, RST);
    let spoofed = Header { src_cid: 4, ..Rig::header(Key { guest: 5, host: 80 }, REQUEST) };
    rig.send_header(&spoofed, &[]);
    rig.silent();
    assert!(rig.muxer.is_empty());
    assert!(rig.host.made.is_empty());
}

#[test]
fn packet_that_does_not_fit_the_state_ends_the_connection() {
    let cases: [fn(&mut Rig, Key); 8] = [
        // No operation at all.
        |rig, key| rig.say(key, 0, 0),
        |rig, key| rig.say(key, 8, 0),
        |rig, key| rig.say(key, REQUEST, 0),
        |rig, key| rig.say(key, RESPONSE, 0),
        // More than the chain has.
        |rig, key| rig.send_header(&Header { len: 10, ..Rig::header(key, RW) }, b"nine char"),
        |rig, key| rig.send_header(&Header { len: u32::MAX, ..Rig::header(key, RW) }, b"x"),
        // More than the window.
        |rig, key| rig.data(key, &vec![0; WIDE as usize + 1]),
        |rig, key| {
            rig.say(key, SHUTDOWN, shutdown::SEND);
            rig.data(key, b"after the end");
        },
    ];
    for case in cases {
        let mut rig = Rig::new();
        let (key, pipe) = rig.open(7);
        case(&mut rig, key);
        rig.expect(key, RST);
        rig.silent();
        assert!(pipe.borrow().dropped);
        assert!(rig.muxer.is_empty());
        assert!(pipe.borrow().from_guest.is_empty());
    }
}

#[test]
fn slow_host_holds_back_one_connection_and_no_other() {
    let mut rig = Rig::new();
    let (slow, slow_pipe) = rig.open(1);
    let (fast, fast_pipe) = rig.open(2);
    slow_pipe.borrow_mut().room = 1000;
    let part = vec![7; 64 << 10];
    for _ in 0..4 {
        rig.data(slow, &part);
        rig.data(fast, &part);
    }
    assert!(slow_pipe.borrow().wants_room);
    assert!(!fast_pipe.borrow().wants_room);
    assert_eq!(fast_pipe.borrow().from_guest.len(), 256 << 10);
    assert_eq!(rig.muxer.waiting_bytes(), (256 << 10) - 1000);
    // The guest hears of room on the fast one only.
    let header = rig.expect(fast, CREDIT_UPDATE);
    assert_eq!((header.buf_alloc, header.fwd_cnt), (WIDE, 256 << 10));
    rig.silent();
    slow_pipe.borrow_mut().room = 100 << 10;
    rig.ready(slow, WRITABLE);
    assert_eq!(rig.expect(slow, CREDIT_UPDATE).fwd_cnt, (100 << 10) + 1000);
    slow_pipe.borrow_mut().room = 1 << 20;
    rig.ready(slow, WRITABLE);
    assert!(!slow_pipe.borrow().wants_room);
    assert_eq!(rig.muxer.waiting_bytes(), 0);
    assert_eq!(slow_pipe.borrow().from_guest, vec![7; 256 << 10]);
}

#[test]
fn guest_without_room_is_asked_once_and_sent_nothing() {
    let mut rig = Rig::new();
    let (key, pipe) = rig.open(1);
    let with_room = |buf_alloc, fwd_cnt| Header { buf_alloc, fwd_cnt, ..Rig::header(key, CREDIT_UPDATE) };
    pipe.borrow_mut().to_guest.extend([1; 10_000]);
    rig.send_header(&with_room(5000, 0), &[]);
    rig.ready(key, READABLE);
    assert_eq!(rig.receive().unwrap().1.len(), 4096);
    assert_eq!(rig.receive().unwrap().1.len(), 904);
    rig.expect(key, CREDIT_REQUEST);
    rig.silent();
    rig.send_header(&with_room(5000, 0), &[]);
    rig.silent();
    rig.send_header(&with_room(5000, 5000), &[]);
    assert_eq!(rig.receive().unwrap().1.len(), 4096);
    assert_eq!(rig.receive().unwrap().1.len(), 904);
    assert_eq!(pipe.borrow().to_guest.len(), 0);
}

#[test]
fn connections_take_turns() {
    let mut rig = Rig::new();
    let open: Vec<_> = (0..10).map(|guest| rig.open(guest)).collect();
    for (key, pipe) in &open {
        pipe.borrow_mut().to_guest.extend(vec![0; if key.guest == 0 { 1 << 20 } else { 3 * DATA_BYTES }]);
        rig.ready(*key, READABLE);
    }
    for _ in 0..3 {
        let mut round: Vec<_> = (0..10).map(|_| rig.receive().unwrap().0.dst_port).collect();
        round.sort_unstable();
        assert_eq!(round, (0..10).collect::<Vec<_>>());
    }
}

#[test]
fn end_of_data_from_either_side_leaves_the_other_direction_open() {
    let mut rig = Rig::new();
    let (key, pipe) = rig.open(1);
    pipe.borrow_mut().to_guest.extend(b"last words");
    pipe.borrow_mut().ended = true;
    rig.ready(key, READABLE);
    assert_eq!(rig.receive().unwrap().1, b"last words");
    assert_eq!(rig.expect(key, SHUTDOWN).flags, shutdown::SEND);
    rig.silent();
    rig.data(key, b"still heard");
    assert_eq!(pipe.borrow().from_guest, b"still heard");
    rig.say(key, SHUTDOWN, shutdown::SEND);
    assert_eq!(pipe.borrow().shut, [End::FromGuest]);
    rig.say(key, SHUTDOWN, shutdown::RECEIVE);
    rig.expect(key, RST);
    assert!(pipe.borrow().dropped);

    let (key, pipe) = rig.open(2);
    pipe.borrow_mut().room = 2;
    rig.data(key, b"slow");
    rig.say(key, SHUTDOWN, shutdown::SEND);
    assert_eq!(pipe.borrow().shut, [], "bytes wait");
    pipe.borrow_mut().room = 2;
    rig.ready(key, WRITABLE);
    assert_eq!(pipe.borrow().shut, [End::FromGuest]);
    assert_eq!(pipe.borrow().from_guest, b"slow");
    pipe.borrow_mut().to_guest.extend(b"answer");
    rig.ready(key, READABLE);
    assert_eq!(rig.receive().unwrap().1, b"answer");
}

#[test]
fn guest_that_closes_does_not_lose_what_it_sent() {
    for forgets in [false, true] {
        let mut rig = Rig::new();
        let (key, pipe) = rig.open(1);
        pipe.borrow_mut().room = 0;
        rig.data(key, b"important");
        rig.say(key, SHUTDOWN, shutdown::BOTH);
        rig.silent();
        if forgets {
            rig.say(key, RST, 0);
            rig.say(key, REQUEST, 0);
            rig.expect(key, RST);
        }
        pipe.borrow_mut().room = 100;
        rig.ready(key, WRITABLE);
        assert_eq!(pipe.borrow().from_guest, b"important");
        if !forgets {
            rig.expect(key, RST);
        }
        rig.silent();
        assert!(rig.muxer.is_empty());
        assert!(pipe.borrow().dropped);
    }
}

#[test]
fn dead_host_program_is_told_to_the_guest_after_its_last_bytes() {
    let mut rig = Rig::new();
    let (key, pipe) = rig.open(1);
    pipe.borrow_mut().room = 0;
    rig.data(key, b"nobody reads this");
    pipe.borrow_mut().to_guest.extend(b"bye");
    pipe.borrow_mut().ended = true;
    rig.ready(key, ENDED);
    assert_eq!(rig.muxer.waiting_bytes(), 0);
    assert_eq!(rig.expect(key, SHUTDOWN).flags, shutdown::RECEIVE);
    assert_eq!(rig.receive().unwrap().1, b"bye");
    assert_eq!(rig.expect(key, SHUTDOWN).flags, shutdown::BOTH);
    assert!(pipe.borrow().dropped, "nothing holds the descriptor");
    rig.data(key, b"not yet heard of it");
    rig.silent();
    rig.say(key, RST, 0);
    rig.silent();
    assert!(rig.muxer.is_empty());

    // It died with bytes unread.
    let (key, pipe) = rig.open(2);
    pipe.borrow_mut().broken = true;
    rig.ready(key, ENDED);
    rig.expect(key, SHUTDOWN);
    rig.expect(key, RST);
    assert!(rig.muxer.is_empty());

    // The guest had no ear for it any more.
    let (key, pipe) = rig.open(3);
    rig.say(key, SHUTDOWN, shutdown::RECEIVE);
    assert_eq!(pipe.borrow().shut, [End::ToGuest]);
    pipe.borrow_mut().to_guest.extend(b"unheard");
    rig.ready(key, READABLE);
    rig.silent();
    rig.ready(key, ENDED);
    assert_eq!(rig.expect(key, SHUTDOWN).flags, shutdown::BOTH);
    assert!(pipe.borrow().dropped);
}

#[test]
fn write_that_fails_tells_the_guest_that_nobody_receives() {
    let mut rig = Rig::new();
    let (key, pipe) = rig.open(1);
    pipe.borrow_mut().broken = true;
    rig.data(key, b"x");
    assert_eq!(rig.expect(key, SHUTDOWN).flags, shutdown::RECEIVE);
    rig.data(key, &[0; 1000]);
    assert_eq!(rig.muxer.waiting_bytes(), 0);
}

#[test]
fn host_that_gives_up_before_the_guest_answers() {
    let mut rig = Rig::new();
    let stream = rig.host.connect(2).unwrap();
    rig.muxer.from_host(&mut rig.host, stream, 99);
    let untold = Key { guest: 99, host: FIRST_HOST_PORT };
    rig.ready(untold, ENDED);
    rig.silent();
    assert!(rig.muxer.is_empty());

    let stream = rig.host.connect(2).unwrap();
    rig.muxer.from_host(&mut rig.host, stream, 99);
    let told = Key { guest: 99, host: FIRST_HOST_PORT + 1 };
    rig.expect(told, REQUEST);
    rig.ready(told, ENDED);
    rig.expect(told, RST);
    // The guest's answer crosses it.
    rig.say(told, RESPONSE, 0);
    rig.expect(told, RST);
    assert!(rig.muxer.is_empty());
}

#[test]
fn guest_that_refuses_a_call_drops_it() {
    let mut rig = Rig::new();
    let stream = rig.host.connect(2).unwrap();
    let pipe = stream.0.clone();
    rig.muxer.from_host(&mut rig.host, stream, 99);
    let key = Key { guest: 99, host: FIRST_HOST_PORT };
    // An answer to what was not asked yet.
    rig.say(key, RESPONSE, 0);
    assert!(pipe.borrow().dropped);
    assert!(pipe.borrow().from_guest.is_empty());
    let stream = rig.host.connect(2).unwrap();
    let pipe = stream.0.clone();
    rig.muxer.from_host(&mut rig.host, stream, 99);
    let key = Key { guest: 99, host: FIRST_HOST_PORT + 1 };
    rig.expect(key, REQUEST);
    rig.say(key, RST, 0);
    assert!(pipe.borrow().dropped);
    assert!(rig.muxer.is_empty());
}

#[test]
fn busy_listener_is_called_again() {
    let mut rig = Rig::new();
    rig.host.busy = true;
    let key = Key { guest: 1, host: 80 };
    rig.say(key, REQUEST, 0);
    rig.silent();
    assert_eq!(rig.host.calls_due, 1);
    rig.muxer.call_again(&mut rig.host);
    assert_eq!(rig.host.calls_due, 2);
    rig.host.busy = false;
    rig.muxer.call_again(&mut rig.host);
    rig.expect(key, RESPONSE);
    rig.host.busy = true;
    let key = Key { guest: 2, host: 80 };
    rig.say(key, REQUEST, 0);
    (0..ATTEMPTS_MAX).for_each(|_| rig.muxer.call_again(&mut rig.host));
    rig.expect(key, RST);
    rig.silent();
}

#[test]
fn guest_that_fetches_nothing_cannot_make_the_host_remember_without_end() {
    let mut rig = Rig::new();
    for port in 0..10_000 {
        rig.say(Key { guest: port, host: 81 }, RW, 0);
    }
    assert_eq!(rig.muxer.resets.len(), RESETS_MAX);
    rig.say(Key { guest: 1, host: 80 }, REQUEST, 0);
    assert!(rig.muxer.is_empty());
    assert!(rig.host.made.is_empty());
    let mut rig = Rig::new();
    for round in 0..10_000 {
        let key = Key { guest: round % 3, host: 80 };
        rig.say(key, REQUEST, 0);
        rig.say(key, if round % 2 == 0 { RST } else { REQUEST }, 0);
    }
    assert!(rig.muxer.turns.len() <= CONNECTIONS_MAX);
    assert!(rig.muxer.resets.len() <= RESETS_MAX + CONNECTIONS_MAX);
    assert_eq!(rig.muxer.wide, rig.muxer.len());
}

#[test]
fn there_are_so_many_connections_and_so_much_room_and_no_more() {
    let mut rig = Rig::new();
    let mut promised = 0;
    for guest in 0..CONNECTIONS_MAX as u32 {
        let key = Key { guest, host: 80 };
        rig.say(key, REQUEST, 0);
        promised += rig.expect(key, RESPONSE).buf_alloc;
    }
    assert_eq!(promised, 46 << 20);
    let more = Key { guest: 5000, host: 80 };
    rig.say(more, REQUEST, 0);
    rig.expect(more, RST);
    let stream = rig.host.connect(2).unwrap();
    let pipe = stream.0.clone();
    rig.muxer.from_host(&mut rig.host, stream, 99);
    assert!(pipe.borrow().dropped);
    rig.say(Key { guest: 3, host: 80 }, SHUTDOWN, shutdown::BOTH);
    rig.expect(Key { guest: 3, host: 80 }, RST);
    rig.say(more, REQUEST, 0);
    assert_eq!(rig.expect(more, RESPONSE).buf_alloc, WIDE, "the one that was closed had it");
    rig.muxer.clear();
    assert!(rig.host.made.iter().all(|pipe| pipe.borrow().dropped));
    rig.silent();
}

#[test]
fn buffer_too_small_for_data_comes_back_empty() {
    let mut rig = Rig::new();
    let (key, pipe) = rig.open(1);
    pipe.borrow_mut().to_guest.extend(b"data");
    rig.ready(key, READABLE);
    for len in [1, 43, 44] {
        rig.ring.send(&[Desc::writable(IN, len)]);
        let chain = rig.queue.pop().unwrap().unwrap();
        assert_eq!(rig.muxer.to_guest(&mut rig.host, &chain.writer(&rig.ram)), Some(0));
        rig.queue.complete(chain, 0).unwrap();
    }
    assert_eq!(rig.receive().unwrap().1, b"data");
}
