//! `isolation`: what the work can see and reach, and which wall stops it. Facts, no adjectives. docs/probes/isolation.md

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use serde_json::Value as Json;

use super::{Context, Error, Found, Probe, spoken};
use crate::bench::executor::{Executor, Job, PATIENCE, find};
use crate::bench::process::Invocation;
use crate::bench::results::Isolation as Level;

/// What the helper is asked to take, where it may have less.
const GREEDY_BYTES: u64 = 512 << 20;
/// What it may have.
const LIMIT_BYTES: u64 = 96 << 20;
/// Processes that it is asked to make, and that it may have.
const GREEDY_PROCESSES: u32 = 300;
const LIMIT_PROCESSES: u32 = 100;
/// How long a machine may take to end when its kernel has crashed.
const CRASH_PATIENCE: Duration = Duration::from_secs(60);

type Measure = fn(&Context, &dyn Executor) -> Result<Vec<Found>, Error>;

/// Facts and attempts: one way to find them, so that what is slow in one is not asked for all.
pub struct Part {
    metrics: fn(&str) -> bool,
    measure: Measure,
    starts: f64,
    weight: f64,
    quick: bool,
}

/// All ways.
pub fn all() -> Vec<Part> {
    const APART: [&str; 5] =
        ["monitor_syscalls", "crash", "escape_memory", "escape_processes", "syscalls_used"];
    let part =
        |metrics, measure: Measure, starts, quick| Part { metrics, measure, starts, weight: 1.0, quick };
    vec![
        Part { weight: 2.0, ..part(|metric| !APART.contains(&metric), inspect, 1.0, true) },
        part(|metric| metric == "monitor_syscalls", monitor, 1.0, true),
        part(|metric| metric == "crash", crash, 2.0, true),
        part(|metric| metric == "escape_memory", take_memory, 1.0, false),
        part(|metric| metric == "escape_processes", make_processes, 1.0, false),
        part(|metric| metric == "syscalls_used", trace, 4.0, false),
    ]
}

impl Probe for Part {
    fn names(&self) -> Vec<&'static str> {
        vec!["isolation"]
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn is_quick(&self) -> bool {
        self.quick
    }

    fn starts(&self) -> f64 {
        self.starts
    }

    fn weight(&self) -> f64 {
        self.weight
    }

    fn covers(&self, metric: &str) -> bool {
        (self.metrics)(metric)
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let found = (self.measure)(context, executor)?;
        Ok(found.into_iter().map(|found| ("isolation", found)).collect())
    }
}

fn inspect(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let said = context.run_helper(executor, &context.helper(["inspect"]))?;
    let part = |name: &str| said.iter().find_map(|line| line.get(name));
    let facts = part("facts").ok_or_else(|| Error::Other("the helper said no facts".into()))?;
    let own_kernel = text(facts, "boot_id") != read("/proc/sys/kernel/random/boot_id");
    let mut found = seen(facts, own_kernel);
    if let Some(attempts) = part("escape").and_then(Json::as_object) {
        for (name, result) in attempts {
            found.push(Found::text(&format!("escape_{name}"), outcome(result, own_kernel)));
        }
    }
    Ok(found)
}

/// Which system calls the filters of a monitor let through: what a guest that has taken it over could still make.
fn monitor(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    if !is_machine(executor) {
        return Err(Error::Other("it has no monitor: the work makes its system calls itself".into()));
    }
    let mut instance = executor.start(&context.spawner, &context.helper(["idle"]))?;
    let result = (|| {
        executor.wait_for_line(&context.spawner, &mut instance, super::MARKER)?;
        let processes = executor.processes(&context.spawner, &instance)?;
        let runs_guest = |pid: u32| {
            let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            files
                .filter_map(|file| fs::read_link(file.path()).ok())
                .any(|file| file.to_string_lossy().contains("kvm-vm"))
        };
        let pids: Vec<String> = processes
            .iter()
            .map(|process| process.pid)
            .filter(|pid| runs_guest(*pid))
            .map(|pid| pid.to_string())
            .collect();
        if pids.is_empty() {
            return Err(Error::Other("none of its processes has a guest".into()));
        }
        let ask =
            Invocation::new([context.helper.to_string_lossy().into_owned(), "filters".into()]).and(pids);
        context.note(&ask);
        let said = context.spawner.output(&ask, PATIENCE)?;
        let allowed = said.lines().filter_map(spoken).find_map(|line| line.get("allowed")?.as_f64());
        allowed.ok_or_else(|| Error::Other(format!("its filters cannot be read: {}", said.trim())))
    })();
    executor.remove(&context.spawner, instance)?;
    Ok(vec![Found::number("monitor_syscalls", result?)])
}

fn is_machine(executor: &dyn Executor) -> bool {
    matches!(executor.isolation(), Level::Microvm | Level::FullVm)
}

/// Crashes a guest's kernel, and looks at what is left of its neighbour. The host's own is left alone.
fn crash(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let said = |text: String| Ok(vec![Found::text("crash", text)]);
    if !is_machine(executor) {
        return said("the host, with everything on it: the kernel is the host's (not tried)".into());
    }
    let mut neighbour = executor.start(&context.spawner, &context.helper(["idle"]))?;
    let result = (|| {
        executor.wait_for_line(&context.spawner, &mut neighbour, super::MARKER)?;
        let ended = crash_one(context, executor)?;
        let Some(ended) = ended else { return Ok(None) };
        let processes = executor.processes(&context.spawner, &neighbour)?;
        let lives = !processes.is_empty()
            && processes.iter().all(|process| fs::metadata(format!("/proc/{}", process.pid)).is_ok());
        Ok::<_, Error>(Some((ended, lives)))
    })();
    executor.remove(&context.spawner, neighbour)?;
    match result? {
        None => {
            said("its own machine: the kernel is its own (not tried: it offers no way to crash it)".into())
        }
        Some((seconds, true)) => said(format!(
            "its own machine: its kernel was crashed, which ended the instance after {seconds:.1} s; its neighbour and the host went on"
        )),
        Some((_, false)) => said("its own machine and its neighbour, which was gone afterwards".into()),
    }
}

/// Seconds from the crash to the end of the command. `None`: there is no way to crash it.
fn crash_one(context: &Context, executor: &dyn Executor) -> Result<Option<f64>, Error> {
    let boot = read("/proc/sys/kernel/random/boot_id");
    let job = Job { privileged: true, ..context.helper(["crash", &boot]) };
    let invocation = executor.run(&job)?;
    context.note(&invocation);
    let mut running = context.spawner.spawn(&invocation)?;
    let (line, at) = running.line(PATIENCE, spoken)?;
    if line.get("crash").is_none() {
        running.close_stdin();
        running.finish(PATIENCE)?;
        return Ok(None);
    }
    let finished = running.finish(CRASH_PATIENCE)?;
    Ok(Some((finished.at - at).as_secs_f64()))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn text<'a>(facts: &'a Json, name: &str) -> &'a str {
    facts.get(name).and_then(Json::as_str).unwrap_or_default()
}

fn seen(facts: &Json, own_kernel: bool) -> Vec<Found> {
    let whose = |own: bool| if own { "its own" } else { "the host's" };
    let number = |name: &str| facts.get(name).and_then(Json::as_f64).unwrap_or(0.0);
    let mut found = vec![
        Found::text("kernel", whose(own_kernel)),
        Found::text("kernel_release", text(facts, "release")),
        Found::text("hostname", whose(text(facts, "hostname") != read("/proc/sys/kernel/hostname"))),
        // What a guest calls is its own kernel.
        Found::number("syscalls_allowed", if own_kernel { 0.0 } else { number("reachable") }),
    ];
    for name in ["symbols", "modules", "devices", "mounts", "processes", "capabilities"] {
        found.push(Found::number(name, number(name)));
    }
    // Whoever is process 1 sees only its own.
    let apart = own_kernel || number("pid") == 1.0;
    found.push(Found::number("host_processes", if apart { 0.0 } else { number("processes") - 1.0 }));
    let host = rustix::fs::statvfs("/").map_or(0, |found| found.f_blocks.saturating_mul(found.f_frsize));
    let disk = facts.pointer("/root/bytes").and_then(Json::as_u64).unwrap_or(0);
    found.push(Found::text(
        "escape_disk",
        match (own_kernel, disk == host) {
            (true, _) => format!("stopped by the size of its own disk: {} MiB", disk >> 20),
            (false, true) => "reaches the host: its file system is the host's, and nothing limits it".into(),
            (false, false) => format!("stopped by the size of its file system: {} MiB", disk >> 20),
        },
    ));
    found
}

/// What came of an attempt, in words.
fn outcome(result: &Json, own_kernel: bool) -> String {
    match (result, own_kernel) {
        (Json::Null, true) => "reaches its own kernel only".into(),
        (Json::Null, false) => "reaches the host's kernel".into(),
        (result, _) => {
            let by = result.get("by").and_then(Json::as_str).unwrap_or("the kernel");
            let error = result.get("error").and_then(Json::as_str).unwrap_or("an error");
            format!("stopped by {by} ({})", error.split(" (os error").next().unwrap_or(error))
        }
    }
}

fn take_memory(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let bytes = GREEDY_BYTES.to_string();
    let job = Job { memory: Some(LIMIT_BYTES), ..context.helper(["grow", &bytes]) };
    let said = match context.run_helper(executor, &job) {
        Ok(said) => said,
        Err(Error::Other(why)) => vec![serde_json::json!({ "refused": why })],
        Err(error) => return Err(error),
    };
    let ended = match said.iter().any(|line| line.get("grown").is_some()) {
        true => format!("not stopped: it took {} MiB", GREEDY_BYTES >> 20),
        false => format!("stopped at its limit of {} MiB", LIMIT_BYTES >> 20),
    };
    Ok(vec![Found::text("escape_memory", ended)])
}

fn make_processes(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let count = GREEDY_PROCESSES.to_string();
    let job = Job { processes: Some(LIMIT_PROCESSES), ..context.helper(["multiply", &count]) };
    let said = context.run_helper(executor, &job)?;
    let made = said.iter().find_map(|line| line.get("multiplied")?.as_u64()).unwrap_or(0);
    let ended = match made >= u64::from(GREEDY_PROCESSES) {
        true => format!("not stopped: it made {made}"),
        false => format!("stopped after {made} by its limit of {LIMIT_PROCESSES}"),
    };
    Ok(vec![Found::text("escape_processes", ended)])
}

/// Which system calls the host sees from an instance's start to its end, of the command and all that come of it.
fn trace(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let strace = find("strace").ok_or_else(|| Error::Other("there is no strace on this host".into()))?;
    if executor.name() == "docker" {
        return Err(Error::Other("what Docker starts does not come of its command".into()));
    }
    let file = context.directory.join("strace");
    let job = context.helper(["micro", "syscall", "1"]);
    let traced = executor.run(&job)?;
    let invocation = Invocation {
        argv: [strace.to_string_lossy().into_owned(), "-f".into(), "-qq".into(), "-c".into(), "-o".into()]
            .into_iter()
            .chain([file.to_string_lossy().into_owned(), "--".into()])
            .chain(traced.argv)
            .collect(),
        ..traced
    };
    context.spawner.output(&invocation, PATIENCE)?;
    let table =
        fs::read_to_string(&file).map_err(|error| Error::Other(format!("strace left no table: {error}")))?;
    Ok(vec![Found::number("syscalls_used", names(&table).len() as f64)])
}

/// The names in a table of `strace -c`.
fn names(table: &str) -> BTreeSet<&str> {
    let rows = table.lines().filter(|line| line.trim_start().starts_with(|c: char| c.is_ascii_digit()));
    rows.filter_map(|row| row.split_whitespace().last()).filter(|name| *name != "total").collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn outcome_names_the_wall() {
        assert_eq!(outcome(&Json::Null, true), "reaches its own kernel only");
        assert_eq!(outcome(&Json::Null, false), "reaches the host's kernel");
        let stopped = json!({"by": "a missing capability", "error": "Operation not permitted (os error 1)"});
        assert_eq!(outcome(&stopped, false), "stopped by a missing capability (Operation not permitted)");
    }

    #[test]
    fn names_of_a_table_are_read() {
        let table = "% time     seconds  usecs/call     calls    errors syscall\n------ ----\n 30.00 0.1 1 3 read\n\
                     0.00 0.0 0 1 1 open\n------\n100.00 0.2 1 4 total\n";
        assert_eq!(names(table).into_iter().collect::<Vec<_>>(), ["open", "read"]);
    }

    #[test]
    fn process_of_the_host_sees_the_host() {
        let facts = json!({"boot_id": read("/proc/sys/kernel/random/boot_id"), "reachable": 350, "processes": 100, "pid": 77});
        let found = seen(&facts, false);
        let value = |name: &str| found.iter().find(|found| found.metric == name).unwrap().value.clone();
        assert_eq!(value("host_processes"), super::super::Value::Number(99.0));
        assert_eq!(value("syscalls_allowed"), super::super::Value::Number(350.0));
        assert_eq!(value("kernel"), super::super::Value::Text("the host's".into()));
    }
}
