//! Network devices: taps and bridges with Linux guests behind them, and what goes wrong when they are opened.

mod long;

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::guest::linux_for_tests;
use crate::support::{
    LINUX_PATIENCE, Monitor, Outcome, Script, announce, binary, directory, has_fast_kvm, has_kvm, has_tool,
    is_root, linux, skip, tiny, tool,
};
use rvmm::boot::testing::Program;
use rvmm::virtio::mmio::Transport;
use rvmm::virtio::net::{Net, NetOptions, Vhost};
use rvmm::virtio::rate::{Bucket, Limits};
use rvmm::virtio::testing::{Desc, Driver, Ring};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// What network loads need on top of a boot.
const WORK: Duration = Duration::from_secs(300);

/// Whether this process may make taps and namespaces; says so if not.
pub fn has_network() -> bool {
    if !is_root() || !has_tool("ip") {
        return false;
    }
    // Other tests ask at the same time.
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let count = ASKED.fetch_add(1, Ordering::Relaxed);
    let name = format!("rvp{}-{count}", std::process::id() % 100_000);
    let made = |verb: &str| {
        Command::new("ip")
            .args(["tuntap", verb, &name, "mode", "tap"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    let there = made("add") && made("del");
    if !there {
        skip("cannot make a tap on this host");
    }
    there
}

/// Runs `ip`, with the words of one line.
fn ip(line: &str) -> String {
    tool("ip", &line.split_whitespace().collect::<Vec<_>>())
}

/// Something that `ip` made, and the line that takes it away again.
pub struct Made(String);

impl Made {
    /// A tap of the host's own, with an address.
    pub fn tap(name: &str, address: &str, options: &str) -> Made {
        ip(&format!("tuntap add {name} mode tap {options}"));
        let made = Made(format!("link del {name}"));
        ip(&format!("addr add {address} dev {name}"));
        ip(&format!("link set {name} up"));
        made
    }

    fn namespace(name: &str) -> Made {
        ip(&format!("netns add {name}"));
        let made = Made(format!("netns del {name}"));
        ip(&format!("-n {name} link set lo up"));
        made
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(self.0.split_whitespace()).stderr(Stdio::null()).status();
    }
}

/// A server program that ends with the test.
pub struct Server(Child);

impl Server {
    pub fn start(line: &str) -> Server {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Server(command.spawn().unwrap_or_else(|error| panic!("{line}: {error}")))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends back what comes through TCP, connection by connection.
pub fn echo_server(address: &str) {
    let listener = TcpListener::bind(address).expect("an address of the tap's");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes);
                let _ = stream.write_all(&bytes);
            });
        }
    });
}

/// Keeps what comes through TCP to one port, and gives what came last to who asks at the other.
fn store(put: &str, get: &str) {
    let kept: Arc<Mutex<Vec<u8>>> = Arc::default();
    let (to_keep, to_give) = (Arc::clone(&kept), kept);
    let listen = |address: &str| TcpListener::bind(address).expect("an address of the tap's");
    let (put, get) = (listen(put), listen(get));
    std::thread::spawn(move || {
        for mut stream in put.incoming().flatten() {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            *to_keep.lock().unwrap() = bytes;
        }
    });
    std::thread::spawn(move || {
        for mut stream in get.incoming().flatten() {
            let bytes = to_give.lock().unwrap().clone();
            let _ = stream.write_all(&bytes);
        }
    });
}

/// Answers every question for an address with `answer`.
fn name_server(address: &str, answer: [u8; 4]) {
    let socket = UdpSocket::bind(address).expect("an address of the tap's");
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut question) {
            let Some(question) = question.get(..len).filter(|question| question.len() > 16) else { continue };
            let is_address = question[len - 4..] == [0, 1, 0, 1];
            let mut reply = question.to_vec();
            reply[2..4].copy_from_slice(&[0x85, 0x80]);
            reply[6..12].copy_from_slice(&[0, u8::from(is_address), 0, 0, 0, 0]);
            if is_address {
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                reply.extend(answer);
            }
            let _ = socket.send_to(&reply, from);
        }
    });
}

fn statistic(tap: &str, name: &str) -> u64 {
    let path = format!("/sys/class/net/{tap}/statistics/{name}");
    std::fs::read_to_string(&path).expect(&path).trim().parse().expect("a number")
}

/// What the guest's script finds: `rate NAME ARGUMENTS…` reports kilobits a second, and 0 if iperf3 fails.
const RATE: &str = r#"
rate() {
    name=$1; shift
    iperf3 --connect-timeout 20000 -f k "$@" >/tmp/iperf 2>&1 || { cat /tmp/iperf; report $name 0; return; }
    report $name $(sed -n 's/.* \([0-9.]*\) Kbits.*receiver.*/\1/p' /tmp/iperf | tail -n 1)
}
"#;

/// A rate in megabits a second.
fn rate(outcome: &Outcome, name: &str) -> f64 {
    let rate: f64 = outcome.value(name).parse().unwrap_or(0.0);
    outcome.check(rate > 0.0, &format!("no bytes moved in {name}"));
    rate / 1000.0
}

#[test]
fn guest_reaches_its_host() {
    if !has_kvm() || !has_network() {
        return;
    }
    let Some(linux) = linux() else { return };
    let _tap = Made::tap("rvsmoke", "10.77.1.1/24", "");
    echo_server("10.77.1.1:7777");
    let script = Script::new(
        r#"
ip link set eth0 up; ip addr add 10.77.1.2/24 dev eth0
report mac $(cat /sys/class/net/eth0/address)
ping -c 2 -W 20 10.77.1.1 >/dev/null; report ping $?
seq 1 20000 >/tmp/sent
nc 10.77.1.1 7777 </tmp/sent | cmp - /tmp/sent; report echo $?"#,
    );
    let outcome = script.run(linux.monitor().args(["--net", "tap=rvsmoke,mac=02:00:00:00:77:01"]));
    outcome.exits(0).reports("mac", "02:00:00:00:77:01").reports("ping", "0").reports("echo", "0");
}

#[test]
fn tap_carries_traffic_both_ways() {
    if !has_fast_kvm() || !has_network() || !has_tool("iperf3") || !has_tool("busybox") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _tap = Made::tap("rvtap", "10.77.2.1/24", "");
    let directory = directory();
    let leases = directory.path().join("udhcpd");
    let file = |name: &str| format!("{}-{name}", leases.display());
    std::fs::write(file("leases"), "").expect("a file");
    let configuration = format!(
        "start 10.77.2.50\nend 10.77.2.50\ninterface rvtap\nlease_file {}\npidfile {}\noption subnet 255.255.255.0\n\
         option router 10.77.2.1\noption dns 10.77.2.1\n",
        file("leases"),
        file("pid"),
    );
    std::fs::write(file("conf"), configuration).expect("a file");
    let _dhcp = Server::start(&format!("busybox udhcpd -f {}", file("conf")));
    let _iperf = Server::start("iperf3 -s -B 10.77.2.1");
    store("10.77.2.1:7777", "10.77.2.1:7778");
    name_server("10.77.2.1:53", [10, 77, 2, 99]);
    let script = Script::new(&format!(
        r#"{RATE}
cat >/tmp/dhcp <<'END'
#!/bin/sh
[ "$1" = bound ] && ip addr add $ip/24 dev $interface && echo "nameserver $dns" >/tmp/resolv && echo $ip >/tmp/ip
exit 0
END
chmod +x /tmp/dhcp
ip link set eth0 up
udhcpc -i eth0 -n -q -t 10 -s /tmp/dhcp >/dev/null 2>&1; report dhcp $?
report address $(cat /tmp/ip)
report name $(nslookup -type=a host.test 10.77.2.1 | sed -n 's/^Address: //p' | tail -n 1)
device=$(basename $(readlink -f /sys/class/net/eth0/device))
report features $(cat /sys/bus/virtio/devices/$device/features)
ping -c 3 -W 10 10.77.2.1 >/dev/null; report ping $?
dd if=/dev/urandom of=/tmp/sent bs=64k count=64 2>/dev/null
count() {{ cd /sys/class/net/eth0/statistics; cat $1_bytes $1_packets; }}
moves() {{
    name=$1
    set -- $(count tx); nc 10.77.2.1 7777 </tmp/sent
    set -- "$@" $(count tx); report $name-sent $((($3 - $1) / ($4 - $2)))
    set -- $(count rx); nc 10.77.2.1 7778 </dev/null | cmp - /tmp/sent; report $name-data $?
    set -- "$@" $(count rx); report $name-received $((($3 - $1) / ($4 - $2)))
}}
moves all
ethtool -K eth0 tx off; moves plain-out; ethtool -K eth0 tx on tso on gso on
ethtool -K eth0 rx-gro-hw off; moves plain-in; ethtool -K eth0 tx off; moves plain
ethtool -K eth0 tx on tso on gso on rx-gro-hw on; moves again
set -- $(count tx); rate up -c 10.77.2.1 -t 1
set -- "$@" $(count tx); report up-size $((($3 - $1) / ($4 - $2)))
set -- $(count rx); rate down8 -c 10.77.2.1 -t 1 -P 8 -R
set -- "$@" $(count rx); report down-size $((($3 - $1) / ($4 - $2)))
rate udp-up -c 10.77.2.1 -t 1 -u -b 5M
rate udp-down -c 10.77.2.1 -t 1 -u -b 5M -R
ip link set eth0 down; ip link set eth0 up; ip addr add 10.77.2.51/24 dev eth0
ping -c 1 -W 10 10.77.2.1 >/dev/null; report again $?"#
    ));
    let monitor = linux.monitor_with_memory("256M").args(["--net", "tap=rvtap,vhost=off"]);
    let outcome = script.run_long(monitor, WORK);
    outcome.exits(0);
    for step in ["dhcp", "ping", "again"] {
        outcome.reports(step, "0");
    }
    // Bytes of a packet, the mean. Whoever leaves segmentation to the other side sends large ones, if the program writes
    // large pieces, as iperf3 does and nc does not.
    let size = |name: &str| outcome.value(name).parse::<u64>().unwrap_or(0);
    for (name, sent, received) in [
        ("all", true, true),
        ("plain-out", false, true),
        ("plain-in", true, false),
        ("plain", false, false),
        ("again", true, true),
    ] {
        outcome.reports(&format!("{name}-data"), "0");
        for (way, may_be_large) in [("sent", sent), ("received", received)] {
            let mean = size(&format!("{name}-{way}"));
            outcome.check(mean > 0, "packets are counted");
            outcome.check(may_be_large || mean <= 1600, &format!("{name}: {way} packets of {mean} bytes"));
        }
    }
    for name in ["up-size", "down-size"] {
        let mean = size(name);
        outcome.check(mean > 1600, &format!("{name}: packets of {mean} bytes"));
    }
    outcome.reports("address", "10.77.2.50").reports("name", "10.77.2.99");
    // Checksums and segmentation both ways, mergeable buffers, notification by index.
    for bit in [0, 1, 3, 5, 7, 8, 11, 12, 15, 17, 29, 32] {
        let set = outcome.value("features").as_bytes().get(bit) == Some(&b'1');
        outcome.check(set, &format!("feature {bit} was not negotiated"));
    }
    let rates = ["up", "down8", "udp-up", "udp-down"];
    let figures: Vec<_> =
        rates.iter().map(|name| format!("{name} {:.0} Mbit/s", rate(&outcome, name))).collect();
    announce(&format!("figure: network of a guest: {}", figures.join(", ")));
}

#[test]
fn bridge_joins_a_guest_to_another_namespace() {
    if !has_fast_kvm() || !has_network() || !has_tool("iperf3") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _near = Made::namespace("rvnear");
    let _far = Made::namespace("rvfar");
    ip("-n rvnear link add rvbr type bridge");
    ip("-n rvnear link add rvva mtu 9000 type veth peer name rvvb netns rvfar");
    for line in [
        "-n rvnear link set rvva master rvbr up",
        "-n rvnear link set rvbr mtu 9000 up",
        "-n rvfar addr add 10.77.3.1/24 dev rvvb",
        "-n rvfar link set rvvb mtu 9000 up",
    ] {
        ip(line);
    }
    let _iperf = Server::start("ip netns exec rvfar iperf3 -s");
    let script = Script::new(&format!(
        r#"{RATE}
ip addr add 10.77.3.2/24 dev eth0; ip link set eth0 up
report mtu $(cat /sys/class/net/eth0/mtu)
report queues "$(echo $(ls /sys/class/net/eth0/queues))"
pairs() {{ ethtool -l eth0 | sed -n 's/^Combined:[^0-9]*//p' | tail -n 1; }}
report pairs $(pairs)
ping -c 1 -W 20 10.77.3.1 >/dev/null; report ping $?
ping -c 2 -W 10 -s 8900 10.77.3.1 >/dev/null; report jumbo $?
for cpu in 0 1; do
    rate up$cpu -c 10.77.3.1 -t 1 -A $cpu
    rate down$cpu -c 10.77.3.1 -t 1 -A $cpu -R
done
rate udp -c 10.77.3.1 -t 2 -u -b 20M -l 8900
count() {{ ethtool -S eth0 | sed -n "s/.*$1_\(queue_\)*$2_packets: //p;s/.*$1$2_packets: //p" | head -n 1; }}
for queue in 0 1; do for way in tx rx; do report $way$queue $(count $way $queue); done; done
ethtool -L eth0 combined 1; report fewer $(pairs); ping -c 1 -W 20 10.77.3.1 >/dev/null; report one $?
ethtool -L eth0 combined 2; report more $(pairs); ping -c 1 -W 20 10.77.3.1 >/dev/null; report two $?
report interrupts $(awk '/virtio/ {{ sum += $2 + $3 }} END {{ print (sum > 0) }}' /proc/interrupts)
report waiting yes; read go </dev/ttyS0; exit 3"#
    ));
    let net = "tap=rvnew,netns=/run/netns/rvnear,bridge=rvbr,mtu=9000,queues=2,vhost=off";
    let mut running =
        script.on(linux.monitor_with_memory("256M")).args(["--net", net, "--cpus", "2"]).start_with_input();
    running.expect_within("waiting=yes", LINUX_PATIENCE + WORK);
    let link = ip("-n rvnear -d link show rvnew");
    running.send("go\n");
    let outcome = running.wait(LINUX_PATIENCE);
    outcome.exits(3);
    outcome.check(link.contains("mtu 9000") && link.contains("master rvbr"), &link);
    outcome.reports("mtu", "9000").reports("queues", "rx-0 rx-1 tx-0 tx-1");
    outcome.reports("ping", "0").reports("jumbo", "0").reports("interrupts", "1");
    for name in ["up0", "down0", "up1", "down1", "udp"] {
        rate(&outcome, name);
    }
    // What a processor sends goes into its own queue, and the host answers through the same pair.
    for queue in ["tx0", "rx0", "tx1", "rx1"] {
        let count: u64 = outcome.value(queue).parse().unwrap_or(0);
        outcome.check(count > 20, &format!("{count} packets through {queue}"));
    }
    for (name, value) in [("pairs", "2"), ("fewer", "1"), ("one", "0"), ("more", "2"), ("two", "0")] {
        outcome.reports(name, value);
    }
    // What rvmm has made is gone with it, and the rest is there.
    let links = ip("-n rvnear link");
    outcome.check(!links.contains("rvnew") && links.contains("rvva"), &links);
    assert!(!Path::new("/sys/class/net/rvnew").exists());
}

#[test]
fn rate_limits_hold_and_change() {
    if !has_fast_kvm() || !has_network() || !has_tool("iperf3") || !has_tool("curl") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _tap = Made::tap("rvrate", "10.77.4.1/24", "");
    let _iperf = Server::start("iperf3 -s -B 10.77.4.1");
    let directory = directory();
    let data = directory.path().join("data");
    crate::support::image(&data, 16 << 20);
    let disk = format!("{},bw=1M", data.display());
    let script = Script::new(&format!(
        r#"{RATE}
ip addr add 10.77.4.2/24 dev eth0; ip link set eth0 up
rate up -c 10.77.4.1 -t 4 -u -b 400K -l 1400
rate down -c 10.77.4.1 -t 4 -u -b 800K -l 1400 -R
report measured yes; read go </dev/ttyS0
rate slower -c 10.77.4.1 -t 4 -u -b 250K -l 1400
rate faster -c 10.77.4.1 -t 2 -R
before=$(cut -d' ' -f1 /proc/uptime)
dd if=/dev/vdc of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; report read $?
after=$(cut -d' ' -f1 /proc/uptime)
report disk $(echo "$before $after" | awk '{{ print 4096 / ($2 - $1) }}')"#
    ));
    // Datagrams, of which a few more are sent than may pass: so few that a guest on a busy host can.
    let net = "tap=rvrate,tx-bw=32K,rx-bw=64K,rx-bw-burst=8K,tx-bw-burst=8K";
    // The script's disk comes first.
    let socket = directory.path().join("api");
    let monitor = script.on(linux.monitor_with_memory("256M")).args(["--net", net, "--disk", &disk]);
    let mut running = monitor.arg("--api-socket").arg(&socket).start_with_input();
    running.expect_within("measured=yes", LINUX_PATIENCE + WORK);
    // With nothing to do the device's thread sleeps, though limits were met and a tap is there.
    let before = wake_ups(running.pid());
    std::thread::sleep(Duration::from_secs(3));
    let woken = wake_ups(running.pid()) - before;
    assert!(woken < 100, "the thread of an idle network device woke up {woken} times in three seconds");
    // Half of it one way, and no limit the other.
    let body = r#"{"iface_id":"net0","tx_rate_limiter":{"bandwidth":{"size":1638,"refill_time":100}},
        "rx_rate_limiter":{"bandwidth":{"size":0,"refill_time":0}}}"#;
    let request =
        ["-sS", "-X", "PATCH", "-d", body, "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket"];
    let place = [socket.to_str().expect("a path"), "http://localhost/network-interfaces/net0"];
    assert_eq!(tool("curl", &[&request[..], &place].concat()), "204");
    running.send("go\n");
    let outcome = running.wait(LINUX_PATIENCE + WORK);
    outcome.exits(0).reports("read", "0");
    // In kibibytes a second; headers count for the limit and not for iperf3.
    for (name, limit) in [("up", 32.0), ("down", 64.0), ("slower", 16.0)] {
        let got = rate(&outcome, name) * 1e6 / 8.0 / 1024.0;
        let ratio = got / limit;
        outcome.check((0.5..1.25).contains(&ratio), &format!("{name}: {got:.0} of {limit} KiB/s"));
        announce(&format!("figure: {name} at {ratio:.2} of its limit"));
    }
    let faster = rate(&outcome, "faster") / rate(&outcome, "down");
    outcome.check(faster > 1.25, &format!("without a limit it is {faster:.2} times as fast"));
    let disk: f64 = outcome.value("disk").parse().unwrap_or(0.0) / 1024.0;
    outcome.check((0.5..1.25).contains(&disk), &format!("disk: {disk:.2} of 1 MiB/s"));
}

/// How often the threads of network devices have gone to sleep, and so woken up.
fn wake_ups(process: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).expect("a process").flatten();
    let status = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    let of_net = status.filter(|status| status.starts_with("Name:\tvirtio1\n"));
    let count = |status: &str| -> Option<u64> {
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()
    };
    let counts: Vec<u64> = of_net.map(|status| count(&status).expect("a count")).collect();
    assert!(!counts.is_empty(), "no thread is called virtio1");
    counts.iter().sum()
}

/// Whether the host's kernel has threads that serve this process's queues.
fn vhost_is_at_work() -> bool {
    let entries = |directory: &str| std::fs::read_dir(directory).expect(directory).flatten();
    // They are named after the thread that has started them, and are the process's or the kernel's own.
    let names: Vec<_> = entries("/proc/self/task")
        .map(|thread| format!("vhost-{}", thread.file_name().to_string_lossy()))
        .collect();
    let is_it = |path: &Path| {
        std::fs::read_to_string(path.join("comm"))
            .is_ok_and(|comm| names.iter().any(|name| name == comm.trim()))
    };
    ["/proc", "/proc/self/task"].iter().any(|place| entries(place).any(|entry| is_it(&entry.path())))
}

#[test]
fn vhost_net_takes_queues_and_gives_them_back() {
    if !has_network() {
        return;
    }
    let Ok(vhost) = Vhost::open(1) else { return skip("no /dev/vhost-net") };
    let _tap = Made::tap("rvvhost", "10.77.8.1/24", "");
    let tap = rvmm::tap::Options { name: "rvvhost".into(), ..Default::default() };
    let tap = rvmm::tap::open(&tap).expect("a tap");
    let device = Net::new(tap, Some(vhost), &NetOptions::new([2, 0, 0, 0, 0x77, 8]));
    let (limits, _) = device.limit_handles();
    let ram = rvmm::memory::allocate(64 << 20).expect("memory");
    let irq = EventFd::new(libc::EFD_NONBLOCK).expect("an event");
    let transport = Transport::new(ram.clone(), Box::new(device), irq.try_clone().expect("an event"));
    let transport = transport.expect("a transport");
    let driver = Driver(&transport);
    let socket = UdpSocket::bind("10.77.8.1:0").expect("an address of the tap's");
    socket.set_broadcast(true).expect("a broadcast");
    for round in 0..3u8 {
        let ring = |n: u64| Ring::new(&ram, 0x1000 + 0x4000 * n, if n == 2 { 64 } else { 256 });
        let mut rings: Vec<Ring> = (0..3).map(ring).collect();
        driver.bring_up(u64::MAX, &rings.iter().collect::<Vec<_>>());
        for n in 0..250 {
            rings[0].send(&[Desc::writable(0x10_0000 + n * 4096, 4096)]);
        }
        driver.notify(0);
        // To everybody, of a type for experiments.
        let frame = [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0x77, 8, 0x88, 0xb5], &[round; 50]].concat();
        ram.write_slice(&frame, GuestAddress(0x8_0000)).expect("memory");
        let mut exchange = |step: u8| {
            let before = statistic("rvvhost", "rx_packets");
            let head = rings[1].send(&[Desc::readable(0x8_0000, frame.len() as u32)]);
            driver.notify(1);
            assert_eq!(rings[1].wait_used(), (head, 0));
            assert!(statistic("rvvhost", "rx_packets") > before);
            let text = [b"round".as_slice(), &[round, step]].concat();
            socket.send_to(&text, "10.77.8.255:9").expect("a packet");
            loop {
                // The host's own chatter comes first.
                let (head, len) = rings[0].wait_used();
                let mut packet = vec![0; len as usize];
                ram.read_slice(&mut packet, GuestAddress(0x10_0000 + u64::from(head) * 4096))
                    .expect("memory");
                if packet.ends_with(&text) {
                    return;
                }
            }
        };
        exchange(1);
        assert!(vhost_is_at_work());
        transport.pause(Duration::from_secs(20)).expect("a rest");
        assert!(!vhost_is_at_work());
        transport.resume();
        exchange(2);
        assert!(vhost_is_at_work());
        limits.set(Limits { bandwidth: Some(Bucket::per_second(1 << 30, None)), operations: None });
        while vhost_is_at_work() {
            std::thread::sleep(Duration::from_millis(1));
        }
        exchange(3);
        limits.set(Limits::default());
        exchange(4);
        assert!(!vhost_is_at_work());
        transport.pause(Duration::from_secs(20)).expect("a rest");
        transport.resume();
        exchange(5);
        assert!(vhost_is_at_work());
        assert!(irq.read().expect("interrupts") > 0);
        driver.reset();
        assert!(!vhost_is_at_work());
    }
}

/// rvmm with a tiny guest that would end at once, and this network device.
fn attempt(net: &str, wrapped: &[&str]) -> Outcome {
    let guest = tiny(&Program::new().power_off());
    let mut command = match wrapped {
        [] => Command::new(binary()),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(binary());
            command
        }
    };
    command.env_remove("RUST_LOG");
    Monitor::from_command(command)
        .arg("--kernel")
        .arg(&guest.kernel)
        .args(["--memory", "16M", "--net", net])
        .run()
}

#[test]
fn impossible_network_devices_are_refused_before_anything_is_opened() {
    for (net, parts) in [
        ("tap=a-name-too-long0", &["tap name", "1 to 15 bytes"][..]),
        ("tap=a,mac=01:00:5e:00:00:01", &["01:00:5e:00:00:01", "multicast"]),
        ("tap=a,mtu=60", &["mtu=60", "68 to 65521"]),
        ("tap=a,vhost=on,ops=5", &["no rate limits"]),
        ("tap=a,queues=99", &["99 queues", "1 to 16"]),
        ("tap=a,bridge=x/y", &["bridge name"]),
        ("tap=a,netns=/no/such/namespace", &["/no/such/namespace", "No such file"]),
    ] {
        attempt(net, &[]).fails_with(parts);
    }
    let twice = ["--net", "tap=a,mac=02:00:00:00:00:01", "--net", "tap=b,mac=02:00:00:00:00:01"];
    Monitor::new().args(twice).run().fails_with(&["two network devices", "02:00:00:00:00:01"]);
    Monitor::new().args(["--net", "tap=a,speed=1"]).run().exits(2).says("unknown network option");
}

#[test]
fn taps_that_cannot_be_used_are_named_with_advice() {
    if !has_kvm() || !has_network() {
        return;
    }
    attempt("tap=lo", &[]).fails_with(&["lo cannot be used as a tap"]);
    attempt("tap=rvx,netns=/dev/null", &[]).fails_with(&["network namespace /dev/null"]);
    let _tap = Made::tap("rvbusy", "10.77.5.1/24", "");
    attempt("tap=rvbusy,queues=2", &[]).fails_with(&["rvbusy", "multi_queue"]);
    let mac = std::fs::read_to_string("/sys/class/net/rvbusy/address").expect("an address");
    attempt(&format!("tap=rvbusy,mac={}", mac.trim()), &[]).fails_with(&["address of tap rvbusy itself"]);
    let user = tiny(&Program::new().print("ready").halt());
    let first = user.monitor().args(["--net", "tap=rvbusy"]).start_quiet();
    first.expect("ready");
    attempt("tap=rvbusy", &[]).fails_with(&["rvbusy is in use"]);
    drop(first);
    attempt("tap=rvbusy", &[]).exits(0);
    assert!(Path::new("/sys/class/net/rvbusy").exists(), "an existing tap stays");
    // One that was made for several queues can be used with one.
    let _multi = Made::tap("rvmulti", "10.77.6.1/24", "multi_queue");
    attempt("tap=rvmulti", &[]).exits(0);
    attempt("tap=rvmulti,queues=3", &[]).exits(0);
    attempt("tap=rvgone", &[]).exits(0);
    assert!(!Path::new("/sys/class/net/rvgone").exists(), "a tap that rvmm made goes with it");
    let killed = user.monitor().args(["--net", "tap=rvgone"]).start_quiet();
    killed.expect("ready");
    assert!(Path::new("/sys/class/net/rvgone").exists());
    drop(killed);
    assert!(!Path::new("/sys/class/net/rvgone").exists(), "also when rvmm is killed");
    if has_tool("setpriv") {
        let weak = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-all"];
        attempt("tap=rvother", &weak).fails_with(&["rvother", "may not make it", "ip tuntap"]);
        let _owned = Made::tap("rvowned", "10.77.7.1/24", "user 12345");
        attempt("tap=rvowned", &weak).fails_with(&["rvowned", "belongs to another user"]);
        attempt("tap=rvbusy", &weak).exits(0);
    }
    if has_tool("unshare") {
        let line = "mount -t tmpfs none /dev/net && exec \"$@\"";
        let wrapped = ["unshare", "-m", "sh", "-c", line, "sh"];
        attempt("tap=rvx", &wrapped).fails_with(&["/dev/net/tun does not exist", "modprobe tun"]);
    }
}
