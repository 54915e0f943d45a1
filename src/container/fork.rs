//! A process of its own that goes on when this one ends.
#![allow(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::stat::{Mode, umask};
use nix::unistd::{ForkResult, Pid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

/// How long a thread that was joined may still be seen, on a busy and slow host.
const LAST_BREATH: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// How many threads this process has, waiting until there is one: a thread that was joined is still counted for a moment,
/// because whoever joins it is woken before the kernel has taken it apart.
pub fn threads() -> io::Result<usize> {
    let end = Instant::now() + LAST_BREATH;
    loop {
        let count = fs::read_dir("/proc/self/task")?.count();
        if count <= 1 || Instant::now() >= end {
            return Ok(count);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Runs `work` in a process that belongs to no terminal, with its standard error in the file `log`. This process must have
/// one thread.
pub fn detach(log: &Path, work: impl FnOnce()) -> io::Result<Pid> {
    if threads()? != 1 {
        return Err(io::Error::other("this process has several threads"));
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    // SAFETY: this process has one thread, as was just looked up, so the child has all threads that the parent has, and
    // no lock is held by one that is missing.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let done = catch_unwind(AssertUnwindSafe(|| {
                if leave(null.as_fd(), log.as_fd()).is_ok() {
                    work();
                }
            }));
            std::process::exit(i32::from(done.is_err()))
        }
    }
}

/// Leaves what the parent shares with its terminal.
fn leave(null: BorrowedFd<'_>, log: BorrowedFd<'_>) -> io::Result<()> {
    setsid()?;
    chdir("/")?;
    umask(Mode::from_bits_truncate(0o022));
    dup2_stdin(null)?;
    dup2_stdout(null)?;
    dup2_stderr(log)?;
    Ok(())
}
