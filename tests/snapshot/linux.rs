//! Linux guests that are saved under load and go on in other processes.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::api::Api;
use crate::support::guest::linux_for_tests;
use crate::support::monitor::Running;
use crate::support::{LINUX_PATIENCE, Script, directory, has_fast_kvm, image, kvm_kind};
use rvmm::kvm::kind::Kind;

const VSOCK: &str = "/usr/lib/rvmm/tests/vsock";
const SHELL: u32 = 1000;

/// What the guest does all the time: it counts, it looks at its clocks, and it writes and verifies a disk.
const WORK: &str = r#"
count() { i=0; while :; do i=$((i+1)); echo $i >/tmp/count.new; mv /tmp/count.new /tmp/count; sleep 0.05; done; }
clocks() {
    before=0; while :; do
        now=$(cut -d' ' -f1 /proc/uptime | tr -d .); [ "$now" -ge "$before" ] || echo "back from $before to $now" >>/tmp/wrong
        before=$now; sleep 0.02
    done
}
verify() {
    while fio --name=raw --filename=/dev/vdc --size=4m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
        --verify=crc32c --do_verify=1 --verify_fatal=1 >/tmp/fio 2>&1; do echo done >>/tmp/rounds; done
    cat /tmp/fio >>/tmp/wrong
}
: >/tmp/wrong; : >/tmp/rounds; echo 0 >/tmp/count
count & clocks & WORKER
"#;

/// Runs commands in the guest by its vsock shell, waiting until that answers.
fn sh(socket: &Path, commands: &str) -> String {
    let end = Instant::now() + LINUX_PATIENCE;
    loop {
        if let Some(output) = try_sh(socket, commands) {
            return output;
        }
        assert!(Instant::now() < end, "the guest's shell does not answer");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn try_sh(socket: &Path, commands: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(LINUX_PATIENCE)).ok()?;
    writeln!(stream, "CONNECT {SHELL}").ok()?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        if stream.read(&mut byte).ok()? == 0 {
            return None;
        }
        line.extend(byte);
    }
    stream.write_all(commands.as_bytes()).and_then(|()| stream.write_all(b"\n")).ok()?;
    stream.shutdown(Shutdown::Write).ok()?;
    let mut output = String::new();
    stream.read_to_string(&mut output).ok()?;
    output.ends_with("end of output\n").then(|| output.replace("end of output\n", ""))
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// Saves and restores a guest with these vCPUs over and over.
fn rounds(cpus: u32, rounds: u32, with_disk: bool) {
    let Some(linux) = linux_for_tests() else { return };
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    image(&path("data"), 16 << 20);
    let worker = if with_disk { "verify &" } else { "" };
    let script = Script::new(&format!(
        "{}\n{VSOCK} shell {SHELL} &\necho guest is ready\nwait",
        WORK.replace("WORKER", worker)
    ));
    let place = path("snapshot");
    let (mut socket, mut api) = (path("vsock0"), Api::new(&path("api0")));
    let monitor = script.on(linux.monitor()).arg("--disk").arg(path("data")).args(["--rng", "--balloon"]);
    let monitor = monitor.args(["--cpus", &cpus.to_string(), "--vsock"]);
    let monitor = monitor.arg(format!("cid=42,socket={}", socket.display()));
    let mut running: Running = monitor.arg("--api-socket").arg(&api.path).start_quiet();
    running.expect_within("guest is ready", LINUX_PATIENCE);

    let ask = |socket: &Path| {
        let output = sh(socket, "cat /tmp/count; cut -d. -f1 /proc/uptime; date +%s; echo end of output");
        let mut numbers = output.lines().map(number);
        [(); 3].map(|()| numbers.next().unwrap_or_else(|| panic!("{output:?} is too short")))
    };
    let mut before = ask(&socket);
    for round in 1..=rounds {
        // So that the disk is as it was when the state was taken, the VM must not go on.
        api.set_state("Paused");
        let paths = format!("{{\"snapshot_path\":\"{}\"}}", place.join("state").display());
        api.change("PUT", "/snapshot/create", &paths);
        drop(running);
        (socket, api) = (path(&format!("vsock{round}")), Api::new(&path(&format!("api{round}"))));
        running = super::restore(&place)
            .arg("--vsock")
            .arg(&socket)
            .arg("--api-socket")
            .arg(&api.path)
            .start_quiet();
        let now = ask(&socket);
        assert!(
            now.iter().zip(before).all(|(now, before)| *now >= before),
            "round {round}: {before:?}, then {now:?}"
        );
        before = now;
    }
    // Everything still works, on all processors, and goes on.
    let later = ask(&socket);
    let counts = |all: &[u64; 3]| all[0];
    let end = Instant::now() + LINUX_PATIENCE;
    while counts(&ask(&socket)) == counts(&later) {
        assert!(Instant::now() < end, "the process does not count any more");
    }
    if with_disk {
        let wanted = number(&sh(&socket, "grep -c . /tmp/rounds; echo end of output")) + 1;
        while number(&sh(&socket, "grep -c . /tmp/rounds; echo end of output")) < wanted {
            assert!(Instant::now() < end + LINUX_PATIENCE, "the disk is not verified any more");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    let output = sh(
        &socket,
        "cat /tmp/wrong; nproc; dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c; \
         dmesg | grep -iE 'i/o error|blocked for more|soft lockup|detected stalls|kernel BUG'; echo end of output",
    );
    assert_eq!(output.lines().collect::<Vec<_>>(), [cpus.to_string().as_str(), "16"], "{}", running.story());
}

#[test]
#[ignore = "long, and not yet seen to pass in an emulated machine: scripts/test --long runs it"]
fn linux_goes_on_with_its_disk_clocks_and_sockets() {
    if has_fast_kvm() {
        rounds(1, 10, true);
    }
}

#[test]
#[ignore = "long, and not yet seen to pass in an emulated machine: scripts/test --long runs it"]
fn linux_with_two_processors_goes_on() {
    if has_fast_kvm() {
        rounds(2, 5, true);
    }
}

#[test]
#[ignore = "long, and not yet seen to pass in an emulated machine: scripts/test --long runs it"]
fn linux_with_four_processors_goes_on() {
    if has_fast_kvm() {
        rounds(4, 5, true);
    }
}

#[test]
#[ignore = "long: 100 rounds under load, needs KVM at full speed"]
fn linux_goes_on_a_hundred_times() {
    if has_fast_kvm() {
        rounds(2, 100, true);
    }
}

/// Where guest kernels are emulated: one round, without the load.
#[test]
fn linux_goes_on_where_its_kernel_is_emulated() {
    if kvm_kind() == Some(Kind::Pvm) {
        rounds(1, 1, false);
    }
}
