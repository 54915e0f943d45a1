//! The walls around a running VM: what a thread tries that may not, what a jail holds, and how a violation ends.

use std::fs;
use std::process::Command;

use rvmm::boot::testing::Program;

use crate::support::guest::{More, tiny};
use crate::support::{self, Monitor, announce, api::Api, directory, is_root};

/// Lines of `escape: KIND: N of N attempts failed`.
fn escapes(stderr: &str) -> Vec<(String, bool)> {
    let lines = stderr.lines().filter_map(|line| line.strip_prefix("escape: "));
    lines
        .filter_map(|line| {
            let (kind, result) = line.split_once(": ")?;
            let mut words = result.split(' ');
            let (failed, tried) = (words.next()?, words.nth(1)?);
            let many = tried.parse::<u32>().is_ok_and(|tried| tried >= 40);
            Some((kind.to_owned(), many && failed == tried && !line.contains("escaped")))
        })
        .collect()
}

fn is_debug_build(monitor: &str) -> bool {
    let debug = cfg!(debug_assertions);
    if !debug {
        support::skip(&format!("{monitor} needs a debug build"));
    }
    debug
}

/// With every device, each thread fails in all that it tries, and the VM lives on.
#[test]
fn threads_cannot_get_out() {
    if !support::has_kvm() || !is_debug_build("an escape") {
        return;
    }
    let Some(linux) = support::linux() else { return };
    let place = directory();
    let path = |name: &str| place.path().join(name);
    support::image(&path("disk"), 1 << 20);
    support::image(&path("sync"), 1 << 20);
    // Another VM's image.
    fs::write(path("image"), [7; 4096]).unwrap();
    fs::create_dir(path("share")).unwrap();
    // The one beside the tests, which is built as they are.
    let mut command = Command::new(env!("CARGO_BIN_EXE_rvmm"));
    command.env("RVMM_SANDBOX_ESCAPE", place.path());
    let outcome = Monitor::from_command(command)
        .arg("--kernel")
        .arg(&linux.kernel)
        .arg("--rootfs")
        .arg(format!("{},readonly", linux.rootfs.display()))
        .arg("--disk")
        .arg(path("disk"))
        .arg("--disk")
        .arg(format!("{},io=sync", path("sync").display()))
        .arg("--share")
        .arg(format!("tag=share,path={}", path("share").display()))
        .arg("--vsock")
        .arg(format!("cid=9,socket={}", path("vsock").display()))
        .arg("--api-socket")
        .arg(path("api"))
        .args(["--rng", "--balloon", "--cmdline", "quiet rvmm.exec=\"echo alive\""])
        .run_within(support::LINUX_PATIENCE);
    outcome.exits(0).shows("alive");
    let found = escapes(&outcome.stderr);
    let kinds =
        ["main", "vCPU", "launcher", "console", "api", "virtio-rng", "virtio-balloon", "virtio-vsock"];
    for kind in kinds.into_iter().chain(["virtio-fs", "virtio-block (sync)"]) {
        outcome.check(found.iter().any(|(name, _)| name == kind), &format!("no attempt of {kind}"));
    }
    for (kind, failed) in &found {
        outcome.check(*failed, &format!("{kind} got out"));
    }
    assert_eq!(fs::read(path("image")).unwrap(), [7; 4096]);
    assert!(!path("fresh").exists());
    // What the keeper was left with.
    assert!(!path("vsock").exists() && !path("api").exists(), "sockets are left");
}

pub fn status_of(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.trim_start_matches(':').trim().to_owned()
}

/// Threads of a process, by name.
pub fn threads(pid: u32) -> Vec<(u32, String)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    tasks
        .filter_map(|task| {
            let id: u32 = task.file_name().to_str()?.parse().ok()?;
            let name = fs::read_to_string(task.path().join("comm")).ok()?;
            Some((id, name.trim().to_owned()))
        })
        .collect()
}

#[test]
fn walls_are_up_by_default_and_down_on_demand() {
    if !support::has_kvm() {
        return;
    }
    for (flag, filters, privileges) in
        [(None, "2", "1"), (Some("--no-sandbox"), "0", "0"), (Some("--no-seccomp"), "0", "0")]
    {
        let guest = tiny(&Program::new().listen().print("up\n").echo_until(b'.').power_off());
        let mut monitor = guest.monitor();
        if let Some(flag) = flag {
            monitor = monitor.arg(flag);
        }
        let mut running = monitor.start_with_input();
        running.expect("up");
        let pid = running.pid();
        for (thread, name) in threads(pid) {
            let mode = status_of(thread, "Seccomp");
            assert_eq!(mode, filters, "{flag:?}: {name}");
            assert_eq!(status_of(thread, "NoNewPrivs"), privileges, "{flag:?}: {name}");
            if flag.is_none() {
                assert_eq!(status_of(thread, "CapEff"), "0000000000000000", "{name}");
            }
        }
        running.send(".");
    }
}

/// The one child of a process.
pub fn child_of(parent: u32) -> u32 {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut ids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    ids.find(|id| {
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        status
            .lines()
            .any(|line| line.strip_prefix("PPid:").is_some_and(|ppid| ppid.trim() == parent.to_string()))
    })
    .expect("a child")
}

pub fn jailed(place: &std::path::Path, extra: &str) -> String {
    fs::create_dir_all(place.join("jail")).unwrap();
    format!("{}{extra}", place.join("jail").display())
}

#[test]
fn jail_takes_files_user_and_processes_away() {
    if !support::has_kvm() || !is_root() {
        return;
    }
    let guest = tiny(&Program::new().listen().print("up\n").echo_until(b'.').power_off());
    let place = guest.directory.path();
    let mut running = guest
        .monitor()
        .arg("--api-socket")
        .arg(guest.path("api"))
        .arg("--jail")
        .arg(jailed(place, ",uid=123456,gid=123457"))
        .start_with_input();
    running.expect("up");
    let keeper = running.pid();
    let monitor = child_of(keeper);
    assert_eq!(status_of(monitor, "Uid").split_whitespace().next(), Some("123456"));
    assert_eq!(status_of(monitor, "Gid").split_whitespace().next(), Some("123457"));
    assert_eq!(status_of(monitor, "Groups"), "");
    assert_eq!(status_of(monitor, "NSpid").split_whitespace().last(), Some("1"));
    assert_eq!(status_of(monitor, "CapEff"), "0000000000000000");
    assert_eq!(fs::read_dir(format!("/proc/{monitor}/root/")).unwrap().count(), 0);
    let link = |name: &str| fs::read_link(format!("/proc/{monitor}/ns/{name}")).unwrap();
    for name in ["mnt", "pid", "ipc", "uts"] {
        assert_ne!(link(name), fs::read_link(format!("/proc/self/ns/{name}")).unwrap(), "{name}");
    }
    // It is controlled as ever.
    let api = Api::new(&guest.path("api"));
    assert_eq!(api.get("/")["state"], "Running");
    api.set_state("Paused");
    api.set_state("Resumed");
    running.send(".");
    let outcome = running.wait(support::PATIENCE);
    outcome.check(outcome.status.code().is_some(), "no exit code");
    assert!(!guest.path("api").exists());
}

#[test]
fn signals_and_exit_codes_pass_through_a_jail() {
    if !support::has_kvm() || !is_root() {
        return;
    }
    let guest = tiny(&Program::new().print("up\n").spin());
    let running = guest
        .monitor()
        .args(["--shutdown-timeout", "1", "--jail"])
        .arg(jailed(guest.directory.path(), ",uid=123456"))
        .start_quiet();
    running.expect("up");
    running.signal(nix::sys::signal::Signal::SIGTERM);
    running.wait(support::PATIENCE).exits(143);
    // Killed, it takes the monitor along: the pipe of the console ends.
    let running =
        guest.monitor().arg("--jail").arg(jailed(guest.directory.path(), ",uid=123456")).start_quiet();
    running.expect("up");
    running.signal(nix::sys::signal::Signal::SIGKILL);
    let end = std::time::Instant::now() + support::PATIENCE;
    while !running.has_ended() {
        assert!(std::time::Instant::now() < end, "a monitor without its keeper lives on");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    drop(running);
    let outcome = guest.monitor().args(["--jail", "/nonexistent/directory"]).run();
    outcome.fails_with(&["cannot open the jail"]);
    announce("a jail was left in good order");
}
