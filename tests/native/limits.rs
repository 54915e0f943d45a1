//! Limits: what a container can be kept to, what it is told to have used, and what is refused.

use rvmm::container::config::Limits;
use serde_json::json;

use super::container::{Plan, can_run, groups};
use crate::support::skip;

/// Whether the host has a controller, of whichever version; says so if not.
fn has_controller(name: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let v1 = mounts.lines().filter(|line| line.contains(" - cgroup ")).any(|line| {
        line.rsplit(' ').next().is_some_and(|options| options.split(',').any(|option| option == name))
    });
    let v2 = mounts.lines().filter(|line| line.contains(" - cgroup2 ")).any(|line| {
        let mount = line.split(' ').nth(4).expect("a mount");
        let list = std::fs::read_to_string(format!("{mount}/cgroup.controllers")).unwrap_or_default();
        list.split_whitespace().any(|controller| controller == name)
    });
    if !v1 && !v2 {
        skip(&format!("needs the controller {name}"));
    }
    v1 || v2
}

fn limited(line: &str, limits: Limits) -> Plan {
    Plan::shell(line).with(|config| config.limits = limits)
}

#[test]
fn memory_is_limited_and_its_want_is_noticed() {
    if !can_run() || !has_controller("memory") {
        return;
    }
    let limits =
        Limits { memory_bytes: Some(32 << 20), memory_swap_bytes: Some(32 << 20), ..Limits::default() };
    // One variable of 128 MiB.
    let mut container = limited(
        "x=$(dd if=/dev/zero bs=1M count=128 2>/dev/null | tr '\\0' x); echo survived",
        limits.clone(),
    )
    .start();
    let end = container.wait(0);
    assert!(!end.stdout.contains("survived"), "{end:?}");
    assert_eq!(container.ask(json!("oom-killed")), json!(true));
    container.delete();

    let mut container = limited("echo ready; sleep 1000", limits).start();
    container.expect(0, "ready");
    let stats = container.ask(json!("stats"));
    assert_eq!(stats["memory_limit_bytes"], 32 << 20);
    assert!(stats["memory_bytes"].as_u64().is_some_and(|bytes| bytes < 32 << 20), "{stats}");
    assert_eq!(container.ask(json!("oom-killed")), json!(false));
    container.delete();
}

#[test]
fn processes_are_limited() {
    if !can_run() || !has_controller("pids") {
        return;
    }
    let limits = Limits { pids: Some(5), ..Limits::default() };
    let end = limited("for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; echo all", limits.clone()).run();
    assert!(end.stderr.contains("can't fork") && !end.stdout.contains("all"), "{end:?}");
    let mut container = limited("echo ready; sleep 1000", limits).start();
    container.expect(0, "ready");
    let stats = container.ask(json!("stats"));
    assert_eq!(
        (&stats["pids_limit"], stats["pids"].as_u64().is_some_and(|count| count >= 1)),
        (&json!(5), true)
    );
    container.delete();
}

#[test]
fn processor_time_is_limited_and_counted() {
    if !can_run() || !has_controller("cpu") {
        return;
    }
    let limits = Limits { cpu_millis: Some(100), cpu_shares: Some(512), ..Limits::default() };
    let mut container = limited("while :; do :; done", limits).start();
    let find = |name: &str| {
        groups(&container.id).into_iter().map(|group| group.join(name)).find(|path| path.exists())
    };
    match find("cpu.cfs_quota_us") {
        Some(quota) => {
            assert_eq!(std::fs::read_to_string(quota).unwrap().trim(), "10000");
            let shares = find("cpu.shares").expect("shares");
            assert_eq!(std::fs::read_to_string(shares).unwrap().trim(), "512");
        }
        None => {
            let max = find("cpu.max").expect("a quota");
            assert_eq!(std::fs::read_to_string(max).unwrap().trim(), "10000 100000");
        }
    }
    // A tenth of a processor, so it is held back in every period.
    let mut stats = json!(null);
    for _ in 0..600 {
        stats = container.ask(json!("stats"));
        if stats["throttled_periods"].as_u64().is_some_and(|count| count > 2) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(stats["throttled_periods"].as_u64().is_some_and(|count| count > 2), "{stats}");
    assert!(stats["cpu_ns"].as_u64().is_some_and(|ns| ns > 1_000_000), "{stats}");
    container.delete();
}

#[test]
fn set_of_processors_is_kept_to() {
    if !can_run() || !has_controller("cpuset") {
        return;
    }
    let limits = Limits { cpuset: Some("0".into()), ..Limits::default() };
    let end = limited("grep Cpus_allowed_list /proc/self/status", limits).run();
    assert_eq!(end.stdout, "Cpus_allowed_list:\t0\n");
}

#[test]
fn limits_hold_for_further_processes() {
    if !can_run() || !has_controller("pids") {
        return;
    }
    let mut container = limited("read x", Limits { pids: Some(4), ..Limits::default() })
        .with(|config| config.process.stdin = true)
        .start();
    let end = container.exec_shell("for i in 1 2 3 4 5 6; do sleep 1 & done; echo all");
    assert!(end.stderr.contains("can't fork"), "{end:?}");
    container.delete();
}

#[test]
fn container_cannot_raise_its_own_limits() {
    if !can_run() || !has_controller("memory") {
        return;
    }
    let limits = Limits { memory_bytes: Some(32 << 20), ..Limits::default() };
    let raise = "for f in /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max; do \
                 if test -e $f; then echo there; echo 1000000000 >$f; fi; done; \
                 mount -o remount,rw /sys/fs/cgroup/memory; umount /sys/fs/cgroup; echo end";
    let end = limited(raise, limits).run();
    assert_eq!(end.stdout, "there\nend\n");
    assert!(end.stderr.contains("Read-only file system"), "{end:?}");
}

#[test]
fn impossible_limits_are_refused_with_a_reason() {
    if !can_run() {
        return;
    }
    let (text, code) = limited("true", Limits { memory_bytes: Some(1), ..Limits::default() }).fails();
    assert!(code == 125 && text.contains("6 MiB"), "{text}");
    let (text, _) = limited("true", Limits { disk_bytes: Some(1 << 30), ..Limits::default() }).fails();
    assert!(text.contains("microVM"), "{text}");
    if !std::path::Path::new("/sys/fs/cgroup/blkio/blkio.bfq.weight").exists()
        && !std::path::Path::new("/sys/fs/cgroup/io.bfq.weight").exists()
    {
        let plan = limited("true", Limits { io_weight: Some(500), ..Limits::default() });
        let mut container = plan.driver();
        // Some kernels weigh by another file.
        let answer = container.request(json!("create"));
        if let Some(text) = answer.get("error").and_then(|text| text.as_str()) {
            assert!(text.contains("disk weight"), "{text}");
        }
        container.delete();
    }
}
