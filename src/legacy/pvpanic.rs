//! pvpanic: one byte by which a guest kernel tells that it panicked (QEMU's `docs/specs/pvpanic.rst`).

use std::sync::Arc;

use super::{GuestRequest, GuestRequests};
use crate::bus::BusDevice;

/// The guest panicked and will not run a crash kernel.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and will run its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The device.
pub struct PvPanic {
    requests: Arc<GuestRequests>,
}

impl PvPanic {
    /// A device that posts to `requests`.
    pub fn new(requests: Arc<GuestRequests>) -> PvPanic {
        PvPanic { requests }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|byte| byte & PANICKED != 0) {
            self.requests.post(GuestRequest::Panicked);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_panic_bit_counts() {
        let requests = super::super::requests();
        let device = PvPanic::new(requests.clone());
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [3]);
        device.write(0, &[CRASH_LOADED]);
        assert!(!requests.has(GuestRequest::Panicked));
        device.write(0, &[PANICKED]);
        assert!(requests.has(GuestRequest::Panicked));
    }
}
