//! Other hosts than this: other layouts of control groups, and users that are not root.

use std::path::Path;
use std::process::Command;

use rvmm::container::config::Limits;

use super::container::{Plan, can_run};
use crate::support::{can_unshare, skip};

/// Tests that depend on control groups, and run on every host.
const TESTS: [&str; 6] = [
    "native::devices_are_there_and_no_others_can_be_used",
    "native::kernel_file_systems_are_masked_unless_privileged",
    "native::life::pause_stops_everything_until_it_goes_on",
    "native::life::nothing_is_left_when_the_driver_is_killed",
    "native::life::further_processes_are_in_the_container_with_streams_of_their_own",
    "native::life::processes_are_listed_as_the_host_sees_them",
];
/// Keeps tests from starting themselves anew without end.
const INSIDE: &str = "RVMM_TEST_LAYOUT";

/// Runs [`TESTS`] where a line of shell has changed the mounts.
fn with_mounts(change: &str) {
    let line = format!("{change} && exec \"$0\" --exact \"$@\"");
    let tests = std::env::current_exe().expect("the tests' own path");
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &line])
        .arg(tests)
        .args(TESTS)
        .env(INSIDE, "1")
        .output()
        .expect("unshare");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{change}\n{text}\n{errors}");
    assert!(text.contains(&format!(" {} passed", TESTS.len())), "{text}\n{errors}");
}

fn is_mount_of(path: &str, kind: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
    mounts.lines().any(|line| line.split(' ').nth(1) == Some(path) && line.split(' ').nth(2) == Some(kind))
}

#[test]
fn host_with_version_2_alone() {
    if !can_run() || !can_unshare() || std::env::var_os(INSIDE).is_some() {
        return;
    }
    if is_mount_of("/sys/fs/cgroup", "cgroup2") {
        skip("this host has version 2 alone, so the other tests are this one");
        return;
    }
    with_mounts("umount -R -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup");
}

#[test]
fn host_with_version_1_alone() {
    if !can_run() || !can_unshare() || std::env::var_os(INSIDE).is_some() {
        return;
    }
    if !is_mount_of("/sys/fs/cgroup/unified", "cgroup2") {
        skip("this host has no hybrid control groups, of which version 2 could be taken away");
        return;
    }
    with_mounts("umount -l /sys/fs/cgroup/unified");
}

#[test]
fn user_who_is_not_root_runs_containers_without_limits() {
    if !can_run() {
        return;
    }
    let forbidden = |path: &str, value: &str| {
        Path::new(path).exists() && std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value)
    };
    if forbidden("/proc/sys/kernel/unprivileged_userns_clone", "0")
        || forbidden("/proc/sys/user/max_user_namespaces", "0")
    {
        skip("this host forbids user namespaces");
        return;
    }
    // A user that no file knows, and so with one number alone.
    let user = Some(23_456);
    let mut plan = Plan::shell(
        "id -u; cat /proc/self/uid_map; touch /x && ls -n /x; echo x >/dev/null; grep CapEff /proc/self/status",
    );
    plan.user = user;
    let mut container = plan.start();
    let end = container.wait(0);
    let lines: Vec<&str> = end.stdout.lines().collect();
    assert_eq!(lines[0], "0", "{end:?}");
    assert_eq!(lines[1].split_whitespace().collect::<Vec<_>>(), ["0", "23456", "1"]);
    assert!(lines[2].contains(" 0 ") && lines[3].ends_with("00000000a80425fb"), "{end:?}");
    container.ask(serde_json::json!("delete"));

    let mut plan = Plan::shell("true").with(|config| config.process.user = "ann".into());
    plan.user = user;
    let (text, _) = plan.fails_without_look();
    assert!(text.contains("no user 1000"), "{text}");
    let mut plan =
        Plan::shell("true").with(|config| config.limits = Limits { pids: Some(9), ..Limits::default() });
    plan.user = user;
    let (text, _) = plan.fails_without_look();
    assert!(text.contains("cannot limit processes"), "{text}");
}
