//! Dispatch of guest port and MMIO accesses: an address range leads to a device.
//!
//! The bus is filled while the machine is built and never changes afterwards, so vCPU threads look up without a lock.

use std::sync::Arc;

/// A device that the guest reaches by port or MMIO access.
///
/// Called on vCPU threads, by several at once: an implementation synchronises itself and must not block on I/O.
pub trait BusDevice: Send + Sync {
    /// Fills `data` from `offset` bytes after the start of the device's range. Left as it is, `data` reads as all
    /// ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` bytes after the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices claim the same address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("bus range {start:#x}+{len:#x} is empty, wraps, or overlaps another device")]
pub struct Overlap {
    start: u64,
    len: u64,
}

struct Entry {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// A set of disjoint address ranges, each with its device.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl Bus {
    /// Adds a device at `start..start + len`.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let overlap = Overlap { start, len };
        let end = start.checked_add(len).filter(|_| len > 0).ok_or(overlap)?;
        let at = self.entries.partition_point(|entry| entry.start < start);
        let clear_before = at == 0 || self.entries[at - 1].start + self.entries[at - 1].len <= start;
        let clear_after = self.entries.get(at).is_none_or(|entry| end <= entry.start);
        if !(clear_before && clear_after) {
            return Err(Overlap { start, len });
        }
        self.entries.insert(at, Entry { start, len, device });
        Ok(())
    }

    /// Reads `data.len()` bytes at `addr`; an access that no device answers reads as all ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(addr, data.len()) {
            device.read(offset, data);
        }
    }

    /// Writes `data` at `addr`; an access that no device answers is dropped.
    pub fn write(&self, addr: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(addr, data.len()) {
            device.write(offset, data);
        }
    }

    /// The device whose range holds the whole access, and the offset into it.
    fn find(&self, addr: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.entries.partition_point(|entry| entry.start <= addr).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        let offset = addr - entry.start;
        let fits = offset.checked_add(len as u64).is_some_and(|end| end <= entry.len);
        fits.then(|| (entry.device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, usize)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data.fill(7);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn access_reaches_device_with_offset() {
        let (low, high) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x100, 8, high.clone()).unwrap();
        bus.insert(0x10, 8, low.clone()).unwrap();
        let mut data = [0; 4];
        bus.read(0x104, &mut data);
        bus.write(0x10, &[1]);
        assert_eq!(data, [7; 4]);
        assert_eq!(*high.0.lock().unwrap(), [(4, 4)]);
        assert_eq!(*low.0.lock().unwrap(), [(0, 1)]);
    }

    #[test]
    fn access_outside_or_across_end_reads_ones() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x100, 8, device.clone()).unwrap();
        for addr in [0, 0xff, 0x105, 0x108, u64::MAX] {
            let mut data = [0; 4];
            bus.read(addr, &mut data);
            bus.write(addr, &data);
            assert_eq!(data, [0xff; 4], "{addr:#x}");
        }
        assert!(device.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let mut bus = Bus::default();
        let device = || Arc::new(Recorder::default());
        bus.insert(0x100, 0x10, device()).unwrap();
        for (start, len) in [(0x100, 1), (0xff, 2), (0x10f, 1), (0x80, 0x200), (0x50, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, len, device()), Err(Overlap { start, len }));
        }
        bus.insert(0x110, 1, device()).unwrap();
        bus.insert(0xff, 1, device()).unwrap();
    }
}
