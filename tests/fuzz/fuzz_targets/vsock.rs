//! A hostile guest's packets, and host programs that come, go, stall and fail, against the connections of a device.
//!
//! Holds: no panic, no hang; bytes of a connection arrive in order and none is lost in between; the guest is never sent
//! more than it has room for; connections and waiting bytes stay within their bounds; each packet is whole.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::virtio::queue::Queue;
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::vsock::muxer::{CONNECTIONS_MAX, End, Host, Key, Muxer, Readiness, Stream};
use rvmm::virtio::vsock::packet::Header;
use rvmm::virtio::{Reader, Writer};
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 3;
const DATA: u64 = 0x10000;
const DATA_BYTES: u32 = 0x8000;
const WAITING_MAX: usize = 46 << 20;

#[derive(Default)]
struct Pipe {
    /// Bytes that the program has to say.
    to_guest: u32,
    next_byte: u8,
    room: usize,
    heard: Option<u8>,
    greeted: bool,
    ended: bool,
    broken: bool,
}

impl Pipe {
    fn hear(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(last) = self.heard {
                assert_eq!(*byte, last.wrapping_add(1), "bytes from the guest in order");
            }
            self.heard = Some(*byte);
        }
    }
}

struct MockStream(Rc<RefCell<Pipe>>);

impl Stream for MockStream {
    fn read(&mut self, mut to: Writer<'_>) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.to_guest == 0 && !pipe.ended {
            let kind = if pipe.broken { io::ErrorKind::ConnectionReset } else { io::ErrorKind::WouldBlock };
            return Err(kind.into());
        }
        let len = pipe.to_guest.min(to.remaining());
        let first = pipe.next_byte;
        let bytes: Vec<u8> = (0..len).map(|at| first.wrapping_add(at as u8)).collect();
        pipe.next_byte = first.wrapping_add(len as u8);
        pipe.to_guest -= len;
        to.write_all(&bytes).expect("room");
        Ok(len as usize)
    }

    fn write(&mut self, mut from: Reader<'_>) -> io::Result<usize> {
        let mut bytes = vec![0; from.remaining() as usize];
        from.read_exact(&mut bytes).expect("bytes");
        self.write_bytes(&bytes)
    }

    fn write_bytes(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if from.starts_with(b"OK ") && !pipe.greeted {
            pipe.greeted = true;
            return Ok(from.len());
        }
        let len = from.len().min(pipe.room);
        if len == 0 && !from.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        pipe.room -= len;
        pipe.hear(&from[..len]);
        Ok(len)
    }

    fn shut_down(&mut self, _end: End) {}
}

#[derive(Default)]
struct MockHost {
    busy: bool,
    pipes: BTreeMap<(u32, u32), Rc<RefCell<Pipe>>>,
}

impl Host for MockHost {
    type Stream = MockStream;

    fn connect(&mut self, port: u32) -> io::Result<MockStream> {
        match port % 4 {
            _ if self.busy => Err(io::ErrorKind::WouldBlock.into()),
            3 => Err(io::ErrorKind::ConnectionRefused.into()),
            _ => Ok(MockStream(Rc::new(RefCell::new(Pipe { greeted: true, ..Pipe::default() })))),
        }
    }

    fn watch(&mut self, key: Key, stream: &MockStream, _writable: bool) -> io::Result<()> {
        self.pipes.insert((key.guest, key.host), Rc::clone(&stream.0));
        Ok(())
    }

    fn rewatch(&mut self, _key: Key, _stream: &MockStream, _writable: bool) -> io::Result<()> {
        Ok(())
    }

    fn call_again(&mut self) {}
}

#[derive(Arbitrary, Debug)]
enum Act {
    /// A packet that is nearly right.
    Packet { guest: u8, host: u8, op: u8, flags: u8, len: u16, alloc: u16, forwarded: u8 },
    /// Any packet at all.
    Any { fields: [u64; 5], lens: [u32; 2] },
    Fetch { room: u16, count: u8 },
    Call { port: u8 },
    Say { which: u8, len: u16 },
    Hear { which: u8, len: u32 },
    End { which: u8, both: bool, broken: bool },
    Busy(bool),
    Again,
    Clear,
}

/// What the guest knows of a connection.
#[derive(Clone, Copy, Default)]
struct Known {
    alloc: u32,
    forwarded: u32,
    got: u32,
    last: Option<u8>,
}

struct Rig {
    ram: Ram,
    ring: Ring,
    queue: Queue,
    muxer: Muxer<MockStream>,
    host: MockHost,
    known: BTreeMap<(u32, u32), Known>,
    next_bytes: BTreeMap<(u32, u32), u8>,
}

impl Rig {
    fn new(ram: &Ram) -> Self {
        let ring = Ring::new(ram, 0x1000, 16);
        let queue = ring.queue(0);
        Self {
            ram: ram.clone(),
            ring,
            queue,
            muxer: Muxer::new(CID),
            host: MockHost::default(),
            known: BTreeMap::new(),
            next_bytes: BTreeMap::new(),
        }
    }

    /// A key that the device may know: the ports of its own calls count from 2^30 on.
    fn key(guest: u8, host: u8) -> (u32, u32) {
        let host = if host < 8 { u32::from(host) } else { (1 << 30) + u32::from(host - 8) };
        (u32::from(guest % 4), host)
    }

    fn send(&mut self, header: &Header, len: u32) {
        let key = (header.src_port, header.dst_port);
        let len = len.min(DATA_BYTES);
        let next = self.next_bytes.entry(key).or_default();
        let bytes: Vec<u8> = (0..len).map(|at| next.wrapping_add(at as u8)).collect();
        self.ram.write_slice(&bytes, GuestAddress(DATA)).expect("memory");
        if header.src_cid == CID && header.dst_cid == 2 && header.kind == 1 {
            if header.op == 5 {
                *next = next.wrapping_add(header.len.min(len) as u8);
            }
            let known = self.known.entry(key).or_default();
            (known.alloc, known.forwarded) = (header.buf_alloc, header.fwd_cnt);
        }
        self.ring.send(&[Desc::readable(DATA, len / 2), Desc::readable(DATA + u64::from(len / 2), len - len / 2)]);
        let chain = self.queue.pop().expect("a ring").expect("a chain");
        self.muxer.from_guest(&mut self.host, header, &chain.reader(&self.ram));
        self.queue.complete(chain, 0).expect("a ring");
    }

    /// Takes a packet; false if there is none.
    fn fetch(&mut self, room: u32) -> bool {
        self.ring.send(&[Desc::writable(DATA, 20.min(room)), Desc::writable(DATA + 20, room.saturating_sub(20))]);
        let chain = self.queue.pop().expect("a ring").expect("a chain");
        let len = self.muxer.to_guest(&mut self.host, &chain.writer(&self.ram));
        self.queue.complete(chain, 0).expect("a ring");
        let Some(len) = len.filter(|len| *len > 0) else { return len.is_some() };
        assert!((44..=room).contains(&len));
        self.ring.send(&[Desc::readable(DATA, len)]);
        let chain = self.queue.pop().expect("a ring").expect("a chain");
        let mut reader = chain.reader(&self.ram);
        let header = Header::read(&mut reader).expect("a header");
        let mut bytes = vec![0; reader.remaining() as usize];
        reader.read_exact(&mut bytes).expect("the data");
        self.queue.complete(chain, 0).expect("a ring");
        assert_eq!((header.len, header.dst_cid), (len - 44, CID));
        assert!((1..=7).contains(&header.op));
        let known = self.known.entry((header.dst_port, header.src_port)).or_default();
        match header.op {
            1..=3 => *known = Known { alloc: known.alloc, forwarded: known.forwarded, ..Known::default() },
            5 => {
                assert!(!bytes.is_empty());
                known.got = known.got.wrapping_add(header.len);
                assert!(known.got.wrapping_sub(known.forwarded) <= known.alloc, "no more than there is room for");
                for byte in bytes {
                    if let Some(last) = known.last {
                        assert_eq!(byte, last.wrapping_add(1), "bytes for the guest in order");
                    }
                    known.last = Some(byte);
                }
            }
            _ => assert_eq!(header.len, 0),
        }
        true
    }

    fn pipe(&self, which: u8) -> Option<((u32, u32), Rc<RefCell<Pipe>>)> {
        let at = usize::from(which) % self.host.pipes.len().max(1);
        self.host.pipes.iter().nth(at).map(|(key, pipe)| (*key, Rc::clone(pipe)))
    }

    fn ready(&mut self, key: (u32, u32), now: Readiness) {
        self.muxer.ready(&mut self.host, Key { guest: key.0, host: key.1 }, now);
    }

    fn act(&mut self, act: &Act) {
        match *act {
            Act::Packet { guest, host, op, flags, len, alloc, forwarded } => {
                let (src_port, dst_port) = Self::key(guest, host);
                let got = self.known.get(&(src_port, dst_port)).map_or(0, |known| known.got);
                let op = u16::from(op % 9);
                let len = if op == 5 { u32::from(len) % DATA_BYTES } else { 0 };
                let header = Header {
                    src_cid: CID,
                    dst_cid: 2,
                    src_port,
                    dst_port,
                    len,
                    kind: 1,
                    op,
                    flags: flags.into(),
                    buf_alloc: alloc.into(),
                    fwd_cnt: got.wrapping_sub(u32::from(forwarded)),
                };
                self.send(&header, len);
            }
            Act::Any { fields, lens } => {
                let header = Header {
                    src_cid: fields[0],
                    dst_cid: fields[1],
                    src_port: fields[2] as u32,
                    dst_port: (fields[2] >> 32) as u32,
                    len: lens[0],
                    kind: fields[3] as u16,
                    op: (fields[3] >> 16) as u16,
                    flags: (fields[3] >> 32) as u32,
                    buf_alloc: fields[4] as u32,
                    fwd_cnt: (fields[4] >> 32) as u32,
                };
                self.send(&header, lens[1] % DATA_BYTES);
            }
            Act::Fetch { room, count } => {
                for _ in 0..count {
                    if !self.fetch(u32::from(room) % DATA_BYTES) {
                        break;
                    }
                }
            }
            Act::Call { port } => {
                let stream = MockStream(Rc::default());
                self.muxer.from_host(&mut self.host, stream, u32::from(port % 4));
            }
            Act::Say { which, len } => {
                if let Some((key, pipe)) = self.pipe(which) {
                    pipe.borrow_mut().to_guest += u32::from(len);
                    self.ready(key, Readiness { readable: true, ..Readiness::default() });
                }
            }
            Act::Hear { which, len } => {
                if let Some((key, pipe)) = self.pipe(which) {
                    pipe.borrow_mut().room = len as usize % (1 << 20);
                    self.ready(key, Readiness { writable: true, ..Readiness::default() });
                }
            }
            Act::End { which, both, broken } => {
                if let Some((key, pipe)) = self.pipe(which) {
                    pipe.borrow_mut().ended = !broken;
                    pipe.borrow_mut().broken |= broken || both;
                    self.ready(key, Readiness { readable: true, writable: both, ended: both });
                }
            }
            Act::Busy(busy) => self.host.busy = busy,
            Act::Again => self.muxer.call_again(&mut self.host),
            Act::Clear => self.muxer.clear(),
        }
        assert!(self.muxer.len() <= CONNECTIONS_MAX);
        assert!(self.muxer.waiting_bytes() <= WAITING_MAX);
    }
}

fuzz_target!(|acts: Vec<Act>| {
    thread_local! {
        static RAM: Ram = memory::allocate(1 << 20).expect("memory");
    }
    RAM.with(|ram| {
        let mut rig = Rig::new(ram);
        acts.iter().for_each(|act| rig.act(act));
        // Whatever has happened, the device has something to say only so often.
        for _ in 0..100_000 {
            if !rig.fetch(4096) {
                return;
            }
        }
        panic!("packets without end");
    });
});
