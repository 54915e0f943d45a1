//! VMs that are saved and go on elsewhere: what they keep, what is refused, and what is left when somebody is killed.

#[path = "snapshot/changes.rs"]
mod changes;
#[path = "snapshot/kills.rs"]
mod kills;
#[path = "snapshot/linux.rs"]
mod linux_guests;
#[path = "snapshot/network.rs"]
mod network;
#[path = "snapshot/shell.rs"]
mod shell;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rvmm::boot::testing::Program;
use rvmm::vm::snapshot::FORMAT_VERSION;

use crate::sandbox;
use crate::support::api::Api;
use crate::support::guest::{More, Tiny};
use crate::support::monitor::Running;
use crate::support::{Monitor, PATIENCE, directory, has_kvm, image, is_root, tiny};

const MIB: u64 = 1 << 20;
/// Where the guest counts in memory.
const COUNTER: [u8; 4] = 0x20_0000u32.to_le_bytes();

/// A tiny guest that counts the bytes that it gets, in a register and in memory, and sends them back. At `q` it powers
/// off, and reports the count, if both agree.
fn counting() -> Program {
    let program = Program::new().listen().print("ready\n");
    // xor ebx, ebx; mov [COUNTER], ebx
    let program = program.raw(&[0x31, 0xdb, 0x89, 0x1c, 0x25]).raw(&COUNTER).await_byte();
    // out dx, al; inc ebx; inc [COUNTER]; cmp al, 'q'; jne to the start of the waiting
    let program =
        program.raw(&[0xee, 0xff, 0xc3, 0xff, 0x04, 0x25]).raw(&COUNTER).raw(&[0x3c, b'q', 0x75, 0xe4]);
    // mov eax, ebx; sub eax, [COUNTER]; add eax, ebx; mov dx, 0x5f1; out dx, al
    let program = program.raw(&[0x89, 0xd8, 0x2b, 0x04, 0x25]).raw(&COUNTER);
    program.raw(&[0x01, 0xd8, 0x66, 0xba, 0xf1, 0x05, 0xee]).power_off()
}

/// A guest that runs, with a control socket.
struct Saved {
    guest: Tiny,
    api: Api,
    running: Running,
}

impl Saved {
    fn start(arguments: &[&str]) -> Saved {
        let guest = tiny(&counting());
        let api = Api::new(&guest.path("api"));
        let running = guest.monitor().args(arguments).arg("--api-socket").arg(&api.path).start_with_input();
        running.expect("ready");
        Saved { guest, api, running }
    }

    fn feed(&mut self, text: &str) {
        self.running.send(text);
        self.running.expect(text);
    }

    fn snapshot(&self) -> PathBuf {
        let place = self.guest.path("snapshot");
        snapshot(&self.api.path, &place);
        place
    }
}

fn snapshot(socket: &Path, place: &Path) {
    let saved = Monitor::new().arg("snapshot").arg(socket).arg(place).run();
    saved.exits(0);
}

fn restore(place: &Path) -> Monitor {
    Monitor::new().arg("restore").arg(place)
}

/// Names in a directory, those of memory files without what is random.
fn names(place: &Path) -> Vec<String> {
    let entries = fs::read_dir(place).expect("a directory");
    let name = |entry: fs::DirEntry| entry.file_name().into_string().expect("a name");
    let mut names: Vec<_> =
        entries.map(|entry| name(entry.expect("an entry")).split('-').next().unwrap().to_owned()).collect();
    names.sort();
    names
}

fn memory_of(place: &Path) -> PathBuf {
    let entries = fs::read_dir(place).expect("a directory").map(|entry| entry.expect("an entry").path());
    entries.into_iter().find(|path| path.to_str().unwrap().contains("memory-")).expect("a memory file")
}

#[test]
fn guest_goes_on_where_it_was_saved_again_and_again() {
    if !has_kvm() {
        return;
    }
    let mut first = Saved::start(&["--rng", "--balloon"]);
    first.feed("abc");
    let place = first.snapshot();
    assert_eq!(names(&place), ["memory", "state"]);
    // The VM that was saved goes on too.
    first.feed("d");
    first.running.send("q");
    first.running.wait(PATIENCE).exits(5);
    for (input, count) in [("xyq", 6), ("q", 4), ("0123456789q", 14)] {
        let mut running = restore(&place).start_with_input();
        running.send(input);
        let outcome = running.wait(PATIENCE);
        outcome.exits(count).check(outcome.stdout == input, "the guest sent something else");
    }

    // A restored VM is saved in place of the snapshot that it came from, and goes on.
    let api = Api::new(&first.guest.path("second"));
    let mut second = restore(&place).arg("--api-socket").arg(&api.path).start_with_input();
    second.send("ef");
    second.expect("ef");
    snapshot(&api.path, &place);
    assert_eq!(names(&place), ["memory", "state"]);
    second.send("q");
    second.wait(PATIENCE).exits(6);
    let mut third = restore(&place).start_with_input();
    third.send("q");
    third.wait(PATIENCE).exits(6);
}

#[test]
fn what_clients_say_before_a_snapshot_is_loaded_holds() {
    if !has_kvm() {
        return;
    }
    let mut first = Saved::start(&[]);
    first.feed("a");
    let place = first.snapshot();
    let (log, metrics) = (first.guest.path("log"), first.guest.path("metrics"));
    let api = Api::new(&first.guest.path("restored"));
    let mut second = Monitor::new().args(["restore", "--api-socket"]).arg(&api.path).start_with_input();
    api.change("PUT", "/logger", &format!("{{\"log_path\":{log:?},\"level\":\"Debug\"}}"));
    api.change("PUT", "/metrics", &format!("{{\"metrics_path\":{metrics:?}}}"));
    api.change("PUT", "/mmds", "{\"a\":\"b\"}");
    let body = format!("{{\"snapshot_path\":{:?},\"resume_vm\":true}}", place.join("state"));
    api.change("PUT", "/snapshot/load", &body);
    second.send("b");
    second.expect("b");
    assert_eq!(api.get("/mmds"), serde_json::json!({"a": "b"}));
    api.change("PUT", "/actions", "{\"action_type\":\"FlushMetrics\"}");
    assert_eq!(fs::read_to_string(&metrics).expect("metrics").lines().count(), 1);
    second.send("q");
    second.wait(PATIENCE).exits(3);
    let log = fs::read_to_string(&log).expect("a log");
    assert!(log.contains("DEBUG") && log.contains("the guest powered off"), "{log}");
}

#[test]
fn restored_guest_rests_until_it_is_told_to_go_on() {
    if !has_kvm() {
        return;
    }
    let mut first = Saved::start(&["--rng"]);
    first.feed("a");
    let place = first.snapshot();
    let api = Api::new(&first.guest.path("paused"));
    let mut second = restore(&place).args(["--paused", "--api-socket"]).arg(&api.path).start_with_input();
    assert_eq!(api.get("/").get("state").unwrap(), "Paused");
    // It can be saved before it has run at all.
    let again = first.guest.path("again");
    snapshot(&api.path, &again);
    second.send("b");
    std::thread::sleep(Duration::from_millis(100));
    assert!(!second.has_shown("b"));
    assert_eq!(api.get("/").get("state").unwrap(), "Paused");
    api.set_state("Resumed");
    second.expect("b");
    second.send("q");
    second.wait(PATIENCE).exits(3);
    let mut third = restore(&again).start_with_input();
    third.send("q");
    third.wait(PATIENCE).exits(2);
    let socket = first.guest.path("nobody");
    Monitor::new().arg("snapshot").arg(&socket).arg(&again).run().fails_with(&["no VM listens"]);
}

#[test]
fn snapshot_is_made_and_loaded_through_the_socket() {
    if !has_kvm() {
        return;
    }
    let mut first = Saved::start(&[]);
    first.feed("ab");
    let (state, memory) = (first.guest.path("vm.snap"), first.guest.path("vm.mem"));
    let paths =
        format!("\"snapshot_path\":\"{}\",\"mem_file_path\":\"{}\"", state.display(), memory.display());
    first.api.set_state("Paused");
    first.api.change("PUT", "/snapshot/create", &format!("{{\"snapshot_type\":\"Full\",{paths}}}"));
    let load = format!(
        "{{\"snapshot_path\":\"{}\",\"mem_backend\":{{\"backend_type\":\"File\",\"backend_path\":\"{}\"}},\
         \"resume_vm\":true}}",
        state.display(),
        memory.display()
    );
    first.api.refuses("PUT", "/snapshot/load", &load, 400, "after starting");

    let api = Api::new(&first.guest.path("empty"));
    let mut second = Monitor::new().args(["restore", "--api-socket"]).arg(&api.path).start_with_input();
    assert_eq!(api.get("/").get("state").unwrap(), "Not started");
    api.refuses("PATCH", "/vm", "{\"state\":\"Paused\"}", 400, "before starting");
    api.refuses("PUT", "/snapshot/load", "{\"snapshot_path\":\"/nowhere\"}", 400, "no snapshot");
    api.refuses("PUT", "/snapshot/load", &format!("{{{paths}}}").replace("vm.mem", "vm.snap"), 400, "memory");
    api.change("PUT", "/snapshot/load", &load);
    second.send("cq");
    second.wait(PATIENCE).exits(4);

    // So does an rvmm that waits to be told what to boot, until it is told.
    let api = Api::new(&first.guest.path("any"));
    let mut third = Monitor::new().arg("--api-socket").arg(&api.path).start_with_input();
    api.refuses("PUT", "/snapshot/create", &format!("{{{paths}}}"), 400, "before starting");
    api.change("PUT", "/snapshot/load", &load);
    assert_eq!(api.get("/").get("state").unwrap(), "Running");
    third.send("cdq");
    third.wait(PATIENCE).exits(5);
    let fourth = Monitor::new().arg("--api-socket").arg(&api.path).start_quiet();
    api.change("PUT", "/machine-config", "{\"vcpu_count\":1,\"mem_size_mib\":64}");
    api.refuses("PUT", "/snapshot/load", &load, 400, "after configuring");
    fourth.signal(nix::sys::signal::Signal::SIGTERM);
    fourth.wait(PATIENCE).exits(0);

    let waiting = Monitor::new().args(["restore", "--api-socket"]).arg(&api.path).start_quiet();
    api.get("/");
    waiting.signal(nix::sys::signal::Signal::SIGTERM);
    waiting.wait(PATIENCE).exits(0);
    assert!(!api.path.exists(), "the socket is left behind");
}

#[test]
fn snapshots_that_are_not_whole_are_refused() {
    if !has_kvm() {
        return;
    }
    let directory = directory();
    let disk = directory.path().join("disk");
    image(&disk, MIB);
    let other = directory.path().join("other");
    image(&other, 2 * MIB);
    let first = Saved::start(&["--disk", disk.to_str().unwrap()]);
    let place = first.snapshot();
    // The image is locked as long as the VM runs.
    drop(first.running);
    let state = fs::read(place.join("state")).expect("a state");
    let memory = memory_of(&place);
    let refused = |says: &[&str]| {
        restore(&place).run().fails_with(says);
    };

    let mut altered = state.clone();
    altered[state.len() / 2] ^= 1;
    let mut newer = state.clone();
    newer[8] = 77;
    for (contents, says) in [
        (&b""[..], &["no snapshot of rvmm"][..]),
        (b"#!/bin/sh", &["no snapshot of rvmm"]),
        (&state[..state.len() - 1], &["cut off"]),
        (&state[..20], &["cut off"]),
        (&altered, &["altered"]),
        (&newer, &["format 77", &format!("format {FORMAT_VERSION}")]),
    ] {
        fs::write(place.join("state"), contents).expect("a state");
        refused(says);
    }
    fs::remove_file(place.join("state")).expect("a state");
    refused(&["no snapshot at"]);
    fs::write(place.join("state"), &state).expect("a state");

    let len = fs::metadata(&memory).expect("a file").len();
    let file = fs::OpenOptions::new().write(true).open(&memory).expect("a file");
    file.set_len(len - 4096).expect("a length");
    refused(&["memory", "cut off"]);
    file.set_len(len).expect("a length");
    refused(&["memory", "another snapshot"]);
    fs::remove_file(&memory).expect("a file");
    refused(&["open the memory"]);

    let place = {
        let first = Saved::start(&["--disk", disk.to_str().unwrap()]);
        let place = directory.path().join("whole");
        snapshot(&first.api.path, &place);
        place
    };
    let refused = |arguments: &[&str], says: &[&str]| {
        restore(&place).args(arguments).run().fails_with(says);
    };
    fs::remove_file(&disk).expect("a file");
    refused(&[], &["does not exist"]);
    image(&disk, 2 * MIB);
    refused(&[], &["disk0", "1048576", "2097152"]);
    refused(&["--disk", "data=x"], &["no disk \"data\"", "disk0"]);
    refused(&["--net", "net0=tap0"], &["no network interface"]);
    refused(&["--vsock", "x"], &["vsock"]);
    refused(&["--balloon", "1M"], &["balloon"]);
    let mut running =
        restore(&place).arg("--disk").arg(format!("disk0={}", other.display())).start_with_input();
    running.send("q");
    running.wait(PATIENCE).exits(1);
}

#[test]
fn shared_folders_are_named_anew_at_restore() {
    if !has_kvm() {
        return;
    }
    let directory = directory();
    let share = format!("tag=t,path={}", directory.path().display());
    let mut first = Saved::start(&["--share", &share]);
    let place = first.guest.path("snapshot");
    snapshot(&first.api.path, &place);
    first.running.send("q");
    first.running.wait(PATIENCE).exits(1);
    restore(&place).run().fails_with(&["shared folder", "\"t\"", "name the folder"]);
    restore(&place).args(["--share", "other=/etc"]).run().fails_with(&["no shared folder \"other\"", "t"]);
    let named = format!("t={}", directory.path().display());
    let mut running = restore(&place).args(["--share", &named]).start_with_input();
    running.send("q");
    running.wait(PATIENCE).exits(1);
}

/// Every thread of a process has a filter and no privileges.
fn has_walls(pid: u32) {
    let threads = sandbox::threads(pid);
    assert!(threads.len() >= 4, "{threads:?}");
    for (thread, name) in threads {
        assert_eq!(sandbox::status_of(thread, "Seccomp"), "2", "{name}");
        assert_eq!(sandbox::status_of(thread, "NoNewPrivs"), "1", "{name}");
        assert_eq!(sandbox::status_of(thread, "CapEff"), "0000000000000000", "{name}");
    }
}

#[test]
fn walls_are_up_where_a_vm_is_saved_and_where_it_goes_on() {
    if !has_kvm() {
        return;
    }
    let devices = ["--rng", "--balloon", "--cpus", "2"];
    let mut first = Saved::start(&devices);
    // The guest may be faster than the main thread, which answers behind its walls.
    first.api.get("/");
    has_walls(first.running.pid());
    first.feed("a");
    let place = first.snapshot();
    first.feed("b");
    has_walls(first.running.pid());
    let api = Api::new(&first.guest.path("second"));
    let mut second = restore(&place).arg("--api-socket").arg(&api.path).start_with_input();
    second.send("c");
    second.expect("c");
    api.get("/");
    has_walls(second.pid());
    // What cannot be is said by the keeper.
    let nowhere = "{\"snapshot_path\":\"/proc/nowhere/state\"}";
    api.refuses("PUT", "/snapshot/create", nowhere, 400, "/proc/nowhere");
    api.change("PATCH", "/vm", "{\"state\":\"Paused\"}");
    snapshot(&api.path, &place);
    api.set_state("Resumed");
    second.send("q");
    second.wait(PATIENCE).exits(3);
    let mut open = restore(&place).arg("--no-sandbox").start_with_input();
    open.send("q");
    open.wait(PATIENCE).exits(3);
}

#[test]
fn snapshots_of_a_jail_lie_in_it() {
    if !has_kvm() || !is_root() {
        return;
    }
    let guest = tiny(&counting());
    let jail = sandbox::jailed(guest.directory.path(), ",uid=123456");
    let api = Api::new(&guest.path("api"));
    let first = guest.monitor().arg("--jail").arg(&jail).arg("--api-socket").arg(&api.path);
    let mut running = first.start_with_input();
    running.expect("ready");
    running.send("a");
    running.expect("a");
    for _ in 0..2 {
        api.change("PUT", "/snapshot/create", "{\"snapshot_path\":\"/saved/state\"}");
    }
    running.send("q");
    running.wait(PATIENCE).exits(2);
    let place = guest.path("jail/saved");
    assert_eq!(names(&place), ["memory", "state"]);

    let api = Api::new(&guest.path("second"));
    let second = restore(&place).arg("--jail").arg(&jail).arg("--api-socket").arg(&api.path);
    let mut running = second.start_with_input();
    running.send("b");
    running.expect("b");
    api.get("/");
    let monitor = sandbox::child_of(running.pid());
    has_walls(monitor);
    assert_eq!(sandbox::status_of(monitor, "Uid").split_whitespace().next(), Some("123456"));
    api.change("PUT", "/snapshot/create", "{\"snapshot_path\":\"/again/deep/state\"}");
    running.send("q");
    running.wait(PATIENCE).exits(3);
    assert_eq!(names(&guest.path("jail/again/deep")), ["memory", "state"]);
}
