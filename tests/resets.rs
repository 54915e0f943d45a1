//! A Linux guest that takes its drivers away from their devices and gives them back, again and again.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use rvmm::kvm::kind::Kind;

use crate::net::{Made, has_network};
use crate::support::guest::linux_for_tests;
use crate::support::monitor::Running;
use crate::support::{LINUX_PATIENCE, PATIENCE, Script, announce, directory, has_fast_kvm, image, kvm_kind};

/// The host's port for the guest's socket.
const PORT: u32 = 5000;

/// Takes each device from its driver and gives it back, `rounds ROUNDS`, and uses it at the end of so many rounds.
const SCRIPT: &str = r#"
bus=/sys/bus/virtio
of_kind() { for d in $bus/devices/*; do [ $(cat $d/device) = $1 ] && echo ${d##*/}; done; }
spare=$(ls -d $bus/devices/*/block/vdc); spare=${spare#$bus/devices/}; spare=${spare%%/*}
devices="$spare:virtio_blk $(of_kind 0x0004):virtio_rng $(of_kind 0x0005):virtio_balloon"
devices="$devices $(of_kind 0x0003):virtio_console $(of_kind 0x0013):vmw_vsock_virtio_transport"
[ -n "$(of_kind 0x001a)" ] && devices="$devices $(of_kind 0x001a):virtiofs"
[ -n "$(of_kind 0x0001)" ] && devices="$devices $(of_kind 0x0001):virtio_net"
use_all() {
    [ "$(dd if=/dev/vdc bs=512 count=1 2>/dev/null | wc -c)" = 512 ] || echo "round $1: the disk"
    [ "$(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c)" = 16 ] || echo "round $1: random numbers"
    echo "round $1" >/dev/hvc0 || echo "round $1: the console"
    /usr/lib/rvmm/tests/vsock churn 5000 1 | grep -q 'done 1' || echo "round $1: the sockets"
    case $devices in *virtiofs*)
        { mount -t virtiofs work /mnt && grep -q shared /mnt/file && umount /mnt; } || echo "round $1: the folder" ;;
    esac
    case $devices in *virtio_net*)
        { ip addr add NET.2/24 dev eth0 2>/dev/null; ip link set eth0 up && ping -c 1 -W 20 NET.1 >/dev/null; } ||
            echo "round $1: the network" ;;
    esac
}
rounds() {
    n=0
    while [ $n -lt $1 ]; do
        n=$((n + 1))
        for device in $devices; do
            { echo ${device%:*} >$bus/drivers/${device#*:}/unbind && echo ${device%:*} >$bus/drivers/${device#*:}/bind; } ||
                echo "round $n: $device"
        done
        [ $((n % $2)) != 0 ] || use_all $n
    done
    report $3 $n
    read answer
}
report devices "$(echo $devices | wc -w)"
"#;

/// What a monitor has that it could lose.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    kib: u64,
}

impl Holdings {
    fn of(running: &Running) -> Holdings {
        let count =
            |what| fs::read_dir(format!("/proc/{}/{what}", running.pid())).expect("a process").count();
        Holdings { descriptors: count("fd"), threads: running.threads(), kib: running.own_kib() }
    }
}

/// Answers the guest's connections with the byte that they bring, for as long as the process lives.
fn answer(listener: UnixListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut byte) = (stream.expect("a connection"), [0]);
            if stream.read_exact(&mut byte).is_ok() {
                let _ = stream.write_all(&byte);
            }
        }
    });
}

/// The guest, beside the devices that it always has.
struct Shape {
    cpus: u32,
    folder: bool,
    network: bool,
}

/// Each driver lets go of its device `rounds` times, and every `use_each` times all devices are used.
fn reset_every_device(rounds: usize, use_each: usize, shape: Shape) {
    let Some(linux) = linux_for_tests() else { return };
    let tap = shape.network.then(|| {
        let name = format!("rvrs{}", shape.cpus);
        let made = Made::tap(&name, &format!("10.78.{}.1/24", shape.cpus), "");
        (name, made)
    });
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    image(&path("spare"), 1 << 20);
    fs::create_dir(path("folder")).expect("a folder");
    fs::write(path("folder/file"), "shared").expect("a file");
    answer(UnixListener::bind(path(&format!("vsock_{PORT}"))).expect("a socket"));
    let warm = (rounds / 10).clamp(1, 20);
    let script = Script::new(&format!(
        "{}rounds {warm} 1 warm\nrounds {rounds} {use_each} over\nuse_all last\nreport cpus $(nproc)\nreport end $?",
        SCRIPT.replace("NET", &format!("10.78.{}", shape.cpus))
    ));
    let mut monitor = script
        .with_cmdline(linux.monitor(), "console=ttyS0")
        .args([
            "--cpus",
            &shape.cpus.to_string(),
            "--log-level",
            "debug",
            "--rng",
            "--balloon",
            "size=1M,free-page-reporting,stats-interval=1",
        ])
        .args(["--disk", &format!("{},id=spare", path("spare").display())])
        .args(["--console", &format!("file={}", path("console").display())])
        .args(["--vsock", &format!("cid=5,socket={}", path("vsock").display())]);
    if let Some((name, _)) = &tap {
        monitor = monitor.args(["--net", &format!("tap={name}")]);
    }
    if shape.folder {
        monitor = monitor.args(["--share", &format!("tag=work,path={}", path("folder").display())]);
    }
    let mut running = monitor.start_with_input();
    running.expect_within("warm=", LINUX_PATIENCE);
    let before = Holdings::of(&running);
    let start = Instant::now();
    running.send("\n");
    running.expect_within("over=", LINUX_PATIENCE + Duration::from_secs(2) * rounds as u32);
    let (seconds, end) = (start.elapsed().as_secs_f64(), Instant::now() + PATIENCE);
    // The last connection may still be on its way out.
    let after = loop {
        let after = Holdings::of(&running);
        if after.descriptors == before.descriptors && after.threads == before.threads {
            break after;
        }
        assert!(Instant::now() < end, "{before:?} became {after:?}");
        thread::sleep(Duration::from_millis(50));
    };
    running.send("\n");
    let outcome = running.wait(LINUX_PATIENCE);
    let devices = &(5 + u32::from(shape.folder) + u32::from(shape.network)).to_string();
    outcome
        .exits(0)
        .reports("cpus", &shape.cpus.to_string())
        .reports("devices", devices)
        .reports("over", &rounds.to_string())
        .reports("end", "0");
    let failed: Vec<_> = outcome.stdout.lines().filter(|line| line.starts_with("round ")).collect();
    outcome.check(failed.is_empty(), &format!("these failed: {failed:?}"));
    outcome.check(!outcome.stderr.contains("needs a reset"), "a device broke");
    outcome.check(after.kib < before.kib + 256, &format!("{before:?} became {after:?}"));
    let lines = fs::read_to_string(path("console")).expect("the console's output");
    assert_eq!(lines.matches("round ").count(), warm + rounds / use_each + 1, "{lines}");
    announce(&format!(
        "figure: {rounds} resets of each of {devices} devices in {seconds:.1} s: {} KiB, before {} KiB",
        after.kib, before.kib
    ));
}

#[test]
fn drivers_come_and_go_and_nothing_is_lost() {
    match kvm_kind() {
        Some(Kind::Pvm) => reset_every_device(1, 1, Shape { cpus: 1, folder: false, network: false }),
        _ => reset_every_device(40, 20, Shape { cpus: 1, folder: true, network: false }),
    }
}

#[test]
fn every_device_serves_two_three_and_four_processors() {
    if !has_fast_kvm() || !has_network() {
        return;
    }
    for cpus in 2..=4 {
        reset_every_device(4, 2, Shape { cpus, folder: true, network: true });
    }
}

#[test]
#[ignore = "long: scripts/test --long runs it"]
fn a_thousand_resets_of_every_device_lose_nothing() {
    if has_fast_kvm() {
        reset_every_device(1000, 100, Shape { cpus: 1, folder: true, network: false });
    }
}
