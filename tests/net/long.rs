//! Loads of minutes, for `scripts/test --long`.

use super::*;
use crate::support::monitor::Running;

/// `rates NAME SECONDS ARGUMENTS…`: as `rate`, and how many intervals of two seconds had no byte.
const RATES: &str = r#"
rates() {
    name=$1; seconds=$2; shift 2
    iperf3 --connect-timeout 20000 -f k -i 2 -t $seconds "$@" >/tmp/iperf 2>&1 || { cat /tmp/iperf; report $name 0; return; }
    report $name $(sed -n 's/.* \([0-9.]*\) Kbits.*receiver.*/\1/p' /tmp/iperf | tail -n 1)
    report $name-lost "$(sed -n 's/.*ms  *\([0-9]*\/[0-9]*\) .*receiver.*/\1/p' /tmp/iperf | tail -n 1)"
    { grep '^.SUM' /tmp/iperf || grep '^. ' /tmp/iperf; } | grep -v 'sender\|receiver' >/tmp/intervals
    report $name-stalls $(grep -c ' 0.00 Kbits/sec' /tmp/intervals)
}
counters() { cat $(printf '/sys/class/net/eth0/statistics/%s ' rx_dropped rx_errors tx_dropped tx_errors) | paste -sd' ' -; }
"#;

/// Checks what `rates` has found, and makes a line of it.
fn rates(outcome: &Outcome, names: &[&str]) -> String {
    let figures: Vec<String> = names
        .iter()
        .map(|name| {
            let found = rate(outcome, name);
            outcome.reports(&format!("{name}-stalls"), "0");
            let lost = outcome.value(&format!("{name}-lost"));
            let lost = if lost.is_empty() { String::new() } else { format!(" ({lost} lost)") };
            format!("{name} {found:.0} Mbit/s{lost}")
        })
        .collect();
    figures.join(", ")
}

#[test]
#[ignore = "long: a minute for each of twelve loads, needs KVM at full speed"]
fn minutes_of_traffic_never_stall() {
    if !has_fast_kvm() || !has_network() || !has_tool("iperf3") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _near = Made::namespace("rvnear2");
    let _far = Made::namespace("rvfar2");
    ip("-n rvnear2 link add rvbr type bridge");
    ip("-n rvnear2 link add rvva mtu 9000 type veth peer name rvvb netns rvfar2");
    for line in [
        "-n rvnear2 link set rvva master rvbr up",
        "-n rvnear2 link set rvbr mtu 9000 up",
        "-n rvfar2 addr add 10.77.13.1/24 dev rvvb",
        "-n rvfar2 link set rvvb mtu 9000 up",
    ] {
        ip(line);
    }
    let _tap = Made::tap("rvminute", "10.77.12.1/24", "");
    let _near_server = Server::start("iperf3 -s -B 10.77.12.1");
    let _far_server = Server::start("ip netns exec rvfar2 iperf3 -s");
    let script = Script::new(&format!(
        r#"{RATE}{RATES}
ip addr add 10.77.12.2/24 dev eth0; ip link set eth0 up
ip addr add 10.77.13.2/24 dev eth1; ip link set eth1 up
near=10.77.12.1; far=10.77.13.1
rates up 60 -c $near; rates down 60 -c $near -R
rates up8 60 -c $near -P 8; rates down8 60 -c $near -P 8 -R
report before "$(counters)"
rates udp-up 60 -c $near -u -b 2M; rates udp8 60 -c $near -u -b 200K -P 8; rates udp-down 60 -c $near -u -b 2M -R
report after "$(counters)"
rates jumbo-up 60 -c $far; rates jumbo-down 60 -c $far -R
rates jumbo-up8 60 -c $far -P 8; rates jumbo-down8 60 -c $far -P 8 -R
rates jumbo-udp 60 -c $far -u -b 10M -l 8900"#
    ));
    let monitor = linux.monitor_with_memory("256M").args(["--net", "tap=rvminute,vhost=off"]);
    let far = "tap=rvminute2,netns=/run/netns/rvnear2,bridge=rvbr,mtu=9000,vhost=off";
    let outcome = script.run_long(monitor.args(["--net", far]), Duration::from_secs(1800));
    outcome.exits(0);
    let near = rates(&outcome, &["up", "down", "up8", "down8", "udp-up", "udp8", "udp-down"]);
    let far = rates(&outcome, &["jumbo-up", "jumbo-down", "jumbo-up8", "jumbo-down8", "jumbo-udp"]);
    announce(&format!("figure: a minute each over a tap: {near}"));
    announce(&format!("figure: a minute each over a bridge to another namespace: {far}"));
    // A load that all can bear loses nothing.
    let (before, after) = (outcome.value("before"), outcome.value("after"));
    outcome.check(before == after, "the guest's device has lost datagrams");
    announce(&format!(
        "figure: the tap has dropped {} packets for the guest",
        statistic("rvminute", "tx_dropped")
    ));
}

#[test]
#[ignore = "long: needs KVM at full speed and vhost-net"]
fn host_kernel_and_monitor_move_the_same() {
    if !has_fast_kvm() || !has_network() || !has_tool("iperf3") {
        return;
    }
    if Vhost::open(2).is_err() {
        return skip("no /dev/vhost-net");
    }
    let Some(linux) = linux_for_tests() else { return };
    let _tap = Made::tap("rvboth", "10.77.14.1/24", "multi_queue");
    let _server = Server::start("iperf3 -s -B 10.77.14.1");
    echo_server("10.77.14.1:7777");
    for (vhost, queues, cpus) in [("on", 1, "1"), ("off", 1, "1"), ("on", 2, "2"), ("off", 2, "2")] {
        let script = Script::new(&format!(
            r#"{RATE}{RATES}
ip addr add 10.77.14.2/24 dev eth0; ip link set eth0 up
dd if=/dev/urandom of=/tmp/sent bs=64k count=64 2>/dev/null
nc 10.77.14.1 7777 </tmp/sent | cmp - /tmp/sent; report echo $?
rates up 10 -c 10.77.14.1; rates down 10 -c 10.77.14.1 -R
rates up8 10 -c 10.77.14.1 -P 8; rates down8 10 -c 10.77.14.1 -P 8 -R
ping -q -i 0.02 -c 200 -W 10 10.77.14.1 >/tmp/ping; report ping $?
report round-trip $(sed -n 's/^round-trip[^=]*= //p' /tmp/ping)"#
        ));
        let net = format!("tap=rvboth,queues={queues},vhost={vhost}");
        let monitor = linux.monitor_with_memory("256M").args(["--net", &net, "--cpus", cpus]);
        let outcome = script.run_long(monitor, WORK);
        outcome.exits(0).reports("echo", "0").reports("ping", "0");
        let figures = rates(&outcome, &["up", "down", "up8", "down8"]);
        let round_trip = outcome.value("round-trip");
        announce(&format!(
            "figure: vhost={vhost} queues={queues}: {figures}, min/avg/max round trip {round_trip}"
        ));
    }
}

/// What a monitor holds: descriptors, threads, and KiB of memory that are its own.
fn held(running: &Running) -> [u64; 3] {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/{}/{what}", running.pid())).expect("a process").count() as u64
    };
    [count("fd"), running.threads() as u64, running.own_kib()]
}

#[test]
#[ignore = "long: a thousand connections and a thousand resets by Linux, needs KVM at full speed"]
fn connections_and_resets_leave_nothing_behind() {
    if !has_fast_kvm() || !has_network() {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _tap = Made::tap("rvmany", "10.77.15.1/24", "");
    echo_server("10.77.15.1:7777");
    for vhost in ["off", "auto"] {
        let script = Script::new(
            r#"
join() { ip addr add 10.77.15.2/24 dev eth0; ip link set eth0 up; ping -c 1 -W 20 10.77.15.1 >/dev/null; }
connect() {
    n=0; while [ $n -lt $1 ]; do
        for at in 1 2 3 4 5 6 7 8 9 10; do seq $n 999 | nc 10.77.15.1 7777 | cmp - /tmp/all.$n || report bad $n & done
        wait; n=$((n + 10))
    done
}
device=$(basename $(readlink -f /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net
rebind() { n=0; while [ $n -lt $1 ]; do echo $device >unbind && echo $device >bind || report bad $n; n=$((n + 1)); done; }
n=0; while [ $n -lt 1000 ]; do seq $n 999 >/tmp/all.$n; n=$((n + 10)); done
join; connect 100; rebind 10; join; report ready $?
read go </dev/ttyS0
connect 1000; report connected $?
read go </dev/ttyS0
rebind 1000; join; report bound $?
read go </dev/ttyS0"#,
        );
        let net = format!("tap=rvmany,vhost={vhost}");
        let monitor = linux.monitor_with_memory("256M").args(["--net", &net, "--log-level", "debug"]);
        let monitor = script.on(monitor);
        let mut running = monitor.start_with_input();
        running.expect_within("ready=0", LINUX_PATIENCE + WORK);
        let mut before = held(&running);
        for (step, what) in [("connected=0", "1,000 connections"), ("bound=0", "1,000 resets")] {
            running.send("go\n");
            running.expect_within(step, LINUX_PATIENCE + Duration::from_secs(1200));
            let after = held(&running);
            announce(&format!(
                "figure: vhost={vhost}: descriptors, threads, own KiB before and after {what}: {before:?}, {after:?}"
            ));
            assert_eq!(after[..2], before[..2], "descriptors or threads after {what}");
            assert!(after[2] < before[2] + 512, "{before:?} KiB became {after:?} after {what}");
            before = after;
        }
        running.send("go\n");
        let outcome = running.wait(LINUX_PATIENCE);
        outcome.exits(0).check(!outcome.stdout.contains("bad="), "a connection or a bind failed");
    }
}
