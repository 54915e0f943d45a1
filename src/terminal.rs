//! The terminal in raw mode, and its way back out of it by every exit of the process.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::termios::{SetArg, SpecialCharacterIndices, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

/// The settings that the process found, kept for the handlers of fatal signals.
static FOUND: OnceLock<(RawFd, libc::termios)> = OnceLock::new();
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// Signals that end the process by a fault of its own.
const FATAL_SIGNALS: [libc::c_int; 5] =
    [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGQUIT];

/// Keeps standard input's terminal in raw mode until it is dropped, the process panics, or a fatal signal comes.
pub struct RawTerminal {
    found: Termios,
    /// Whether output processing is off too.
    whole: bool,
}

impl RawTerminal {
    /// Puts standard input in raw mode; `None` when it is not a terminal.
    ///
    /// Characters reach the reader one by one and unchanged, Ctrl-C included; output processing stays on, so that
    /// the host's own lines look as they should. At most one value exists at a time.
    pub fn enter() -> io::Result<Option<RawTerminal>> {
        Self::enter_as(false)
    }

    /// The same without output processing: what is shown comes from another terminal, which has done it already.
    pub fn enter_whole() -> io::Result<Option<RawTerminal>> {
        Self::enter_as(true)
    }

    fn enter_as(whole: bool) -> io::Result<Option<RawTerminal>> {
        let stdin = io::stdin();
        // SAFETY: `isatty` only looks at the descriptor.
        if unsafe { libc::isatty(stdin.as_raw_fd()) } == 0 {
            return Ok(None);
        }
        let found = tcgetattr(&stdin)?;
        FOUND.get_or_init(|| (stdin.as_raw_fd(), found.clone().into()));
        restore_on_fatal_signals()?;
        restore_on_panic();
        let terminal = RawTerminal { found, whole };
        terminal.make_raw()?;
        Ok(Some(terminal))
    }

    /// Takes the terminal again, after the process was stopped and continued. In the background nothing is changed:
    /// the terminal is another's then.
    pub fn make_raw(&self) -> io::Result<()> {
        let stdin = io::stdin();
        if tcgetpgrp(&stdin).is_ok_and(|foreground| foreground != getpgrp()) {
            return Ok(());
        }
        let mut raw = self.found.clone();
        cfmakeraw(&mut raw);
        if !self.whole {
            raw.output_flags = self.found.output_flags;
        }
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        IS_RAW.store(true, Ordering::SeqCst);
        Ok(tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Columns and rows of standard output's terminal, if it is one that knows.
pub fn size() -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call writes one `winsize`, which lives as long as the call.
    let result = unsafe { libc::ioctl(io::stdout().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Puts the terminal back as it was found, if it is in raw mode. May be called from a signal handler.
pub fn restore() {
    let Some((fd, found)) = FOUND.get() else { return };
    if IS_RAW.swap(false, Ordering::SeqCst) {
        // SAFETY: a plain system call on a descriptor number and a structure that lives as long as the process.
        unsafe { libc::tcsetattr(*fd, libc::TCSANOW, found) };
    }
}

fn restore_on_panic() {
    let earlier = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        earlier(info);
    }));
}

extern "C" fn on_fatal_signal(signal: libc::c_int) {
    restore();
    // SAFETY: both calls are async-signal-safe; with the default action back, the signal ends the process as soon as
    // this handler returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn restore_on_fatal_signals() -> io::Result<()> {
    for signal in FATAL_SIGNALS {
        // SAFETY: an all-zero `sigaction` is a valid value, and the handler has the type that goes without SA_SIGINFO
        // and calls nothing but async-signal-safe functions.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fatal_signal as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
