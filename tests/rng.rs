//! The entropy device in a Linux guest.

use crate::support::{LINUX_PATIENCE, Script, has_fast_kvm, linux};

#[test]
fn guest_reads_random_bytes_from_its_host() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let script = Script::new(
        r#"
report source "$(cat /sys/class/misc/hw_random/rng_current)"
dd if=/dev/hwrng of=/tmp/first bs=4k count=4 iflag=fullblock 2>/dev/null; report first $?
dd if=/dev/hwrng of=/tmp/second bs=4k count=4 iflag=fullblock 2>/dev/null; report second $?
report size $(cat /tmp/first /tmp/second | wc -c)
cmp -s /tmp/first /tmp/second; report differ $?
gzip -c /tmp/first >/tmp/packed
report packed $(wc -c </tmp/packed)"#,
    );
    let outcome = script.on(linux.monitor()).arg("--rng").run_within(LINUX_PATIENCE);
    outcome.exits(0).reports("first", "0").reports("second", "0").reports("differ", "1");
    outcome.reports("size", &(32u32 << 10).to_string());
    outcome.check(outcome.value("source").starts_with("virtio_rng"), "another source of random numbers");
    let packed: u64 = outcome.value("packed").parse().expect("a number");
    outcome.check(packed > 16 << 10, "random bytes must not get smaller");
}
