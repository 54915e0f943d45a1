//! Tiny guests: every boot protocol, every way to end, memory sizes, console, signals. They run on any kind of KVM.

use std::fs;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use rvmm::boot::testing::{ElfImage, Program};
use rvmm::kvm::kind::Kind;

use crate::support::guest::{More, Tiny, kernel_file};
use crate::support::{Monitor, PATIENCE, binary, directory, has_kvm, image, kvm_kind, skip, tiny};

fn hello() -> Program {
    Program::new().print("hello\n").power_off()
}

#[test]
fn every_boot_protocol_starts_a_guest() {
    if !has_kvm() {
        return;
    }
    tiny(&hello()).monitor().run().exits(0).shows("hello");
    tiny(&hello()).monitor().args(["--boot-protocol", "linux64"]).run().exits(0).shows("hello");
    let pvh = tiny(&hello().with_pvh());
    pvh.monitor().args(["--boot-protocol", "pvh"]).run().exits(0).shows("hello");
    pvh.monitor().args(["--log-level", "debug"]).run().exits(0).shows("hello").says("Pvh");
    pvh.monitor().args(["--boot-protocol", "linux64"]).run().exits(0).shows("hello");
    kernel_file(&hello().bzimage()).monitor().run().exits(0).shows("hello");
}

#[test]
fn protocols_that_a_kernel_lacks_are_refused() {
    if !has_kvm() {
        return;
    }
    tiny(&hello()).monitor().args(["--boot-protocol", "pvh"]).run().fails_with(&["PVH", "CONFIG_PVH"]);
    let bzimage = kernel_file(&hello().bzimage());
    bzimage.monitor().args(["--boot-protocol", "pvh"]).run().fails_with(&["bzImage", "PVH"]);
}

#[test]
fn exit_codes_are_as_documented() {
    if !has_kvm() {
        return;
    }
    let program = Program::new;
    for (program, code) in [
        (program().power_off(), 0),
        (program().exit_status(42).power_off(), 42),
        (program().exit_status(1).exit_status(255).power_off(), 255),
        (program().reset(), 122),
        (program().acpi_reset(), 122),
        (program().exit_status(42).reset(), 122),
        (program().triple_fault(), 121),
        (program().exit_status(0).triple_fault(), 121),
    ] {
        tiny(&program).monitor().run().exits(code);
    }
}

#[test]
fn panic_is_told_from_what_follows_it() {
    if !has_kvm() {
        return;
    }
    let panicked = || Program::new().print("oops").out(rvmm::platform::PVPANIC.start, 1);
    for program in [panicked().reset(), panicked().triple_fault(), panicked().power_off()] {
        tiny(&program).monitor().run().exits(120).shows("oops");
    }
}

#[test]
fn guest_that_hangs_after_its_panic_is_ended() {
    if !has_kvm() {
        return;
    }
    tiny(&Program::new().print("oops").panic()).monitor().run().exits(120).shows("oops");
}

#[test]
fn guest_finds_the_event_port_by_its_letter() {
    if !has_kvm() {
        return;
    }
    let program =
        Program::new().copy(rvmm::platform::GUEST_EVENT.start, rvmm::platform::COM1.start).power_off();
    let outcome = tiny(&program).monitor().run();
    outcome.exits(0).check(outcome.bytes == b"R", "the port does not read as R");
}

#[test]
fn boot_marks_are_in_the_timeline() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().mark(1).mark(77).power_off());
    let table = guest.monitor().arg("--timeline").run();
    table.exits(0).says("first KVM_RUN").says("first process").says("guest mark 77");
    let outcome = guest.monitor().arg("--timeline=json").run();
    let json: serde_json::Value = serde_json::from_str(&outcome.stderr).expect("JSON");
    let moments = json["moments"].as_array().expect("moments");
    let times: Vec<u64> = moments.iter().map(|moment| moment["wall_us"].as_u64().expect("a time")).collect();
    assert!(times.len() > 5 && times.is_sorted(), "{times:?}");
}

/// Bytes of usable memory below and above 4 GiB, as the zero page's memory map tells the guest.
fn memory_that_a_guest_sees(size: &str) -> (u64, u64) {
    let program = Program::new().dump(0x2000 + 0x1e8, 1).dump(0x2000 + 0x2d0, 20 * 16).power_off();
    let guest = tiny(&program);
    let outcome =
        Monitor::new().arg("--kernel").arg(&guest.kernel).args(["--memory", size]).run_within(PATIENCE);
    outcome.exits(0).check(outcome.bytes.len() == 1 + 20 * 16, "the guest printed something else");
    let (count, map) = outcome.bytes.split_first().unwrap();
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let (mut low, mut high) = (0, 0);
    for entry in map.chunks(20).take(usize::from(*count)) {
        let (start, len, kind) = (number(&entry[..8]), number(&entry[8..16]), entry[16]);
        if kind == 1 && start < 1 << 32 {
            assert!(
                start + len <= rvmm::platform::MMIO_HOLE_START,
                "memory in the MMIO hole: {start:#x}+{len:#x}"
            );
            low += len;
        } else if kind == 1 {
            high += len;
        }
    }
    (low, high)
}

#[test]
fn memory_of_every_size_is_told_to_the_guest() {
    if !has_kvm() {
        return;
    }
    const MIB: u64 = 1 << 20;
    let host_mib = nix::sys::sysinfo::sysinfo().expect("sysinfo").ram_total() / MIB;
    for mib in [16, 17, 128, 3071, 3072, 3073, 3328, 4096, 5120] {
        if mib > host_mib {
            skip(&format!("{mib} MiB of memory: this host has {host_mib}"));
            continue;
        }
        let (low, high) = memory_that_a_guest_sees(&format!("{mib}M"));
        // The first MiB holds what firmware would.
        assert!(
            low <= mib.min(3072) * MIB && low > (mib.min(3072) - 1) * MIB,
            "{mib} MiB: {low} below 4 GiB"
        );
        assert_eq!(high, mib.saturating_sub(3072) * MIB, "{mib} MiB: above 4 GiB");
    }
}

#[test]
fn number_of_processors_and_devices_up_to_the_limits() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&hello());
    for cpus in ["1", "2", "32"] {
        guest.monitor().args(["--cpus", cpus]).run().exits(0).shows("hello");
    }
    let disks = (0..18).flat_map(|n| {
        let path = guest.path(&format!("disk{n}"));
        image(&path, 512);
        ["--disk".to_owned(), path.to_str().unwrap().to_owned()]
    });
    guest.monitor().args(disks).run().exits(0).shows("hello");
}

#[test]
fn serial_output_goes_where_it_is_told() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&hello());
    let log = guest.path("log");
    let to_file = guest.monitor().arg("--serial").arg(format!("file={}", log.display())).run();
    to_file.exits(0).check(to_file.bytes.is_empty(), "output also came to standard output");
    assert_eq!(fs::read(&log).expect("a log"), b"hello\n");
    let nowhere = guest.monitor().args(["--serial", "none"]).run();
    nowhere.exits(0).check(nowhere.bytes.is_empty(), "there is output");
}

/// Runs a guest in a shell, where its streams can be broken.
fn in_shell(guest: &Tiny, line: &str) -> String {
    let line = format!("{line}\necho code=$(cat code)");
    let output = Command::new("timeout")
        .args(["300", "bash", "-c", &line])
        .current_dir(guest.directory.path())
        .env("RVMM", binary())
        .output()
        .expect("bash");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn long_output_comes_whole_to_a_slow_reader() {
    if !has_kvm() {
        return;
    }
    // More than a pipe holds.
    const BURSTS: u32 = 4_500;
    let guest = tiny(&Program::new().print("x").send(0x20_0000, BURSTS).power_off());
    let line = "{ \"$RVMM\" --kernel kernel --memory 16M; echo $? >code; } | { sleep 3; head -c 1000; sleep 3; cat; } | wc -c";
    let seen = in_shell(&guest, line);
    assert!(seen.contains("code=0") && seen.starts_with(&format!("{}\n", 1 + 16 * BURSTS)), "{seen}");
}

#[test]
fn signal_ends_the_wait_for_a_reader_that_takes_nothing() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().print("x").send(0x20_0000, 4_500).power_off());
    let line =
        "{ timeout 5 \"$RVMM\" --kernel kernel --memory 16M; echo $? >code; } | { sleep 7; cat; } | wc -c";
    let seen = in_shell(&guest, line);
    // 124: timeout(1) had to send its signal.
    assert!(seen.contains("code=124"), "{seen}");
}

#[test]
fn closed_streams_do_not_end_the_guest() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().send(0x20_0000, 50).exit_status(9).power_off());
    for redirection in ["| true", "| head -c 10 >/dev/null", ">&-", "</dev/null >/dev/full", "<&- >/dev/null"]
    {
        let line =
            format!("{{ \"$RVMM\" --kernel kernel --memory 16M; echo $? >code; }} 2>/dev/null {redirection}");
        let seen = in_shell(&guest, &line);
        assert!(seen.contains("code=9"), "{redirection}: {seen}");
    }
}

#[test]
fn input_from_a_pipe_reaches_the_guest() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().listen().print("ready").echo_until(b'!').power_off());
    let mut running = guest.monitor().start_with_input();
    running.expect("ready");
    running.send("first ");
    running.expect("first ");
    // Without a terminal, Ctrl-A is a character like others.
    running.send("\u{1}x second!");
    running.wait(PATIENCE).exits(0).shows("readyfirst \u{1}x second!");
}

#[test]
fn input_that_is_longer_than_any_buffer_reaches_the_guest_whole() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().listen().echo_until(b'!').power_off());
    let text: String = (0..5000).map(|n| format!("{n} ")).collect();
    fs::write(guest.path("input"), format!("{text}!")).expect("a file");
    // From a file, which epoll cannot watch, and from a pipe.
    for input in ["<input", "< <(cat input)"] {
        let seen =
            in_shell(&guest, &format!("\"$RVMM\" --kernel kernel --memory 16M {input}; echo $? >code"));
        assert!(seen.contains("code=0"), "{input}: {seen}");
        assert!(seen.starts_with(&text), "{input}: the guest did not see all of it: {} bytes", seen.len());
    }
}

#[test]
fn end_of_input_does_not_end_the_guest() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().listen().echo_until(b'a').print("still here").halt());
    let mut running = guest.monitor().start_with_input();
    running.send("a");
    running.close_input();
    running.expect("still here");
    std::thread::sleep(Duration::from_millis(200));
    running.signal(Signal::SIGTERM);
    running.signal(Signal::SIGTERM);
    running.wait(PATIENCE);
}

fn deaf_guest() -> Tiny {
    tiny(&Program::new().print("ready").halt())
}

#[test]
fn second_sigterm_ends_a_guest_that_does_not_listen() {
    if !has_kvm() {
        return;
    }
    let guest = deaf_guest();
    let running = guest.monitor().start_quiet();
    running.expect("ready");
    running.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(100));
    running.signal(Signal::SIGTERM);
    running.wait(PATIENCE).exits(143);
}

#[test]
fn time_limit_after_a_signal_ends_a_guest_that_does_not_listen() {
    if !has_kvm() {
        return;
    }
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let guest = deaf_guest();
        let running = guest.monitor().args(["--shutdown-timeout", "1"]).start_quiet();
        running.expect("ready");
        running.signal(signal);
        running.wait(PATIENCE).exits(code);
    }
}

#[test]
fn guest_that_spins_is_ended_too() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().print("ready").spin());
    let running = guest.monitor().args(["--shutdown-timeout", "1"]).start_quiet();
    running.expect("ready");
    running.signal(Signal::SIGTERM);
    running.wait(PATIENCE).exits(143);
}

#[test]
fn configuration_file_makes_a_vm_and_flags_override_it() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&hello());
    let toml = guest.path("vm.toml");
    fs::write(&toml, format!("kernel = {:?}\nmemory = '16M'\nserial = 'none'\n", guest.kernel))
        .expect("a file");
    let silent = Monitor::new().arg("--config").arg(&toml).run();
    silent.exits(0).check(silent.bytes.is_empty(), "there is output");
    Monitor::new().arg("--config").arg(&toml).args(["--serial", "stdio"]).run().exits(0).shows("hello");
    let json = guest.path("vm.json");
    let disk = guest.path("disk");
    image(&disk, 4096);
    let config = serde_json::json!({ "kernel": guest.kernel, "memory": "16M", "cpus": 2, "disks": [{ "path": disk }] });
    fs::write(&json, config.to_string()).expect("a file");
    Monitor::new().arg("--config").arg(&json).run().exits(0).shows("hello");
}

#[test]
fn kernel_file_that_is_truncated_meanwhile_ends_the_vm_in_good_order_at_most() {
    if !has_kvm() {
        return;
    }
    const FAR: u32 = 0x40_0000;
    // A page of the kernel that the guest touches only once it is told to.
    let reader = Program::new().listen().print("ready").await_byte().touch(FAR).print("alive").power_off();
    let code = reader.elf();
    let start = 0x1000; // where a program's code lies in its file
    let mut kernel = ElfImage::new(rvmm::boot::testing::CODE_ADDR);
    kernel.segment(rvmm::boot::testing::CODE_ADDR, &code[start..], (code.len() - start) as u64);
    kernel.segment(u64::from(FAR), &[0x5a; 0x4000], 0x4000);
    let guest = kernel_file(&kernel.build());

    let mut whole = guest.monitor().start_with_input();
    whole.expect("ready");
    whole.send("x");
    whole.wait(PATIENCE).exits(0).shows("alive");

    let mut running = guest.monitor().start_with_input();
    running.expect("ready");
    fs::OpenOptions::new()
        .write(true)
        .open(&guest.kernel)
        .and_then(|file| file.set_len(0x1800))
        .expect("truncated");
    running.send("x");
    let outcome = running.wait(PATIENCE);
    // The kernel is mapped from its file on PVM hosts, and copied elsewhere.
    if kvm_kind() == Some(Kind::Pvm) {
        outcome.exits(123).says("truncated while the VM ran");
    } else {
        outcome.exits(0).shows("alive");
    }
}

#[test]
fn twenty_guests_at_once() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().print("hello").exit_status(3).power_off());
    let all: Vec<_> = (0..20).map(|_| guest.monitor().start_quiet()).collect();
    for running in all {
        running.wait(PATIENCE).exits(3).shows("hello");
    }
}

#[test]
fn killed_monitor_leaves_no_lock() {
    if !has_kvm() {
        return;
    }
    let guest = deaf_guest();
    let disk = guest.path("disk");
    image(&disk, 1 << 20);
    for _ in 0..5 {
        let running = guest.monitor().arg("--disk").arg(&disk).start_quiet();
        running.expect("ready");
        running.signal(Signal::SIGKILL);
        running.wait(PATIENCE);
        let after = tiny(&hello());
        after.monitor().arg("--disk").arg(&disk).run().exits(0).shows("hello");
    }
}

#[test]
fn nothing_is_left_behind() {
    if !has_kvm() {
        return;
    }
    let empty = directory();
    let guest = tiny(&hello());
    let output = Command::new(binary())
        .arg("--kernel")
        .arg(&guest.kernel)
        .args(["--memory", "16M"])
        .current_dir(empty.path())
        .output()
        .expect("rvmm");
    assert!(output.status.success());
    assert_eq!(fs::read_dir(empty.path()).expect("a directory").count(), 0);
}
