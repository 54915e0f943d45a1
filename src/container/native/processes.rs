//! Processes, as `/proc` shows them (proc(5)).

use std::fs;

use crate::container::backend::{InterfaceStats, ProcessInfo};

/// Longest command that is shown, in bytes.
const COMMAND_BYTES_MAX: usize = 4096;

/// Parts of `/proc/PID/stat` behind the name, which may have blanks and brackets in it.
struct Stat {
    name: String,
    state: char,
    parent: u32,
    user_ticks: u64,
    system_ticks: u64,
    start_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    let (before, after) = text.rsplit_once(')')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse().ok();
    Some(Stat {
        name: before.split_once('(')?.1.to_owned(),
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        user_ticks: number(11)?,
        system_ticks: number(12)?,
        start_ticks: number(19)?,
    })
}

/// When a process was started, in clock ticks after boot: with its number, what tells it from all others.
pub fn start_ticks(pid: i32) -> Option<u64> {
    Some(stat(pid)?.start_ticks)
}

/// What is known of processes. Those that have ended meanwhile are left out.
pub(super) fn describe(pids: &[i32]) -> Vec<ProcessInfo> {
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot =
        boot.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse::<u64>().ok()).unwrap_or(0);
    let one = |pid: &i32| {
        let stat = stat(*pid)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uid = status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok())?;
        Some(ProcessInfo {
            pid: u32::try_from(*pid).ok()?,
            parent: stat.parent,
            uid,
            cpu_ms: (stat.user_ticks.saturating_add(stat.system_ticks)).saturating_mul(1000) / ticks,
            started_s: boot.saturating_add(stat.start_ticks / ticks),
            state: stat.state,
            command: command(*pid).unwrap_or_else(|| format!("[{}]", stat.name)),
        })
    };
    pids.iter().filter_map(one).collect()
}

fn command(pid: i32) -> Option<String> {
    let mut bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    bytes.truncate(COMMAND_BYTES_MAX);
    let text = String::from_utf8_lossy(&bytes);
    let words: Vec<&str> = text.split('\0').filter(|word| !word.is_empty()).collect();
    (!words.is_empty()).then(|| words.join(" "))
}

/// Processes in the process namespace of one, where no control group tells.
pub(super) fn in_namespace_of(pid: i32) -> Vec<i32> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(own) = namespace(pid) else { return vec![] };
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut found: Vec<i32> = pids.filter(|pid| namespace(*pid).as_ref() == Some(&own)).collect();
    found.sort_unstable();
    found
}

/// Counters of the network interfaces that a process sees, without the loopback.
pub(super) fn interfaces(pid: i32) -> Vec<InterfaceStats> {
    parse_interfaces(&fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default())
}

/// From `/proc/net/dev`.
pub fn parse_interfaces(text: &str) -> Vec<InterfaceStats> {
    let one = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
        let number = |at: usize| numbers.get(at).copied().unwrap_or(0);
        Some(InterfaceStats {
            name: name.trim().to_owned(),
            rx_bytes: number(0),
            rx_packets: number(1),
            rx_dropped: number(3),
            tx_bytes: number(8),
            tx_packets: number(9),
            tx_dropped: number(11),
        })
    };
    text.lines().filter_map(one).filter(|interface| interface.name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_with_brackets_does_not_move_the_fields() {
        let text = "12 (a) b) S 7 1 1 0 -1 0 0 0 0 0 3 4 0 0 20 0 1 0 555 0 0";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.name.as_str(), stat.state, stat.parent), ("a) b", 'S', 7));
        assert_eq!((stat.user_ticks, stat.system_ticks, stat.start_ticks), (3, 4, 555));
        assert!(parse_stat("12 (a) S").is_none());
    }

    #[test]
    fn this_process_is_described_and_one_that_is_not_there_is_left_out() {
        let own = std::process::id() as i32;
        let found = describe(&[own, i32::MAX]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, own as u32);
        assert!(!found[0].command.is_empty());
        assert!(in_namespace_of(own).contains(&own));
    }

    #[test]
    fn interfaces_are_read_without_the_loopback() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 0 3 0 0 0 0 20 4 0 5 0 0 0 0\n";
        let found = parse_interfaces(text);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].rx_bytes, found[0].rx_dropped, found[0].tx_bytes, found[0].tx_dropped),
            (10, 3, 20, 5)
        );
    }
}
