//! A hostile driver against the balloon: any buffers on any queue, any configuration writes, any order.
//!
//! Holds: no panic, no hang; every chain comes back once; a page is either as the driver left it or zero, and zero only
//! if a request or a report named it.
#![no_main]

use std::collections::BTreeSet;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rvmm::memory::{self, Ram};
use rvmm::virtio::balloon::{Balloon, BalloonOptions};
use rvmm::virtio::testing::{Desc, Ring};
use rvmm::virtio::{Activation, Completions, Device, Handled};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 1 << 20;
const PAGES: u64 = MEMORY / 4096;
/// Where buffers lie; the pages from here on are those that may go.
const FREE: u64 = 0x40;
const DATA: u64 = 0x8000;

#[derive(Arbitrary, Debug)]
enum Act {
    /// Page numbers on a queue, cut in two.
    Pages { queue: u8, pages: Vec<u16>, cut: u8, far: Option<u32> },
    /// Ranges that the device may write, on a queue.
    Report { queue: u8, ranges: Vec<(u32, u16)>, huge: bool },
    /// Statistics, or what looks like it.
    Statistics { queue: u8, bytes: Vec<u8> },
    Config { offset: u32, data: Vec<u8> },
    Target(u32),
    Interval(u16),
    Event,
    Drain,
    Restart(u64),
}

#[derive(Arbitrary, Debug)]
struct Input {
    reporting: bool,
    statistics: bool,
    features: u64,
    acts: Vec<Act>,
}

struct Rig {
    ram: Ram,
    device: Balloon,
    ring: Ring,
    /// Chains of statistics that the device holds.
    held: usize,
    named: BTreeSet<u64>,
}

impl Rig {
    fn send(&mut self, queue: u8, descs: &[Desc]) {
        let queue = u16::from(queue % 6);
        self.ring = Ring::new(&self.ram, 0x1000, 64);
        self.ring.send(descs);
        let Ok(Some(chain)) = self.ring.queue(u64::MAX).pop() else { return };
        match self.device.handle(queue, chain) {
            Handled::Done(..) => {}
            Handled::Deferred => self.held += 1,
            Handled::Wait(_) => panic!("the balloon never waits"),
        }
        assert!(self.held <= 1);
    }

    fn collect(&mut self, done: Completions) {
        assert!(done.len() <= self.held);
        self.held -= done.len();
    }

    fn check(&self) {
        for page in FREE..PAGES {
            let byte: u8 = self.ram.read_obj(GuestAddress(page * 4096)).expect("memory");
            assert!(byte == 7 || byte == 0 && self.named.contains(&page), "page {page}: {byte}");
        }
    }
}

thread_local! {
    static RAM: Ram = memory::allocate(MEMORY).expect("memory for a guest");
}

fuzz_target!(|input: Input| {
    let ram = RAM.with(Clone::clone);
    for page in FREE..PAGES {
        ram.write_obj(7u8, GuestAddress(page * 4096)).expect("memory");
    }
    let interval = input.statistics.then_some(Duration::from_secs(1));
    let options = BalloonOptions {
        free_page_reporting: input.reporting,
        stats_interval: interval,
        ..BalloonOptions::default()
    };
    let (mut device, handle) = Balloon::new(&options);
    device.start(Activation { ram: ram.clone(), features: input.features }).expect("a timer");
    let ring = Ring::new(&ram, 0x1000, 64);
    let mut rig = Rig { ram, device, ring, held: 0, named: BTreeSet::new() };
    for act in input.acts.iter().take(60) {
        match act {
            Act::Pages { queue, pages, cut, far } => {
                let pages = pages.iter().take(200).map(|page| u32::from(*page) % (PAGES as u32 + 8));
                let pages: Vec<u32> = pages.filter(|page| u64::from(*page) >= FREE).chain(*far).collect();
                let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
                rig.ram.write_slice(&bytes, GuestAddress(DATA)).expect("memory");
                // What is cut off at the end may still be read as other pages.
                rig.named.extend(pages.iter().map(|page| u64::from(*page)));
                let (len, cut) = (bytes.len() as u32, u32::from(*cut).min(bytes.len() as u32));
                let descs =
                    [Desc::readable(DATA, cut), Desc::readable(DATA + u64::from(cut), len - cut)];
                rig.send(*queue, &descs);
            }
            Act::Report { queue, ranges, huge } => {
                let mut descs = Vec::new();
                for (addr, len) in ranges.iter().take(16) {
                    let addr = FREE * 4096 + u64::from(*addr) % (MEMORY - FREE * 4096);
                    let len = if *huge { MEMORY - addr } else { u64::from(*len).min(MEMORY - addr) };
                    rig.named.extend(addr.div_ceil(4096)..(addr + len) / 4096);
                    descs.push(Desc::writable(addr, len as u32));
                }
                if !descs.is_empty() {
                    rig.send(*queue, &descs);
                }
            }
            Act::Statistics { queue, bytes } => {
                // On the queue for pages these would be page numbers.
                let queue = if queue % 6 == 0 { 2 } else { *queue };
                let bytes = &bytes[..bytes.len().min(1000)];
                rig.ram.write_slice(bytes, GuestAddress(DATA)).expect("memory");
                rig.send(queue, &[Desc::readable(DATA, bytes.len() as u32)]);
            }
            Act::Config { offset, data } => {
                rig.device.write_config(*offset, data);
                assert_eq!(rig.device.config().len(), 16);
            }
            Act::Target(pages) => {
                handle.set_target_pages(*pages);
                rig.device.reconfigure(&mut Completions::new());
                assert_eq!(rig.device.config()[..4], pages.to_le_bytes());
            }
            Act::Interval(ms) => {
                handle.set_stats_interval(Duration::from_millis((*ms).into()));
                rig.device.reconfigure(&mut Completions::new());
            }
            Act::Event => {
                let mut done = Completions::new();
                rig.device.event(0);
                rig.device.flush(&mut done);
                rig.collect(done);
            }
            Act::Drain => {
                let mut done = Completions::new();
                rig.device.drain(&mut done);
                rig.collect(done);
                assert_eq!(rig.held, 0);
            }
            Act::Restart(features) => {
                rig.device.stop();
                rig.held = 0;
                assert_eq!(handle.actual_pages(), 0);
                let ram = rig.ram.clone();
                rig.device.start(Activation { ram, features: *features }).expect("a timer");
            }
        }
    }
    rig.check();
});
