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
        let cgroup = match control_groups(&processes) {
            Ok(bytes) => Found::number("cgroup", bytes),
            Err(why) => Found::failed("cgroup", why),
        };
        Ok(vec![
            cgroup,
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
        let program = fs::read_link(format!("/proc/{}/exe", process.pid)).unwrap_or_default();
        let (small, large) = pss(&text, &program.to_string_lossy());
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
pub fn total(processes: &[Process]) -> Result<f64, Error> {
    let taken = taken(processes)?;
    Ok(taken.monitor + taken.guest + taken.workload)
}

/// Proportional memory in mappings that are a monitor's own, and in those that are a guest's memory: a large one, and what lies
/// before and behind it without a gap, for parts of it may have been mapped from a kernel's file or have other attributes.
fn pss(smaps: &str, program: &str) -> (f64, f64) {
    let (mut own, mut guest) = (0.0, 0.0);
    // What lies together, and whether one of it is large.
    let (mut together, mut large, mut end) = (0.0, false, None);
    let mut settle = |together: &mut f64, large: &mut bool| {
        *if *large { &mut guest } else { &mut own } += *together;
        (*together, *large) = (0.0, false);
    };
    let mut of_guest = false;
    for line in smaps.lines() {
        let kib =
            |rest: &str| rest.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        if let Some((from, to, rights, path)) = mapping(line) {
            // Its program and libraries are no guest's memory wherever they lie, and unreadable pages are guards.
            let library = path.contains(".so") || path.starts_with('[');
            of_guest = !(rights.starts_with("---") || rights.contains('x') || path == program || library);
            if end != Some(from) || !of_guest {
                settle(&mut together, &mut large);
            }
            end = of_guest.then_some(to);
            large |= of_guest && to - from >= GUEST_MAPPING_BYTES;
        } else if let Some(rest) = line.strip_prefix("Pss:") {
            together += (kib(rest) << 10) as f64;
            if !of_guest {
                settle(&mut together, &mut large);
            }
        }
    }
    settle(&mut together, &mut large);
    (own, guest)
}

/// Where a mapping begins and ends, its rights, and its file.
fn mapping(line: &str) -> Option<(u64, u64, &str, &str)> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
    let rights = words.next()?;
    Some((from, to.max(from), rights, words.nth(3).unwrap_or_default()))
}

/// What the control groups of an instance count for it, without file pages that nobody has used lately, as `docker stats` has it.
pub fn control_groups(processes: &[Process]) -> Result<f64, String> {
    let own = memory_group(std::process::id());
    let mut groups: Vec<String> = vec![];
    for process in processes.iter().filter(|process| process.role != Role::Runtime) {
        if let Some(group) = memory_group(process.pid).filter(|group| Some(group) != own.as_ref())
            && !groups.contains(&group)
        {
            groups.push(group);
        }
    }
    if groups.is_empty() {
        return Err("it has no control group of its own for memory".into());
    }
    let mut sum = 0.0;
    for group in groups {
        let number = |name: &str| -> Option<f64> {
            fs::read_to_string(format!("{group}/{name}")).ok()?.trim().parse().ok()
        };
        let used = number("memory.usage_in_bytes").or_else(|| number("memory.current"));
        let used = used.ok_or_else(|| format!("{group} does not say what it uses"))?;
        let stat = fs::read_to_string(format!("{group}/memory.stat")).unwrap_or_default();
        let field =
            |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        let unused = field("total_inactive_file ").or_else(|| field("inactive_file ")).unwrap_or(0.0);
        sum += (used - unused).max(0.0);
    }
    Ok(sum)
}

/// The directory of the control group that a process's memory is counted in; `None`: the host's own.
fn memory_group(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let group = |wanted: fn(&str) -> bool| {
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            wanted(controllers).then(|| path.to_owned())
        })
    };
    let first = group(|controllers| controllers.split(',').any(|name| name == "memory"));
    let (root, path) = match first {
        Some(path) => ("/sys/fs/cgroup/memory", path),
        None => ("/sys/fs/cgroup", group(str::is_empty)?),
    };
    (path != "/").then(|| format!("{root}{path}"))
}

/// Processor time that processes have used, in ticks.
pub fn busy_ticks(processes: &[Process]) -> f64 {
    let ticks = |process: &Process| -> Option<(u32, f64)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
        let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
        let user: f64 = fields.next()?.parse().ok()?;
        Some((process.pid, user + fields.next()?.parse::<f64>().ok()?))
    };
    processes.iter().filter_map(ticks).collect::<HashMap<_, _>>().values().sum()
}

/// Of these, how many there are in a second.
pub fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_told_from_the_monitors_own() {
        let mapping = |range: &str, rights: &str, file: &str, kib: u64| {
            format!(
                "{range} {rights} 00000000 00:00 0   {file}\nSize: 4 kB\nRss: 1 kB\nPss: {kib} kB\nPss_Dirty: 1 kB\n"
            )
        };
        let smaps = [
            mapping("1000-2000", "rw-p", "", 5),
            // A guest's memory, part of it a kernel's file.
            mapping("7f0000000000-7f0000200000", "rw-p", "", 100),
            mapping("7f0000200000-7f0000300000", "rw-p", "/guest/vmlinux", 20),
            mapping("7f0000300000-7f0010000000", "rw-p", "", 3000),
            mapping("7f0010000000-7f0010200000", "r--p", "/bin/rvmm", 7),
            mapping("7f0010200000-7f0010400000", "r-xp", "/bin/rvmm", 11),
            mapping("7f0010400000-7f0010500000", "---p", "", 0),
            mapping("7f0010500000-7f0010600000", "rw-p", "", 13),
        ]
        .concat();
        assert_eq!(pss(&smaps, "/bin/rvmm"), (36.0 * 1024.0, 3120.0 * 1024.0));
    }

    #[test]
    fn own_memory_can_be_read() {
        let own = [Process { pid: std::process::id(), role: Role::Workload }];
        assert!(taken(&own).unwrap().workload > 100_000.0);
        assert!(busy_ticks(&own) >= 0.0);
        assert!(System::now().unwrap().available > 0.0);
    }
}
