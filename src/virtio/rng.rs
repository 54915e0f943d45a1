//! The entropy device (virtio 1.2 §5.4): random bytes from the host's kernel.

use std::io;
use std::sync::Arc;

use event_manager::EventSet;

use super::Chain;
use super::device::{Activation, Device, Handled, Source};
use super::rate::{Limiter, Limits};
use super::spec::rng;
use super::state::{DeviceState, RestoreError};
use crate::memory::Ram;
use crate::{metrics, sandbox};

/// Bytes that one request gets at most; a driver that wants more asks again (§5.4.6 lets the device give fewer).
const REQUEST_BYTES_MAX: usize = 4096;

/// Token of the limiter's timer.
const TIMER: u32 = 0;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    /// While the driver is ready.
    ram: Option<Ram>,
    limiter: Limiter,
    counters: Arc<metrics::Device>,
    error_logged: bool,
}

impl Default for Rng {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Rng {
    /// A device that gives no more than this.
    pub fn new(limits: Limits) -> Self {
        let counters = metrics::Device::new("rng", "", metrics::Own::Nothing);
        Self { ram: None, limiter: Limiter::new(limits), counters, error_logged: false }
    }

    /// Fills a request's buffer; returns how many bytes it got.
    fn fill(&mut self, ram: &Ram, chain: &Chain) -> u32 {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let len = REQUEST_BYTES_MAX.min(chain.writable_len() as usize);
        let Some(bytes) = bytes.get_mut(..len) else { return 0 };
        if let Err(error) = getrandom::fill(bytes) {
            if !std::mem::replace(&mut self.error_logged, true) {
                tracing::warn!(%error, "the host has no random numbers for the guest");
            }
            return 0;
        }
        let mut writer = chain.writer(ram);
        // What does not reach guest memory is not counted.
        let _ = writer.write_all(bytes);
        writer.written()
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        rng::ID
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn metrics(&self) -> Arc<metrics::Device> {
        Arc::clone(&self.counters)
    }

    fn walls(&self) -> sandbox::Kind {
        sandbox::Kind::Rng
    }

    fn sources(&self) -> Vec<Source> {
        let timer = self.limiter.fd().map(|fd| Source { fd, token: TIMER, events: EventSet::IN });
        timer.into_iter().collect()
    }

    fn event(&mut self, _token: u32) {
        self.limiter.fired();
    }

    fn start(&mut self, activation: Activation) -> io::Result<()> {
        if self.limiter.has_limits() {
            self.limiter.start()?;
        }
        self.ram = Some(activation.ram);
        Ok(())
    }

    fn handle(&mut self, _queue: u16, chain: Chain) -> Handled {
        let Some(ram) = self.ram.clone() else { return Handled::Done(chain, 0) };
        if !self.limiter.ready() {
            self.counters.limiter_waits.add(1);
            return Handled::Wait(chain);
        }
        let written = self.fill(&ram, &chain);
        self.limiter.take(written.into());
        Handled::Done(chain, written)
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Rng)
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), RestoreError> {
        if state == DeviceState::Rng { Ok(()) } else { Err(RestoreError::Nonsense(rng::ID)) }
    }

    fn stop(&mut self) {
        self.ram = None;
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::memory;
    use crate::virtio::mmio::Transport;
    use crate::virtio::rate::Bucket;
    use crate::virtio::testing::{Desc, Driver, Ring};

    const RING: u64 = 0x1000;
    const DATA: u64 = 0x10000;

    struct Rig {
        transport: Transport,
        ram: Ram,
        ring: Ring,
    }

    impl Rig {
        fn new() -> Self {
            Self::with(Limits::default())
        }

        fn with(limits: Limits) -> Self {
            let ram = memory::allocate(16 << 20).unwrap();
            let irq = EventFd::new(EFD_NONBLOCK).unwrap();
            let transport = Transport::new(ram.clone(), Box::new(Rng::new(limits)), irq).unwrap();
            let ring = Ring::new(&ram, RING, 64);
            Driver(&transport).bring_up(u64::MAX, &[&ring]);
            Self { transport, ram, ring }
        }

        /// Sends a request; returns the used length.
        fn request(&mut self, descs: &[Desc]) -> u32 {
            let head = self.ring.send(descs);
            Driver(&self.transport).notify(0);
            let (used, len) = self.ring.wait_used();
            assert_eq!(used, head);
            len
        }

        fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
            let mut bytes = vec![0; len];
            self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
            bytes
        }
    }

    #[test]
    fn buffers_are_filled_with_bytes_that_differ() {
        let mut rig = Rig::new();
        assert_eq!(rig.request(&[Desc::writable(DATA, 64)]), 64);
        let first = rig.bytes(DATA, 64);
        assert_eq!(rig.request(&[Desc::writable(DATA, 10), Desc::writable(DATA + 100, 54)]), 64);
        let second = [rig.bytes(DATA, 10), rig.bytes(DATA + 100, 54)].concat();
        // Each byte of two times 64 random ones is zero, or the same in both, with a probability of 2^-8.
        assert!(first.iter().zip(&second).filter(|(a, b)| a == b).count() < 16);
        assert!(first.iter().chain(&second).filter(|byte| **byte == 0).count() < 16);
        assert_eq!(rig.bytes(DATA + 154, 64), [0; 64], "nothing past the buffer");
    }

    #[test]
    fn large_request_gets_a_part() {
        let mut rig = Rig::new();
        assert_eq!(rig.request(&[Desc::writable(DATA, 1 << 20)]), 4096);
        assert_eq!(rig.bytes(DATA + 4096, 4096), [0; 4096]);
        assert_ne!(rig.bytes(DATA + 4096 - 16, 16), [0; 16]);
    }

    #[test]
    fn requests_wait_for_what_their_limits_let_pass() {
        // 1,000 requests a second of which one may pass at once, and bytes enough for ten of them.
        let operations = Some(Bucket { size: 1, one_time_burst: 0, refill_time: 1 });
        let bandwidth = Some(Bucket { size: 640, one_time_burst: 0, refill_time: 3_600_000 });
        let mut rig = Rig::with(Limits { operations, bandwidth });
        for _ in 0..10 {
            assert_eq!(rig.request(&[Desc::writable(DATA, 64)]), 64);
        }
        rig.ring.send(&[Desc::writable(DATA, 64)]);
        Driver(&rig.transport).notify(0);
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(rig.ring.used_index(), 10, "the eleventh has to wait an hour");
        // A driver that gives up is not kept waiting.
        Driver(&rig.transport).reset();
        rig.ring = Ring::new(&rig.ram, RING, 64);
        Driver(&rig.transport).bring_up(0, &[&rig.ring]);
        rig.ring.send(&[Desc::writable(DATA, 64)]);
        Driver(&rig.transport).notify(0);
        std::thread::sleep(std::time::Duration::from_millis(30));
        assert_eq!(rig.ring.used_index(), 0, "a reset fills no bucket");
    }

    #[test]
    fn a_thousand_resets_leak_nothing_and_bytes_come_each_time() {
        let mut rig = Rig::new();
        let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = descriptors();
        for round in 0..1000u64 {
            assert_eq!(rig.request(&[Desc::writable(DATA, 8)]), 8);
            // One that may be under way.
            rig.ring.send(&[Desc::writable(DATA + 8, 4096)]);
            Driver(&rig.transport).notify(0);
            Driver(&rig.transport).reset();
            rig.ram.write_slice(&[0; 16], GuestAddress(DATA)).unwrap();
            rig.ring = Ring::new(&rig.ram, RING, 64);
            Driver(&rig.transport).bring_up(if round % 2 == 0 { 0 } else { u64::MAX }, &[&rig.ring]);
            assert_eq!(rig.bytes(DATA, 16), [0; 16], "nothing is written after the reset");
        }
        // Tests beside this one open and close some, too.
        assert!(descriptors() < before + 500);
    }

    #[test]
    fn request_without_room_gets_nothing_and_the_device_goes_on() {
        let mut rig = Rig::new();
        assert_eq!(rig.request(&[Desc::readable(DATA, 64)]), 0);
        assert_eq!(rig.request(&[Desc::writable(DATA, 0)]), 0);
        assert_eq!(rig.bytes(DATA, 64), [0; 64]);
        assert_eq!(rig.request(&[Desc::readable(DATA, 64), Desc::writable(DATA + 64, 32)]), 32);
        Driver(&rig.transport).reset();
        rig.ring = Ring::new(&rig.ram, RING, 64);
        Driver(&rig.transport).bring_up(0, &[&rig.ring]);
        assert_eq!(rig.request(&[Desc::writable(DATA, 1)]), 1);
    }
}
