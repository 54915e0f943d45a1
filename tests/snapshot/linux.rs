//! Linux guests that are saved under load and go on in other processes.

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::shell::{SHELL, number, sh};
use crate::support::api::Api;
use crate::support::guest::linux_for_tests;
use crate::support::monitor::Running;
use crate::support::{LINUX_PATIENCE, Script, directory, has_fast_kvm, image, kvm_kind};
use rvmm::kvm::kind::Kind;

const VSOCK: &str = "/usr/lib/rvmm/tests/vsock";
/// Where the guest calls the host.
const HOST: u32 = 5000;

/// What the guest does all the time: it counts, it looks at its clocks, and it writes and verifies a disk. It also keeps
/// some memory of which it knows the sum, and a connection to the host for each of its lives.
const WORK: &str = r#"
count() { i=0; while :; do i=$((i+1)); echo $i >/tmp/count.new; mv /tmp/count.new /tmp/count; sleep 0.05; done; }
clocks() {
    before=0; while :; do
        now=$(cut -d' ' -f1 /proc/uptime | tr -d .); [ "$now" -ge "$before" ] || echo "back from $before to $now" >>/tmp/wrong
        before=$now; sleep 0.02
    done
}
verify() {
    while fio --name=raw --filename=/dev/vdc --size=2m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
        --verify=crc32c --do_verify=1 --verify_fatal=1 >/tmp/fio 2>&1; do echo done >>/tmp/rounds; done
    cat /tmp/fio >>/tmp/wrong
}
held() { while :; do VSOCK hold HOST 1 >>/tmp/held; sleep 0.1; done; }
: >/tmp/wrong; : >/tmp/rounds; : >/tmp/held; echo 0 >/tmp/count
seq 1 60000 >/tmp/kept; md5sum /tmp/kept >/tmp/sum
count & clocks & held & WORKER
VSOCK shell SHELL &
echo guest is ready
wait
"#;

/// What is asked of a guest, and the load in it.
struct Case {
    cpus: u32,
    rounds: u32,
    /// Whether fio writes to a disk.
    disk: bool,
    saves: Saves,
}

/// What each snapshot has.
#[derive(Clone, Copy, PartialEq)]
enum Saves {
    /// All memory.
    Whole,
    /// Most of them what has changed, as KVM and the devices tell.
    Tracked,
    /// The same, by a comparison with what was restored.
    Compared,
}

/// What a guest tells of itself: its counter, its uptime, its wall clock.
fn ask(socket: &Path) -> [u64; 3] {
    let output = sh(socket, "cat /tmp/count; cut -d. -f1 /proc/uptime; date +%s; echo end of output");
    let mut numbers = output.lines().map(number);
    [(); 3].map(|()| numbers.next().unwrap_or_else(|| panic!("{output:?} is too short")))
}

/// Waits until `holds`.
fn until(what: &str, running: &Running, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LINUX_PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}\n{}", running.story());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Where the guest's calls arrive.
fn listen(socket: &Path) -> UnixListener {
    let listener = UnixListener::bind(format!("{}_{HOST}", socket.display())).expect("a socket");
    listener.set_nonblocking(true).expect("a socket");
    listener
}

/// Waits for the guest's call.
fn called(listener: &UnixListener, running: &Running) -> UnixStream {
    let mut stream = None;
    until("the guest does not call", running, || {
        stream = listener.accept().ok().map(|(stream, _)| stream);
        stream.is_some()
    });
    stream.expect("a call")
}

/// The VM's life number `index`: its vsock socket, and its control socket.
fn sockets(directory: &Path, index: u32) -> (PathBuf, Api) {
    (directory.join(format!("vsock{index}")), Api::new(&directory.join(format!("api{index}"))))
}

/// Saves and restores a guest over and over, at moments of no order.
fn rounds(case: &Case) {
    let Some(linux) = linux_for_tests() else { return };
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    let data = path("data");
    image(&data, 16 << 20);
    let worker = if case.disk { "verify &" } else { "" };
    let work = WORK.replace("WORKER", worker).replace("VSOCK", VSOCK);
    let script = Script::new(&work.replace("SHELL", &SHELL.to_string()).replace("HOST", &HOST.to_string()));
    let place = path("snapshot");
    let (mut socket, mut api) = sockets(directory.path(), 0);
    let mut host = listen(&socket);
    // fio and its libraries take more than 128 MiB.
    let monitor = linux.monitor_with_memory(if case.disk { "256M" } else { "128M" });
    let monitor = script.on(monitor).arg("--disk").arg(&data).args(["--rng", "--balloon"]);
    let tracks: &[&str] = if case.saves == Saves::Tracked { &["--track-dirty-pages"] } else { &[] };
    let monitor = monitor.args(tracks).args(["--cpus", &case.cpus.to_string(), "--vsock"]);
    let monitor = monitor.arg(format!("cid=42,socket={}", socket.display()));
    let mut running: Running = monitor.arg("--api-socket").arg(&api.path).start_quiet();
    running.expect_within("guest is ready", LINUX_PATIENCE);
    if case.disk {
        // From then on requests are in flight.
        let blocks = || std::fs::metadata(&data).expect("an image").blocks();
        until("fio writes nothing", &running, || blocks() > 0);
    }
    let mut connection = called(&host, &running);

    let mut before = ask(&socket);
    for round in 1..=case.rounds {
        let moment = u64::from(round.wrapping_mul(2_654_435_761) >> 22);
        std::thread::sleep(Duration::from_millis(moment));
        // So that the disk is as it was when the state was taken, the VM must not go on.
        api.set_state("Paused");
        let kind = if case.saves == Saves::Whole || round % 8 == 1 { "Full" } else { "Diff" };
        let state = place.join("state");
        let body = format!("{{\"snapshot_type\":\"{kind}\",\"snapshot_path\":\"{}\"}}", state.display());
        api.change("PUT", "/snapshot/create", &body);
        drop(running);
        (socket, api) = sockets(directory.path(), round);
        host = listen(&socket);
        running = super::restore(&place)
            .args(tracks)
            .arg("--vsock")
            .arg(&socket)
            .arg("--api-socket")
            .arg(&api.path)
            .start_quiet();
        // The guest hears that its connection is gone, and makes another one.
        connection = called(&host, &running);
        let now = ask(&socket);
        assert!(
            now.iter().zip(before).all(|(now, before)| *now >= before),
            "round {round}: {before:?}, then {now:?}\n{}",
            running.story()
        );
        before = now;
    }
    drop(connection);
    // Everything still works, on all processors, and goes on.
    let [count, ..] = ask(&socket);
    until("the process does not count any more", &running, || ask(&socket)[0] > count);
    if case.disk {
        let done = || number(&sh(&socket, "grep -c . /tmp/rounds; echo end of output"));
        let wrong = || sh(&socket, "cat /tmp/wrong; echo end of output");
        let wanted = done() + 1;
        until("the disk is not verified any more", &running, || done() >= wanted || !wrong().is_empty());
    }
    let output = sh(
        &socket,
        "cat /tmp/wrong; nproc; dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c; md5sum -c -s /tmp/sum; echo $?; \
         dmesg | grep -iE 'i/o error|blocked for more|soft lockup|detected stalls|kernel BUG'; echo end of output",
    );
    let cpus = case.cpus.to_string();
    assert_eq!(output.lines().collect::<Vec<_>>(), [cpus.as_str(), "16", "0"], "{}", running.story());
}

#[test]
fn linux_goes_on_with_its_disk_clocks_and_sockets() {
    if has_fast_kvm() {
        rounds(&Case { cpus: 1, rounds: 6, disk: true, saves: Saves::Whole });
    }
}

#[test]
fn linux_with_two_processors_goes_on() {
    if has_fast_kvm() {
        rounds(&Case { cpus: 2, rounds: 4, disk: true, saves: Saves::Tracked });
    }
}

#[test]
fn linux_with_four_processors_goes_on() {
    if has_fast_kvm() {
        rounds(&Case { cpus: 4, rounds: 4, disk: true, saves: Saves::Compared });
    }
}

#[test]
#[ignore = "long: 100 rounds under load, needs KVM at full speed"]
fn linux_goes_on_a_hundred_times() {
    if has_fast_kvm() {
        rounds(&Case { cpus: 1, rounds: 100, disk: true, saves: Saves::Whole });
    }
}

#[test]
#[ignore = "long: 100 rounds under load, needs KVM at full speed"]
fn linux_with_two_processors_goes_on_a_hundred_times() {
    if has_fast_kvm() {
        rounds(&Case { cpus: 2, rounds: 100, disk: true, saves: Saves::Tracked });
    }
}

#[test]
#[ignore = "long: 100 rounds under load, needs KVM at full speed"]
fn linux_with_four_processors_goes_on_a_hundred_times() {
    if has_fast_kvm() {
        rounds(&Case { cpus: 4, rounds: 100, disk: true, saves: Saves::Compared });
    }
}

/// Where guest kernels are emulated: two rounds, without the load.
#[test]
fn linux_goes_on_where_its_kernel_is_emulated() {
    if kvm_kind() == Some(Kind::Pvm) {
        rounds(&Case { cpus: 1, rounds: 2, disk: false, saves: Saves::Tracked });
    }
}
