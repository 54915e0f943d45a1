//! What can be seen from inside.

use std::fs;
use std::io::{Read, Write};

use serde_json::json;

use crate::{Failure, say, system};

/// The numbers of system calls on this architecture, as far as is known: the last is `mseal`.
pub struct Numbers(&'static [std::ops::RangeInclusive<u32>]);

impl Numbers {
    /// One after the other.
    pub fn flat(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().cloned().flatten()
    }
}

/// All of them; there are none between.
pub const SYSCALLS: Numbers = Numbers(&[0..=334, 424..=462]);

/// Calls that would have an effect whatever their arguments are, or end this program: they are not tried, and taken to be there.
const NOT_TRIED: [i64; 12] = [
    libc::SYS_rt_sigreturn,
    libc::SYS_pause,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_clone,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_vhangup,
    libc::SYS_sync,
    libc::SYS_kill,
    libc::SYS_msgget,
    libc::SYS_alarm,
];

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn lines(path: &str) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Says all of it.
pub fn run() -> Result<(), Failure> {
    let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    let symbols = symbols.lines().filter(|line| !line.starts_with("0000000000000000")).count();
    let mut processes = 0;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        processes += usize::from(entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()));
    }
    let status = text("/proc/self/status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or_default().to_owned()
    };
    let capabilities = u64::from_str_radix(&field("CapEff:"), 16).map_or(0, u64::count_ones);
    say(&json!({ "facts": {
        "release": text("/proc/sys/kernel/osrelease"),
        "boot_id": text("/proc/sys/kernel/random/boot_id"),
        "hostname": text("/proc/sys/kernel/hostname"),
        "symbols": symbols,
        "modules": lines("/proc/modules"),
        "mounts": lines("/proc/self/mounts"),
        "processes": processes,
        "devices": devices("/dev", 0),
        "capabilities": capabilities,
        "seccomp": field("Seccomp:"),
        "memory": text("/proc/meminfo").lines().next().unwrap_or_default(),
        "pid": std::process::id(),
        "root": root_disk(),
        "reachable": reachable()?,
        "filtered": filtered()?,
    }}));
    Ok(())
}

/// Device files that can be opened, in a directory and those below it.
fn devices(directory: &str, depth: u32) -> usize {
    use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
    let mut count = 0;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        if kind.is_dir() && depth < 3 {
            count += path.to_str().map_or(0, |path| devices(path, depth + 1));
        } else if kind.is_block_device() || kind.is_char_device() {
            // Opening some devices has effects: an open for nothing but its path has none, so rights are asked for instead.
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            let harmless = !["watchdog", "mem", "port", "kmsg", "snapshot", "ppp", "rtc"]
                .iter()
                .any(|name| path.to_string_lossy().contains(name));
            let opened = || fs::OpenOptions::new().read(true).custom_flags(flags).open(&path).is_ok();
            count += usize::from(!harmless || opened());
        }
    }
    count
}

/// Size and free space of the root file system, which may be the host's.
fn root_disk() -> serde_json::Value {
    match rustix::fs::statvfs("/") {
        Ok(found) => json!({
            "bytes": found.f_blocks.saturating_mul(found.f_frsize),
            "free": found.f_bavail.saturating_mul(found.f_frsize),
        }),
        Err(error) => json!({ "error": error.to_string() }),
    }
}

/// How many system calls this kernel answers with something else than that it must not be asked.
///
/// They are called with arguments that are all invalid, so that none does anything; in a child, which one of them may end.
fn reachable() -> Result<usize, Failure> {
    let numbers: Vec<i64> =
        SYSCALLS.flat().map(i64::from).filter(|number| !NOT_TRIED.contains(number)).collect();
    let (mut count, mut next) = (NOT_TRIED.len(), 0);
    while next < numbers.len() {
        let (mut answers, mut report) = std::io::pipe()?;
        let rest = &numbers[next..];
        let child = system::fork(|| {
            for number in rest {
                // Whatever blocks after all is ended by this.
                system::alarm(2);
                if report.write_all(&[u8::from(system::is_reachable(*number))]).is_err() {
                    break;
                }
            }
            0
        })?;
        drop(report);
        let mut found = vec![];
        answers.read_to_end(&mut found)?;
        let status = system::wait_for(child)?;
        count += found.iter().filter(|answer| **answer == 1).count();
        next += found.len();
        if next < numbers.len() {
            // The call that ended the child was no refusal, except by a filter that kills.
            count += usize::from(status & 0x7f != libc::SIGSYS);
            next += 1;
        }
    }
    Ok(count)
}

/// Whether a filter of system calls is there.
fn filtered() -> Result<bool, Failure> {
    Ok(text("/proc/self/status").lines().any(|line| line.starts_with("Seccomp:") && line.ends_with('2')))
}
