use std::time::Instant;

use vm_memory::Bytes;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::virtio::mmio::Transport;
use crate::virtio::spec::{interrupt, register};
use crate::virtio::testing::{Desc, Driver, Ring};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 16 * MIB;
const DATA: u64 = 0x10_0000;
const LIMIT: Duration = Duration::from_secs(20);

/// A balloon with a driver in front.
struct Rig {
    transport: Transport,
    handle: BalloonHandle,
    irq: EventFd,
    ram: Ram,
    rings: Vec<Ring>,
}

impl Rig {
    fn new(options: BalloonOptions, features: u64) -> Self {
        let ram = memory::allocate(MEMORY).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let (device, handle) = Balloon::new(&options);
        let queues = device.queue_sizes().len();
        let transport = Transport::new(ram.clone(), Box::new(device), irq.try_clone().unwrap()).unwrap();
        let rings: Vec<Ring> = (0..queues).map(|n| Ring::new(&ram, 0x1000 * (n as u64 + 1), 64)).collect();
        Driver(&transport).bring_up(features, &rings.iter().collect::<Vec<_>>());
        Self { transport, handle, irq, ram, rings }
    }

    /// Fills page `page` with something.
    fn fill(&self, page: u64) {
        self.ram.write_slice(&[7; PAGE_BYTES as usize], GuestAddress(page * PAGE_BYTES)).unwrap();
    }

    fn is_freed(&self, page: u64) -> bool {
        let byte: u8 = self.ram.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap();
        assert!(byte == 0 || byte == 7);
        byte == 0
    }

    fn send(&mut self, queue: usize, descs: &[Desc]) {
        let head = self.rings[queue].send(descs);
        Driver(&self.transport).notify(queue as u32);
        assert_eq!(self.rings[queue].wait_used(), (head, 0));
    }

    fn send_pfns(&mut self, queue: usize, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.send(queue, &[Desc::readable(DATA, bytes.len() as u32)]);
    }

    /// Offers statistics, which the device keeps.
    fn offer_statistics(&mut self, statistics: &[(u16, u64)], extra: u32) -> u16 {
        let one = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat();
        let bytes: Vec<u8> = statistics.iter().flat_map(one).collect();
        self.ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let head = self.rings[2].send(&[Desc::readable(DATA, bytes.len() as u32 + extra)]);
        Driver(&self.transport).notify(2);
        head
    }

    fn config(&self, field: u64) -> u32 {
        Driver(&self.transport).read(register::CONFIG + 4 * field)
    }
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn all() -> BalloonOptions {
    BalloonOptions {
        target_pages: 5,
        deflate_on_oom: true,
        free_page_reporting: true,
        stats_interval: Some(Duration::from_secs(3600)),
    }
}

#[test]
fn options_decide_features_and_queues() {
    let look = |options: &BalloonOptions| {
        let (device, _) = Balloon::new(options);
        (device.features(), device.queue_sizes().len())
    };
    assert_eq!(look(&BalloonOptions::default()), (0, 2));
    assert_eq!(look(&BalloonOptions { deflate_on_oom: true, ..Default::default() }), (1 << 2, 2));
    assert_eq!(
        look(&BalloonOptions { stats_interval: all().stats_interval, ..Default::default() }),
        (1 << 1, 3)
    );
    assert_eq!(
        look(&BalloonOptions { free_page_reporting: true, ..Default::default() }),
        (1 << 4 | 1 << 5, 5)
    );
}

#[test]
fn inflated_pages_are_freed_and_others_stay() {
    let mut rig = Rig::new(BalloonOptions::default(), u64::MAX);
    (1024..1034).for_each(|page| rig.fill(page));
    rig.send_pfns(0, &[1026, 1025, 1030, 1026, u32::MAX, 4096, 1 << 20]);
    let freed: Vec<u64> = (1024..1034).filter(|page| rig.is_freed(*page)).collect();
    assert_eq!(freed, [1025, 1026, 1030]);
    assert_eq!(rig.handle.given_back_bytes(), 3 * PAGE_BYTES);
    // A page that comes back can be used, and given again.
    rig.send_pfns(1, &[1025]);
    rig.fill(1025);
    assert!(!rig.is_freed(1025));
    rig.send_pfns(0, &[1025]);
    assert!(rig.is_freed(1025));
}

#[test]
fn page_numbers_may_be_cut_anywhere_and_a_rest_is_ignored() {
    let mut rig = Rig::new(BalloonOptions::default(), u64::MAX);
    [1024, 1025, 1026].into_iter().for_each(|page| rig.fill(page));
    let bytes: Vec<u8> = [1024u32, 1025, 1026].iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
    rig.ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
    rig.send(0, &[Desc::readable(DATA, 3), Desc::readable(DATA + 3, 4), Desc::readable(DATA + 7, 4)]);
    assert_eq!([1024, 1025, 1026].map(|page| rig.is_freed(page)), [true, true, false]);
    rig.send(0, &[Desc::writable(DATA, 64)]);
    assert_eq!(rig.handle.given_back_bytes(), 2 * PAGE_BYTES);
}

#[test]
fn request_with_too_many_pages_is_done_in_part() {
    let mut rig = Rig::new(BalloonOptions::default(), u64::MAX);
    rig.fill(2048);
    let mut pfns = vec![u32::MAX; PAGES_MAX];
    pfns.push(2048);
    rig.send_pfns(0, &pfns);
    assert!(!rig.is_freed(2048));
}

#[test]
fn whole_pages_of_reports_are_freed_on_every_queue_that_a_driver_may_use() {
    for queue in [3, 4] {
        let mut rig = Rig::new(all(), u64::MAX);
        (1024..1034).for_each(|page| rig.fill(page));
        let at = |page: u64| page * PAGE_BYTES;
        rig.send(queue, &[Desc::writable(at(1025), 8192), Desc::writable(at(1029) + 1, 8192)]);
        let freed: Vec<u64> = (1024..1034).filter(|page| rig.is_freed(*page)).collect();
        assert_eq!(freed, [1025, 1026, 1030]);
        rig.send(queue, &[Desc::readable(at(1033), 4096)]);
        assert!(!rig.is_freed(1033));
    }
    // Without statistics the reports of most drivers are on queue 2.
    let mut rig = Rig::new(BalloonOptions { stats_interval: None, ..all() }, u64::MAX);
    rig.fill(1024);
    rig.send(2, &[Desc::writable(1024 * PAGE_BYTES, 4096)]);
    assert!(rig.is_freed(1024));
}

#[test]
fn poisoned_pages_are_left_alone() {
    let mut rig = Rig::new(all(), u64::MAX);
    rig.fill(1024);
    Driver(&rig.transport).write(register::CONFIG + 12, 0xaaaa_aaaa);
    wait_until("the value", || rig.config(3) == 0xaaaa_aaaa);
    rig.send(4, &[Desc::writable(1024 * PAGE_BYTES, 4096)]);
    assert!(!rig.is_freed(1024));
    Driver(&rig.transport).write(register::CONFIG + 12, 0);
    wait_until("the value", || rig.config(3) == 0);
    rig.send(4, &[Desc::writable(1024 * PAGE_BYTES, 4096)]);
    assert!(rig.is_freed(1024));
}

#[test]
fn new_target_interrupts_the_driver_once() {
    let rig = Rig::new(all(), u64::MAX);
    let driver = Driver(&rig.transport);
    assert_eq!(rig.config(0), 5);
    let generation = driver.read(register::CONFIG_GENERATION);
    rig.handle.set_target_pages(77);
    assert_eq!(rig.config(0), 5);
    rig.transport.reconfigure();
    wait_until("the interrupt", || rig.irq.read().is_ok());
    assert_eq!(driver.read(register::INTERRUPT_STATUS), interrupt::CONFIG);
    assert_eq!(rig.config(0), 77);
    assert_ne!(driver.read(register::CONFIG_GENERATION), generation);
    // What does not change anything is not told.
    rig.transport.reconfigure();
    rig.transport.pause(LIMIT).unwrap();
    assert!(rig.irq.read().is_err());
}

#[test]
fn driver_that_writes_at_the_same_time_still_hears_of_the_target() {
    let rig = Rig::new(all(), u64::MAX);
    let driver = Driver(&rig.transport);
    for round in 1..200u32 {
        rig.handle.set_target_pages(round * 10);
        driver.write(register::CONFIG + 4, round);
        rig.transport.reconfigure();
        wait_until("the interrupt", || rig.irq.read().is_ok());
        assert_eq!(rig.config(0), round * 10);
        wait_until("the size", || rig.handle.actual_pages() == round);
    }
}

#[test]
fn target_can_change_before_there_is_a_driver_and_while_paused() {
    let rig = Rig::new(all(), u64::MAX);
    Driver(&rig.transport).reset();
    rig.handle.set_target_pages(9);
    rig.transport.reconfigure();
    assert_eq!(rig.config(0), 9);
    Driver(&rig.transport).bring_up(u64::MAX, &rig.rings.iter().collect::<Vec<_>>());
    rig.transport.pause(LIMIT).unwrap();
    while rig.irq.read().is_ok() {}
    rig.handle.set_target_pages(10);
    rig.transport.reconfigure();
    wait_until("the interrupt", || rig.irq.read().is_ok());
    assert_eq!(rig.config(0), 10);
    rig.transport.resume();
}

#[test]
fn statistics_are_asked_for_at_the_interval() {
    let mut rig = Rig::new(all(), u64::MAX);
    let head = rig.offer_statistics(&[(4, 1000), (5, 2000), (99, 1), (u16::MAX, 1)], 0);
    wait_until("the statistics", || rig.handle.statistics()[4] == Some(1000));
    assert_eq!((rig.handle.statistics()[5], rig.handle.statistics()[0]), (Some(2000), None));
    assert_eq!(rig.rings[2].used(), None);
    rig.handle.set_stats_interval(Duration::from_millis(1));
    rig.transport.reconfigure();
    assert_eq!(rig.rings[2].wait_used(), (head, 0));
    wait_until("the interrupt", || rig.irq.read().is_ok());
    // What is cut off is not taken; the interval goes on.
    let head = rig.offer_statistics(&[(4, 3000)], 5);
    wait_until("the statistics", || rig.handle.statistics()[4] == Some(3000));
    assert_eq!(rig.handle.statistics()[5], None);
    assert_eq!(rig.rings[2].wait_used(), (head, 0));
    rig.handle.set_stats_interval(Duration::ZERO);
    rig.transport.reconfigure();
    rig.transport.pause(LIMIT).unwrap();
    rig.transport.resume();
    rig.offer_statistics(&[(4, 4000)], 0);
    wait_until("the statistics", || rig.handle.statistics()[4] == Some(4000));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.rings[2].used(), None);
    assert_eq!(rig.handle.stats_interval(), None);
}

#[test]
fn second_buffer_for_statistics_comes_back_at_once_and_pausing_keeps_none() {
    let mut rig = Rig::new(all(), u64::MAX);
    let first = rig.offer_statistics(&[(4, 1)], 0);
    wait_until("the statistics", || rig.handle.statistics()[4] == Some(1));
    let second = rig.offer_statistics(&[(4, 2)], 0);
    assert_eq!(rig.rings[2].wait_used(), (second, 0));
    rig.transport.pause(LIMIT).unwrap();
    assert_eq!(rig.rings[2].used(), Some((first, 0)));
    rig.transport.resume();
}

#[test]
fn reset_forgets_the_guest_and_the_device_can_be_used_a_thousand_times() {
    let mut rig = Rig::new(all(), u64::MAX);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = None;
    for round in 0..1000 {
        rig.offer_statistics(&[(4, 1)], 0);
        Driver(&rig.transport).write(register::CONFIG + 4, 12);
        wait_until("the size", || rig.handle.actual_pages() == 12);
        Driver(&rig.transport).reset();
        assert_eq!((rig.handle.actual_pages(), rig.handle.statistics()[4]), (0, None));
        assert_eq!((rig.config(0), rig.config(1)), (5, 0));
        rig.rings = (1..6).map(|n| Ring::new(&rig.ram, 0x1000 * n, 64)).collect();
        Driver(&rig.transport).bring_up(u64::MAX, &rig.rings.iter().collect::<Vec<_>>());
        if round == 10 {
            before = Some(descriptors());
        }
    }
    // Tests beside this one open and close some, too.
    assert!(descriptors() < before.unwrap() + 200);
}
