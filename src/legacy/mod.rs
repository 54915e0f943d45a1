//! Devices of the PC that a guest expects at fixed I/O ports, and the guest-event port.

mod guest_event;
mod i8042;
mod power;
mod pvpanic;
mod serial;

pub use guest_event::{BootMark, GuestEvent, Mark};
pub use i8042::{I8042, I8042State};
pub use power::PowerBlock;
pub use pvpanic::PvPanic;
pub use serial::{Serial, SerialSink, SerialState};

use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// What a guest can ask of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GuestRequest {
    /// Switch the machine off.
    PowerOff = 1,
    /// Reset the machine.
    Reset = 2,
    /// The guest's kernel says that it panicked; it may go on to print, and to reset.
    Panicked = 4,
}

/// Where devices leave [`GuestRequest`]s for the thread that runs the machine.
pub struct GuestRequests {
    pending: AtomicU8,
    event: EventFd,
}

impl GuestRequests {
    /// Requests that signal `event`.
    pub fn new(event: EventFd) -> GuestRequests {
        GuestRequests { pending: AtomicU8::new(0), event }
    }

    /// Leaves a request. The first of power-off and reset wins, since the guest must not run on after it.
    pub fn post(&self, request: GuestRequest) {
        let ends = GuestRequest::PowerOff as u8 | GuestRequest::Reset as u8;
        let earlier = self.pending.fetch_update(Ordering::AcqRel, Ordering::Acquire, |pending| {
            let taken = request as u8 & ends != 0 && pending & ends != 0;
            (!taken).then_some(pending | request as u8)
        });
        // A full counter means that a wake-up is on its way already.
        if earlier.is_ok() {
            let _ = self.event.write(1);
        }
    }

    /// Whether a request was left.
    pub fn has(&self, request: GuestRequest) -> bool {
        self.pending.load(Ordering::Acquire) & request as u8 != 0
    }

    /// Whether the guest asked to be stopped, so that a vCPU must not run on.
    pub fn stops(&self) -> bool {
        self.has(GuestRequest::PowerOff) || self.has(GuestRequest::Reset)
    }
}

#[cfg(test)]
fn requests() -> std::sync::Arc<GuestRequests> {
    std::sync::Arc::new(GuestRequests::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_end_wins_and_panic_is_kept() {
        let requests = requests();
        assert!(!requests.stops());
        requests.post(GuestRequest::Panicked);
        assert!(!requests.stops());
        requests.post(GuestRequest::Reset);
        requests.post(GuestRequest::PowerOff);
        assert!(requests.has(GuestRequest::Panicked) && requests.has(GuestRequest::Reset));
        assert!(!requests.has(GuestRequest::PowerOff));
        assert_eq!(requests.event.read().unwrap(), 2);
    }
}
