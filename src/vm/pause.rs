//! Bringing a VM to rest and letting it go on: first its vCPUs, then its devices.
//!
//! KVM's timers and interrupt controllers run on: what falls due while the VM rests is delivered when it goes on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::vcpu::VcpuThread;
use crate::virtio;
use crate::virtio::mmio::Transport;

/// How long anything may take to come to rest: a host that needs longer for a disk's requests is in trouble.
const PATIENCE: Duration = Duration::from_secs(5);
/// Distance between attempts to interrupt a vCPU.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Why a VM did not come to rest. It goes on as before then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A vCPU.
    #[error("a vCPU did not come to rest within {PATIENCE:?}")]
    Vcpu,
    /// A device.
    #[error(transparent)]
    Device(#[from] virtio::mmio::Error),
}

/// Where vCPU threads rest.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    resting: Mutex<Resting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Resting {
    vcpus: usize,
    /// Number of the last errand.
    errand: u64,
    /// How many have done it.
    done: usize,
}

impl Gate {
    /// Whether a vCPU that comes by is to rest.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Closes the gate before any vCPU has started.
    pub fn close_early(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Rests until the gate is open, or `stop` is set and [`Gate::open`] called. Does its part of an errand whenever
    /// there is one.
    pub fn rest(&self, stop: &AtomicBool, mut part_of_errand: impl FnMut()) {
        let mut resting = self.lock();
        resting.vcpus += 1;
        self.changed.notify_all();
        let mut last = resting.errand;
        while self.is_closed() && !stop.load(Ordering::Acquire) {
            if resting.errand != last {
                last = resting.errand;
                drop(resting);
                part_of_errand();
                resting = self.lock();
                resting.done += 1;
                self.changed.notify_all();
            } else {
                resting = self.changed.wait(resting).unwrap_or_else(PoisonError::into_inner);
            }
        }
        resting.vcpus -= 1;
    }

    /// Has all vCPUs that rest do their part of an errand; returns how many did, when all have or the time is over.
    pub fn send_on_errand(&self) -> usize {
        let mut resting = self.lock();
        resting.errand = resting.errand.wrapping_add(1);
        resting.done = 0;
        self.changed.notify_all();
        let all_done = |resting: &mut Resting| resting.done < resting.vcpus;
        let waited = self.changed.wait_timeout_while(resting, PATIENCE, all_done);
        waited.unwrap_or_else(PoisonError::into_inner).0.done
    }

    /// Lets vCPUs pass.
    pub fn open(&self) {
        let _resting = self.lock();
        self.closed.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Resting> {
        self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the gate and waits until all `threads` that have not ended rest; false if they do not in time.
    fn close(&self, threads: &[VcpuThread]) -> bool {
        let end = Instant::now() + PATIENCE;
        self.closed.store(true, Ordering::Release);
        let mut resting = self.lock();
        loop {
            let alive = || threads.iter().filter(|thread| !thread.is_over());
            if resting.vcpus >= alive().count() {
                return true;
            }
            if Instant::now() > end {
                return false;
            }
            // With one that rests already, this only ends its next run early.
            alive().for_each(VcpuThread::kick);
            let waited = self.changed.wait_timeout(resting, KICK_INTERVAL);
            resting = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Brings vCPUs and devices to rest: no guest code runs, nothing is in flight, guest memory does not change.
pub fn pause<'a>(
    gate: &Gate,
    threads: &[VcpuThread],
    transports: impl Iterator<Item = &'a Transport> + Clone,
) -> Result<(), Error> {
    let mut rests = if gate.close(threads) { Ok(()) } else { Err(Error::Vcpu) };
    if rests.is_ok() {
        rests = settle(transports.clone());
    }
    if rests.is_err() {
        resume(gate, transports);
    }
    rests
}

/// Brings devices to rest, or has those that rest take note of what was changed since.
pub fn settle<'a>(transports: impl Iterator<Item = &'a Transport>) -> Result<(), Error> {
    // All are told before the first is waited for.
    let told: Vec<_> = transports.map(|transport| transport.begin_pause(PATIENCE)).collect();
    let mut rests = Ok(());
    for device in told {
        let device = device.and_then(virtio::mmio::ComingToRest::wait);
        rests = rests.and(device.map_err(Error::from));
    }
    rests
}

/// Lets them go on.
pub fn resume<'a>(gate: &Gate, transports: impl Iterator<Item = &'a Transport>) {
    transports.for_each(Transport::resume);
    gate.open();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resting_ends_with_the_gate_or_the_vm() {
        for stops in [false, true] {
            let (gate, stop) = (Gate::default(), AtomicBool::new(false));
            let errands = std::sync::atomic::AtomicUsize::new(0);
            gate.close_early();
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..3)
                    .map(|_| {
                        scope.spawn(|| {
                            gate.rest(&stop, || {
                                errands.fetch_add(1, Ordering::Relaxed);
                            })
                        })
                    })
                    .collect();
                while gate.lock().vcpus < 3 {
                    std::thread::yield_now();
                }
                assert_eq!((gate.send_on_errand(), gate.send_on_errand()), (3, 3));
                assert_eq!(errands.load(Ordering::Relaxed), 6);
                if stops {
                    stop.store(true, Ordering::Release);
                }
                gate.open();
                threads.into_iter().for_each(|thread| thread.join().unwrap());
            });
            assert_eq!(gate.lock().vcpus, 0);
            assert!(!gate.is_closed());
        }
    }

    #[test]
    fn machine_without_vcpus_left_rests_at_once() {
        let gate = Gate::default();
        assert!(pause(&gate, &[], std::iter::empty()).is_ok());
        assert!(gate.is_closed());
        assert_eq!(gate.send_on_errand(), 0);
        resume(&gate, std::iter::empty());
        assert!(!gate.is_closed());
    }
}
