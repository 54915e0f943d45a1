//! The process that runs a VM: started, noted where others find it, waited for, ended.
//!
//! It belongs to nobody: who started it may be gone, and the next one opens it by the note in its directory.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::container::backend::Error;
use crate::container::files;
use crate::guest::client::{self, Client};
use crate::program;

/// File names in the directory of a VM.
pub const NOTE: &str = "monitor.json";
pub const LOG: &str = "monitor.log";
pub const CONSOLE: &str = "console.log";
pub const VSOCK: &str = "vsock.sock";
pub const API: &str = "api.sock";

/// Between attempts to talk to an agent whose connections have just been cut.
const RETRY: Duration = Duration::from_millis(2);

/// What identifies a monitor, as it is noted in its directory.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Note {
    pid: u32,
    /// Start of the process in ticks since the host's, which tells it from a later one of that number.
    started: u64,
}

/// A monitor that runs.
#[derive(Debug)]
pub struct Monitor {
    dir: PathBuf,
    pid: u32,
    pidfd: OwnedFd,
}

pub(super) fn failed<'a, E>(what: &'a str, path: &'a Path) -> impl FnOnce(E) -> Error + 'a
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |error| Error::failed(format!("cannot {what} {path:?}"), error)
}

impl Monitor {
    /// Starts `rvmm` with these arguments, and notes it in `dir`, where its log goes.
    pub fn start(dir: &Path, arguments: &[OsString]) -> Result<Monitor, Error> {
        let program = program::directory().map_err(failed("find", Path::new("rvmm")))?.join("rvmm");
        let log = dir.join(LOG);
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&log)
            .map_err(failed("make", &log))?;
        let mut command = Command::new(&program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // A terminal's signals are for the container, and its end must not be the monitor's before the guest's.
        command.process_group(0);
        let child = command.spawn().map_err(failed("start", &program))?.id();
        let pid = Pid::from_raw(child as i32).ok_or(Error::NotRunning)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(failed("watch", dir))?;
        let note = Note { pid: child, started: start_time(child).unwrap_or(0) };
        files::write_json(&dir.join(NOTE), &note)
            .map_err(|error| Error::failed("cannot note the VM", error))?;
        Ok(Monitor { dir: dir.into(), pid: child, pidfd })
    }

    /// The monitor that is noted in `dir`, if it runs.
    pub fn open(dir: &Path) -> Result<Option<Monitor>, Error> {
        let note: Note = match files::read_json(&dir.join(NOTE)) {
            Ok(note) => note,
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return Err(Error::failed("cannot find the sandbox", error)),
        };
        let Some(pid) = i32::try_from(note.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(None) };
        // Asked with the descriptor open: from here on the number belongs to this process.
        if start_time(note.pid) != Some(note.started) {
            return Ok(None);
        }
        Ok(Some(Monitor { dir: dir.into(), pid: note.pid, pidfd }))
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A connection to the agent, perhaps with events.
    pub fn connect(&self, patience: Duration, events: bool) -> Result<Client, Error> {
        let socket = self.dir.join(VSOCK);
        Client::connect(&socket, Some(self.pidfd.as_fd()), patience, events).map_err(|error| {
            Error::failed(format!("the VM's agent does not answer{}", last_words(&self.dir)), error)
        })
    }

    /// The same for a VM that was just restored. Its guest learns at once that all its connections are gone, and a new one that
    /// was faster goes with the others.
    pub fn connect_restored(&self, patience: Duration, events: bool) -> Result<Client, Error> {
        let socket = self.dir.join(VSOCK);
        let end = Instant::now() + patience;
        loop {
            match Client::connect(&socket, Some(self.pidfd.as_fd()), patience, events) {
                Ok(client) => return Ok(client),
                Err(client::Error::Closed | client::Error::Connection { .. }) if Instant::now() < end => {
                    std::thread::sleep(RETRY);
                }
                Err(error) => {
                    let what = format!("the VM's agent does not answer{}", last_words(&self.dir));
                    return Err(Error::failed(what, error));
                }
            }
        }
    }

    /// Ends it at once, and with it the VM.
    pub fn kill(&self, patience: Duration) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.wait(patience);
    }

    /// Waits for the monitor's end, and takes its status if it is our child.
    pub fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec::try_from(left).ok();
            match rustix::event::poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return false,
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        let _ = rustix::process::waitid(
            rustix::process::WaitId::PidFd(self.pidfd.as_fd()),
            rustix::process::WaitIdOptions::EXITED,
        );
        true
    }
}

/// Removes what a monitor has left in its directory.
pub fn clean(dir: &Path) {
    for name in [NOTE, "vm.json", VSOCK, API, CONSOLE, LOG] {
        let _ = fs::remove_file(dir.join(name));
    }
}

/// When a process was started, in ticks since the host was.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may contain anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// What the monitor has said last.
fn last_words(dir: &Path) -> String {
    let log = fs::read_to_string(dir.join(LOG)).unwrap_or_default();
    log.lines().last().map_or_else(String::new, |line| format!(" ({line})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_start() {
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn a_process_of_the_same_number_is_not_the_monitor() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Monitor::open(directory.path()).unwrap().is_none());
        let own = std::process::id();
        let note = |started| files::write_json(&directory.path().join(NOTE), &Note { pid: own, started });
        note(1).unwrap();
        assert!(Monitor::open(directory.path()).unwrap().is_none());
        note(start_time(own).unwrap()).unwrap();
        assert_eq!(Monitor::open(directory.path()).unwrap().unwrap().pid(), own);
    }
}
