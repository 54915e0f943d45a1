use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::memory;
use crate::virtio::mmio::Transport;
use crate::virtio::spec::register;
use crate::virtio::spec::vsock::{HOST_CID, TYPE_STREAM, op};
use crate::virtio::testing::{Desc, Driver, Ring};

const CID: u32 = 9;
const PATIENCE: Duration = Duration::from_secs(20);
const RX_BUFFER: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x40_0000;
const EVENT_BUFFER: u64 = 0x50_0000;
const BUFFER_BYTES: u32 = 4096;

/// A device with a unix socket behind it and a driver in front.
struct Rig {
    transport: Transport,
    ram: Ram,
    rx: Ring,
    tx: Ring,
    event: Ring,
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(prepare: impl FnOnce(&mut Vsock)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let ram = memory::allocate(16 << 20).unwrap();
        let mut device = Vsock::new(CID, UnixHost::listen(&path).unwrap());
        prepare(&mut device);
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = Transport::new(ram.clone(), Box::new(device), irq).unwrap();
        let (rx, tx, event) = rings(&ram);
        let mut rig = Self { transport, ram, rx, tx, event, path, dir };
        rig.bring_up();
        rig
    }

    /// (Re)starts the driver, with 32 buffers in the receive queue.
    fn bring_up(&mut self) {
        Driver(&self.transport).reset();
        (self.rx, self.tx, self.event) = rings(&self.ram);
        for at in 0..32 {
            self.rx.send(&[Desc::writable(RX_BUFFER + at * u64::from(BUFFER_BYTES), BUFFER_BYTES)]);
        }
        Driver(&self.transport).bring_up(u64::MAX, &[&self.rx, &self.tx, &self.event]);
    }

    fn send(&mut self, key: (u32, u32), op: u16, data: &[u8]) {
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: key.0,
            dst_port: key.1,
            len: data.len() as u32,
            kind: TYPE_STREAM,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        };
        self.ram.write_slice(&header.bytes(), GuestAddress(TX_BUFFER)).unwrap();
        self.ram.write_slice(data, GuestAddress(TX_BUFFER + 0x100)).unwrap();
        self.tx.send(&[Desc::readable(TX_BUFFER, 44), Desc::readable(TX_BUFFER + 0x100, data.len() as u32)]);
        Driver(&self.transport).notify(1);
        self.tx.wait_used();
    }

    /// The next packet, whose buffer goes back into the queue.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.rx.wait_used();
        let addr = RX_BUFFER + u64::from(head) * u64::from(BUFFER_BYTES);
        let mut bytes = vec![0; len as usize];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        let field = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let header = Header {
            src_port: field(16),
            dst_port: field(20),
            len: field(24),
            op: (field(28) >> 16) as u16,
            ..Header::default()
        };
        assert_eq!(bytes.len() as u32, 44 + header.len);
        self.rx.offer(head);
        Driver(&self.transport).notify(0);
        (header, bytes.split_off(44))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op);
        header
    }

    fn call(&self, greeting: &str) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        stream
    }

    fn listener_path(&self, port: u32) -> PathBuf {
        self.dir.path().join(format!("s_{port}"))
    }
}

fn rings(ram: &Ram) -> (Ring, Ring, Ring) {
    (Ring::new(ram, 0x1000, 32), Ring::new(ram, 0x3000, 32), Ring::new(ram, 0x5000, 16))
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn read_to_end(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn host_reaches_the_guest_and_bytes_behind_the_greeting_are_for_it() {
    let mut rig = Rig::new();
    let mut stream = rig.call("CONNECT 5\nhello");
    let request = rig.expect(op::REQUEST);
    assert_eq!(request.dst_port, 5);
    let key = (5, request.src_port);
    rig.send(key, op::RESPONSE, &[]);
    let answer = format!("OK {}\n", key.1);
    assert_eq!(read(&mut stream, answer.len()), answer.as_bytes());
    assert_eq!(rig.receive().1, b"hello");
    rig.send(key, op::RW, b"world");
    assert_eq!(read(&mut stream, 5), b"world");
    drop(stream);
    rig.expect(op::SHUTDOWN);
    rig.send(key, op::RST, &[]);
}

#[test]
fn greeting_may_come_in_pieces_and_must_be_one() {
    let mut rig = Rig::new();
    let mut slow = rig.call("CONN");
    for part in ["ECT 4", "2", "\n"] {
        std::thread::sleep(Duration::from_millis(2));
        slow.write_all(part.as_bytes()).unwrap();
    }
    assert_eq!(rig.expect(op::REQUEST).dst_port, 42);
    for wrong in ["\n", "CONNECT\n", "CONNECT 1 2\n", "CONNECT -1\n", "CONNECT 4294967296\n", "A\nB"] {
        assert_eq!(read_to_end(&mut rig.call(wrong)), b"", "{wrong:?}");
    }
    let mut long = rig.call(&"CONNECT ".repeat(4));
    assert_eq!(read_to_end(&mut long), b"");
    rig.call("connect 7\n");
    assert_eq!(rig.expect(op::REQUEST).dst_port, 7);
}

#[test]
fn program_that_says_nothing_is_dropped_for_others() {
    let mut rig = Rig::new();
    let mut first = rig.call("");
    let _others: Vec<_> = (0..300).map(|_| rig.call("CON")).collect();
    assert_eq!(read_to_end(&mut first), b"");
    let _served = rig.call("CONNECT 7\n");
    assert_eq!(rig.expect(op::REQUEST).dst_port, 7);
}

#[test]
fn guest_reaches_listeners_of_the_host_and_nobody_else() {
    let mut rig = Rig::new();
    rig.send((1, 80), op::REQUEST, &[]);
    rig.expect(op::RST);
    let listener = std::os::unix::net::UnixListener::bind(rig.listener_path(80)).unwrap();
    rig.send((1, 80), op::REQUEST, &[]);
    rig.expect(op::RESPONSE);
    let mut stream = listener.accept().unwrap().0;
    rig.send((1, 80), op::RW, b"ask");
    assert_eq!(read(&mut stream, 3), b"ask");
    stream.write_all(b"answer").unwrap();
    assert_eq!(rig.receive().1, b"answer");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    rig.expect(op::SHUTDOWN);
    rig.send((1, 80), op::RW, b"more");
    assert_eq!(read(&mut stream, 4), b"more");
    rig.send((1, 80), op::RST, &[]);
    assert_eq!(read_to_end(&mut stream), b"");
}

#[test]
fn listener_without_room_is_called_again_until_it_has_some() {
    let mut rig = Rig::new();
    let path = rig.listener_path(80);
    let listener =
        socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    socket::listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    rig.send((1, 80), op::REQUEST, &[]);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(rig.rx.used(), None);
    let listener = std::os::unix::net::UnixListener::from(listener);
    listener.accept().unwrap();
    rig.expect(op::RESPONSE);
}

#[test]
fn driver_that_resets_a_thousand_times_leaves_no_stream_and_no_descriptor() {
    let mut rig = Rig::new();
    let listener = std::os::unix::net::UnixListener::bind(rig.listener_path(80)).unwrap();
    let mut before = 0;
    for round in 0..1000 {
        rig.send((1, 80), op::REQUEST, &[]);
        rig.expect(op::RESPONSE);
        let mut stream = listener.accept().unwrap().0;
        let mut caller = rig.call("CONNECT 3\n");
        rig.expect(op::REQUEST);
        rig.bring_up();
        assert_eq!(read_to_end(&mut stream), b"");
        assert_eq!(read_to_end(&mut caller), b"");
        if round == 0 {
            before = descriptors();
        }
    }
    // Other tests of this process have descriptors, too.
    assert!(descriptors() < before + 500, "{} descriptors after {before}", descriptors());
}

#[test]
fn guest_hears_of_a_restore_once() {
    let mut rig = Rig::with(Vsock::announce_reset);
    rig.ram.write_slice(&[0xff; 8], GuestAddress(EVENT_BUFFER)).unwrap();
    rig.event.send(&[Desc::writable(EVENT_BUFFER, 4)]);
    rig.event.send(&[Desc::writable(EVENT_BUFFER + 4, 4)]);
    Driver(&rig.transport).notify(2);
    assert_eq!(rig.event.wait_used(), (0, 4));
    assert_eq!(rig.ram.read_obj::<u64>(GuestAddress(EVENT_BUFFER)).unwrap(), 0xffff_ffff << 32);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(rig.event.used(), None);
}

#[test]
fn paused_device_touches_nothing() {
    let mut rig = Rig::new();
    let stream = rig.call("CONNECT 5\n");
    let key = (5, rig.expect(op::REQUEST).src_port);
    rig.send(key, op::RESPONSE, &[]);
    rig.transport.pause(PATIENCE).unwrap();
    (&stream).write_all(b"waits").unwrap();
    let _caller = rig.call("CONNECT 6\n");
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(rig.rx.used(), None);
    rig.transport.resume();
    let mut seen: Vec<_> = (0..2).map(|_| rig.receive().0.op).collect();
    seen.sort_unstable();
    assert_eq!(seen, [op::REQUEST, op::RW]);
}

#[test]
fn packets_without_a_header_and_buffers_without_room_come_back() {
    let mut rig = Rig::new();
    for len in [0, 1, 43] {
        rig.tx.send(&[Desc::readable(TX_BUFFER, len)]);
        Driver(&rig.transport).notify(1);
        assert_eq!(rig.tx.wait_used().1, 0);
    }
    rig.send((1, 81), op::REQUEST, &[]);
    rig.expect(op::RST);
}

#[test]
fn configuration_space_has_the_address() {
    let rig = Rig::new();
    let mut data = [0xff; 8];
    crate::bus::BusDevice::read(&rig.transport, register::CONFIG, &mut data);
    assert_eq!(u64::from_le_bytes(data), u64::from(CID));
}
