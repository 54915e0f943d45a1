//! The memory balloon of a Linux guest: given, taken back, told of, and free pages that go back by themselves.

use std::time::{Duration, Instant};

use crate::support::api::{Api, resident_kib};
use crate::support::{LINUX_PATIENCE, Script, announce, directory, has_fast_kvm, kvm_kind, linux};

const STATISTICS: &str = "/balloon/statistics";

fn figure(text: &str) {
    let kind = kvm_kind().map_or_else(String::new, |kind| kind.to_string());
    announce(&format!("figure: {kind}: {text}"));
}

/// Uses memory, then waits for input before each further step.
const GUEST: &str = r#"
fill() { dd if=/dev/zero of=/tmp/fill bs=1M count=$1 2>/dev/null; rm /tmp/fill; }
free_kib() { sed -n 's/MemFree: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
next() { report "$1" "$2"; read line </dev/ttyS0; }
fill 220
next used $(free_kib)
next inflated $(free_kib)
next deflated $(free_kib)
fill 200; report again $?
exit 7"#;

#[test]
fn balloon_takes_448_of_512_mib_and_gives_them_back() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let api = Api::new(&directory.path().join("api"));
    let script = Script::new(GUEST);
    let monitor = script.on(linux.monitor_with_memory("512M").args(["--cpus", "2"]));
    let monitor = monitor.args(["--balloon", "stats-interval=1", "--api-socket"]).arg(&api.path);
    let mut running = monitor.start_with_input();
    running.expect_within("used=", LINUX_PATIENCE);
    let before = resident_kib(running.pid());
    let total = api.number(STATISTICS, "total_memory");
    assert!((400 << 20..512 << 20).contains(&total), "{total} bytes of memory");

    let start = Instant::now();
    api.change("PATCH", "/balloon", "{\"amount_mib\":448}");
    // A guest that needs some pages itself does not give the last ones.
    let most = 440 * 256;
    api.wait_until("the balloon", |api| api.number(STATISTICS, "actual_pages") >= most);
    let took = start.elapsed();
    let inside = resident_kib(running.pid());
    figure(&format!(
        "balloon to 448 of 512 MiB in {:.1} s: resident {} MiB before, {} MiB inside",
        took.as_secs_f64(),
        before.0 >> 10,
        inside.0 >> 10
    ));
    assert!(inside.1 * 2 < before.1, "{} KiB of {} KiB are still there", inside.1, before.1);
    assert!(inside.0 < 110 << 10, "{} KiB resident with 64 MiB for the guest", inside.0);
    assert_eq!(api.number("/balloon", "amount_mib"), 448);
    api.wait_until("statistics from inside", |api| api.number(STATISTICS, "free_memory") < 64 << 20);
    running.send("\n");
    running.expect("inflated=");

    api.change("PATCH", "/balloon", "{\"amount_mib\":0}");
    api.wait_until("the deflated balloon", |api| api.number(STATISTICS, "actual_pages") == 0);
    running.send("\n");
    running.expect("deflated=");
    running.send("\n");
    let outcome = running.wait(LINUX_PATIENCE);
    outcome.exits(7).reports("again", "0");
    let number = |name| -> u64 { outcome.value(name).parse().expect("a number") };
    let (used, inflated, deflated) = (number("used"), number("inflated"), number("deflated"));
    outcome.check(inflated < 60 << 10 && deflated > used / 10 * 9, "other free memory");
}

#[test]
fn pages_that_a_process_freed_go_back_to_the_host() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let api = Api::new(&directory.path().join("api"));
    let script = Script::new(
        r#"
sum() { md5sum </bin/busybox; }
next() { report "$1" "$2"; read line </dev/ttyS0; }
before=$(sum)
dd if=/dev/zero bs=1M count=220 2>/dev/null | tr '\0' 'x' >/tmp/fill
next filled $?
rm /tmp/fill
next freed 1
dd if=/dev/zero bs=1M count=200 2>/dev/null | tr '\0' 'y' >/tmp/fill
report wrong $(tr -d 'y' </tmp/fill | wc -c)
rm /tmp/fill
echo 3 >/proc/sys/vm/drop_caches
[ "$before" = "$(sum)" ]; report same $?
exit 9"#,
    );
    let monitor = script.on(linux.monitor_with_memory("512M").args(["--cpus", "2"]));
    let monitor = monitor.args(["--balloon", "free-page-reporting", "--api-socket"]).arg(&api.path);
    let mut running = monitor.start_with_input();
    running.expect_within("filled=0", LINUX_PATIENCE);
    let before = resident_kib(running.pid());
    running.send("\n");
    running.expect("freed=1");
    let start = Instant::now();
    // Linux reports some of it every two seconds.
    api.wait_until("the memory", |_| resident_kib(running.pid()).1 * 2 < before.1);
    let took = start.elapsed();
    std::thread::sleep(Duration::from_secs(2));
    let after = resident_kib(running.pid());
    figure(&format!(
        "free page reporting: resident {} MiB before, {} MiB {:.1} s after 220 MiB were freed, then {} MiB",
        before.0 >> 10,
        before.1 >> 11,
        took.as_secs_f64(),
        after.0 >> 10
    ));
    assert!(before.1 > 220 << 10, "{} KiB", before.1);
    api.refuses("GET", STATISTICS, "", 400, "no statistics");
    running.send("\n");
    running.wait(LINUX_PATIENCE).exits(9).reports("wrong", "0").reports("same", "0");
}

#[test]
fn guest_without_memory_takes_it_from_the_balloon() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let api = Api::new(&directory.path().join("api"));
    let script = Script::new(
        "report ready 1; read line </dev/ttyS0
        dd if=/dev/zero of=/tmp/fill bs=1M count=90 2>/dev/null; report filled $?; exit 3",
    );
    let monitor = script.on(linux.monitor_with_memory("256M"));
    let options = "size=170M,deflate-on-oom,stats-interval=1";
    let mut running = monitor.args(["--balloon", options, "--api-socket"]).arg(&api.path).start_with_input();
    running.expect_within("ready=1", LINUX_PATIENCE);
    api.wait_until("the balloon", |api| api.number(STATISTICS, "actual_pages") > 150 * 256);
    running.send("\n");
    running.wait(LINUX_PATIENCE).exits(3).reports("filled", "0");
}

/// One boot for all of it where KVM emulates the guest's kernel.
#[test]
fn balloon_works_on_every_kind_of_kvm() {
    let Some(linux) = linux() else { return };
    let directory = directory();
    let api = Api::new(&directory.path().join("api"));
    let script = Script::new("report ready 1; read line </dev/ttyS0; report still-here yes; exit 5");
    let monitor = script.on(linux.monitor());
    let options = "size=8M,free-page-reporting,stats-interval=1,deflate-on-oom";
    let mut running = monitor.args(["--balloon", options, "--api-socket"]).arg(&api.path).start_with_input();
    running.expect_within("ready=1", LINUX_PATIENCE);
    let before = resident_kib(running.pid());
    api.wait_until("the balloon", |api| api.number(STATISTICS, "actual_mib") == 8);
    api.change("PATCH", "/balloon", "{\"amount_mib\":16}");
    api.wait_until("the larger balloon", |api| api.number(STATISTICS, "actual_mib") == 16);
    api.change("PATCH", "/balloon", "{\"amount_mib\":2}");
    api.wait_until("the smaller balloon", |api| api.number(STATISTICS, "actual_mib") == 2);
    api.wait_until("statistics", |api| api.get(STATISTICS).get("free_memory").is_some());
    let after = resident_kib(running.pid());
    figure(&format!("resident {} MiB, {} MiB after balloons", before.0 >> 10, after.0 >> 10));
    running.send("\n");
    running.wait(LINUX_PATIENCE).exits(5).reports("still-here", "yes");
}
