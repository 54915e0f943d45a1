//! Checks that a wrong harness would fail: equals do not differ, what was slowed or taken on purpose is found, and other tools
//! agree. They take minutes and want a quiet host.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rvmm::bench::executor::{Process, Role};
use rvmm::bench::probe::memory;
use rvmm::bench::stats::median;
use rvmm::bench::{Results, Verdict, results, summarise, testing};
use serde_json::Value;

use super::Rig;
use crate::container::home::{IMAGE, Wall, can_run};
use crate::support;

/// Bytes that instances take on purpose.
const TAKEN: u64 = 32 << 20;

fn values(results: &Results, executor: &str, metric: &str) -> Vec<f64> {
    let of = |sample: &&results::Sample| sample.metric == metric && sample.executor == executor;
    results.samples.iter().filter(of).filter_map(results::Sample::number).collect()
}

/// Deals the samples of an executor to two, `a` and `b`, in turn.
fn dealt(results: &Results, executor: &str) -> Results {
    let mut dealt = results.clone();
    dealt.samples.retain(|sample| sample.executor == executor);
    for sample in &mut dealt.samples {
        sample.executor = if sample.round % 2 == 0 { "a".into() } else { "b".into() };
    }
    dealt
}

fn agree(what: &str, ours: f64, theirs: f64) {
    println!("figure: {what}: ours {ours}, theirs {theirs}");
    assert!((ours / theirs - 1.0).abs() < 0.05, "{what}: rvmm compare says {ours}, the other {theirs}");
}

/// Two names for the same thing, measured as two: on a real host, with its real noise.
#[test]
#[ignore = "takes minutes and a quiet host; run by scripts/test --long"]
fn same_executor_twice_shows_no_difference() {
    let Some(rig) = Rig::new() else { return };
    let mut wrong = vec![];
    for run in 0..20 {
        let arguments = ["--with", "process,rvmm-native", "--runs", "30", "--probe", "syscall"];
        let results = rig.run(&format!("a{run}"), &arguments);
        for executor in ["process", "rvmm-native"] {
            let summary = summarise(&dealt(&results, executor));
            let found = summary.comparison("syscall", "getppid", "a", "b").unwrap();
            if found.verdict != Verdict::NoDifference {
                wrong.push((run, executor, found.ratio));
            }
        }
    }
    println!("figure: of 40 comparisons of equals, {} found a difference: {wrong:?}", wrong.len());
    let allowed = testing::allowed_misses(40, 0.05, 0.001);
    assert!(wrong.len() <= allowed as usize, "{wrong:?} of 40 differed, allowed are {allowed}");
}

/// The same executor, every second start of which is held up on purpose by 5 % of what a start takes.
#[test]
#[ignore = "takes a minute and a quiet host; run by scripts/test --long"]
fn executor_that_is_slowed_by_five_percent_is_found() {
    let Some(rig) = Rig::new() else { return };
    let arguments = |runs| ["--with", "rvmm-native", "--probe", "start", "--quick", "--runs", runs];
    let usual = median(&values(&rig.run("usual", &arguments("20")), "rvmm-native", "first_output"));
    let wrapper = rig.home.path("slowed.sh");
    // Instances are counted in their names, and a round of a single executor takes one.
    let script = format!(
        "#!/bin/sh\nname=; last=\nfor word; do [ \"$last\" != --name ] || name=$word; last=$word; done\n\
         case $name in cmp-*[13579]) sleep {:.6} ;; cmp-*) sleep 0 ;; esac\nexec {} \"$@\"\n",
        usual * 0.05,
        support::binary().display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let mut arguments = arguments("120").to_vec();
    arguments.extend(["--rvmm", wrapper.to_str().unwrap()]);
    let summary = summarise(&dealt(&rig.run("slowed", &arguments), "rvmm-native"));
    let found = summary.comparison("start", "first_output", "a", "b").unwrap();
    println!("figure: 5 % slower: {:?} {:?} {:?}", found.verdict, found.ratio, found.interval);
    assert!(matches!(found.verdict, Verdict::Lower | Verdict::Higher), "{found:?}");
    let ratio = found.ratio.unwrap().max(1.0 / found.ratio.unwrap());
    // A sleep ends late on a busy host, never early.
    assert!((1.01..1.25).contains(&ratio), "{found:?}");
}

/// What instances take on purpose shows in what is said of them.
fn taken_shows(executors: &[(&str, &[&str])]) {
    let Some(rig) = Rig::new() else { return };
    let bytes = TAKEN.to_string();
    let names: Vec<&str> = executors.iter().map(|(name, _)| *name).collect();
    let with = names.join(",");
    let run = |out: &str, more: &[&str]| {
        let mut arguments = vec!["--with", &with, "--runs", "3", "--probe", "memory"];
        arguments.extend(more);
        rig.run(out, &arguments)
    };
    let without = run("without", &[]);
    let taken = run("with", &["--memory-on-purpose", &bytes]);
    for (executor, metrics) in executors {
        for metric in *metrics {
            let of = |results: &Results| median(&values(results, executor, metric));
            let found = of(&taken) - of(&without);
            println!("figure: {executor}: {TAKEN} bytes taken on purpose: {found} more in {metric}");
            assert!(
                (found / TAKEN as f64 - 1.0).abs() < 0.05,
                "{executor}: {metric} shows {found} of {TAKEN}"
            );
        }
    }
}

#[test]
fn memory_taken_on_purpose_is_found() {
    taken_shows(&[("process", &["pss", "workload"]), ("rvmm-native", &["pss", "workload", "cgroup"])]);
}

#[test]
#[ignore = "boots microVMs; run by scripts/test --long"]
fn memory_taken_on_purpose_in_a_microvm_is_found() {
    if can_run(Wall::Microvm) {
        taken_shows(&[("rvmm-microvm", &["pss", "guest"])]);
    }
}

/// The same commands under hyperfine and under `rvmm compare`, side by side.
#[test]
#[ignore = "takes a minute and a quiet host; run by scripts/test --long"]
fn hyperfine_agrees_about_start_times() {
    let Some(rig) = Rig::new() else { return };
    if !support::has_tool("hyperfine") {
        return;
    }
    let binary = support::binary();
    let line = format!("{} run --rm -i --network none {IMAGE} true", binary.display());
    let file = rig.home.path("hyperfine.json");
    let (mut ours, mut theirs) = (vec![], vec![]);
    // By turns, for what the host does meanwhile is to touch both.
    for turn in 0..4 {
        let arguments = ["--with", "rvmm-native", "--quick", "--runs", "30", "--probe", "start"];
        let results = rig.run(&format!("ours{turn}"), &arguments);
        ours.extend(values(&results, "rvmm-native", "whole"));
        let status = Command::new("hyperfine")
            .args(["--shell=none", "--warmup", "3", "--runs", "30", "--export-json"])
            .arg(&file)
            .arg(&line)
            .env("RVMM_ROOT", rig.home.path("data"))
            .env("RVMM_RUN_ROOT", rig.home.path("run"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        let found: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        let times = found["results"][0]["times"].as_array().unwrap();
        theirs.extend(times.iter().filter_map(Value::as_f64));
    }
    agree("whole command, against hyperfine", median(&ours), median(&theirs));
}

/// A container that runs the helper, and its processes.
struct Running<'a> {
    rig: &'a Rig,
    processes: Vec<Process>,
}

impl<'a> Running<'a> {
    fn new(rig: &'a Rig, verb: &[&str]) -> Running<'a> {
        let volume = format!("{}:/rvmm-probe:ro", rig.helper.display());
        let mut arguments =
            vec!["run", "-d", "--name", "sanity", "--network", "none", "-v", &volume, IMAGE, "/rvmm-probe"];
        arguments.extend(verb);
        rig.home.run(&arguments).ok();
        rig.home.await_log("sanity", "rvmm-probe ");
        let pid = rig.home.inspect("sanity")["State"]["Pid"].as_u64().unwrap() as u32;
        let processes = rvmm::bench::executor::descendants(pid);
        let processes = processes.into_iter().map(|pid| Process { pid, role: Role::Workload }).collect();
        Running { rig, processes }
    }

    /// The directory of its control group for a controller of version 1, or of version 2.
    fn group(&self, controller: &str) -> String {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.processes[0].pid)).unwrap();
        let path = |line: &str| line.rsplit(':').next().unwrap().to_owned();
        let named = |line: &&str| {
            line.split(':').nth(1).is_some_and(|names| names.split(',').any(|name| name == controller))
        };
        match text.lines().find(named) {
            Some(line) => format!("/sys/fs/cgroup/{controller}{}", path(line)),
            None => {
                format!("/sys/fs/cgroup{}", path(text.lines().find(|line| line.starts_with("0::")).unwrap()))
            }
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.rig.home.run(&["rm", "-f", "sanity"]).ok();
    }
}

#[test]
fn smem_agrees_about_memory() {
    let Some(rig) = Rig::new() else { return };
    if !support::has_tool("smem") {
        return;
    }
    let running = Running::new(&rig, &["idle", "8388608"]);
    let output = Command::new("smem").args(["-H", "-c", "pid pss"]).output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let theirs: f64 = listed
        .lines()
        .filter_map(|line| line.trim().split_once(char::is_whitespace))
        .filter(|(pid, _)| running.processes.iter().any(|process| process.pid.to_string() == *pid))
        .filter_map(|(_, kib)| kib.trim().parse::<f64>().ok())
        .sum();
    agree("proportional memory, against smem", memory::total(&running.processes).unwrap(), theirs * 1024.0);
}

#[test]
fn control_group_agrees_about_memory_and_processor_time() {
    let Some(rig) = Rig::new() else { return };
    let running = Running::new(&rig, &["burn", "1"]);
    let directory = running.group("cpuacct");
    let theirs = || -> f64 {
        let old = fs::read_to_string(Path::new(&directory).join("cpuacct.usage"));
        match old {
            Ok(text) => text.trim().parse::<f64>().unwrap() / 1e9,
            Err(_) => {
                let stat = fs::read_to_string(Path::new(&directory).join("cpu.stat")).unwrap();
                let line = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")).unwrap();
                line.parse::<f64>().unwrap() / 1e6
            }
        }
    };
    let ours = || memory::busy_ticks(&running.processes) / memory::ticks_per_second();
    let before = (ours(), theirs());
    std::thread::sleep(Duration::from_secs(3));
    let after = (ours(), theirs());
    agree("processor time, against the control group", after.0 - before.0, after.1 - before.1);
    drop(running);
    let running = Running::new(&rig, &["idle", "33554432"]);
    let group = memory::control_groups(&running.processes).unwrap();
    // All that is in the group is the helper, whose pages are its own.
    agree("memory, control group against pss", group, memory::total(&running.processes).unwrap());
}
