//! The command line: what it offers, and every error that a user is to understand from one line.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use rvmm::boot::testing::Program;

use crate::support::guest::kernel_file;
use crate::support::{Monitor, binary, can_unshare, directory, has_kvm, has_tool, image, is_root, tiny};

fn power_off() -> Program {
    Program::new().power_off()
}

#[test]
fn help_names_options_examples_and_exit_codes() {
    let help = Monitor::new().arg("--help").run();
    help.exits(0);
    for text in ["--kernel", "--rootfs", "--initrd", "--cmdline", "--cpus", "--memory", "--disk", "--config"]
    {
        help.shows(text);
    }
    help.shows("Examples:").shows("Exit codes:").shows("Ctrl-A x");
    let short = Monitor::new().arg("-h").run();
    short.exits(0).check(short.stdout.len() < help.stdout.len(), "-h is not shorter than --help");
}

#[test]
fn version_is_the_packages() {
    Monitor::new().arg("--version").run().exits(0).shows(concat!("rvmm ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn manual_pages_are_written_for_every_command() {
    let directory = directory();
    let target = directory.path().join("a/b");
    Monitor::new().arg("man").arg(&target).run().exits(0);
    let page = fs::read_to_string(target.join("rvmm.1")).expect("a page");
    assert!(page.contains(".TH rvmm 1") && page.contains("Exit codes"), "{page}");
    assert!(target.join("rvmm-completions.1").exists());
}

#[test]
fn completions_are_accepted_by_their_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let script = Monitor::new().args(["completions", shell]).run();
        script.exits(0).shows("rvmm").shows("completions");
        if shell == "bash" {
            let status = Command::new("bash").args(["-n", "-c", &script.stdout]).status().expect("bash");
            assert!(status.success());
        }
    }
}

#[test]
fn unknown_option_and_bad_values_end_with_code_2() {
    for (arguments, text) in [
        (&["--frobnicate"][..], "--frobnicate"),
        (&["--memory", "512"], "has no unit"),
        (&["--memory", "much"], "is not a size"),
        (&["--serial", "telephone"], "stdio, file=PATH or none"),
        (&["--rootfs", "x,writable"], "unknown disk option \"writable\""),
        (&["--disk", "x,io=fast"], "one of auto, uring, sync"),
        (&["--disk", "x,cache=none"], "one of writeback, unsafe"),
    ] {
        let outcome = Monitor::new().args(arguments).run();
        outcome.exits(2).says(text);
    }
}

#[test]
fn unknown_disk_option_lists_those_that_there_are() {
    let outcome = Monitor::new().args(["--rootfs", "x,readwrite"]).run();
    let first = outcome.stderr.lines().next().unwrap_or_default();
    for part in ["readonly", "id=ID", "queues=N", "io=", "cache="] {
        outcome.check(first.contains(part), &format!("the first line does not offer {part}"));
    }
}

#[test]
fn no_dev_kvm_is_said_with_advice() {
    if !is_root() || !can_unshare() {
        return;
    }
    let guest = tiny(&power_off());
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh"]).arg(binary());
    let outcome = Monitor::from_command(command).arg("--kernel").arg(&guest.kernel).run();
    outcome.fails_with(&["/dev/kvm", "No such file", "kvm_intel or kvm_amd"]);
}

#[test]
fn no_permission_on_dev_kvm_is_said_with_advice() {
    if !has_kvm() || !is_root() || !can_unshare() || !has_tool("setpriv") {
        return;
    }
    // Where nobody can reach: the binary may lie below a home directory.
    let guest = tiny(&power_off());
    let binary_copy = guest.path("rvmm");
    fs::copy(binary(), &binary_copy).expect("a copy");
    for path in [guest.directory.path(), &binary_copy] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    let mut command = Command::new("unshare");
    let script = "mount -t tmpfs none /dev && mknod /dev/kvm c 10 232 && chmod 600 /dev/kvm \
                  && mknod /dev/null c 1 3 && exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";
    command.args(["-m", "sh", "-c", script, "sh"]).arg(&binary_copy);
    let outcome = Monitor::from_command(command).arg("--kernel").arg(&guest.kernel).run();
    outcome.fails_with(&["/dev/kvm", "ermission denied", "usermod -aG kvm"]);
}

#[test]
fn missing_kernel_is_named() {
    if !has_kvm() {
        return;
    }
    let outcome = Monitor::new().args(["--kernel", "/no/such/vmlinux"]).run();
    outcome.fails_with(&["/no/such/vmlinux", "No such file"]);
}

fn refused_kernel(contents: &[u8], parts: &[&str]) {
    if !has_kvm() {
        return;
    }
    let guest = kernel_file(contents);
    let outcome = guest.monitor().run();
    outcome.fails_with(&[guest.kernel.to_str().unwrap()]).fails_with(parts);
}

#[test]
fn file_that_is_no_kernel_is_refused_with_what_it_is() {
    refused_kernel(b"#!/bin/sh\necho no kernel\n", &["not a kernel", "script", "vmlinux or a bzImage"]);
    refused_kernel(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 9, 9, 9, 9], &["not a kernel", "gzip"]);
    refused_kernel(&[b'x'; 5000], &["not a kernel"]);
    refused_kernel(b"", &["empty"]);
}

#[test]
fn kernel_for_another_architecture_is_refused_with_its_name() {
    const AARCH64: u8 = 183;
    let mut elf = power_off().elf();
    elf[18] = AARCH64;
    refused_kernel(&elf, &["aarch64", "x86-64"]);
}

#[test]
fn truncated_kernels_are_refused() {
    let mut whole = rvmm::boot::testing::ElfImage::new(0x10_0000);
    let elf = whole.segment(0x10_0000, &[0xf4; 0x6000], 0x6000).build();
    refused_kernel(&elf[..elf.len() - 0x2000], &["truncated"]);
    refused_kernel(&elf[..100], &["truncated"]);
    let bzimage = power_off().bzimage();
    refused_kernel(&bzimage[..bzimage.len() - 16], &["truncated"]);
}

#[test]
fn directory_as_kernel_is_refused() {
    if !has_kvm() {
        return;
    }
    Monitor::new().args(["--kernel", "/usr"]).run().fails_with(&["/usr", "directory"]);
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let guest = tiny(&power_off());
    let outcome = Monitor::new().arg("--kernel").arg(&guest.kernel).args(["--memory", "100T"]).run();
    outcome.fails_with(&["100 TiB", "the host has"]);
}

#[test]
fn impossible_machines_are_refused_before_anything_is_opened() {
    for (arguments, text) in [
        (&["--cpus", "0"][..], "1 to 32"),
        (&["--cpus", "33"], "1 to 32"),
        (&["--memory", "8M"], "at least 16 MiB"),
        (&["--disk", "/x,queues=17"], "1 to 16"),
        (&["--disk", "/x,id=one", "--disk", "/y,id=one"], "two disks have the id"),
    ] {
        Monitor::new().args(arguments).run().fails_with(&[text]);
    }
    let disks = (0..19).flat_map(|n| ["--disk".to_owned(), format!("/x{n}")]);
    Monitor::new().args(disks).run().fails_with(&["19 devices", "interrupt controller", "18"]);
}

fn refused_image(path: &Path, parts: &[&str]) {
    let guest = tiny(&power_off());
    let outcome = guest.monitor().arg("--rootfs").arg(path).run();
    outcome.fails_with(&[path.to_str().unwrap()]).fails_with(parts);
}

#[test]
fn bad_images_are_refused_with_advice() {
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    refused_image(&path("missing"), &["does not exist", "truncate -s"]);
    image(&path("empty"), 0);
    refused_image(&path("empty"), &["is empty", "truncate -s"]);
    image(&path("odd"), 100_000);
    refused_image(&path("odd"), &["100000 bytes", "multiple of 512"]);
    refused_image(directory.path(), &["directory"]);
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    refused_image(&path("fifo"), &["raw image file or a block device"]);
}

#[test]
fn image_that_is_not_writable_is_refused_and_works_readonly() {
    if !has_kvm() || !is_root() || !has_tool("setpriv") {
        return;
    }
    let guest = tiny(&power_off());
    let disk = guest.path("disk");
    image(&disk, 4096);
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o444)).expect("permissions");
    // Root without capabilities keeps to a file's permissions.
    let run = |option: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(binary());
        let disk = format!("{}{option}", disk.display());
        Monitor::from_command(command)
            .arg("--kernel")
            .arg(&guest.kernel)
            .args(["--memory", "16M", "--disk", &disk])
            .run()
    };
    run("").fails_with(&["cannot be written", "read-only"]);
    run(",readonly").exits(0);
}

#[test]
fn image_of_another_vm_is_refused_unless_both_only_read() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().print("ready").halt());
    // On an overlay the host does not tell who holds a lock.
    let directory = tempfile::tempdir_in("/dev/shm").expect("a temporary directory");
    let disk = directory.path().join("disk");
    image(&disk, 1 << 20);
    let other = tiny(&power_off());
    let attempt = |option: &str| {
        let disk = format!("{}{option}", disk.display());
        other.monitor().args(["--disk", &disk]).run()
    };
    let first = guest.monitor().arg("--disk").arg(&disk).start_quiet();
    first.expect("ready");
    attempt("").fails_with(&[&format!("in use by process {}", first.pid()), "stop that process"]);
    attempt(",readonly").fails_with(&["in use"]);
    drop(first);
    let reader = guest.monitor().args(["--disk", &format!("{},readonly", disk.display())]).start_quiet();
    reader.expect("ready");
    attempt(",readonly").exits(0);
    attempt("").fails_with(&["in use"]);
}

#[test]
fn verbose_prints_causes_one_under_the_other() {
    if !has_kvm() {
        return;
    }
    let outcome = Monitor::new().args(["--kernel", "/no/such/vmlinux", "--verbose"]).run();
    outcome.exits(125).says("/no/such/vmlinux").says("\n  because: No such file");
}

#[test]
fn configuration_files_that_are_wrong_are_named() {
    let directory = directory();
    let path = directory.path().join("vm.toml");
    Monitor::new().arg("--config").arg(&path).run().fails_with(&["vm.toml", "No such file"]);
    fs::write(&path, "memroy = '1G'\n").expect("a file");
    Monitor::new().arg("--config").arg(&path).run().fails_with(&["vm.toml", "memroy"]);
}

#[test]
fn missing_directory_of_the_serial_file_is_said() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&power_off());
    let outcome = guest.monitor().args(["--serial", "file=/no/such/directory/log"]).run();
    outcome.fails_with(&["/no/such/directory/log", "console", "No such file"]);
}
