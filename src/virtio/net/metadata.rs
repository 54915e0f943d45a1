//! The metadata service's place in the device: what the guest sends to it is taken out of the way to the tap.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::mmds::{HEAD_BYTES, Stack};
use crate::tap::HEADER_BYTES;
use crate::virtio::chain::{Reader, TooShort};

/// Shortest wait, since a timer that is set to nothing is off.
const MIN_WAIT: Duration = Duration::from_millis(1);

/// The service's end, with what wakes the device for it.
pub(super) struct Metadata {
    stack: Stack,
    /// While the driver is ready.
    timer: Option<TimerFd>,
    armed: bool,
    /// Something has happened since the timer was set.
    changed: bool,
}

/// What a frame is.
pub(super) enum Looked<'a> {
    /// The service's, which has it.
    Taken,
    /// Not the service's: so many bytes were copied, and these come behind them.
    Other(usize, Reader<'a>),
}

impl Metadata {
    pub(super) fn new(stack: Stack) -> Self {
        Self { stack, timer: None, armed: false, changed: false }
    }

    pub(super) fn start(&mut self) -> io::Result<()> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        self.timer = Some(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?);
        Ok(())
    }

    pub(super) fn stop(&mut self) {
        self.stack.reset();
        (self.timer, self.armed, self.changed) = (None, false, false);
    }

    /// Becomes readable when [`Self::fired`] is to be called.
    pub(super) fn fd(&self) -> Option<RawFd> {
        self.timer.as_ref().map(|timer| timer.as_fd().as_raw_fd())
    }

    /// Looks at a packet, which has the device's header before it, and takes it if it is the service's.
    pub(super) fn look<'a>(
        &mut self,
        packet: Reader<'a>,
        head: &mut [u8; HEADER_BYTES + HEAD_BYTES],
    ) -> Result<Looked<'a>, TooShort> {
        let known = head.len().min(packet.remaining() as usize);
        let (mut front, behind) = packet.split_at(known as u32)?;
        let head = head.get_mut(..known).ok_or(TooShort)?;
        front.read_exact(head)?;
        let head = head.get(HEADER_BYTES..).ok_or(TooShort)?;
        if !self.stack.wants(head) {
            return Ok(Looked::Other(known, behind));
        }
        // As long as a packet may be, which the device has seen to.
        let mut frame = head.to_vec();
        frame.resize(head.len() + behind.remaining() as usize, 0);
        let mut behind = behind;
        behind.read_exact(frame.get_mut(head.len()..).ok_or(TooShort)?)?;
        self.stack.receive(&frame);
        self.changed = true;
        Ok(Looked::Taken)
    }

    /// The next packet for the guest, behind an empty header.
    pub(super) fn packet(&self) -> Option<Vec<u8>> {
        self.stack.frame(HEADER_BYTES)
    }

    /// Takes note that the guest has it, or never will.
    pub(super) fn sent(&mut self) {
        self.stack.sent();
        self.changed = true;
    }

    /// Carries on when the timer says so.
    pub(super) fn fired(&mut self) {
        if let Some(timer) = &self.timer {
            let _ = timer.wait();
        }
        self.stack.poll();
        (self.armed, self.changed) = (false, true);
    }

    /// Sets the timer, if anything has changed.
    pub(super) fn arm(&mut self) {
        let (Some(timer), true) = (&self.timer, std::mem::take(&mut self.changed)) else { return };
        let set = match self.stack.due() {
            Some(due) => {
                self.armed = true;
                let due = TimeSpec::from_duration(due.max(MIN_WAIT));
                timer.set(Expiration::OneShot(due), TimerSetTimeFlags::empty())
            }
            None if self.armed => {
                self.armed = false;
                timer.unset()
            }
            None => Ok(()),
        };
        if let Err(error) = set {
            tracing::warn!(%error, "cannot arm the timer of the metadata service");
        }
    }
}
