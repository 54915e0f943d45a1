//! Linux guests: commands and their status, memory, shutdown, reboot, panic, the console. Where KVM is slow, few of
//! them run, and one boot serves many checks.

use std::fs;

use nix::sys::signal::Signal;

use crate::support::{
    LINUX_PATIENCE, Monitor, Script, announce, directory, has_fast_kvm, image, is_root, kvm_kind, linux,
    skip, tool,
};

/// Unmounts when it is dropped, so that a failed test leaves nothing.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The last lines of a command are in the terminal's buffers when it ends, and must not be lost with it.
#[test]
fn output_of_a_command_comes_whole() {
    let Some(linux) = linux() else { return };
    let outcome =
        linux.monitor().args(["--cmdline", "quiet rvmm.exec=\"seq 1001 2000\""]).run_within(LINUX_PATIENCE);
    outcome.exits(0);
    let seen = outcome.stdout.lines().filter(|line| line.len() == 4 && line.parse::<u32>().is_ok()).count();
    outcome.check(seen == 1000, &format!("{seen} of 1000 lines came"));
}

#[test]
fn guest_works_on_its_disks_and_reports_its_status() {
    let Some(linux) = linux() else { return };
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    image(&path("data"), 8 << 20);
    // A disk on a host file system that becomes full.
    let mut full = String::new();
    let mut mounted = None;
    if is_root() {
        fs::create_dir(path("small")).expect("a directory");
        tool("mount", &["-t", "tmpfs", "-o", "size=1m", "none", path("small").to_str().unwrap()]);
        mounted = Some(Mounted(path("small")));
        image(&path("small/disk"), 8 << 20);
        full = format!("{},id=full", path("small/disk").display());
    }
    let script = Script::new(
        r#"
uname -a
report root "$(grep ' / ' /proc/mounts | tail -n 1 | cut -d' ' -f3,4 | cut -d, -f1)"
touch /here 2>/dev/null; report touch $?
report serials "$(for disk in /sys/block/vd?; do echo "$(cat $disk/serial)"; done | tr '\n' ' ')"
report readonly "$(cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro | tr -d '\n')"
report sectors "$(cat /sys/block/vdc/size)"
report memory "$(sed -n 's/MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
report processors "$(grep -c ^processor /proc/cpuinfo)"
printf 'written by the guest' | dd of=/dev/vdc bs=512 seek=3 conv=notrunc,sync,fsync 2>/dev/null
report write $?
dd if=/dev/vdc bs=512 skip=3 count=1 2>/dev/null | grep -q 'written by the guest'; report read $?
if [ -b /dev/vdd ]; then
    dd if=/dev/zero of=/dev/vdd bs=64k conv=fsync 2>/tmp/full; report full $?
    grep -q 'error\|No space' /tmp/full; report error $?
    dd if=/dev/vdd of=/dev/null bs=64k count=4 2>/dev/null; report after $?
fi
exit 42"#,
    );
    let mut monitor =
        script.on(linux.monitor()).args(["--disk", &format!("{},id=data", path("data").display())]);
    if mounted.is_some() {
        monitor = monitor.args(["--disk", &full]);
    }
    let outcome = monitor.run_within(LINUX_PATIENCE);
    outcome.exits(42).shows("Linux ").shows("x86_64").reports("root", "ext4 ro");
    outcome.check(outcome.value("touch") != "0", "the guest wrote to its read-only root");
    let serials = if mounted.is_some() { "disk0 script data full" } else { "disk0 script data" };
    outcome.check(outcome.value("serials").split_whitespace().eq(serials.split(' ')), "other disk serials");
    outcome.reports("readonly", "110").reports("sectors", "16384");
    outcome.reports("processors", "1").reports("write", "0").reports("read", "0");
    let memory: u64 = outcome.value("memory").parse().expect("a number");
    outcome.check((90 << 10..=128 << 10).contains(&memory), "other than 128 MiB of memory");
    let written = fs::read(path("data")).expect("the image");
    assert!(written[3 * 512..].starts_with(b"written by the guest"));
    if mounted.is_some() {
        outcome.check(outcome.value("full") != "0", "the guest saw no error from the full host");
        outcome.reports("error", "0").reports("after", "0");
    }
}

#[test]
fn sigterm_lets_the_guest_clean_up_and_power_off() {
    let Some(linux) = linux() else { return };
    let directory = directory();
    let data = directory.path().join("data");
    image(&data, 1 << 20);
    let script = Script::new(
        r#"
trap 'echo cleaned | dd of=/dev/vdc bs=512 conv=sync,fsync 2>/dev/null; echo cleaned up; exit 5' TERM
echo guest is ready
while :; do read -t 1 line; done </dev/ttyS0"#,
    );
    let running = script.on(linux.monitor()).arg("--disk").arg(&data).start_quiet();
    running.expect_within("guest is ready", LINUX_PATIENCE);
    running.signal(Signal::SIGTERM);
    running.wait(LINUX_PATIENCE).exits(0).shows("cleaned up");
    assert!(fs::read(&data).expect("the image").starts_with(b"cleaned"));
}

#[test]
fn panic_is_reported_as_the_documentation_says() {
    let Some(linux) = linux() else { return };
    // The kernel panics when its first process ends.
    let outcome = linux.monitor().args(["--cmdline", "quiet init=/bin/true"]).run_within(LINUX_PATIENCE);
    outcome.exits(120).shows("Kernel panic - not syncing: Attempted to kill init!");
}

#[test]
fn crash_by_sysrq_is_a_panic() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let script = Script::new("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 100");
    script.run(linux.monitor()).exits(120).shows("sysrq triggered crash");
}

#[test]
fn reboot_by_the_guest_is_a_reset() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    Script::new("reboot; sleep 100").run(linux.monitor()).exits(122);
    Script::new("reboot -f; sleep 100").run(linux.monitor()).exits(122);
}

#[test]
fn power_off_by_the_guest_is_success() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    Script::new("poweroff; sleep 100").run(linux.monitor()).exits(0);
    Script::new("poweroff -f; sleep 100").run(linux.monitor()).exits(0);
}

#[test]
fn statuses_of_commands_come_through() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    for (command, code) in [("true", 0), ("false", 1), ("exit 255", 255), ("kill -9 $$", 137)] {
        let cmdline = format!("quiet rvmm.exec=\"{command}\"");
        linux.monitor().args(["--cmdline", &cmdline]).run_within(LINUX_PATIENCE).exits(code);
    }
}

#[test]
fn shell_is_served_from_a_pipe() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let mut running = linux.monitor().args(["--cmdline", "quiet"]).start_with_input();
    running.expect_within("# ", LINUX_PATIENCE);
    running.send("echo answer=$((6 * 7))\n");
    running.expect("answer=42");
    running.send("exit\n");
    running.wait(LINUX_PATIENCE).exits(0);
}

#[test]
fn every_protocol_and_an_initrd_boot_linux() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    for protocol in ["linux64", "pvh"] {
        let cmdline = "quiet rvmm.exec=\"cat /proc/cmdline; exit 7\"";
        let monitor = linux.monitor().args(["--boot-protocol", protocol, "--cmdline", cmdline]);
        monitor.run_within(LINUX_PATIENCE).exits(7).shows("root=/dev/vda ro");
    }
    let initrd = crate::support::project("target/guest/initrd.cpio");
    if !initrd.exists() {
        return skip("target/guest/initrd.cpio is missing: run scripts/build-rootfs");
    }
    Monitor::new()
        .arg("--kernel")
        .arg(&linux.kernel)
        .arg("--initrd")
        .arg(&initrd)
        .args(["--memory", "128M", "--cmdline", "quiet rvmm.exec=\"grep -q rootfs /proc/mounts && exit 9\""])
        .run_within(LINUX_PATIENCE)
        .exits(9);
}

#[test]
fn processors_and_memory_are_what_was_asked_for() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let script = "report processors $(nproc); report memory $(sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)
        for cpu in /sys/devices/system/cpu/cpu[0-9]*; do cat $cpu/topology/core_id; done | sort -u | wc -l >/tmp/cores
        report cores $(cat /tmp/cores)";
    let host_mib = nix::sys::sysinfo::sysinfo().expect("sysinfo").ram_total() >> 20;
    for (cpus, mib) in [("1", 64), ("2", 256), ("4", 3500), ("8", 128), ("1", 5120)] {
        if mib > host_mib {
            skip(&format!("{mib} MiB of memory: this host has {host_mib}"));
            continue;
        }
        let monitor = linux.monitor_with_memory(&format!("{mib}M")).args(["--cpus", cpus]);
        let outcome = Script::new(script).run(monitor);
        outcome.exits(0).reports("processors", cpus).reports("cores", cpus);
        let memory: u64 = outcome.value("memory").parse().expect("a number");
        outcome.check(memory <= mib << 10 && memory > (mib << 10) / 100 * 94 - (38 << 10), "other memory");
    }
}

#[test]
fn sixteen_mib_of_memory_do_not_take_the_monitor_down() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    // Too little for this kernel to reach its first process, perhaps: but an end in good order.
    let outcome = linux.monitor_with_memory("16M").args(["--cmdline", "quiet rvmm.exec=true"]);
    let outcome = outcome.run_within(LINUX_PATIENCE);
    let code = outcome.status.code();
    outcome.check(matches!(code, Some(0 | 120..=122 | 125)), "not an end in good order");
}

#[test]
#[ignore = "long: scripts/test --long runs it"]
fn fifty_boots_of_fifty_succeed() {
    let Some(linux) = linux() else { return };
    let start = std::time::Instant::now();
    for _ in 0..50 {
        let monitor = linux.monitor().args(["--cmdline", "quiet rvmm.exec=\"echo booted; exit 3\""]);
        monitor.run_within(LINUX_PATIENCE).exits(3).shows("booted");
    }
    let kind = kvm_kind().map_or_else(String::new, |kind| kind.to_string());
    announce(&format!("figure: {kind}: 50 of 50 boots, {:.1} s each", start.elapsed().as_secs_f64() / 50.0));
}
