//! The guest-event port: boot marks and the exit status of the guest's work. See `docs/guest-event-port.md`.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;

/// What a read of the mark register gives, so that a guest can tell that rvmm is there: an `R`.
const PRESENT: u8 = 0x52;
/// Marks that are kept at most; a guest that leaves more has them dropped.
const MAX_MARKS: usize = 64;

const MARK: u64 = 0;
const EXIT_STATUS: u64 = 1;

/// Marks whose meaning is fixed. A guest may use others for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BootMark {
    /// The guest's first user process runs.
    FirstProcess = 1,
    /// The command that the guest was booted for starts.
    CommandStart = 2,
    /// That command has ended.
    CommandEnd = 3,
}

/// A moment in the guest's life, as it was told by the guest.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// What was written.
    pub value: u8,
    /// When.
    pub at: Instant,
    /// Processor time that the whole process had used by then.
    pub cpu: Option<Duration>,
}

#[derive(Default)]
struct Told {
    marks: Vec<Mark>,
    exit_status: Option<u8>,
}

/// The device.
#[derive(Default)]
pub struct GuestEvent {
    told: Mutex<Told>,
}

impl GuestEvent {
    /// The marks so far, in order.
    pub fn marks(&self) -> Vec<Mark> {
        self.lock().marks.clone()
    }

    /// The exit status that the guest reported last.
    pub fn exit_status(&self) -> Option<u8> {
        self.lock().exit_status
    }

    /// Takes over the exit status that the guest reported before it was restored.
    pub fn restore(&self, exit_status: Option<u8>) {
        self.lock().exit_status = exit_status;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl BusDevice for GuestEvent {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (MARK, [first]) = (offset, data) {
            *first = PRESENT;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, &value) in (offset..).zip(data) {
            let mut told = self.lock();
            match offset {
                MARK if told.marks.len() < MAX_MARKS => {
                    let cpu = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).ok().map(Duration::from);
                    told.marks.push(Mark { value, at: Instant::now(), cpu });
                }
                EXIT_STATUS => told.exit_status = Some(value),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_status_are_kept_and_bounded() {
        let device = GuestEvent::default();
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [PRESENT]);
        assert_eq!(device.exit_status(), None);
        for _ in 0..1000 {
            device.write(0, &[BootMark::FirstProcess as u8]);
        }
        device.write(1, &[1]);
        device.write(1, &[42]);
        assert_eq!(device.marks().len(), MAX_MARKS);
        assert_eq!(device.exit_status(), Some(42));
    }
}
