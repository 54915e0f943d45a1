//! The control socket: its answers, hostile clients, pausing under load, drives that change.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use rvmm::boot::testing::Program;

use crate::support::api::{Api, resident_kib};
use crate::support::guest::{More, linux_for_tests};
use crate::support::{
    LINUX_PATIENCE, Monitor, PATIENCE, Script, announce, directory, has_fast_kvm, has_kvm, has_tool, image,
    kvm_kind, linux, tiny, tool,
};

const MIB: u64 = 1 << 20;

fn figure(text: &str) {
    let kind = kvm_kind().map_or_else(String::new, |kind| kind.to_string());
    announce(&format!("figure: {kind}: {text}"));
}

fn curl(socket: &Path, arguments: &[&str]) -> String {
    let mut all = vec!["-s", "--max-time", "60", "--unix-socket", socket.to_str().unwrap()];
    all.extend(arguments);
    tool("curl", &all)
}

/// A tiny guest that sends back what it is sent, up to `q`, and then powers off.
fn echo() -> Program {
    Program::new().listen().print("ready\n").echo_until(b'q').power_off()
}

#[test]
fn curl_speaks_to_a_running_machine() {
    if !has_kvm() || !has_tool("curl") {
        return;
    }
    let guest = tiny(&echo());
    let socket = guest.path("api");
    let mut running = guest.monitor().args(["--balloon", "--api-sock"]).arg(&socket).start_with_input();
    running.expect("ready");
    assert_eq!(socket.metadata().expect("a socket").permissions().mode() & 0o777, 0o600);
    let information = curl(&socket, &["http://localhost/"]);
    assert!(information.contains("\"state\":\"Running\""), "{information}");
    assert!(curl(&socket, &["http://localhost/version"]).contains("\"firecracker_version\":\""));
    let config = curl(&socket, &["http://localhost/vm/config"]);
    assert!(config.contains("\"mem_size_mib\":16"), "{config}");
    let write = ["-w", "%{http_code}", "-H", "Content-Type: application/json"];
    let patch = |path: &str, body: &str| {
        let url = format!("http://localhost{path}");
        curl(&socket, &[&write[..], &["-X", "PATCH", "-d", body, &url]].concat())
    };
    assert_eq!(patch("/vm", "{\"state\": \"Paused\"}"), "204");
    assert!(curl(&socket, &["http://localhost/"]).contains("\"state\":\"Paused\""));
    // Input waits while the guest rests.
    running.send("abc");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(patch("/vm", "{\"state\": \"Paused\"}"), "204");
    assert_eq!(patch("/balloon", "{\"amount_mib\": 4}"), "204");
    assert!(curl(&socket, &["http://localhost/balloon"]).contains("\"amount_mib\":4"));
    assert!(patch("/balloon", "{\"amount_mib\": 17}").ends_with("400"));
    assert_eq!(patch("/vm", "{\"state\": \"Resumed\"}"), "204");
    running.expect("abc");
    running.send("q");
    running.wait(PATIENCE).exits(0);
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn wrong_requests_get_faults_and_do_no_harm() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&echo());
    let api = Api::new(&guest.path("api"));
    let mut running = guest.monitor().arg("--api-socket").arg(&api.path).start_with_input();
    running.expect("ready");
    api.refuses("GET", "/nothing", "", 400, "Invalid request method and/or path");
    api.refuses("PATCH", "/vm", "{\"state\":\"Sleeping\"}", 400, "unknown variant");
    api.refuses("PATCH", "/vm", &format!("{{\"state\":\"{}\"}}", "x".repeat(1 << 20)), 413, "bytes");
    api.refuses("GET", "/balloon", "", 400, "no balloon");
    api.refuses("PATCH", "/balloon", "{\"amount_mib\":1}", 400, "no balloon");
    api.refuses("PATCH", "/balloon/statistics", "{\"stats_polling_interval_s\":1}", 400, "no balloon");
    api.refuses("PATCH", "/drives/x", "{\"drive_id\":\"x\",\"path_on_host\":\"/x\"}", 400, "no disk \"x\"");
    api.refuses("PUT", "/actions", "{\"action_type\":\"InstanceStart\"}", 400, "after starting");
    api.change("PUT", "/actions", "{\"action_type\":\"FlushMetrics\"}");
    // A second monitor does not take the socket away, and a file is no socket.
    let second = guest.monitor().arg("--api-socket").arg(&api.path).run();
    second.fails_with(&["control socket", "in use"]);
    guest.monitor().arg("--api-socket").arg(&guest.kernel).run().fails_with(&["is no socket"]);
    // Clients that stall, many of them, and the guest goes on.
    let stalled: Vec<_> = (0..100).map(|_| api.connect()).collect();
    assert_eq!(api.get("/").get("state").and_then(|state| state.as_str()), Some("Running"));
    running.send("xyz");
    running.expect("xyz");
    drop(stalled);
    let descriptors =
        || std::fs::read_dir(format!("/proc/{}/fd", running.pid())).expect("descriptors").count();
    api.wait_until("the end of the stalled clients", |_| descriptors() < 60);
    let (before, memory) = (descriptors(), resident_kib(running.pid()).1);
    for _ in 0..1000 {
        assert_eq!(api.request("GET", "/vm/config", "").status, 200);
    }
    api.wait_until("the end of the clients", |_| descriptors() <= before);
    let grown = resident_kib(running.pid()).1.saturating_sub(memory);
    assert!(grown < 512, "{grown} KiB more after 1,000 requests");
    // What a killed monitor leaves goes away, or is replaced.
    running.signal(Signal::SIGKILL);
    running.wait(PATIENCE);
    let _ = std::os::unix::net::UnixListener::bind(&api.path);
    let mut running = guest.monitor().arg("--api-socket").arg(&api.path).start_with_input();
    running.expect("ready");
    // A machine that rests can be ended.
    api.set_state("Paused");
    running.close_input();
    running.signal(Signal::SIGTERM);
    // Two at once would be one.
    std::thread::sleep(Duration::from_millis(200));
    running.signal(Signal::SIGTERM);
    running.wait(PATIENCE).exits(143);
    assert!(!api.path.exists());
}

#[test]
fn guest_rests_and_goes_on_a_thousand_times() {
    if !has_kvm() {
        return;
    }
    // Counts in memory until it is told to stop.
    let guest = tiny(&echo());
    let api = Api::new(&guest.path("api"));
    let mut running = guest.monitor().arg("--api-socket").arg(&api.path).start_with_input();
    running.expect("ready");
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..1000 {
        times.push(api.set_state("Paused"));
        api.set_state("Resumed");
    }
    times.sort();
    figure(&format!(
        "1,000 pauses of a busy vCPU: median {:?}, 99 % within {:?}, longest {:?}",
        times[500], times[990], times[999]
    ));
    running.send("still here q");
    running.wait(PATIENCE).exits(0).shows("still here");
}

/// fio on two disks and processes on all vCPUs, while the machine is paused and resumed over and over.
#[test]
fn pausing_under_load_loses_nothing() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let directory = directory();
    let api = Api::new(&directory.path().join("api"));
    let disks = ["one", "two"].map(|name| directory.path().join(name));
    disks.iter().for_each(|disk| image(disk, 64 * MIB));
    let script = Script::new(
        r#"
mkfs.ext4 -q /dev/vdc && mkdir -p /tmp/m && mount /dev/vdc /tmp/m
for n in 1 2; do timeout 10 sh -c 'while :; do :; done' & done
report ready 1
fio --name=raw --filename=/dev/vdd --size=48m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --io_size=4m >/tmp/raw 2>&1 & raw=$!
fio --name=files --directory=/tmp/m --size=2m --nrfiles=4 --rw=randwrite --bs=4k --ioengine=psync --fsync=16 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 >/tmp/files 2>&1; report files $?
wait $raw; report raw $?
start=$(date +%s); sleep 1; report slept $(($(date +%s) - start))
grep -i "err\|verif" /tmp/raw /tmp/files | head -n 20
umount /tmp/m; report umount $?
dmesg | grep -iE 'i/o error|blocked for more|soft lockup|detected stalls|kernel BUG'; report quiet $?
exit 4"#,
    );
    let mut monitor = script.on(linux.monitor_with_memory("256M").args(["--cpus", "3"]));
    for disk in &disks {
        monitor = monitor.arg("--disk").arg(disk);
    }
    let running = monitor.arg("--api-socket").arg(&api.path).start_quiet();
    running.expect_within("ready=1", LINUX_PATIENCE);
    let mut times: Vec<Duration> = Vec::new();
    let end = Instant::now() + Duration::from_secs(20);
    while times.len() < 1000 && Instant::now() < end && !running.has_ended() && !running.has_shown("umount=")
    {
        times.push(api.set_state("Paused"));
        api.set_state("Resumed");
        std::thread::sleep(Duration::from_millis(20));
    }
    let outcome = running.wait(LINUX_PATIENCE);
    outcome.exits(4).reports("files", "0").reports("raw", "0").reports("umount", "0").reports("quiet", "1");
    outcome.check(times.len() > 20, "the load was over too soon");
    times.sort();
    figure(&format!(
        "{} pauses of 3 vCPUs under fio: median {:?}, 99 % within {:?}, longest {:?}",
        times.len(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times[times.len() - 1]
    ));
    tool("e2fsck", &["-fn", disks[0].to_str().unwrap()]);
}

#[test]
fn drives_change_and_the_guest_is_told() {
    let Some(linux) = linux() else { return };
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    image(&path("small"), MIB);
    image(&path("large"), 2 * MIB);
    std::fs::write(path("small"), [b'a'; MIB as usize]).expect("an image");
    let mut large = vec![b'b'; 2 * MIB as usize];
    large[..6].copy_from_slice(b"second");
    std::fs::write(path("large"), large).expect("an image");
    let api = Api::new(&path("api"));
    let script = Script::new(
        r#"
next() { report "$1" "$2"; read line </dev/ttyS0; }
sectors() { cat /sys/block/vdc/size; }
next first $(sectors)
for n in 1 2 3 4 5 6 7 8 9 10; do [ $(sectors) = 4096 ] && break; sleep 0.1; done
next second $(sectors)
report read $(dd if=/dev/vdc bs=6 count=1 2>/dev/null)
for n in 1 2 3 4 5 6 7 8 9 10; do [ $(sectors) = 8192 ] && break; sleep 0.1; done
report third $(sectors)
printf written | dd of=/dev/vdc bs=512 seek=8000 conv=sync,fsync 2>/dev/null; report write $?
poweroff; sleep 100"#,
    );
    let disk = format!("{},id=data", path("small").display());
    let monitor = script.on(linux.monitor()).args(["--disk", &disk]).arg("--api-socket").arg(&api.path);
    let mut running = monitor.start_with_input();
    running.expect_within("first=2048", LINUX_PATIENCE);
    let set = |image: &Path| {
        let body = format!("{{\"drive_id\":\"data\",\"path_on_host\":\"{}\"}}", image.display());
        api.change("PATCH", "/drives/data", &body);
    };
    set(&path("large"));
    // The first image is free again, once the device has let go of it.
    running.send("\n");
    running.expect_within("second=4096", LINUX_PATIENCE);
    tool("flock", &["-n", path("small").to_str().unwrap(), "true"]);
    std::fs::OpenOptions::new()
        .write(true)
        .open(path("large"))
        .and_then(|file| file.set_len(4 * MIB))
        .expect("a larger image");
    set(&path("large"));
    let missing = "{\"drive_id\":\"data\",\"path_on_host\":\"/no/such\"}";
    api.refuses("PATCH", "/drives/data", missing, 400, "does not exist");
    let config = api.get("/vm/config");
    let name = config.pointer("/drives/2/path_on_host").and_then(|path| path.as_str()).expect("a path");
    assert_eq!(Path::new(name), path("large"));
    running.send("\n");
    let outcome = running.wait(LINUX_PATIENCE);
    outcome.exits(0).reports("read", "second").reports("third", "8192").reports("write", "0");
    let bytes = std::fs::read(path("large")).expect("the image");
    assert!(bytes[8000 * 512..].starts_with(b"written"));
    assert!(std::fs::read(path("small")).expect("the image").iter().all(|byte| *byte == b'a'));
}

#[test]
fn ctrl_alt_del_lets_a_linux_guest_shut_down() {
    let Some(linux) = linux() else { return };
    let directory = directory();
    let api = Api::new(&directory.path().join("api"));
    let script = Script::new("report ready 1; while :; do read -t 1 line; done </dev/ttyS0");
    let monitor: Monitor = script.on(linux.monitor()).arg("--api-socket").arg(&api.path);
    let running = monitor.start_quiet();
    running.expect_within("ready=1", LINUX_PATIENCE);
    // Time that passes while it rests is no reason for a guest to complain.
    api.set_state("Paused");
    std::thread::sleep(Duration::from_secs(2));
    api.set_state("Resumed");
    api.change("PUT", "/actions", "{\"action_type\":\"SendCtrlAltDel\"}");
    running.wait(LINUX_PATIENCE).exits(0);
}
