//! Ctrl-C and SIGTERM: whoever waits for something hears of them.
//!
//! The signals are caught and not blocked: what a process blocks, its children block too, and a child that never hears
//! of SIGTERM does not end when it is told to.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Somebody wants the run to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Whether the run is to end. Clones share it.
#[derive(Clone, Debug)]
pub struct Interrupt {
    signals: Option<Arc<UnixStream>>,
    seen: Arc<AtomicBool>,
}

impl Interrupt {
    /// Takes SIGINT, SIGTERM and SIGHUP from now on.
    pub fn by_signals() -> io::Result<Interrupt> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        Ok(Interrupt { signals: Some(Arc::new(reader)), seen: Arc::default() })
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
        if self.take() {
            self.interrupt();
        }
        match self.seen.load(Ordering::Relaxed) {
            true => Err(Interrupted),
            false => Ok(()),
        }
    }

    /// Forgets the signals so far: for what must still be done at the end.
    pub fn clear(&self) {
        self.take();
        self.seen.store(false, Ordering::Relaxed);
    }

    /// Becomes readable with the first signal.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.signals.as_ref().map(|signals| signals.as_fd())
    }

    /// Whether signals have come since the last time.
    fn take(&self) -> bool {
        let Some(signals) = &self.signals else { return false };
        let mut bytes = [0; 64];
        let mut any = false;
        while matches!((&**signals).read(&mut bytes), Ok(count) if count > 0) {
            any = true;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn child_hears_of_the_signals_that_are_taken_here() {
        let interrupt = Interrupt::by_signals().unwrap();
        let status =
            std::process::Command::new("grep").args(["-E", "^Sig(Blk|Ign)", "/proc/self/status"]).output();
        let said = String::from_utf8(status.unwrap().stdout).unwrap();
        let taken = (1 << (SIGINT - 1)) | (1 << (SIGTERM - 1)) | (1 << (SIGHUP - 1));
        for line in said.lines() {
            let set = u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
            assert_eq!(set & taken, 0, "{said}");
        }
        assert_eq!(interrupt.check(), Ok(()));
        signal_hook::low_level::raise(SIGTERM).unwrap();
        assert_eq!(interrupt.check(), Err(Interrupted));
        interrupt.clear();
        assert_eq!(interrupt.check(), Ok(()));
    }
}
