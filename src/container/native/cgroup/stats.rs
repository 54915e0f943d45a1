//! What a group uses.

use std::fs;
use std::path::Path;

use super::{Cgroup, Part, Version};
use crate::container::backend::Stats;

/// What version 1 shows for no limit: the largest number of pages, in bytes.
const NO_LIMIT_V1: u64 = 1 << 60;

impl Cgroup {
    /// All that the host counts. Files that are not there count as nothing known.
    pub(in super::super) fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        self.cpu_stats(&mut stats);
        if let Some(part) = self.part("memory") {
            memory(part, &mut stats);
        }
        if let Some(part) = self.part("pids") {
            stats.pids = number(&part.directory.join("pids.current"));
            stats.pids_limit = number(&part.directory.join("pids.max"));
        }
        if let Some(part) = self.part("blkio").or_else(|| self.part("io")) {
            block(part, &mut stats);
        }
        stats
    }

    /// How often the kernel has killed a process of the group for want of memory.
    pub(in super::super) fn oom_kills(&self) -> u64 {
        let Some(part) = self.part("memory") else { return 0 };
        let file = if part.version == Version::V1 { "memory.oom_control" } else { "memory.events" };
        keyed(&part.directory.join(file), "oom_kill").unwrap_or(0)
    }

    fn cpu_stats(&self, stats: &mut Stats) {
        if let Some(part) = self.part("cpuacct") {
            stats.cpu_ns = number(&part.directory.join("cpuacct.usage"));
            stats.cpu_system_ns = number(&part.directory.join("cpuacct.usage_sys"));
        }
        // Version 2 counts processor time without a controller.
        if let Some(part) = self.v2().filter(|_| stats.cpu_ns.is_none()) {
            let us = |key| Some(keyed(&part.directory.join("cpu.stat"), key)?.saturating_mul(1000));
            stats.cpu_ns = us("usage_usec");
            stats.cpu_system_ns = us("system_usec");
        }
        if let Some(part) = self.part("cpu") {
            let file = part.directory.join("cpu.stat");
            stats.throttled_periods = keyed(&file, "nr_throttled");
            stats.throttled_ns = match part.version {
                Version::V1 => keyed(&file, "throttled_time"),
                Version::V2 => keyed(&file, "throttled_usec").map(|us| us.saturating_mul(1000)),
            };
        }
    }
}

fn memory(part: &Part, stats: &mut Stats) {
    let directory = &part.directory;
    let (usage, limit, inactive, cache) = match part.version {
        Version::V1 => {
            ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file", "total_cache")
        }
        Version::V2 => ("memory.current", "memory.max", "inactive_file", "file"),
    };
    let detail = |key| keyed(&directory.join("memory.stat"), key);
    let usage = number(&directory.join(usage));
    stats.memory_bytes = usage.map(|bytes| bytes.saturating_sub(detail(inactive).unwrap_or(0)));
    stats.cache_bytes = detail(cache);
    stats.memory_limit_bytes = number(&directory.join(limit)).filter(|bytes| *bytes < NO_LIMIT_V1);
}

fn block(part: &Part, stats: &mut Stats) {
    let (mut read, mut write) = (0u64, 0u64);
    match part.version {
        Version::V1 => {
            let names = ["blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_service_bytes"];
            let text = names.iter().find_map(|name| fs::read_to_string(part.directory.join(name)).ok());
            // A line for each device and direction: `8:0 Read 4096`.
            for line in text.unwrap_or_default().lines() {
                let mut words = line.split(' ').skip(1);
                let (kind, bytes) =
                    (words.next(), words.next().and_then(|word| word.parse().ok()).unwrap_or(0));
                match kind {
                    Some("Read") => read = read.saturating_add(bytes),
                    Some("Write") => write = write.saturating_add(bytes),
                    _ => {}
                }
            }
        }
        Version::V2 => {
            // A line for each device: `8:0 rbytes=4096 wbytes=0 …`.
            let text = fs::read_to_string(part.directory.join("io.stat")).unwrap_or_default();
            for word in text.split_whitespace() {
                let value = |name| word.strip_prefix(name).and_then(|bytes: &str| bytes.parse::<u64>().ok());
                read = read.saturating_add(value("rbytes=").unwrap_or(0));
                write = write.saturating_add(value("wbytes=").unwrap_or(0));
            }
        }
    }
    stats.block_read_bytes = Some(read);
    stats.block_write_bytes = Some(write);
}

/// A file's only number; `max` is none.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number beside a key in a file of such lines.
fn keyed(path: &Path, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}
