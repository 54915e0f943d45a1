//! Shared folders in Linux guests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Mounted;
use crate::support::guest::linux_for_tests;
use crate::support::{
    LINUX_PATIENCE, PATIENCE, Script, announce, directory, has_fast_kvm, has_tool, is_root, linux, tool,
};

/// What work in a shared folder needs on top of a boot.
const WORK: Duration = Duration::from_secs(400);

/// Numbers of the processes that a monitor has started.
fn children(pid: u32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

fn share(tag: &str, folder: &Path, options: &str) -> [String; 2] {
    ["--share".into(), format!("tag={tag},path={}{options}", folder.display())]
}

#[test]
fn impossible_shares_are_refused() {
    let base = directory();
    let missing = base.path().join("missing");
    let file = base.path().join("file");
    fs::write(&file, "").expect("a file");
    for path in [&missing, &file] {
        let outcome = crate::support::Monitor::new().args(share("t", path, "")).run();
        outcome.fails_with(&["cannot open the shared folder", path.to_str().unwrap()]);
    }
    let twice = [share("t", base.path(), ""), share("t", base.path(), "")].concat();
    crate::support::Monitor::new().args(twice).run().fails_with(&["two shared folders have the tag \"t\""]);
    let outcome = crate::support::Monitor::new().args(["--share", "tag=t"]).run();
    outcome.exits(2).says("the path is missing");
}

/// What a folder has in it, with all that tar keeps.
fn manifest(folder: &Path) -> Vec<String> {
    fn walk(path: &Path, below: &Path, found: &mut Vec<String>) {
        let stat = fs::symlink_metadata(path).expect("a file");
        let name = path.strip_prefix(below).expect("a name").display();
        let (mode, links) = (stat.mode(), if stat.is_dir() { 0 } else { stat.nlink() });
        let contents = match () {
            () if stat.is_file() => format!("{:?}", fs::read(path).expect("contents")),
            () if stat.is_symlink() => format!("{:?}", fs::read_link(path).expect("a target")),
            () => String::new(),
        };
        let mut room = [0; 64];
        let attribute =
            rustix::fs::lgetxattr(path, "user.test", &mut room).map_or(vec![], |len| room[..len].to_vec());
        found.push(format!(
            "{name} {mode:o} {links} {}:{} {} {attribute:?} {contents}",
            stat.uid(),
            stat.gid(),
            stat.mtime()
        ));
        if stat.is_dir() {
            for entry in fs::read_dir(path).expect("a folder") {
                walk(&entry.expect("an entry").path(), below, found);
            }
        }
    }
    let mut found = vec![];
    walk(folder, folder, &mut found);
    found.sort();
    found
}

/// A folder with one of each kind.
fn make_tree(tree: &Path) {
    fs::create_dir_all(tree.join("d/e")).expect("a folder");
    fs::write(tree.join("d/file"), "contents").expect("a file");
    fs::write(tree.join("suid"), "program").expect("a file");
    fs::hard_link(tree.join("d/file"), tree.join("d/e/hard")).expect("a link");
    symlink("d/file", tree.join("soft")).expect("a link");
    nix::unistd::mkfifo(&tree.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o620)).expect("a FIFO");
    for (n, name) in (1..).zip(["d", "d/file", "suid", "soft", "fifo"]) {
        lchown(tree.join(name), Some(1000 + n), Some(2000 + n)).expect("an owner");
    }
    fs::set_permissions(tree.join("suid"), fs::Permissions::from_mode(0o6755)).expect("a mode");
    fs::set_permissions(tree.join("d"), fs::Permissions::from_mode(0o3777)).expect("a mode");
    for name in ["d", "d/file"] {
        let set =
            rustix::fs::lsetxattr(tree.join(name), "user.test", b"kept", rustix::fs::XattrFlags::empty());
        if set.is_err() {
            announce(&format!("note: no extended attributes in {}", tree.display()));
        }
    }
    // In the past, so that it shows whether times are kept.
    tool("find", &[tree.to_str().unwrap(), "-exec", "touch", "-h", "-d", "2001-02-03 04:05:06", "{}", "+"]);
}

/// On every kind of KVM: both ways through the folder, with all that tar keeps.
#[test]
fn guest_and_host_exchange_files_with_owners_and_attributes() {
    if !is_root() || !has_tool("tar") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let base = directory();
    let folder = base.path().join("work");
    let tree = folder.join("tree");
    fs::create_dir(&folder).expect("a folder");
    make_tree(&tree);
    let archive = folder.join("in.tar");
    tool("tar", &["--xattrs", "-C", tree.to_str().unwrap(), "-cf", archive.to_str().unwrap(), "."]);
    let script = Script::new(
        r#"
mount -t virtiofs work /mnt; report mount $?
mkdir /mnt/in && /bin/tar --xattrs -xpf /mnt/in.tar -C /mnt/in; report extract $?
/bin/tar --xattrs -C /mnt/tree -cf /mnt/out.tar .; report pack $?
mkdir /tmp/ro && mount -t virtiofs ro /tmp/ro; report second $?
cat /tmp/ro/in.tar | cmp - /mnt/in.tar; report same $?
echo x 2>/dev/null >/tmp/ro/new; report refused $?
umount /mnt && mount -t virtiofs work /mnt; report again $?
df /mnt | tail -n 1 | grep -q work; report df $?"#,
    );
    let monitor = linux.monitor().args(share("work", &folder, "")).args(share("ro", &folder, ",readonly"));
    let outcome = script.run_long(monitor, WORK);
    outcome.exits(0);
    for step in ["mount", "extract", "pack", "second", "same", "again", "df"] {
        outcome.reports(step, "0");
    }
    outcome.reports("refused", "1");
    assert!(!folder.join("new").exists());
    assert_eq!(manifest(&folder.join("in")), manifest(&tree), "extracted in the guest");
    let out = base.path().join("out");
    fs::create_dir(&out).expect("a folder");
    tool("tar", &["--xattrs", "-xpf", folder.join("out.tar").to_str().unwrap(), "-C", out.to_str().unwrap()]);
    assert_eq!(manifest(&out), manifest(&tree), "packed in the guest");
}

#[test]
fn tools_end_in_a_shared_folder_as_on_the_host() {
    if !has_fast_kvm() || !has_tool("git") {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let base = directory();
    let folder = base.path().join("work");
    let repository = folder.join("repository");
    fs::create_dir_all(&repository).expect("a folder");
    let git = |arguments: &[&str]| {
        let known = ["-C", repository.to_str().unwrap(), "-c", "user.name=t", "-c", "user.email=t@localhost"];
        tool("git", &[&known[..], arguments].concat())
    };
    git(&["init", "-q"]);
    for n in 0..40 {
        fs::write(repository.join(format!("file-{n}")), format!("{n}\n").repeat(100 * n)).expect("a file");
    }
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "all"]);
    let script = Script::new(
        r#"
mount -t virtiofs work /mnt; report mount $?
cd /mnt; export HOME=/tmp
mkdir exercise fio
/usr/lib/rvmm/tests/file-exercise /mnt/exercise 15 1; report exercise $?
/usr/lib/rvmm/tests/file-exercise /tmp 2 2; report calibrate $?
fio --name=v --directory=/mnt/fio --size=8m --rw=randwrite --bsrange=512-128k --ioengine=psync --fsync=64 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --io_size=4m >/tmp/fio 2>&1; report fio $?
fio --name=d --directory=/mnt/fio --size=4m --rw=randrw --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
    --verify=crc32c --do_verify=1 --verify_fatal=1 --io_size=2m >/tmp/direct 2>&1; report direct $?
grep -i 'err=\|verif' /tmp/fio /tmp/direct | head
git config --global --add safe.directory '*'
git clone -q --no-local /mnt/repository /mnt/clone; report clone $?
git -C /mnt/clone fsck --full --strict; report fsck $?
git -C /mnt/clone -c user.name=t -c user.email=t@localhost commit -q --allow-empty -m guest; report commit $?
git -C /mnt/clone status --porcelain | wc -l | grep -q '^0$'; report status $?
n=0; while [ $n -lt 300 ]; do echo $n >/mnt/fio/$n; n=$((n + 1)); done; ls /mnt/fio | wc -l | grep -q 302; report many $?
rm -r /mnt/fio; report rm $?
umount /mnt 2>/dev/null; cd /; umount /mnt; report umount $?"#,
    );
    let monitor = linux.monitor_with_memory("256M").args(share("work", &folder, ""));
    let outcome = script.run_long(monitor, WORK);
    outcome.exits(0);
    for step in [
        "mount",
        "exercise",
        "calibrate",
        "fio",
        "direct",
        "clone",
        "fsck",
        "commit",
        "status",
        "many",
        "rm",
        "umount",
    ] {
        outcome.reports(step, "0");
    }
    let clone = folder.join("clone");
    let clone = clone.to_str().unwrap();
    tool("git", &["-c", "safe.directory=*", "-C", clone, "fsck", "--full", "--strict"]);
    assert_eq!(
        tool("git", &["-c", "safe.directory=*", "-C", clone, "rev-list", "--count", "HEAD"]).trim(),
        "2"
    );
}

#[test]
fn guest_lives_on_when_its_file_server_dies_and_servers_die_with_the_monitor() {
    if !has_fast_kvm() || !is_root() {
        return;
    }
    let Some(linux) = linux() else { return };
    let base = directory();
    let (folder, other) = (base.path().join("work"), base.path().join("other"));
    fs::create_dir_all(folder.join("late")).expect("a folder");
    fs::create_dir(&other).expect("a folder");
    fs::write(folder.join("file"), "contents").expect("a file");
    let Some(_mounted) = Mounted::new(&["--bind", folder.to_str().unwrap()], &folder) else { return };
    tool("mount", &["--make-shared", folder.to_str().unwrap()]);
    let script = Script::new(
        r#"
mkdir /tmp/other; mount -t virtiofs work /mnt; mount -t virtiofs other /tmp/other
echo mount it now
until [ -e /mnt/late/file ]; do sleep 1; done
report late "$(cat /mnt/late/file)"
echo kill it now
while cat /mnt/late/file >/dev/null 2>&1; do sleep 1; done
cat /mnt/file; report read $?
echo x >/mnt/new; report write $?
ls /mnt; report list $?
umount -l /mnt; report umount $?
mount -t virtiofs work /mnt && ls /mnt; report again $?
echo alive >/tmp/other/file; report other $?
echo kill all now
sleep 1000"#,
    );
    let running = script
        .on(linux.monitor())
        .args(share("work", &folder, ""))
        .args(share("other", &other, ""))
        .start_quiet();
    running.expect_within("mount it now", LINUX_PATIENCE);
    let Some(_late) = Mounted::new(&["-t", "tmpfs", "none"], &folder.join("late")) else { return };
    fs::write(folder.join("late/file"), "appears").expect("a file");
    running.expect_within("late=appears", LINUX_PATIENCE);
    running.expect_within("kill it now", LINUX_PATIENCE);
    let servers = children(running.pid());
    assert_eq!(servers.len(), 2);
    kill(Pid::from_raw(servers[0]), Signal::SIGKILL).expect("a server");
    running.expect_within("kill all now", LINUX_PATIENCE);
    assert_eq!(fs::read(other.join("file")).expect("a file"), b"alive\n");
    running.signal(Signal::SIGKILL);
    let outcome = running.wait(PATIENCE);
    // The mount itself may succeed: Linux does not wait for the server's answer.
    for step in ["read", "write", "list", "again"] {
        outcome.check(outcome.value(step) != "0", "a dead server still serves");
    }
    outcome.reports("umount", "0").reports("other", "0");
    let end = Instant::now() + PATIENCE;
    while Path::new(&format!("/proc/{}", servers[1])).exists() {
        assert!(Instant::now() < end, "a server goes on without its monitor");
        std::thread::sleep(Duration::from_millis(5));
    }
}
