//! The virtio console of a Linux guest, alone and beside the serial port.

use crate::support::{LINUX_PATIENCE, Script, directory, has_fast_kvm, linux};

#[test]
fn virtio_console_serves_a_guest_in_place_of_the_serial_port() {
    let Some(linux) = linux() else { return };
    let script = Script::new(
        r#"
report ports "$(ls /dev/hvc0 2>/dev/null) $(grep -c ttyS /proc/cmdline)"
report ready 1
read line; report line "$line"
seq 10001 14000
exit 6"#,
    );
    let mut running = script.on(linux.monitor()).args(["--console", "stdio"]).start_with_input();
    running.expect_within("ready=1", LINUX_PATIENCE);
    running.send("typed into hvc0\n");
    let outcome = running.wait(LINUX_PATIENCE);
    outcome.exits(6).reports("ports", "/dev/hvc0 0").reports("line", "typed into hvc0");
    let lines = outcome.stdout.lines().filter(|line| line.len() == 5 && line.parse::<u32>().is_ok()).count();
    outcome.check(lines == 4000, &format!("{lines} of 4000 lines came"));
}

#[test]
fn serial_port_and_virtio_console_work_side_by_side() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let (serial, console) = (directory.path().join("serial"), directory.path().join("console"));
    let script = Script::new("echo to the console; echo to the port >/dev/ttyS0; exit 3");
    let outcome = script
        .on(linux.monitor())
        .args(["--serial", &format!("file={}", serial.display())])
        .args(["--console", &format!("file={}", console.display())])
        .run_within(LINUX_PATIENCE);
    outcome.exits(3).check(outcome.stdout.is_empty(), "there is output elsewhere");
    let read = |path| std::fs::read_to_string(path).expect("output");
    assert!(read(&console).contains("to the console"), "{}", read(&console));
    assert!(read(&serial).contains("to the port"), "{}", read(&serial));
}
