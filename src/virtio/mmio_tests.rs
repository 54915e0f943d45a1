use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use event_manager::EventSet;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory;
use crate::virtio::spec::{descriptor, interrupt};
use crate::virtio::testing::{Desc, Driver, Ring};
use crate::virtio::{Chain, Completion, Completions, Handled, Source};

const MIB: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(20);
const SIZE: u16 = 16;
const OUT: Desc = Desc { addr: 0x20000, len: 5, flags: 0, next: 0 };
const IN: Desc = Desc { addr: 0x21000, len: 5, flags: descriptor::WRITE, next: 0 };
const MOCK_FEATURE: u64 = 1 << 3;

/// Queues of the mock device, by what it does with their chains.
const ECHO: u32 = 0;
const DEFER: u32 = 1;
const WAIT: u32 = 2;

/// What a test sees and steers of the mock device.
struct Knobs {
    /// Signalled: deferred chains are done, and chains may be had from [`WAIT`].
    go: EventFd,
    stop_delay_ms: AtomicU32,
    panics: AtomicBool,
    fails_to_start: AtomicBool,
    handled: AtomicU32,
    stopped: AtomicU32,
}

struct Mock {
    id: u32,
    knobs: Arc<Knobs>,
    config: Vec<u8>,
    ram: Option<Ram>,
    held: Vec<(u16, Chain)>,
    going: bool,
}

fn echo(ram: &Ram, chain: &Chain) -> u32 {
    let mut bytes = vec![0; chain.readable_len().min(chain.writable_len()) as usize];
    chain.reader(ram).read_exact(&mut bytes).unwrap();
    let mut writer = chain.writer(ram);
    writer.write_all(&bytes).unwrap();
    writer.written()
}

impl Device for Mock {
    fn id(&self) -> u32 {
        self.id
    }
    fn features(&self) -> u64 {
        MOCK_FEATURE
    }
    fn queue_sizes(&self) -> &[u16] {
        &[SIZE, SIZE, SIZE]
    }
    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }
    fn write_config(&mut self, offset: u32, data: &[u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            if let Some(to) = self.config.get_mut(at) {
                *to = *byte;
            }
        }
    }
    fn walls(&self) -> crate::sandbox::Kind {
        crate::sandbox::Kind::Rng
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.ram = Some(activation.ram);
        if self.knobs.fails_to_start.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        Ok(())
    }
    fn sources(&self) -> Vec<Source> {
        use std::os::fd::AsRawFd;
        vec![Source { fd: self.knobs.go.as_raw_fd(), token: 9, events: EventSet::IN }]
    }
    fn handle(&mut self, queue: u16, chain: Chain) -> Handled {
        self.knobs.handled.fetch_add(1, Ordering::SeqCst);
        assert!(!self.knobs.panics.load(Ordering::SeqCst), "the mock device panics on demand");
        match queue.into() {
            DEFER => {
                self.held.push((queue, chain));
                Handled::Deferred
            }
            WAIT if !self.going => Handled::Wait(chain),
            _ => {
                let written = echo(self.ram.as_ref().unwrap(), &chain);
                Handled::Done(chain, written)
            }
        }
    }
    fn flush(&mut self, done: &mut Completions) {
        if self.going {
            self.drain(done);
        }
    }
    fn event(&mut self, token: u32) {
        assert_eq!(token, 9);
        let _ = self.knobs.go.read();
        self.going = true;
    }
    fn drain(&mut self, done: &mut Completions) {
        for (queue, chain) in self.held.drain(..) {
            let written = echo(self.ram.as_ref().unwrap(), &chain);
            done.push(Completion { queue, chain, written });
        }
    }
    fn stop(&mut self) {
        std::thread::sleep(Duration::from_millis(self.knobs.stop_delay_ms.load(Ordering::SeqCst).into()));
        self.held.clear();
        (self.going, self.ram) = (false, None);
        self.knobs.stopped.fetch_add(1, Ordering::SeqCst);
    }
}

struct Rig {
    transport: Transport,
    knobs: Arc<Knobs>,
    irq: EventFd,
    ram: Ram,
    rings: Vec<Ring>,
}

impl Rig {
    fn idle() -> Self {
        Self::with_id(1000)
    }

    fn with_id(id: u32) -> Self {
        let ram = memory::allocate(MIB).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let knobs = Arc::new(Knobs {
            go: event(),
            stop_delay_ms: AtomicU32::new(0),
            panics: AtomicBool::new(false),
            fails_to_start: AtomicBool::new(false),
            handled: AtomicU32::new(0),
            stopped: AtomicU32::new(0),
        });
        let irq = event();
        let device = Mock {
            id,
            knobs: Arc::clone(&knobs),
            config: vec![1, 2, 3, 4, 5, 6, 7, 8],
            ram: None,
            held: Vec::new(),
            going: false,
        };
        let transport = Transport::new(ram.clone(), Box::new(device), irq.try_clone().unwrap()).unwrap();
        ram.write_slice(b"hello", GuestAddress(OUT.addr)).unwrap();
        Self { transport, knobs, irq, ram, rings: Vec::new() }
    }

    fn running() -> Self {
        let mut rig = Self::idle();
        rig.bring_up(u64::MAX);
        rig
    }

    fn bring_up(&mut self, features: u64) {
        self.rings = (1..4).map(|at| Ring::new(&self.ram, at * 0x1000, SIZE)).collect();
        let rings: Vec<&Ring> = self.rings.iter().collect();
        self.driver().bring_up(features, &rings);
    }

    fn driver(&self) -> Driver<'_> {
        Driver(&self.transport)
    }

    fn send(&mut self, queue: u32) -> u16 {
        let head = self.rings[queue as usize].send(&[OUT, IN]);
        self.driver().notify(queue);
        head
    }

    fn wait_used(&mut self, queue: u32) -> (u16, u32) {
        self.rings[queue as usize].wait_used()
    }

    fn echo(&mut self) {
        self.ram.write_slice(&[0; 5], GuestAddress(IN.addr)).unwrap();
        let head = self.send(ECHO);
        assert_eq!(self.wait_used(ECHO), (head, 5));
        let mut bytes = [0; 5];
        self.ram.read_slice(&mut bytes, GuestAddress(IN.addr)).unwrap();
        assert_eq!(&bytes, b"hello");
    }

    fn wait(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + LONG;
        while !holds(self) {
            assert!(Instant::now() < end, "waited in vain: {what}");
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn wait_needs_reset(&self) {
        self.wait("device needs reset", |rig| rig.driver().status() & status::DEVICE_NEEDS_RESET != 0);
    }
}

#[test]
fn identity_registers_are_those_of_a_version_2_device() {
    let rig = Rig::idle();
    let driver = rig.driver();
    assert_eq!(driver.read(register::MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(register::VERSION), 2);
    assert_eq!(driver.read(register::DEVICE_ID), 1000);
    assert_eq!(driver.offered(), MOCK_FEATURE | feature::COMMON);
    driver.write(register::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(register::DEVICE_FEATURES), 0);
    driver.write(register::QUEUE_SEL, 2);
    assert_eq!(driver.read(register::QUEUE_NUM_MAX), u32::from(SIZE));
    driver.write(register::QUEUE_SEL, 3);
    assert_eq!(driver.read(register::QUEUE_NUM_MAX), 0);
    assert_eq!(driver.read(register::QUEUE_READY), 0);
    for offset in (register::SHM_LEN_LOW..=register::SHM_BASE_HIGH).step_by(4) {
        assert_eq!(driver.read(offset), u32::MAX);
    }
}

#[test]
fn registers_take_aligned_words_only() {
    let rig = Rig::idle();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x70, 2)] {
        let mut data = vec![0; len];
        rig.transport.read(offset, &mut data);
        assert!(data.iter().all(|byte| *byte == 0xff), "{offset:#x}+{len}");
    }
    rig.transport.write(register::STATUS, &[1]);
    rig.transport.write(register::STATUS, &[1, 0]);
    rig.transport.write(register::STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.driver().status(), 0);
}

#[test]
fn status_moves_only_along_the_table() {
    let steps = [0, 1, 3, 11];
    for (at, from) in steps.iter().enumerate() {
        for to in 1..64 {
            let rig = Rig::idle();
            let driver = rig.driver();
            driver.negotiate(0);
            driver.reset();
            driver.write(register::DRIVER_FEATURES_SEL, 1);
            for step in &steps[1..=at] {
                driver.write(register::STATUS, *step);
                driver.write(register::DRIVER_FEATURES, 1);
            }
            assert_eq!(driver.status(), *from);
            driver.write(register::STATUS, to);
            let legal = to == steps.get(at + 1).copied().unwrap_or(15);
            assert_eq!(driver.status(), if legal { to } else { *from }, "{from} to {to}");
        }
    }
}

#[test]
fn driver_may_give_up_and_start_again() {
    let rig = Rig::idle();
    let driver = rig.driver();
    driver.write(register::STATUS, 1);
    driver.write(register::STATUS, 1 | status::FAILED);
    assert_eq!(driver.status(), 1 | status::FAILED);
    driver.write(register::STATUS, 3);
    assert_eq!(driver.status(), 1 | status::FAILED);
    driver.reset();
    assert!(driver.negotiate(feature::VERSION_1));
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let good = feature::VERSION_1 | MOCK_FEATURE;
    for (features, agrees) in [
        (good, true),
        (feature::VERSION_1, true),
        (good | feature::COMMON, true),
        (0, false),
        (MOCK_FEATURE, false),
        (good | 1, false),
        (good | 1 << 63, false),
        (u64::MAX, false),
    ] {
        let rig = Rig::idle();
        assert_eq!(rig.driver().negotiate(features), agrees, "{features:#x}");
        if !agrees {
            rig.driver().ready();
            assert_eq!(rig.driver().status(), 3);
        }
    }
    let rig = Rig::idle();
    rig.driver().negotiate(0);
    rig.driver().write(register::DRIVER_FEATURES_SEL, 1);
    rig.driver().write(register::DRIVER_FEATURES, 1);
    rig.driver().write(register::DRIVER_FEATURES_SEL, 2);
    rig.driver().write(register::DRIVER_FEATURES, 1);
    rig.driver().write(register::STATUS, 11);
    assert_eq!(rig.driver().status(), 3, "a feature above bit 63");
}

#[test]
fn features_are_fixed_after_negotiation() {
    let mut rig = Rig::running();
    rig.driver().write(register::DRIVER_FEATURES_SEL, 0);
    rig.driver().write(register::DRIVER_FEATURES, 0);
    rig.echo();
    rig.driver().reset();
    assert!(!rig.driver().negotiate(0), "the features of before are forgotten");
}

#[test]
fn illegal_queues_do_not_become_ready() {
    let rig = Rig::idle();
    let driver = rig.driver();
    let ring = Ring::new(&rig.ram, 0x1000, SIZE);
    let ring_with = |desc, avail, used, size| {
        let mut other = Ring::new(&rig.ram, 0x1000, SIZE);
        (other.desc, other.avail, other.used, other.size) = (desc, avail, used, size);
        other
    };
    let (desc, avail, used) = (ring.desc, ring.avail, ring.used);
    assert!(!driver.set_queue(0, &ring), "before negotiation");
    assert!(driver.negotiate(feature::VERSION_1));
    for size in [0, 3, 15, 32, u16::MAX] {
        assert!(!driver.set_queue(0, &ring_with(desc, avail, used, size)), "size {size}");
    }
    for (desc, avail, used) in [
        (desc + 8, avail, used),
        (desc, avail + 1, used),
        (desc, avail, used + 2),
        (MIB - 16, avail, used),
        (desc, MIB - 4, used),
        (desc, avail, MIB - 4),
        (desc, 0, used),
        (!15, avail, used),
        (desc, !1, used),
        (desc, avail, !3),
        (1 << 40, avail, used),
    ] {
        assert!(!driver.set_queue(0, &ring_with(desc, avail, used, SIZE)), "{desc:#x} {avail:#x} {used:#x}");
    }
    assert!(!driver.set_queue(3, &ring));
    assert!(!driver.set_queue(u32::MAX, &ring));
    assert!(driver.set_queue(0, &ring_with(desc, avail, used, 1)), "a queue of one");
    driver.write(register::QUEUE_READY, 0);
    assert!(driver.set_queue(0, &ring));
    // A ready queue keeps its place.
    driver.write(register::QUEUE_DESC_LOW, 1);
    driver.write(register::QUEUE_NUM, 3);
    driver.write(register::QUEUE_READY, 1);
    assert_eq!(driver.read(register::QUEUE_READY), 1);
    driver.ready();
    driver.write(register::QUEUE_READY, 0);
    assert_eq!(driver.read(register::QUEUE_READY), 1, "the driver is ready");
}

#[test]
fn chain_is_answered_and_interrupt_says_why() {
    let mut rig = Rig::running();
    rig.echo();
    rig.wait("an interrupt", |rig| rig.irq.read().is_ok());
    assert_eq!(rig.driver().read(register::INTERRUPT_STATUS), interrupt::USED_RING);
    rig.driver().write(register::INTERRUPT_ACK, interrupt::CONFIG);
    assert_eq!(rig.driver().read(register::INTERRUPT_STATUS), interrupt::USED_RING);
    rig.driver().write(register::INTERRUPT_ACK, u32::MAX);
    assert_eq!(rig.driver().read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn chains_from_before_the_driver_was_ready_are_answered() {
    let mut rig = Rig::idle();
    let mut ring = Ring::new(&rig.ram, 0x1000, SIZE);
    let head = ring.send(&[OUT, IN]);
    rig.rings = vec![ring];
    let rings: Vec<&Ring> = rig.rings.iter().collect();
    rig.driver().bring_up(u64::MAX, &rings);
    assert_eq!(rig.wait_used(ECHO), (head, 5));
}

#[test]
fn deferred_and_waiting_chains_are_answered_after_the_event() {
    let mut rig = Rig::running();
    let heads = [rig.send(DEFER), rig.send(DEFER), rig.send(WAIT)];
    rig.wait("three chains", |rig| rig.knobs.handled.load(Ordering::SeqCst) >= 3);
    rig.echo();
    assert!(rig.rings[1].used().is_none() && rig.rings[2].used().is_none());
    rig.knobs.go.write(1).unwrap();
    assert_eq!([rig.wait_used(DEFER), rig.wait_used(DEFER)], [(heads[0], 5), (heads[1], 5)]);
    assert_eq!(rig.wait_used(WAIT), (heads[2], 5));
}

#[test]
fn one_interrupt_answers_many_chains() {
    let mut rig = Rig::running();
    for _ in 0..4 {
        rig.rings[0].send(&[OUT, IN]);
    }
    rig.driver().notify(ECHO);
    for _ in 0..4 {
        rig.wait_used(ECHO);
    }
    rig.transport.pause(LONG).unwrap();
    assert_eq!(rig.irq.read().unwrap(), 1);
}

#[test]
fn broken_ring_needs_a_reset_that_heals() {
    for features in [feature::VERSION_1, u64::MAX] {
        let mut rig = Rig::idle();
        for broken in 0..3 {
            rig.bring_up(features);
            rig.echo();
            // The interrupt comes after the answer.
            rig.transport.pause(LONG).unwrap();
            rig.transport.resume();
            rig.driver().write(register::INTERRUPT_ACK, u32::MAX);
            let _ = rig.irq.read();
            match broken {
                0 => rig.rings[0].publish(0x8000),
                1 => drop(rig.rings[0].send(&[Desc::readable(MIB, 1)])),
                _ => rig.rings[0].offer(SIZE),
            }
            rig.driver().notify(ECHO);
            rig.wait_needs_reset();
            rig.wait("an interrupt", |rig| rig.irq.read().is_ok());
            assert_eq!(rig.driver().read(register::INTERRUPT_STATUS), interrupt::CONFIG);
            // The other queues are not served any more either.
            rig.rings[1].send(&[OUT, IN]);
            rig.driver().notify(DEFER);
            rig.knobs.go.write(1).unwrap();
            rig.transport.pause(LONG).unwrap();
            rig.transport.resume();
            assert!(rig.rings[1].used().is_none());
            rig.driver().reset();
            assert_eq!(rig.driver().read(register::INTERRUPT_STATUS), 0);
        }
        rig.bring_up(features);
        rig.echo();
    }
}

#[test]
fn device_that_cannot_start_needs_a_reset() {
    let mut rig = Rig::idle();
    rig.knobs.fails_to_start.store(true, Ordering::SeqCst);
    rig.bring_up(u64::MAX);
    rig.wait_needs_reset();
    rig.knobs.fails_to_start.store(false, Ordering::SeqCst);
    rig.bring_up(u64::MAX);
    rig.echo();
}

#[test]
fn device_that_panics_is_lost_and_nothing_else() {
    let mut rig = Rig::running();
    rig.knobs.panics.store(true, Ordering::SeqCst);
    rig.send(ECHO);
    rig.wait("the panic", |rig| rig.knobs.handled.load(Ordering::SeqCst) > 0);
    rig.driver().write(register::STATUS, 0);
    rig.wait_needs_reset();
    rig.transport.pause(LONG).unwrap();
    rig.driver().write(register::STATUS, 1);
    rig.transport.stop(LONG).unwrap();
}

#[test]
fn slow_reset_shows_in_the_status_and_does_not_hold_the_vcpu() {
    let mut rig = Rig::running();
    rig.echo();
    rig.knobs.stop_delay_ms.store(300, Ordering::SeqCst);
    let before = Instant::now();
    let driver = rig.driver();
    driver.write(register::STATUS, 0);
    assert_ne!(driver.status(), 0);
    driver.write(register::STATUS, 1);
    driver.write(register::QUEUE_READY, 0);
    assert_ne!(driver.status(), 1, "ignored while the device stops");
    assert!(before.elapsed() < Duration::from_millis(200), "{:?}", before.elapsed());
    driver.reset();
    assert!(before.elapsed() >= Duration::from_millis(300));
    rig.knobs.stop_delay_ms.store(0, Ordering::SeqCst);
    rig.bring_up(u64::MAX);
    rig.echo();
}

#[test]
fn quick_reset_is_over_at_once() {
    let mut rig = Rig::running();
    rig.echo();
    rig.driver().write(register::STATUS, 0);
    assert_eq!(rig.driver().status(), 0);
}

/// Threads of this process with this name.
fn threads(name: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|found| found.trim() == name).count()
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_thousand_resets_leak_nothing() {
    let mut rig = Rig::with_id(77_001);
    let before = descriptors();
    for round in 0..1000 {
        rig.bring_up(u64::MAX);
        if round % 10 == 0 {
            rig.echo();
        }
        rig.send(DEFER);
    }
    assert!(threads("virtio77001") <= 1);
    rig.driver().reset();
    assert_eq!(threads("virtio77001"), 0);
    assert_eq!(rig.knobs.stopped.load(Ordering::SeqCst), 1000);
    // Other tests open descriptors meanwhile, but not a thousand.
    assert!(descriptors() < before + 500);
}

#[test]
fn paused_device_touches_nothing_until_resumed() {
    let mut rig = Rig::running();
    let head = rig.send(DEFER);
    rig.wait("the chain", |rig| rig.knobs.handled.load(Ordering::SeqCst) > 0);
    rig.transport.pause(LONG).unwrap();
    assert_eq!(rig.rings[1].used(), Some((head, 5)), "what was in flight is done");
    let head = rig.send(ECHO);
    rig.knobs.go.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert!(rig.rings[0].used().is_none());
    rig.transport.pause(LONG).unwrap();
    assert_eq!(rig.knobs.go.read().unwrap(), 1, "nobody has taken the event");
    rig.knobs.go.write(1).unwrap();
    rig.transport.resume();
    assert_eq!(rig.wait_used(ECHO), (head, 5));
    rig.wait("the event to be taken", |rig| rig.knobs.go.read().is_err());
    for _ in 0..200 {
        rig.transport.pause(LONG).unwrap();
        let head = rig.send(ECHO);
        assert!(rig.rings[0].used().is_none());
        rig.transport.resume();
        assert_eq!(rig.wait_used(ECHO), (head, 5));
    }
}

#[test]
fn paused_device_can_be_reset() {
    let mut rig = Rig::running();
    rig.transport.pause(LONG).unwrap();
    rig.driver().reset();
    rig.transport.resume();
    rig.bring_up(u64::MAX);
    rig.echo();
}

#[test]
fn flooding_driver_does_not_keep_the_device_from_resting() {
    let mut rig = Rig::running();
    let ring = rig.rings.remove(0);
    let head = rig.rings[0].chain(&[]);
    ring.write_desc(head, OUT);
    let (over, knobs) = (AtomicBool::new(false), Arc::clone(&rig.knobs));
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| {
        let (over, transport) = (&over, &rig.transport);
        scope.spawn(move || {
            // Makes chains available without end; each is legal, since no more than the ring's size are open.
            let mut index = 0u16;
            while !over.load(Ordering::SeqCst) {
                if index.wrapping_sub(ring.used_index()) < SIZE {
                    index = index.wrapping_add(1);
                    ring.publish(index);
                    Driver(transport).notify(ECHO);
                }
            }
        });
        for _ in 0..20 {
            let seen = knobs.handled.load(Ordering::SeqCst);
            let end = Instant::now() + LONG;
            while knobs.handled.load(Ordering::SeqCst) < seen + 500 {
                assert!(Instant::now() < end, "the device does not get on");
                std::thread::yield_now();
            }
            let before = Instant::now();
            transport.pause(LONG).unwrap();
            slowest = slowest.max(before.elapsed());
            transport.resume();
        }
        over.store(true, Ordering::SeqCst);
    });
    eprintln!("slowest pause under flood: {slowest:?}");
    // Generous, since other tests run at the same time.
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
}

#[test]
fn configuration_space_takes_any_width() {
    let mut rig = Rig::idle();
    for (offset, expected) in
        [(0, &[1u8, 2, 3, 4][..]), (1, &[2]), (6, &[7, 8, 0, 0]), (8, &[0, 0]), (9000, &[0])]
    {
        let mut data = vec![0xff; expected.len()];
        rig.transport.read(register::CONFIG + offset, &mut data);
        assert_eq!(data, expected);
    }
    let mut whole = [0; 8];
    rig.transport.write(register::CONFIG + 2, &[30, 40]);
    rig.transport.write(register::CONFIG + 7, &[80, 90]);
    rig.transport.read(register::CONFIG, &mut whole);
    assert_eq!(whole, [1, 2, 30, 40, 5, 6, 7, 80]);
    let generation = rig.driver().read(register::CONFIG_GENERATION);
    rig.bring_up(u64::MAX);
    rig.transport.write(register::CONFIG, &[10]);
    rig.wait("the write", |rig| rig.driver().read(register::CONFIG_GENERATION) == generation.wrapping_add(1));
    rig.transport.read(register::CONFIG, &mut whole);
    assert_eq!(whole, [10, 2, 30, 40, 5, 6, 7, 80]);
    rig.transport.write(u64::MAX, &[1]);
    rig.transport.read(u64::MAX, &mut whole);
    assert_eq!(whole, [0; 8]);
}

#[test]
fn queue_sizes_must_be_powers_of_two() {
    struct Odd(u16);
    impl Device for Odd {
        fn id(&self) -> u32 {
            1
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            std::slice::from_ref(&self.0)
        }
        fn config(&self) -> Vec<u8> {
            Vec::new()
        }
        fn walls(&self) -> crate::sandbox::Kind {
            crate::sandbox::Kind::Rng
        }

        fn start(&mut self, _activation: Activation) -> io::Result<()> {
            Ok(())
        }
        fn handle(&mut self, _queue: u16, chain: Chain) -> Handled {
            Handled::Done(chain, 0)
        }
        fn stop(&mut self) {}
    }
    for (size, fine) in [(0, false), (3, false), (1, true), (32768, true), (65535, false)] {
        let ram = memory::allocate(MIB).unwrap();
        let transport = Transport::new(ram, Box::new(Odd(size)), EventFd::new(EFD_NONBLOCK).unwrap());
        assert_eq!(transport.is_ok(), fine, "{size}");
    }
}

/// Accesses that are often nearly what a driver does.
fn access() -> impl Strategy<Value = (u64, u32)> {
    let offset = prop_oneof![
        4 => Just(register::STATUS),
        2 => Just(register::QUEUE_READY),
        2 => Just(register::QUEUE_NUM),
        8 => (0..0x48u64).prop_map(|at| at * 4),
        1 => 0..0x200u64,
    ];
    let value = prop_oneof![
        4 => prop_oneof![Just(0u32), Just(1), Just(3), Just(11), Just(15), Just(16)],
        2 => (0..64u32).prop_map(|n| n << 12),
        1 => any::<u32>(),
    ];
    (offset, value)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_written_the_device_can_be_brought_up_again(
        accesses in proptest::collection::vec(access(), 1..80),
    ) {
        let mut rig = Rig::idle();
        for (offset, value) in accesses {
            rig.driver().write(offset, value);
            rig.driver().read(offset);
        }
        rig.bring_up(u64::MAX);
        rig.echo();
    }
}
