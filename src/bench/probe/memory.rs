//! `memory`: what one more idle instance takes. docs/probes/memory.md

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, Instance, Process, Role};

/// A mapping of a monitor that is at least as large as this is the guest's memory.
const GUEST_MAPPING_BYTES: u64 = 48 << 20;

/// Idle instances.
pub struct Memory;

/// Memory of some processes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Taken {
    monitor: f64,
    guest: f64,
    workload: f64,
}

impl Probe for Memory {
    fn names(&self) -> Vec<&'static str> {
        vec!["memory"]
    }

    fn weight(&self) -> f64 {
        2.0
    }

    fn starts(&self) -> f64 {
        2.0
    }

    fn seconds(&self) -> f64 {
        1.0
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        // The first shares nothing yet; what one more takes is seen with the second.
        let first = start(context, executor)?;
        let result = one_more(context, executor);
        executor.remove(&context.spawner, first)?;
        Ok(result?.into_iter().map(|found| ("memory", found)).collect())
    }
}

fn start(context: &Context, executor: &dyn Executor) -> Result<Instance, Error> {
    let bytes = context.memory_on_purpose.to_string();
    let job = context.helper(["idle", &bytes]);
    if let Ok(invocation) = executor.run(&job) {
        context.note(&invocation);
    }
    let mut instance = executor.start(&context.spawner, &job)?;
    match executor.wait_for_line(&context.spawner, &mut instance, super::MARKER) {
        Ok(_) => Ok(instance),
        Err(error) => {
            executor.remove(&context.spawner, instance)?;
            Err(error.into())
        }
    }
}

fn one_more(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let settle = Duration::from_millis(if context.quick { 150 } else { 500 });
    context.pause(settle)?;
    let before = System::now()?;
    let second = start(context, executor)?;
    let measured = (|| {
        context.pause(settle)?;
        let after = System::now()?;
        let processes = executor.processes(&context.spawner, &second)?;
        let taken = taken(&processes)?;
        let busy = busy_ticks(&processes);
        let watched = Duration::from_millis(if context.quick { 300 } else { 2000 });
        context.pause(watched)?;
        let idle = (busy_ticks(&processes) - busy) / ticks_per_second() / watched.as_secs_f64();
        Ok(vec![
            Found::number("pss", taken.monitor + taken.guest + taken.workload),
            Found::number("monitor", taken.monitor),
            Found::number("guest", taken.guest),
            Found::number("workload", taken.workload),
            Found::number("system", before.available - after.available),
            Found::number("page_cache", after.cached - before.cached),
            Found::number("idle_cpu", idle),
        ])
    })();
    executor.remove(&context.spawner, second)?;
    measured
}

/// The host's memory, in bytes.
struct System {
    available: f64,
    cached: f64,
}

impl System {
    fn now() -> Result<System, Error> {
        let text = fs::read_to_string("/proc/meminfo")
            .map_err(|error| Error::Other(format!("/proc/meminfo: {error}")))?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':')
                .split_whitespace()
                .next()?
                .parse::<f64>()
                .ok()
                .map(|kib| kib * 1024.0)
        };
        // Free and clean cache are told apart: `MemAvailable` is an estimate, and jumps with the watermarks.
        let cached = field("Cached").unwrap_or(0.0) + field("Buffers").unwrap_or(0.0);
        Ok(System {
            available: field("MemFree").unwrap_or(0.0) + cached - field("Shmem").unwrap_or(0.0),
            cached,
        })
    }
}

fn taken(processes: &[Process]) -> Result<Taken, Error> {
    let mut taken = Taken::default();
    let mut seen = false;
    for process in processes {
        // It may have ended since it was listed.
        let Ok(text) = fs::read_to_string(format!("/proc/{}/smaps", process.pid)) else { continue };
        seen = true;
        let (small, large) = pss(&text);
        match process.role {
            Role::Workload => taken.workload += small + large,
            Role::Runtime => taken.monitor += small + large,
            Role::Monitor => {
                taken.monitor += small;
                taken.guest += large;
            }
        }
    }
    match seen {
        true => Ok(taken),
        false => Err(Error::Other("the memory of its processes cannot be read; root can".into())),
    }
}

/// Proportional memory of some processes together, in bytes.
pub(super) fn total(processes: &[Process]) -> Result<f64, Error> {
    let taken = taken(processes)?;
    Ok(taken.monitor + taken.guest + taken.workload)
}

/// Proportional memory in mappings that are small, and in those that are large enough to be a guest's memory.
fn pss(smaps: &str) -> (f64, f64) {
    let (mut small, mut large) = (0.0, 0.0);
    let mut size = 0;
    for line in smaps.lines() {
        let kib =
            |rest: &str| rest.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        if let Some(rest) = line.strip_prefix("Size:") {
            size = kib(rest) << 10;
        } else if let Some(rest) = line.strip_prefix("Pss:") {
            let bytes = (kib(rest) << 10) as f64;
            *if size >= GUEST_MAPPING_BYTES { &mut large } else { &mut small } += bytes;
        }
    }
    (small, large)
}

/// Processor time that processes have used, in ticks.
pub(super) fn busy_ticks(processes: &[Process]) -> f64 {
    let ticks = |process: &Process| -> Option<(u32, f64)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
        let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
        let user: f64 = fields.next()?.parse().ok()?;
        Some((process.pid, user + fields.next()?.parse::<f64>().ok()?))
    };
    processes.iter().filter_map(ticks).collect::<HashMap<_, _>>().values().sum()
}

pub(super) fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_monitors_own() {
        let smaps = "7f00-7f01 rw-p 0 00:00 0\nSize:  524288 kB\nRss: 40960 kB\nPss: 40000 kB\nPss_Dirty: 1 kB\n\
                     5500-5501 r-xp 0 00:00 0 /bin/rvmm\nSize: 4096 kB\nPss: 1500 kB\n";
        assert_eq!(pss(smaps), (1500.0 * 1024.0, 40000.0 * 1024.0));
    }

    #[test]
    fn own_memory_can_be_read() {
        let own = [Process { pid: std::process::id(), role: Role::Workload }];
        assert!(taken(&own).unwrap().workload > 100_000.0);
        assert!(busy_ticks(&own) >= 0.0);
        assert!(System::now().unwrap().available > 0.0);
    }
}
