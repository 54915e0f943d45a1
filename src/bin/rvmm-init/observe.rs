//! What a container uses, its processes, and what a path of it is.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2, readlinkat};
use rustix::param::clock_ticks_per_second;
use rvmm::guest::protocol::{Failure, FileInfo, ProcessInfo, Stats};

use crate::cgroup::{Cgroup, field};
use crate::failure::Doing;

/// Processes of a listing at most.
const PROCESSES_MAX: usize = 4096;
/// Bytes of a command line that are told at most, and of all of them together.
const COMMAND_BYTES_MAX: usize = 4096;
const COMMANDS_BYTES_MAX: usize = 512 << 10;

/// What a container uses.
pub fn stats(cgroup: &mut Cgroup) -> Stats {
    let cpu = cgroup.read("cpu.stat");
    let memory = cgroup.read("memory.stat");
    let number = |text: String| text.trim().parse::<u64>().ok();
    let mut stats = Stats {
        cpu_us: field(&cpu, "usage_usec"),
        cpu_user_us: field(&cpu, "user_usec"),
        cpu_system_us: field(&cpu, "system_usec"),
        throttled_periods: field(&cpu, "nr_throttled"),
        throttled_us: field(&cpu, "throttled_usec"),
        memory_bytes: number(cgroup.read("memory.current")).unwrap_or(0),
        memory_inactive_file_bytes: field(&memory, "inactive_file"),
        memory_limit_bytes: number(cgroup.read("memory.max")),
        swap_bytes: number(cgroup.read("memory.swap.current")).unwrap_or(0),
        oom_kills: cgroup.oom_kills(),
        pids: number(cgroup.read("pids.current")).unwrap_or(0),
        pids_limit: number(cgroup.read("pids.max")),
        ..Stats::default()
    };
    // A line for each disk: `MAJOR:MINOR rbytes=… wbytes=… rios=… wios=… …`.
    for part in cgroup.read("io.stat").split_whitespace() {
        let Some((name, value)) = part.split_once('=') else { continue };
        let value = value.parse::<u64>().unwrap_or(0);
        let total = match name {
            "rbytes" => &mut stats.read_bytes,
            "wbytes" => &mut stats.write_bytes,
            "rios" => &mut stats.reads,
            "wios" => &mut stats.writes,
            _ => continue,
        };
        *total = total.saturating_add(value);
    }
    stats
}

/// The processes of a container.
pub fn processes(cgroup: &Cgroup) -> Vec<ProcessInfo> {
    let boot = fs::read_to_string("/proc/stat").map_or(0, |text| field(&text, "btime"));
    let mut left = COMMANDS_BYTES_MAX;
    let mut found = Vec::new();
    for pid in cgroup.processes().into_iter().take(PROCESSES_MAX) {
        // One that has ended meanwhile is none.
        let Some(mut info) = process(pid, boot) else { continue };
        let len = info.command.floor_char_boundary(left.min(COMMAND_BYTES_MAX));
        info.command.truncate(len);
        left -= len;
        found.push(info);
    }
    found
}

fn process(pid: i32, boot: u64) -> Option<ProcessInfo> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut info =
        parse(pid, &stat, &status, boot, clock_ticks_per_second(), rustix::param::page_size() as u64)?;
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(bytes.trim_ascii_end().strip_suffix(b"\0").unwrap_or(&bytes))
        .replace('\0', " ");
    if !line.is_empty() {
        info.command = line;
    }
    Some(info)
}

/// What proc(5) says of a process.
fn parse(pid: i32, stat: &str, status: &str, boot: u64, ticks: u64, page: u64) -> Option<ProcessInfo> {
    // The name stands in brackets and may have anything in it.
    let (name, rest) = (stat.split_once('(')?.1.rsplit_once(')')?.0, stat.rsplit_once(')')?.1);
    let fields: Vec<_> = rest.split_whitespace().collect();
    // The first is field 3 of proc(5).
    let number = |at: usize| fields.get(at - 3).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let uid = line("Uid:").and_then(|ids| ids.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    let inner = line("NSpid:").and_then(|ids| ids.split_whitespace().next_back()?.parse().ok());
    let ticks = ticks.max(1);
    Some(ProcessInfo {
        pid: pid.unsigned_abs(),
        parent: number(4) as u32,
        inner_pid: inner.unwrap_or(pid.unsigned_abs()),
        uid,
        state: fields.first()?.bytes().next()?,
        terminal: number(7) as u32,
        started: boot + number(22) / ticks,
        cpu_ms: number(14).saturating_add(number(15)).saturating_mul(1000) / ticks,
        memory_bytes: number(24).saturating_mul(page),
        command: format!("[{name}]"),
    })
}

/// What a path below `root` is.
pub fn stat_path(root: OwnedFd, path: &str, follow: bool) -> Result<FileInfo, Failure> {
    let doing = || format!("look at {path}");
    let mut flags = OFlags::PATH | OFlags::CLOEXEC;
    flags.set(OFlags::NOFOLLOW, !follow);
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let below = match path.trim_start_matches('/') {
        "" => ".",
        below => below,
    };
    let file = openat2(root.as_fd(), below, flags, Mode::empty(), resolve).doing(doing)?;
    let stat = fstat(&file).doing(doing)?;
    let is_link = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_symlink();
    let link = match is_link {
        true => Some(readlinkat(&file, "", Vec::new()).doing(doing)?.to_string_lossy().into_owned()),
        false => None,
    };
    Ok(FileInfo {
        mode: stat.st_mode,
        len: stat.st_size.unsigned_abs(),
        modified: stat.st_mtime as i64,
        link,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_read_from_proc() {
        let stat = "42 (a) b (c) S 7 42 42 1025 42 0 0 0 0 0 150 50 0 0 20 0 1 0 300 4096 25 1 1";
        let status = "Name:\ta\nUid:\t33\t33\t33\t33\nNSpid:\t42\t9\n";
        let info = parse(42, stat, status, 1000, 100, 4096).unwrap();
        let expected = ProcessInfo {
            pid: 42,
            parent: 7,
            inner_pid: 9,
            uid: 33,
            state: b'S',
            terminal: 1025,
            started: 1003,
            cpu_ms: 2000,
            memory_bytes: 25 * 4096,
            command: "[a) b (c]".into(),
        };
        assert_eq!(info, expected);
    }

    #[test]
    fn this_process_is_found() {
        let pid = std::process::id() as i32;
        let info = process(pid, 0).unwrap();
        assert_eq!(info.pid, pid as u32);
        assert!(info.command.contains("rvmm"), "{}", info.command);
    }
}
