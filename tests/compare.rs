//! `rvmm compare`: whole runs with their folders, runs that are ended in the middle, and figures held against others' tools.

#[path = "compare/sanity.rs"]
mod sanity;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rvmm::bench::process::RUN_VARIABLE;
use rvmm::bench::{Results, Verdict, summarise};
use serde_json::Value;

use crate::container::home::{Home, IMAGE, Wall, can_run};
use crate::support::{self, LINUX_PATIENCE, is_root, project, skip};

/// The helper, linked statically: it must run in any image.
fn helper() -> Option<PathBuf> {
    let given = std::env::var_os("RVMM_TEST_PROBE").map(PathBuf::from);
    let path = given.unwrap_or_else(|| project("target/guest/rvmm-probe"));
    if !path.is_file() {
        skip("needs the helper: scripts/build-agent");
        return None;
    }
    Some(path)
}

/// A home with the image, and a command that compares in it.
struct Rig {
    home: Home,
    helper: PathBuf,
}

impl Rig {
    fn new() -> Option<Rig> {
        if !is_root() || !can_run(Wall::Native) {
            return None;
        }
        Some(Rig { home: Home::new(), helper: helper()? })
    }

    fn command(&self, out: &str, arguments: &[&str]) -> Command {
        let out = self.home.path(out);
        let mut all =
            vec!["compare", IMAGE, "--helper", self.helper.to_str().unwrap(), "--out", out.to_str().unwrap()];
        all.extend(arguments);
        let mut command = self.home.command(&all);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, out: &str, arguments: &[&str]) -> Results {
        let output = self.command(out, arguments).output().expect("rvmm");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Results::open(&self.home.path(out)).expect("results")
    }

    /// Fails if anything of a run is there: instances, images, processes, files.
    fn is_clean(&self) -> Result<(), String> {
        let listed = self.home.run(&["ps", "-a", "-q"]).ok();
        if !listed.trim().is_empty() {
            return Err(format!("containers are left: {listed}"));
        }
        let images = self.home.run(&["images"]).ok();
        if images.contains("rvmm-compare") {
            return Err(format!("images are left: {images}"));
        }
        let work = self.home.path("data/compare");
        let left: Vec<_> =
            fs::read_dir(&work).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
        if !left.is_empty() {
            return Err(format!("files are left: {left:?}"));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let home = self.home.path("");
        let home = home.to_str().unwrap().trim_end_matches('/');
        match mounts.lines().find(|line| line.contains(home)) {
            Some(mount) => Err(format!("a mount is left: {mount}")),
            None => Ok(()),
        }
    }

    /// The same, given time: a guard clears up after a run that was killed.
    fn becomes_clean(&self) {
        let deadline = Instant::now() + LINUX_PATIENCE;
        while let Err(why) = self.is_clean() {
            assert!(Instant::now() < deadline, "{why}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn processes_of(run: &str) -> Vec<u32> {
    let mark = format!("{RUN_VARIABLE}={run}");
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes())
    })
    .collect()
}

fn wait_for_samples(folder: &Path, child: &mut Child) {
    let deadline = Instant::now() + LINUX_PATIENCE;
    while fs::read_to_string(folder.join("samples.jsonl")).unwrap_or_default().lines().count() < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        assert!(Instant::now() < deadline, "no samples came");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn whole_run_has_figures_and_facts_and_leaves_nothing() {
    let Some(rig) = Rig::new() else { return };
    let with = "process,rvmm-native";
    let arguments =
        ["--with", with, "--runs", "2", "--probe", "start,memory,syscall,size,isolation,persistence"];
    let results = rig.run("out", &arguments);
    assert!(results.complete());
    let summary = summarise(&results);
    for executor in ["process", "rvmm-native"] {
        for (probe, metric) in
            [("start", "first_output"), ("start", "stop"), ("memory", "pss"), ("syscall", "getppid")]
        {
            let series = summary
                .series(probe, metric, executor)
                .unwrap_or_else(|| panic!("{probe} {metric} {executor}"));
            assert_eq!(series.values.len(), 2, "{series:?}");
            assert!(series.quantiles.median > 0.0, "{series:?}");
        }
        assert_eq!(summary.fact("isolation", "kernel", executor).unwrap().values, ["the host's"]);
    }
    let kept = |metric: &str| summary.fact("persistence", metric, "rvmm-native").unwrap().values.clone();
    assert_eq!(kept("root_stop"), ["kept"]);
    assert_eq!(kept("root_remove"), ["lost"]);
    assert_eq!(kept("volume_remove"), ["kept"]);
    let processes = |executor| summary.series("isolation", "host_processes", executor).unwrap().values[0];
    assert_eq!(processes("rvmm-native"), 0.0);
    assert!(processes("process") > 0.0);
    let capabilities = |executor| summary.series("isolation", "capabilities", executor).unwrap().values[0];
    assert!(capabilities("rvmm-native") < capabilities("process"));
    assert!(results.commands.iter().any(|command| command.argv.iter().any(|word| word == "--isolation")));
    assert!(results.host.executors.iter().any(|info| info.left_out.as_deref() == Some("not asked for")));
    assert_eq!(rig.is_clean(), Ok(()));
    assert_eq!(processes_of(&results.plan.run), [] as [u32; 0]);
}

#[test]
fn killed_run_is_readable_and_leaves_nothing() {
    let Some(rig) = Rig::new() else { return };
    // Kills at moments that are spread over a run: while instances start, run and are removed.
    for (round, milliseconds) in [0_u64, 130, 270].into_iter().enumerate() {
        let out = format!("killed-{round}");
        let folder = rig.home.path(&out);
        let arguments = ["--with", "process,rvmm-native", "--runs", "1000", "--probe", "start,memory"];
        let mut child = rig.command(&out, &arguments).spawn().unwrap();
        wait_for_samples(&folder, &mut child);
        std::thread::sleep(Duration::from_millis(milliseconds));
        child.kill().unwrap();
        child.wait().unwrap();
        let results = Results::open(&folder).unwrap();
        assert!(!results.complete() && results.end.is_none());
        assert!(results.samples.len() >= 3);
        let report = rig.home.run(&["compare", "report", folder.to_str().unwrap(), "--format", "json"]).ok();
        assert!(report.contains("was killed"), "{report}");
        rig.becomes_clean();
        assert_eq!(processes_of(&results.plan.run), [] as [u32; 0]);
    }
}

#[test]
fn interrupted_run_keeps_what_it_has_and_says_so() {
    let Some(rig) = Rig::new() else { return };
    for signal in [Signal::INT, Signal::TERM] {
        let out = format!("interrupted-{}", signal.as_raw());
        let folder = rig.home.path(&out);
        let arguments =
            ["--with", "process,rvmm-native", "--runs", "1000", "--probe", "start", "--format", "json"];
        let mut child = rig.command(&out, &arguments).spawn().unwrap();
        wait_for_samples(&folder, &mut child);
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(130),
            "{:?} {}",
            output.status.signal(),
            String::from_utf8_lossy(&output.stderr)
        );
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(printed["complete"], false);
        let results = Results::open(&folder).unwrap();
        assert_eq!(results.end.unwrap().why.as_deref(), Some("interrupted"));
        assert_eq!(rig.is_clean(), Ok(()));
    }
}

#[test]
fn same_seed_gives_the_same_order() {
    let Some(rig) = Rig::new() else { return };
    let order = |out: &str| -> Vec<String> {
        let arguments =
            ["--with", "process,rvmm-native", "--runs", "8", "--probe", "syscall", "--seed", "77"];
        let results = rig.run(out, &arguments);
        let first = results.samples.iter().filter(|sample| sample.metric == "getppid");
        first.map(|sample| sample.executor.clone()).collect()
    };
    assert_eq!(order("one"), order("two"));
}

#[test]
fn mistakes_are_told_in_one_line() {
    if !is_root() {
        return;
    }
    let home = support::directory();
    let run = |arguments: &[&str]| {
        let output = Command::new(support::binary())
            .args(arguments)
            .env("RVMM_ROOT", home.path().join("data"))
            .env("RVMM_RUN_ROOT", home.path().join("run"))
            .current_dir(home.path())
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    for (arguments, wanted) in [
        (&["compare", "--probe", "nonsense"][..], "there is no probe \"nonsense\"; there are: start"),
        (&["compare", "--with", "nonsense"], "there is no executor \"nonsense\"; there are: process"),
        (&["compare", "--helper", "/nowhere/helper"], "/nowhere/helper"),
        (&["compare", "report", "/nowhere"], "cannot read \"/nowhere/plan.json\""),
        (&["compare", "diff", "/nowhere", "/nowhere"], "cannot read"),
        (&["compare", "--runs", "0"], "--runs"),
    ] {
        let said = run(arguments);
        assert!(said.contains(wanted), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn run_differs_from_itself_in_nothing() {
    let fixture = project("tests/bench/fixture");
    let results = Results::open(&fixture).unwrap();
    let found = rvmm::bench::diff(&results, &results);
    assert!(found.len() > 50);
    let wrong: Vec<_> = found
        .iter()
        .filter(|found| !matches!(found.verdict, Verdict::NoDifference | Verdict::TooFew))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}
