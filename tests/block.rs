//! Disks under load, with file systems on them, in a Linux guest; checked again on the host.

use std::path::Path;
use std::time::Duration;

use crate::support::guest::linux_for_tests;
use crate::support::{
    LINUX_PATIENCE, PATIENCE, Script, announce, directory, has_fast_kvm, has_tool, image, linux, tool,
};

const MIB: u64 = 1 << 20;
/// What a write load needs on top of a boot.
const WORK: Duration = Duration::from_secs(300);

fn disk(path: &Path, options: &str) -> String {
    format!("{}{options}", path.display())
}

/// `e2fsck` on the host must find nothing to mend.
fn is_clean(path: &Path) {
    tool("e2fsck", &["-fn", path.to_str().unwrap()]);
}

/// Writes `mib` MiB at random, and trims and rewrites a sixth of it.
fn verify_with_fio(options: &str, cpus: &str, mib: u32) {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let directory = directory();
    let path = directory.path().join("data");
    image(&path, 64 * MIB);
    let script = Script::new(&format!(
        "mib={mib}{}",
        r#"
fio --name=random --filename=/dev/vdc --size=48m --rw=randwrite --bsrange=512-64k --ioengine=libaio --iodepth=16 \
    --direct=1 --verify=crc32c --do_verify=1 --verify_fatal=1 --io_size=${mib}m --fsync=64 >/tmp/random 2>&1
report random $?
fio --name=trim --filename=/dev/vdc --size=48m --rw=randtrimwrite --bs=4k --ioengine=libaio --iodepth=4 --direct=1 \
    --io_size=$((mib * 170))k >/tmp/trim 2>&1
report trim $?
fio --name=again --filename=/dev/vdc --offset=48m --size=12m --rw=write --bs=128k --ioengine=psync --fsync=8 \
    --numjobs=1 --verify=crc32c --do_verify=1 --verify_fatal=1 >/tmp/again 2>&1
report again $?
[ -s /tmp/random ] && cat /tmp/random /tmp/trim /tmp/again | grep -i 'err\|verif\|fio:' | head -n 20
report queues $(ls /sys/block/vdc/mq | wc -l)
dmesg | grep -i 'i/o error\|vdc.*error'
report quiet $?"#,
    ));
    let monitor = script
        .on(linux.monitor_with_memory("256M").args(["--cpus", cpus]))
        .args(["--disk", &disk(&path, options)]);
    let outcome = monitor.run_within(LINUX_PATIENCE + WORK);
    outcome.exits(0).reports("random", "0").reports("trim", "0").reports("again", "0").reports("quiet", "1");
    outcome.reports("queues", cpus);
}

#[test]
fn fio_verifies_what_it_wrote_with_io_uring() {
    verify_with_fio(",io=uring", "1", 12);
}

#[test]
fn fio_verifies_what_it_wrote_with_system_calls() {
    verify_with_fio(",io=sync", "1", 12);
}

#[test]
fn fio_verifies_what_it_wrote_through_several_queues() {
    verify_with_fio(",queues=2", "2", 6);
}

#[test]
#[ignore = "long: scripts/test --long runs it"]
fn fio_verifies_much_more_through_several_queues() {
    verify_with_fio(",queues=2", "2", 48);
}

#[test]
fn file_system_is_whole_after_writes_and_discards() {
    if !has_fast_kvm() || !has_tool("e2fsck") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    for io in ["uring", "sync"] {
        let directory = directory();
        let path = directory.path().join("data");
        image(&path, 96 * MIB);
        let script = Script::new(
            r#"
mkfs.ext4 -q -E nodiscard,lazy_itable_init=0 /dev/vdc; report mkfs $?
mount -t ext4 -o discard /dev/vdc /mnt; report mount $?
mkdir /mnt/kept /mnt/gone
for n in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=/mnt/kept/$n bs=64k count=16 2>/dev/null
    dd if=/dev/urandom of=/mnt/gone/$n bs=64k count=64 2>/dev/null
done
(cd /mnt/kept && md5sum * >/mnt/sums)
sync
rm -r /mnt/gone; sync
fstrim /mnt; report trim $?
(cd /mnt/kept && md5sum -c -s /mnt/sums); report before $?
umount /mnt; report umount $?
echo 3 >/proc/sys/vm/drop_caches
e2fsck -fn /dev/vdc >/tmp/fsck 2>&1; report fsck $?
mount -t ext4 /dev/vdc /mnt
(cd /mnt/kept && md5sum -c -s /mnt/sums); report after $?
umount /mnt"#,
        );
        let monitor = script.on(linux.monitor()).args(["--disk", &disk(&path, &format!(",io={io}"))]);
        let outcome = monitor.run_within(LINUX_PATIENCE + WORK);
        outcome.exits(0);
        for step in ["mkfs", "mount", "trim", "before", "umount", "fsck", "after"] {
            outcome.reports(step, "0");
        }
        is_clean(&path);
        let allocated = std::os::unix::fs::MetadataExt::blocks(&path.metadata().expect("the image")) * 512;
        // 40 MiB were written and 32 of them deleted again.
        outcome
            .check(allocated < 30 * MIB, &format!("discard freed nothing: {allocated} bytes are allocated"));
    }
}

#[test]
fn root_that_is_written_to_is_whole_afterwards() {
    if !has_fast_kvm() || !has_tool("e2fsck") {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let root = directory.path().join("root");
    let script =
        "for n in 1 2 3 4; do dd if=/dev/urandom of=/root/$n bs=64k count=16 2>/dev/null; done; sync; exit 6";
    let monitor =
        linux.monitor_with_copy(&root).args(["--cmdline", &format!("quiet rvmm.exec=\"{script}\"")]);
    monitor.run_within(LINUX_PATIENCE).exits(6);
    is_clean(&root);
    let listing = tool("debugfs", &["-R", "ls -l /root", root.to_str().unwrap()]);
    assert!(listing.contains("1048576"), "{listing}");
}

#[test]
fn many_disks_keep_apart_what_is_written_to_them() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let paths: Vec<_> = (0..12).map(|n| directory.path().join(format!("disk-{n}"))).collect();
    paths.iter().for_each(|path| image(path, MIB));
    let script = Script::new(
        r#"
for disk in /sys/block/vd[c-n]; do
    name=${disk##*/}
    cat $disk/serial | dd of=/dev/$name bs=512 seek=9 conv=sync,fsync 2>/dev/null || report failed $name
done
report count $(ls -d /sys/block/vd* | wc -l)
dd if=/dev/zero of=/dev/vdo bs=512 count=1 2>/dev/null; report readonly $?
blockdev --getro /dev/vdo"#,
    );
    let mut monitor = script.on(linux.monitor());
    for (n, path) in paths.iter().enumerate() {
        monitor = monitor.args(["--disk", &disk(path, &format!(",id=serial-of-{n}"))]);
    }
    let readonly = directory.path().join("readonly");
    std::fs::write(&readonly, vec![7; 4096]).expect("an image");
    let outcome = monitor.args(["--disk", &disk(&readonly, ",readonly")]).run_within(LINUX_PATIENCE);
    outcome.exits(0).reports("count", "15");
    outcome.check(outcome.value("readonly") != "0", "the guest wrote to a read-only disk");
    assert!(std::fs::read(&readonly).expect("the image").iter().all(|byte| *byte == 7));
    for (n, path) in paths.iter().enumerate() {
        let bytes = std::fs::read(path).expect("the image");
        let text = String::from_utf8_lossy(&bytes[9 * 512..10 * 512]);
        assert_eq!(text.trim_end_matches(['\0', '\n']), format!("serial-of-{n}"));
        assert!(bytes[..9 * 512].iter().all(|byte| *byte == 0), "disk {n}");
    }
}

#[test]
fn stock_debian_kernel_finds_its_root_by_acpi() {
    if !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let file = |name: &str| crate::support::project(&format!("target/debian-kernel/{name}"));
    let (kernel, initrd) = (file("vmlinuz"), file("initrd.img"));
    if !kernel.exists() || !initrd.exists() {
        return crate::support::skip("target/debian-kernel is missing: run scripts/fetch-debian-kernel");
    }
    for cpus in ["1", "4"] {
        let script = Script::new(
            r#"
uname -r
report processors $(nproc)
report root "$(grep ' / ' /proc/mounts | tail -n 1 | cut -d' ' -f1,3)"
grep -q virtio_mmio.device /proc/cmdline; report told $?
ls /sys/bus/acpi/devices | grep -q LNRO0005; report acpi $?"#,
        );
        let monitor = crate::support::Monitor::new()
            .arg("--kernel")
            .arg(&kernel)
            .arg("--initrd")
            .arg(&initrd)
            .args(["--rootfs", &disk(&linux.rootfs, ",readonly"), "--memory", "512M", "--cpus", cpus]);
        let outcome = script.run(monitor);
        outcome.exits(0).shows("cloud-amd64").reports("processors", cpus).reports("root", "/dev/vda ext4");
        outcome.reports("told", "1").reports("acpi", "0");
    }
}

#[test]
#[ignore = "long: scripts/test --long runs it"]
fn killed_monitor_leaves_a_file_system_that_its_journal_mends() {
    const ROUNDS: u32 = 20;
    if !has_fast_kvm() || !has_tool("e2fsck") || !has_tool("mkfs.ext4") {
        return;
    }
    let Some(linux) = linux() else { return };
    let directory = directory();
    let path = directory.path().join("data");
    image(&path, 96 * MIB);
    tool("mkfs.ext4", &["-qF", path.to_str().unwrap()]);
    let script = Script::new(
        r#"
mount -t ext4 /dev/vdc /mnt || exit 1
n=0
echo writing
while :; do
    n=$((n + 1))
    dd if=/dev/urandom of=/mnt/file-$((n % 40)) bs=16k count=$((n % 7 + 1)) 2>/dev/null
    [ $((n % 5)) = 0 ] && rm -f /mnt/file-$((n * 7 % 40)) && sync
done"#,
    );
    for round in 0..ROUNDS {
        let running = script.on(linux.monitor()).args(["--disk", &disk(&path, "")]).start_quiet();
        running.expect_within("writing", LINUX_PATIENCE);
        // A moment that differs from round to round and from run to run.
        let nanos = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.subsec_nanos());
        std::thread::sleep(Duration::from_millis(u64::from(nanos % 3000)));
        running.signal(nix::sys::signal::Signal::SIGKILL);
        running.wait(PATIENCE);
        // 1: mended by replaying the journal, as after any sudden end.
        let status = std::process::Command::new("e2fsck").arg("-p").arg(&path).status().expect("e2fsck");
        assert!(matches!(status.code(), Some(0 | 1)), "round {round}: e2fsck -p ends with {status}");
        is_clean(&path);
    }
    announce(&format!("figure: {ROUNDS} of {ROUNDS} kills left a file system that its journal mends"));
}

/// Makes an EROFS file of a directory.
fn erofs(directory: &Path, to: &Path) {
    let (from, to) = (directory.to_str().unwrap(), to.to_str().unwrap());
    tool("mkfs.erofs", &["-T", "0", to, from]);
}

#[test]
fn guest_mounts_the_partitions_of_a_composed_disk() {
    const PARTS: usize = 120;
    let Some(linux) = linux() else { return };
    if !has_tool("mkfs.erofs") {
        return;
    }
    for io in ["uring", "sync"] {
        let directory = directory();
        let layer = directory.path().join("layer");
        let mut parts = vec![];
        for index in 0..PARTS {
            let path = directory.path().join(format!("{index}.erofs"));
            std::fs::create_dir_all(&layer).unwrap();
            // Lengths that are no multiple of a block, and files that are read across several requests.
            let bytes: Vec<u8> = (0..index * 5000).map(|at| (at % 251 + index) as u8).collect();
            std::fs::write(layer.join("data"), &bytes).unwrap();
            std::fs::write(layer.join("number"), index.to_string()).unwrap();
            erofs(&layer, &path);
            parts.push(serde_json::json!({ "path": path.file_name().unwrap().to_str(), "name": format!("sha256:{index:04}") }));
        }
        let last = tool("md5sum", &[layer.join("data").to_str().unwrap()]);
        let list = directory.path().join("layers.json");
        std::fs::write(&list, serde_json::json!({ "parts": parts }).to_string()).unwrap();
        let script = Script::new(
            r#"
report partitions $(ls -d /sys/block/vdc/vdc* | wc -l)
report name $(sed -n s/PARTNAME=//p /sys/block/vdc/vdc120/uevent)
report readonly $(cat /sys/block/vdc/ro)
mkdir /tmp/a /tmp/b
mount -t erofs /dev/vdc1 /tmp/a; report first $(cat /tmp/a/number)
mount -t erofs /dev/vdc120 /tmp/b; report last $(cat /tmp/b/number)
report sum $(md5sum </tmp/b/data | cut -d ' ' -f 1)
dd if=/dev/zero of=/dev/vdc bs=512 count=1 2>/dev/null; report written $?
dmesg | grep -i 'i/o error\|gpt:\|alternate'
report quiet $?"#,
        );
        let place = format!("parts={},id=layers,io={io}", list.display());
        let outcome = script.on(linux.monitor()).args(["--disk", &place]).run_within(LINUX_PATIENCE + WORK);
        outcome.exits(0).reports("partitions", "120").reports("name", "sha256:0119").reports("readonly", "1");
        outcome.reports("first", "0").reports("last", "119").reports("written", "1").reports("quiet", "1");
        outcome.reports("sum", last.split(' ').next().unwrap());
    }
}
