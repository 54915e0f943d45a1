//! A driver's side of queues and registers, for tests and fuzz targets. Nothing of the monitor uses it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue as RawQueue, QueueState};
use vm_memory::{Bytes, GuestAddress};

use super::mmio::Transport;
use super::queue::Queue;
use super::spec::{descriptor, feature, register, status};
use super::state::TransportState;
use crate::bus::BusDevice;
use crate::memory::Ram;

/// Reads a device's state, as it stands in a snapshot.
pub fn read_state(bytes: &[u8]) -> Result<TransportState, postcard::Error> {
    postcard::from_bytes(bytes)
}

/// One descriptor as a driver writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Flags.
    pub flags: u16,
    /// Successor.
    pub next: u16,
}

impl Desc {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0, next: 0 }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: descriptor::WRITE, next: 0 }
    }

    /// A table of its own.
    pub fn indirect(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: descriptor::INDIRECT, next: 0 }
    }

    /// The sixteen bytes in memory.
    pub fn bytes(self) -> [u8; 16] {
        let number = u128::from(self.addr)
            | u128::from(self.len) << 64
            | u128::from(self.flags) << 96
            | u128::from(self.next) << 112;
        number.to_le_bytes()
    }
}

/// The driver's side of one queue.
#[derive(Debug)]
pub struct Ring {
    ram: Ram,
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    next_desc: u16,
    next_avail: u16,
    next_used: u16,
}

impl Ring {
    /// A queue of `size` whose parts lie one after the other from `base` on.
    pub fn new(ram: &Ram, base: u64, size: u16) -> Self {
        let avail = base + u64::from(size) * 16;
        let used = (avail + 6 + 2 * u64::from(size) + 3) & !3;
        let ring = Self {
            ram: ram.clone(),
            size,
            desc: base,
            avail,
            used,
            next_desc: 0,
            next_avail: 0,
            next_used: 0,
        };
        let end = used + 6 + 8 * u64::from(size);
        ram.write_slice(&vec![0; (end - base) as usize], GuestAddress(base))
            .expect("the ring lies in memory");
        ring
    }

    /// The device's side, as it is after activation.
    pub fn queue(&self, features: u64) -> Queue {
        self.queue_at(features, 0)
    }

    /// The same, with both indices at `index`.
    pub fn queue_at(&self, features: u64, index: u16) -> Queue {
        let state = QueueState {
            max_size: self.size,
            next_avail: index,
            next_used: index,
            event_idx_enabled: false,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        };
        let queue = RawQueue::try_from(state).expect("a legal queue");
        Queue::new(queue, self.ram.clone(), features)
    }

    /// Starts both rings at `index`.
    pub fn start_at(&mut self, index: u16) {
        (self.next_avail, self.next_used) = (index, index);
        self.store(self.avail + 2, index);
        self.store(self.used + 2, index);
    }

    /// Writes descriptor `index` as it is.
    pub fn write_desc(&self, index: u16, desc: Desc) {
        self.ram
            .write_slice(&desc.bytes(), GuestAddress(self.desc + 16 * u64::from(index)))
            .expect("the table lies in memory");
    }

    /// Writes a chain into the next free descriptors; returns its head. The driver does not look whether they are free.
    pub fn chain(&mut self, descs: &[Desc]) -> u16 {
        let head = self.next_desc % self.size;
        for (at, desc) in descs.iter().enumerate() {
            let index = self.next_desc % self.size;
            self.next_desc = self.next_desc.wrapping_add(1);
            let mut desc = *desc;
            if at + 1 < descs.len() {
                desc.flags |= descriptor::NEXT;
                desc.next = self.next_desc % self.size;
            }
            self.write_desc(index, desc);
        }
        head
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, head: u16) {
        self.store(self.avail + 4 + 2 * u64::from(self.next_avail % self.size), head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.publish(self.next_avail);
    }

    /// Sets the available ring's index, whatever it means.
    pub fn publish(&self, index: u16) {
        self.store(self.avail + 2, index);
    }

    /// Writes a chain and makes it available.
    pub fn send(&mut self, descs: &[Desc]) -> u16 {
        let head = self.chain(descs);
        self.offer(head);
        head
    }

    /// The next used element: head and length.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.load(self.used + 2) == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        let element: u64 = self.ram.read_obj(GuestAddress(at)).expect("the ring lies in memory");
        Some((element as u16, (element >> 32) as u32))
    }

    /// Waits for the next used element.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(used) = self.used() {
                return used;
            }
            assert!(Instant::now() < end, "the device did not complete the chain");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Number of elements that the device has put into the used ring, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// Flags of the used ring.
    pub fn used_flags(&self) -> u16 {
        self.load(self.used)
    }

    /// Where the device wants to be notified next.
    pub fn avail_event(&self) -> u16 {
        self.load(self.used + 4 + 8 * u64::from(self.size))
    }

    /// Sets the flags of the available ring.
    pub fn set_avail_flags(&self, flags: u16) {
        self.store(self.avail, flags);
    }

    /// Sets where the driver wants to be interrupted next.
    pub fn set_used_event(&self, index: u16) {
        self.store(self.avail + 4 + 2 * u64::from(self.size), index);
    }

    fn store(&self, at: u64, value: u16) {
        self.ram.store(value, GuestAddress(at), Ordering::SeqCst).expect("the ring lies in memory");
    }

    fn load(&self, at: u64) -> u16 {
        self.ram.load(GuestAddress(at), Ordering::SeqCst).expect("the ring lies in memory")
    }
}

/// The driver's side of the registers.
#[derive(Clone, Copy)]
pub struct Driver<'a>(pub &'a Transport);

impl Driver<'_> {
    /// Reads a register.
    pub fn read(self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write(self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }

    /// The device status.
    pub fn status(self) -> u32 {
        self.read(register::STATUS)
    }

    /// All features that are offered.
    pub fn offered(self) -> u64 {
        self.write(register::DEVICE_FEATURES_SEL, 0);
        let low = self.read(register::DEVICE_FEATURES);
        self.write(register::DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(register::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Accepts features and says so; the result is whether the device agrees.
    pub fn negotiate(self, features: u64) -> bool {
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        self.write(register::DRIVER_FEATURES_SEL, 0);
        self.write(register::DRIVER_FEATURES, features as u32);
        self.write(register::DRIVER_FEATURES_SEL, 1);
        self.write(register::DRIVER_FEATURES, (features >> 32) as u32);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Tells the device where a queue lies; the result is whether it is ready then.
    pub fn set_queue(self, index: u32, ring: &Ring) -> bool {
        self.write(register::QUEUE_SEL, index);
        self.write(register::QUEUE_NUM, ring.size.into());
        for (low, high, addr) in [
            (register::QUEUE_DESC_LOW, register::QUEUE_DESC_HIGH, ring.desc),
            (register::QUEUE_DRIVER_LOW, register::QUEUE_DRIVER_HIGH, ring.avail),
            (register::QUEUE_DEVICE_LOW, register::QUEUE_DEVICE_HIGH, ring.used),
        ] {
            self.write(low, addr as u32);
            self.write(high, (addr >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
        self.read(register::QUEUE_READY) == 1
    }

    /// Says that the driver is ready.
    pub fn ready(self) {
        self.write(
            register::STATUS,
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
        );
    }

    /// From reset to ready with what is offered of `features`, and these queues.
    pub fn bring_up(self, features: u64, rings: &[&Ring]) {
        self.reset();
        let features = self.offered() & (features | feature::VERSION_1);
        assert!(self.negotiate(features), "the device refuses {features:#x}");
        for (index, ring) in rings.iter().enumerate() {
            assert!(self.set_queue(index as u32, ring), "queue {index} is refused");
        }
        self.ready();
    }

    /// Resets the device and waits until it is.
    pub fn reset(self) {
        self.write(register::STATUS, 0);
        let end = Instant::now() + Duration::from_secs(20);
        while self.status() != 0 {
            assert!(Instant::now() < end, "the device did not reset");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Notifies queue `index`.
    pub fn notify(self, index: u32) {
        self.write(register::QUEUE_NOTIFY, index);
    }
}
