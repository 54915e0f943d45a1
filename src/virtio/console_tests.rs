use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory;
use crate::virtio::mmio::Transport;
use crate::virtio::spec::{interrupt, register};
use crate::virtio::testing::{Desc, Driver, Ring};

const DATA: u64 = 0x1_0000;
const LIMIT: Duration = Duration::from_secs(20);

/// Takes so many bytes until it is emptied.
struct Sink(Mutex<(Vec<u8>, usize)>);

impl ConsoleSink for Sink {
    fn put(&self, bytes: &[u8]) -> usize {
        let mut inner = lock(&self.0);
        let taken = bytes.len().min(inner.1);
        inner.1 -= taken;
        inner.0.extend(bytes.iter().take(taken));
        taken
    }
}

struct Rig {
    transport: Transport,
    handle: ConsoleHandle,
    sink: Arc<Sink>,
    irq: EventFd,
    room: EventFd,
    ram: Ram,
    rings: [Ring; 2],
}

impl Rig {
    fn new(room_of_sink: usize) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (irq, room) = (event(), event());
        let sink = Arc::new(Sink(Mutex::new((Vec::new(), room_of_sink))));
        let ram = memory::allocate(16 << 20).unwrap();
        let size = Size { columns: 80, rows: 25 };
        let (device, handle) = Console::new(sink.clone(), size, room.try_clone().unwrap()).unwrap();
        let transport = Transport::new(ram.clone(), Box::new(device), irq.try_clone().unwrap()).unwrap();
        let rings = [Ring::new(&ram, 0x1000, 64), Ring::new(&ram, 0x2000, 64)];
        Self { transport, handle, sink, irq, room, ram, rings }
    }

    fn bring_up(&self) {
        Driver(&self.transport).bring_up(u64::MAX, &[&self.rings[0], &self.rings[1]]);
    }

    fn send(&mut self, queue: usize, descs: &[Desc]) -> u16 {
        let head = self.rings[queue].send(descs);
        Driver(&self.transport).notify(queue as u32);
        head
    }

    fn written(&self) -> Vec<u8> {
        lock(&self.sink.0).0.clone()
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn output_waits_for_a_slow_sink_and_comes_whole() {
    let mut rig = Rig::new(5000);
    rig.bring_up();
    let text: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    rig.ram.write_slice(&text, GuestAddress(DATA)).unwrap();
    let first = rig.send(1, &[Desc::readable(DATA, 3), Desc::readable(DATA + 3, 11_997)]);
    let second = rig.send(1, &[Desc::readable(DATA + 12_000, 8000)]);
    wait_until("the first part", || rig.written().len() == 5000);
    assert_eq!(rig.rings[1].used(), None);
    // Pausing and going on sends nothing twice.
    rig.transport.pause(LIMIT).unwrap();
    rig.transport.resume();
    for _ in 0..100 {
        lock(&rig.sink.0).1 += 153;
        rig.handle.sink_drained();
        std::thread::sleep(Duration::from_micros(300));
    }
    wait_until("the rest", || {
        lock(&rig.sink.0).1 += 100;
        rig.handle.sink_drained();
        rig.written().len() == text.len()
    });
    assert!(rig.written() == text);
    assert_eq!([rig.rings[1].wait_used(), rig.rings[1].wait_used()], [(first, 0), (second, 0)]);
}

#[test]
fn input_waits_for_driver_and_buffers() {
    let mut rig = Rig::new(0);
    assert_eq!(rig.handle.feed(b"early"), 0);
    rig.bring_up();
    wait_until("the call for input", || rig.room.read().is_ok());
    assert_eq!(rig.handle.feed(b"hello"), 5);
    let first = rig.send(0, &[Desc::writable(DATA, 2), Desc::writable(DATA + 100, 2)]);
    assert_eq!(rig.rings[0].wait_used(), (first, 4));
    assert_eq!((rig.read(DATA, 2), rig.read(DATA + 100, 2)), (b"he".to_vec(), b"ll".to_vec()));
    let second = rig.send(0, &[Desc::writable(DATA, 100)]);
    assert_eq!(rig.rings[0].wait_used(), (second, 1));
    let third = rig.send(0, &[Desc::writable(DATA, 100)]);
    assert_eq!(rig.rings[0].used(), None);
    rig.handle.feed(b"later");
    assert_eq!(rig.rings[0].wait_used(), (third, 5));
    let useless = rig.send(0, &[Desc::readable(DATA, 100)]);
    assert_eq!(rig.rings[0].wait_used(), (useless, 0));
}

#[test]
fn input_is_bounded_and_reset_forgets_it() {
    let mut rig = Rig::new(0);
    rig.bring_up();
    wait_until("the driver", || rig.handle.feed(&[1]) == 1);
    let _ = rig.room.read();
    assert_eq!(rig.handle.feed(&[2; 5000]), INPUT_MAX - 1);
    let head = rig.send(0, &[Desc::writable(DATA, 4000)]);
    assert_eq!(rig.rings[0].wait_used(), (head, 4000));
    wait_until("the call for input", || rig.room.read().is_ok());
    Driver(&rig.transport).reset();
    assert_eq!(rig.handle.feed(&[3]), 0);
    rig.rings = [Ring::new(&rig.ram, 0x1000, 64), Ring::new(&rig.ram, 0x2000, 64)];
    rig.bring_up();
    wait_until("the driver", || rig.handle.feed(&[4]) == 1);
    let head = rig.send(0, &[Desc::writable(DATA, 4000)]);
    assert_eq!(rig.rings[0].wait_used(), (head, 1));
    assert_eq!(rig.read(DATA, 1), [4]);
}

#[test]
fn long_output_comes_whole_and_does_not_keep_the_device_from_pausing() {
    let mut rig = Rig::new(usize::MAX);
    rig.bring_up();
    let text: Vec<u8> = (0..PIECE as u32 * 256).map(|n| (n / 7 % 251) as u8).collect();
    rig.ram.write_slice(&text, GuestAddress(DATA)).unwrap();
    let half = (text.len() / 2) as u32;
    let head = rig.send(1, &[Desc::readable(DATA, half), Desc::readable(DATA + u64::from(half), half)]);
    while rig.rings[1].used() != Some((head, 0)) {
        rig.transport.pause(LIMIT).unwrap();
        rig.transport.resume();
    }
    assert!(rig.written() == text);
}

#[test]
fn a_thousand_resets_leak_nothing_and_output_goes_on_each_time() {
    let mut rig = Rig::new(usize::MAX);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    rig.ram.write_slice(b"x", GuestAddress(DATA)).unwrap();
    for round in 0..1000 {
        rig.rings = [Ring::new(&rig.ram, 0x1000, 64), Ring::new(&rig.ram, 0x2000, 64)];
        Driver(&rig.transport)
            .bring_up(if round % 2 == 0 { u64::MAX } else { 0 }, &[&rig.rings[0], &rig.rings[1]]);
        rig.send(0, &[Desc::writable(DATA + 100, 1)]);
        rig.send(1, &[Desc::readable(DATA, 1)]);
        rig.rings[1].wait_used();
        // One that may be under way.
        rig.send(1, &[Desc::readable(DATA + 1, 0)]);
        Driver(&rig.transport).reset();
    }
    assert_eq!(rig.written(), vec![b'x'; 1000]);
    // Tests beside this one open and close some, too.
    assert!(descriptors() < before + 500);
}

#[test]
fn size_of_the_terminal_follows() {
    let rig = Rig::new(0);
    rig.bring_up();
    let driver = Driver(&rig.transport);
    wait_until("the interrupt", || rig.irq.read().is_ok());
    assert_eq!(driver.read(register::INTERRUPT_STATUS), interrupt::CONFIG);
    driver.write(register::INTERRUPT_ACK, interrupt::CONFIG);
    assert_eq!(driver.read(register::CONFIG), 25 << 16 | 80);
    rig.handle.set_size(Size { columns: 132, rows: 50 });
    rig.transport.reconfigure();
    wait_until("the interrupt", || rig.irq.read().is_ok());
    assert_eq!(driver.read(register::INTERRUPT_STATUS), interrupt::CONFIG);
    assert_eq!(driver.read(register::CONFIG), 50 << 16 | 132);
}
