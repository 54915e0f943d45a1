//! A guest under load, and clients that pause it, change its drives and its limits in random order.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::net::{Made, echo_server, has_network};
use crate::support::api::Api;
use crate::support::guest::linux_for_tests;
use crate::support::monitor::Running;
use crate::support::{LINUX_PATIENCE, Script, announce, directory, has_fast_kvm, image};

const MIB: u64 = 1 << 20;
/// How long a guest that runs may say nothing.
const SILENCE: Duration = Duration::from_secs(90);
/// How much memory the monitor may have more at the end than after a third of the time, in KiB.
const GROWTH_KIB: u64 = 512;

/// Numbers that look random, from a seed.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let seed = std::env::var("RVMM_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64);
        let seed = seed.unwrap_or(now) | 1;
        announce(&format!("soak: RVMM_TEST_SEED={seed}"));
        Random(seed)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

/// What a monitor has of the host.
#[derive(Debug)]
struct Held {
    kib: u64,
    descriptors: usize,
    threads: usize,
}

impl Held {
    fn by(running: &Running) -> Held {
        let count = |what: &str| {
            let path = format!("/proc/{}/{what}", running.pid());
            std::fs::read_dir(path).map_or(0, Iterator::count)
        };
        Held { kib: running.own_kib(), descriptors: count("fd"), threads: running.threads() }
    }
}

const SCRIPT: &str = r#"
ip link set eth0 up; ip addr add 10.77.10.2/24 dev eth0
(read line </dev/ttyS0; touch /tmp/stop) &
seq 1 5000 >/tmp/sent
goes_on() { [ ! -e /tmp/stop ]; }
writes() {
    n=0; bad=0
    while goes_on; do
        fio --name=l --filename=/dev/vdc --size=16m --io_size=512k --rw=randwrite --bsrange=4k-32k --ioengine=libaio \
            --iodepth=8 --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 >/tmp/fio 2>&1 ||
            { bad=$((bad + 1)); head -n 20 /tmp/fio; }
        n=$((n + 1))
    done
    report wrote $n; report wrote-bad $bad
}
talks() {
    n=0; bad=0
    while goes_on; do
        nc -w 60 10.77.10.1 7777 </tmp/sent | cmp -s - /tmp/sent || bad=$((bad + 1))
        n=$((n + 1))
    done
    report talked $n; report talked-bad $bad
}
reads() {
    n=0; bad=0
    while goes_on; do
        case $(dd if=/dev/vdd bs=4k count=1 skip=$((n % 200)) iflag=direct 2>/dev/null | tr -d '\n' | cut -c 1-3) in
            aaa|bbb) ;;
            *) bad=$((bad + 1)) ;;
        esac
        n=$((n + 1)); sleep 0.2
    done
    report read $n; report read-bad $bad
}
report ready 1
writes & talks & reads &
n=0; while goes_on; do n=$((n + 1)); report beat $n.; sleep 1; done
wait
dmesg | grep -iE 'i/o error|blocked for more|soft lockup|detected stalls|kernel BUG'; report quiet $?"#;

/// Does one thing to the guest.
fn act(api: &Api, random: &mut Random, images: &[&Path; 2]) {
    let bucket = |random: &mut Random, least: u64| {
        let size = if random.below(3) == 0 { 0 } else { least + random.below(least * 4) };
        format!("{{\"size\":{size},\"refill_time\":100}}")
    };
    match random.below(8) {
        0 | 1 => {
            api.set_state("Paused");
            std::thread::sleep(Duration::from_millis(random.below(100)));
            api.set_state("Resumed");
        }
        2 => {
            let image = images[random.below(2) as usize];
            let body = format!("{{\"drive_id\":\"other\",\"path_on_host\":{image:?}}}");
            api.change("PATCH", "/drives/other", &body);
        }
        3 => {
            let (bandwidth, ops) = (bucket(random, 200_000), bucket(random, 50));
            let limits = format!("{{\"bandwidth\":{bandwidth},\"ops\":{ops}}}");
            api.change(
                "PATCH",
                "/drives/load",
                &format!("{{\"drive_id\":\"load\",\"rate_limiter\":{limits}}}"),
            );
        }
        4 => {
            let (receive, send) = (bucket(random, 100_000), bucket(random, 100_000));
            let body = format!(
                "{{\"iface_id\":\"net0\",\"rx_rate_limiter\":{{\"bandwidth\":{receive}}},\
                 \"tx_rate_limiter\":{{\"bandwidth\":{send}}}}}"
            );
            api.change("PATCH", "/network-interfaces/net0", &body);
        }
        5 => {
            let image = images[random.below(2) as usize];
            api.set_state("Paused");
            let body = format!("{{\"drive_id\":\"other\",\"path_on_host\":{image:?}}}");
            api.change("PATCH", "/drives/other", &body);
            api.set_state("Resumed");
        }
        6 => api.change("PATCH", "/balloon", &format!("{{\"amount_mib\":{}}}", random.below(32))),
        _ => {
            api.get("/vm/config");
            api.change("PUT", "/actions", "{\"action_type\":\"FlushMetrics\"}");
            assert_eq!(api.request("GET", "/metrics/prometheus", "").status, 200);
        }
    }
}

fn soak(time: Duration, tap: &str) {
    if !has_fast_kvm() || !has_network() {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _tap = Made::tap(tap, "10.77.10.1/24", "");
    echo_server("10.77.10.1:7777");
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    image(&path("load"), 16 * MIB);
    std::fs::write(path("a"), vec![b'a'; MIB as usize]).expect("an image");
    std::fs::write(path("b"), vec![b'b'; MIB as usize]).expect("an image");
    let (first, second) = (path("a"), path("b"));
    let api = Api::new(&path("api"));
    let disk = |name: &str, id: &str| format!("{},id={id}", path(name).display());
    let monitor = Script::new(SCRIPT);
    let monitor = monitor.on(linux.monitor_with_memory("256M"));
    let net = format!("tap={tap}");
    let monitor =
        monitor.args(["--disk", &disk("load", "load"), "--disk", &disk("a", "other"), "--net", &net]);
    let monitor =
        monitor.args(["--balloon", "--rng", "--log-level", "debug", "--metrics-path"]).arg(path("metrics"));
    let mut running = monitor.arg("--api-socket").arg(&api.path).start_with_input();
    running.expect_within("ready=1", LINUX_PATIENCE);

    let mut random = Random::new();
    let start = Instant::now();
    let (mut acts, mut beats, mut heard, mut longest) = (0u32, 0u32, start, Duration::ZERO);
    let mut early = None;
    while start.elapsed() < time && !running.has_ended() {
        act(&api, &mut random, &[&first, &second]);
        acts += 1;
        std::thread::sleep(Duration::from_millis(random.below(200)));
        while running.has_shown(&format!("beat={}.", beats + 1)) {
            beats += 1;
            longest = longest.max(heard.elapsed());
            heard = Instant::now();
        }
        assert!(heard.elapsed() < SILENCE, "the guest says nothing any more\n{}", running.story());
        if early.is_none() && start.elapsed() > time / 3 {
            early = Some(Held::by(&running));
        }
    }
    let late = Held::by(&running);
    // What limits hold back is let go, so that the guest can end.
    let none = "{\"size\":0,\"refill_time\":0}";
    let none = format!("{{\"bandwidth\":{none},\"ops\":{none}}}");
    api.change("PATCH", "/drives/load", &format!("{{\"drive_id\":\"load\",\"rate_limiter\":{none}}}"));
    api.change(
        "PATCH",
        "/network-interfaces/net0",
        &format!("{{\"iface_id\":\"net0\",\"rx_rate_limiter\":{none},\"tx_rate_limiter\":{none}}}"),
    );
    running.send("\n");
    let outcome = running.wait(LINUX_PATIENCE + Duration::from_secs(120));
    outcome.exits(0);
    for kind in ["wrote", "talked", "read"] {
        outcome.reports(&format!("{kind}-bad"), "0");
        outcome.check(outcome.value(kind) != "0", &format!("nothing was done: {kind}"));
    }
    outcome.reports("quiet", "1");
    outcome.check(acts > 20 && beats > 3, "the soak was over too soon");
    let early = early.expect("a look at the monitor");
    outcome.check(late.kib <= early.kib + GROWTH_KIB, &format!("memory grows: {early:?}, then {late:?}"));
    let leaks = late.descriptors > early.descriptors || late.threads > early.threads;
    outcome.check(!leaks, &format!("descriptors or threads leak: {early:?}, then {late:?}"));
    announce(&format!(
        "figure: soak of {} s: {acts} changes, {} rounds of fio, {} of nc, longest silence {longest:.0?}, {} KiB of memory after \
         a third and {} KiB at the end, {} descriptors",
        time.as_secs(),
        outcome.value("wrote"),
        outcome.value("talked"),
        early.kib,
        late.kib,
        late.descriptors
    ));
}

#[test]
fn guest_under_load_survives_what_clients_do_to_it() {
    soak(Duration::from_secs(20), "rvsoak");
}

#[test]
#[ignore = "long: half an hour, needs KVM at full speed"]
fn half_an_hour_of_changes_leaks_and_loses_nothing() {
    let minutes = std::env::var("RVMM_TEST_ROUNDS").ok().and_then(|minutes| minutes.parse().ok());
    soak(Duration::from_secs(60 * minutes.unwrap_or(30)), "rvsoakl");
}
