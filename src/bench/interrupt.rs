//! Ctrl-C and SIGTERM: whoever waits for something hears of them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Somebody wants the run to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Whether the run is to end. Clones share it.
#[derive(Clone, Debug)]
pub struct Interrupt {
    signals: Option<Arc<SignalFd>>,
    seen: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP from now on. Before there are other threads.
    pub fn by_signals() -> nix::Result<Interrupt> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        signals.thread_block()?;
        let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Interrupt { signals: Some(Arc::new(signals)), seen: Arc::default() })
    }

    /// Hears of no signals.
    pub fn never() -> Interrupt {
        Interrupt { signals: None, seen: Arc::default() }
    }

    /// Interrupts.
    pub fn interrupt(&self) {
        self.seen.store(true, Ordering::Relaxed);
    }

    /// An error from the first signal on.
    pub fn check(&self) -> Result<(), Interrupted> {
        let arrived =
            self.signals.as_ref().is_some_and(|signals| matches!(signals.read_signal(), Ok(Some(_))));
        if arrived {
            self.interrupt();
        }
        match self.seen.load(Ordering::Relaxed) {
            true => Err(Interrupted),
            false => Ok(()),
        }
    }

    /// Forgets the signals so far: for what must still be done at the end.
    pub fn clear(&self) {
        while self.signals.as_ref().is_some_and(|signals| matches!(signals.read_signal(), Ok(Some(_)))) {}
        self.seen.store(false, Ordering::Relaxed);
    }

    /// Becomes readable with the first signal.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.signals.as_ref().map(|signals| signals.as_fd())
    }
}
