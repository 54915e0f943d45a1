//! Connections of a Linux guest that is saved, and goes on behind the same tap or another one.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::shell::{SHELL, sh};
use crate::support::api::Api;
use crate::support::guest::linux_for_tests;
use crate::support::monitor::Running;
use crate::support::{LINUX_PATIENCE, Script, directory, has_fast_kvm, has_tool, is_root, tool};

const BRIDGE: &str = "rvsnap-br";
const TAPS: [&str; 2] = ["rvsnap0", "rvsnap1"];
const HOST: &str = "10.77.31.1";
/// Ports: where the guest sends numbers, where it is sent some, and iperf3's. Others in each test, since the end of a
/// connection keeps its port for a while.
fn ports(test: u16) -> [u16; 3] {
    [0, 1, 2].map(|index| 7700 + 10 * test + index)
}

/// What the guest does: it counts through one connection, checks what comes through another, and loads a third.
const WORK: &str = r#"
ip link set eth0 up; ip addr add 10.77.31.2/24 dev eth0
{ i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done; } | nc HOST FROM_GUEST >/dev/null 2>&1 &
nc HOST TO_GUEST </dev/null | {
    n=0; while read -r line; do n=$((n+1)); [ "$line" = "$n" ] || echo "$line in the place of $n" >>/tmp/wrong; echo $n >/tmp/heard; done
    echo "no more after $n" >>/tmp/wrong
} &
: >/tmp/wrong
iperf3 -c HOST -p IPERF -t 86400 >/tmp/iperf 2>&1 || cat /tmp/iperf >>/tmp/wrong &
/usr/lib/rvmm/tests/vsock shell SHELL &
echo guest is ready
wait
"#;

fn ip(line: &str) {
    tool("ip", &line.split_whitespace().collect::<Vec<_>>());
}

/// A bridge with the host's address, and two taps in it.
struct Network;

impl Network {
    fn new() -> Network {
        let network = Network;
        network.remove();
        ip(&format!("link add {BRIDGE} type bridge"));
        ip(&format!("addr add {HOST}/24 dev {BRIDGE}"));
        for tap in TAPS {
            ip(&format!("tuntap add {tap} mode tap vnet_hdr"));
            ip(&format!("link set {tap} master {BRIDGE}"));
            ip(&format!("link set {tap} up"));
        }
        // An address of the bridge's own, which it would take from a tap otherwise.
        ip(&format!("link set {BRIDGE} address 02:00:00:77:31:01"));
        ip(&format!("link set {BRIDGE} up"));
        network
    }

    fn remove(&self) {
        for link in TAPS.iter().chain([&BRIDGE]) {
            let _ = Command::new("ip").args(["link", "del", link]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Takes one connection, and no other.
fn one(port: u16, then: impl FnOnce(TcpStream) + Send + 'static) {
    let listener = TcpListener::bind((HOST, port)).expect("an address of the bridge's");
    std::thread::spawn(move || then(listener.accept().expect("a connection").0));
}

/// Numbers in their order, or what is wrong with them.
#[derive(Default)]
struct Heard {
    last: AtomicU64,
    wrong: Mutex<String>,
}

impl Heard {
    fn listen(self: &Arc<Heard>, port: u16) {
        let heard = Arc::clone(self);
        one(port, move |stream| {
            let mut expected = 0;
            for line in BufReader::new(stream).lines() {
                expected += 1;
                match line.map(|line| line.trim().to_owned()) {
                    Ok(line) if line == expected.to_string() => heard.last.store(expected, Ordering::Relaxed),
                    other => {
                        return *heard.wrong.lock().unwrap() = format!("{other:?} instead of {expected}");
                    }
                }
            }
            *heard.wrong.lock().unwrap() = format!("the connection ended after {expected}");
        });
    }

    fn last(&self) -> u64 {
        assert_eq!(*self.wrong.lock().unwrap(), "", "what the guest sent");
        self.last.load(Ordering::Relaxed)
    }
}

/// Sends numbers as long as somebody takes them.
fn count_for_guest(port: u16) {
    one(port, |mut stream| {
        use std::io::Write;
        for n in 1_u64.. {
            if writeln!(stream, "{n}").is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

fn until(what: &str, running: &Running, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + LINUX_PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}\n{}", running.story());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What the guest has heard from the host, and what went wrong in it.
fn asked(socket: &Path) -> (u64, String) {
    let output = sh(socket, "cat /tmp/heard 2>/dev/null || echo 0; cat /tmp/wrong; echo end of output");
    let (heard, wrong) = output.split_once('\n').unwrap_or((&output, ""));
    (heard.trim().parse().unwrap_or(0), wrong.to_owned())
}

/// Saves and restores the guest over and over; `tap` says behind which one it goes on.
fn rounds(test: u16, rounds: u32, tap: impl Fn(u32) -> &'static str) {
    if !has_fast_kvm() || !is_root() || !has_tool("ip") || !has_tool("iperf3") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    // The addresses are there once.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let _network = Network::new();
    let heard: Arc<Heard> = Arc::default();
    let [from_guest, to_guest, iperf] = ports(test);
    heard.listen(from_guest);
    count_for_guest(to_guest);
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "-B", HOST, "-p", &iperf.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("iperf3");

    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    let mut work = WORK.replace("HOST", HOST);
    for (name, port) in [("FROM_GUEST", from_guest), ("TO_GUEST", to_guest), ("IPERF", iperf)] {
        work = work.replace(name, &port.to_string());
    }
    work = work.replace("SHELL", &SHELL.to_string());
    let script = Script::new(&work);
    let place = path("snapshot");
    let (mut socket, mut api) = (path("vsock0"), Api::new(&path("api0")));
    let monitor = script.on(linux.monitor()).args(["--net", &format!("tap={}", TAPS[0])]);
    let monitor = monitor.arg("--vsock").arg(format!("cid=42,socket={}", socket.display()));
    let mut running: Running = monitor.arg("--api-socket").arg(&api.path).start_quiet();
    running.expect_within("guest is ready", LINUX_PATIENCE);
    until("the guest sends nothing", &running, || heard.last() > 3);
    until("the guest hears nothing", &running, || asked(&socket).0 > 3);

    for round in 1..=rounds {
        std::thread::sleep(Duration::from_millis(u64::from(round * 211 % 700)));
        let before = heard.last();
        // What the VM sent after it was saved, its restored self would not know of.
        api.set_state("Paused");
        let paths = format!("{{\"snapshot_path\":\"{}\"}}", place.join("state").display());
        api.change("PUT", "/snapshot/create", &paths);
        drop(running);
        (socket, api) = (path(&format!("vsock{round}")), Api::new(&path(&format!("api{round}"))));
        let monitor = super::restore(&place).arg("--net").arg(format!("net0={}", tap(round)));
        let monitor = monitor.arg("--vsock").arg(&socket);
        running = monitor.arg("--api-socket").arg(&api.path).start_quiet();
        until("the guest's connection stands still", &running, || heard.last() > before + 3);
        let (count, wrong) = asked(&socket);
        assert_eq!(wrong, "", "round {round}\n{}", running.story());
        until("the connection to the guest stands still", &running, || asked(&socket).0 > count);
    }
    // iperf3 still sends: it would have said if its connection had ended.
    let sent = || -> u64 {
        let output = sh(&socket, "cat /sys/class/net/eth0/statistics/tx_bytes; echo end of output");
        output.trim().parse().expect("a number")
    };
    let before = sent();
    until("iperf3 stands still", &running, || sent() > before + (1 << 20));
    assert_eq!(asked(&socket).1, "", "{}", running.story());
    heard.last();
    drop(running);
    let _ = server.kill();
    let _ = server.wait();
}

#[test]
fn connections_live_on_behind_the_same_tap() {
    rounds(0, 4, |_| TAPS[0]);
}

#[test]
fn connections_live_on_behind_another_tap() {
    rounds(1, 4, |round| TAPS[(round % 2) as usize]);
}

#[test]
#[ignore = "long: 50 rounds under load, needs KVM at full speed"]
fn connections_live_on_fifty_times() {
    rounds(2, 50, |round| TAPS[(round / 2 % 2) as usize]);
}
