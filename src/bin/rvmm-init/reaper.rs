//! A container's process 1 where the user wants an init: starts the program, passes signals on, and reaps.

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, WaitOptions, wait};

use crate::system;

/// Exit status of a program that cannot be started.
const NOT_STARTED: i32 = 127;
/// `SI_KERNEL`: a terminal has sent the signal, and to the program as well.
const FROM_KERNEL: i32 = 0x80;

/// Runs a program: its path, and its arguments with its name.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> i32 {
    // What `ps` shows; the name of the program's file says nothing to whoever looks.
    let _ = rustix::thread::set_name(c"rvmm-reaper");
    let all = SigSet::all();
    let Ok(signals) = SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC) else { return NOT_STARTED };
    if all.thread_set_mask().is_err() {
        return NOT_STARTED;
    }
    let (Some(path), Some(name)) = (arguments.next(), arguments.next()) else { return NOT_STARTED };
    let child = match system::fork() {
        Ok(Some(child)) => child,
        Ok(None) => {
            let error = match SigSet::empty().thread_set_mask() {
                Ok(()) => Command::new(path).arg0(name).args(arguments).exec(),
                Err(error) => error.into(),
            };
            eprintln!("{error}");
            system::exit(NOT_STARTED)
        }
        Err(error) => {
            eprintln!("{error}");
            return NOT_STARTED;
        }
    };
    loop {
        let Ok(Some(signal)) = signals.read_signal() else { continue };
        match signal.ssi_signo as i32 {
            libc::SIGCHLD => {
                if let Some(status) = reap(child) {
                    return status;
                }
            }
            _ if signal.ssi_code == FROM_KERNEL => {}
            number => {
                let _ = system::kill(child, number);
            }
        }
    }
}

/// Takes all that have ended; the exit status if the program is among them.
fn reap(child: i32) -> Option<i32> {
    let mut result = None;
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if Some(pid) == Pid::from_raw(child) {
            let status = std::process::ExitStatus::from_raw(status.as_raw());
            result = status.code().or(status.signal().map(|signal| 128 + signal));
        }
    }
    result
}
