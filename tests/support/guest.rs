//! Guests: tiny ones that are assembled here and start in milliseconds, and Linux.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rvmm::boot::testing::Program;
use rvmm::kvm::kind::Kind;

use super::{LINUX_PATIENCE, Monitor, Outcome, directory, has_kvm, kvm_kind, project, skip};

/// A tiny guest in a file, and the monitor to boot it.
pub struct Tiny {
    pub directory: tempfile::TempDir,
    pub kernel: PathBuf,
}

/// A tiny guest that runs `program`, as an ELF kernel.
pub fn tiny(program: &Program) -> Tiny {
    kernel_file(&program.elf())
}

/// A kernel file with these contents.
pub fn kernel_file(contents: &[u8]) -> Tiny {
    let directory = directory();
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, contents).expect("a kernel file");
    Tiny { directory, kernel }
}

impl Tiny {
    /// `rvmm --kernel …` with little memory.
    pub fn monitor(&self) -> Monitor {
        Monitor::new().arg("--kernel").arg(&self.kernel).args(["--memory", "16M"])
    }

    /// A path beside the kernel.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Instructions of tiny guests beyond those of the product, with one meaning in 64-bit and 32-bit mode.
pub trait More {
    /// Enables the serial port's receive interrupt, without which it takes no input. The processor takes none.
    fn listen(self) -> Self;
    /// Waits for a byte from the serial port and leaves it in AL.
    fn await_byte(self) -> Self;
    /// Sends back every byte from the serial port, up to and with `last`.
    fn echo_until(self, last: u8) -> Self;
    /// Sends `len` bytes of memory at `addr` to the serial port by one string instruction: no more than its buffer.
    fn dump(self, addr: u32, len: u32) -> Self;
    /// Sends `bursts` times 16 bytes of memory from `addr` on, and waits for the transmitter before each burst, as the
    /// drivers of a UART with a FIFO do.
    fn send(self, addr: u32, bursts: u32) -> Self;
    /// Reads a byte of memory.
    fn touch(self, addr: u32) -> Self;
}

impl More for Program {
    fn listen(self) -> Self {
        self.out(rvmm::platform::COM1.start + 1, 1)
    }

    fn await_byte(self) -> Self {
        // again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx
        self.raw(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec])
    }

    fn echo_until(self, last: u8) -> Self {
        // out dx, al; cmp al, last; jne to the start of the waiting
        self.await_byte().raw(&[0xee, 0x3c, last, 0x75, 0xed])
    }

    fn dump(self, addr: u32, len: u32) -> Self {
        let (addr, len) = (addr.to_le_bytes(), len.to_le_bytes());
        // mov esi, addr; mov ecx, len; mov dx, 0x3f8; cld; rep outsb
        self.raw(&[0xbe]).raw(&addr).raw(&[0xb9]).raw(&len).raw(&[0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e])
    }

    fn send(self, addr: u32, bursts: u32) -> Self {
        // mov esi, addr; mov ebx, bursts; cld
        let program =
            self.raw(&[0xbe]).raw(&addr.to_le_bytes()).raw(&[0xbb]).raw(&bursts.to_le_bytes()).raw(&[0xfc]);
        // again: mov dx, 0x3fd; in al, dx; test al, 0x20; jz again; mov dx, 0x3f8; mov ecx, 16; rep outsb
        // dec ebx; jnz again
        program
            .raw(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03])
            .raw(&[0xb9, 16, 0, 0, 0, 0xf3, 0x6e, 0xff, 0xcb, 0x75, 0xe8])
    }

    fn touch(self, addr: u32) -> Self {
        // mov esi, addr; mov al, [rsi]
        self.raw(&[0xbe]).raw(&addr.to_le_bytes()).raw(&[0x8a, 0x06])
    }
}

/// A Linux guest's files.
pub struct Linux {
    pub kernel: PathBuf,
    pub rootfs: PathBuf,
}

fn file(variable: &str, default: &str, made_by: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map_or_else(|| project(default), PathBuf::from);
    if path.is_file() {
        return Some(path);
    }
    skip(&format!("{} is missing: run {made_by}, or set {variable}", path.display()));
    None
}

/// The Linux guest for this host, with the small root file system; says so if there is none.
pub fn linux() -> Option<Linux> {
    with_rootfs("RVMM_TEST_ROOTFS", "target/guest/rootfs.ext4", "scripts/build-rootfs")
}

/// The Linux guest for this host, with the root file system for tests; says so if there is none.
pub fn linux_for_tests() -> Option<Linux> {
    with_rootfs("RVMM_TEST_ROOTFS_TEST", "target/guest/rootfs-test.ext4", "scripts/build-rootfs --test")
}

fn with_rootfs(variable: &str, default: &str, made_by: &str) -> Option<Linux> {
    Some(Linux { kernel: kernel()?, rootfs: file(variable, default, made_by)? })
}

/// The kernel for this host.
fn kernel() -> Option<PathBuf> {
    if !has_kvm() {
        return None;
    }
    match kvm_kind() {
        Some(Kind::Pvm) => file("RVMM_TEST_KERNEL", "target/guest/vmlinux-pvm", "scripts/build-kernel pvm"),
        _ => file("RVMM_TEST_KERNEL", "target/guest/vmlinux", "scripts/build-kernel full"),
    }
}

/// The kernel for this host and the agent's initrd; says so if there is none.
pub fn agent_kernel() -> Option<(PathBuf, PathBuf)> {
    Some((kernel()?, file("RVMM_TEST_AGENT", "target/guest/agent.cpio", "scripts/build-agent")?))
}

impl Linux {
    /// `rvmm` with this guest's kernel, its root, read-only, and 128 MiB of memory.
    pub fn monitor(&self) -> Monitor {
        self.monitor_with_memory("128M")
    }

    /// `rvmm` with this guest's kernel, its root, read-only, and this much memory.
    pub fn monitor_with_memory(&self, memory: &str) -> Monitor {
        let rootfs = format!("{},readonly", self.rootfs.display());
        Monitor::new().arg("--kernel").arg(&self.kernel).args([
            "--rootfs",
            &rootfs,
            "--memory",
            memory,
            "--shutdown-timeout",
            "120",
        ])
    }

    /// `rvmm` with this guest's kernel and a root of its own to write to, at `copy`.
    pub fn monitor_with_copy(&self, copy: &Path) -> Monitor {
        super::tool("cp", &["--sparse=always", self.rootfs.to_str().unwrap(), copy.to_str().unwrap()]);
        Monitor::new().arg("--kernel").arg(&self.kernel).arg("--rootfs").arg(copy).args([
            "--memory",
            "128M",
            "--shutdown-timeout",
            "120",
        ])
    }
}

/// A shell script for the guest, which reads it from its second disk, so that its length and its quotes are no matter.
pub struct Script {
    directory: tempfile::TempDir,
}

impl Script {
    /// A script in which `report NAME VALUE` hands a value to the test. The kernel prints only what it dies of, so that
    /// its messages do not come between.
    pub fn new(text: &str) -> Script {
        let directory = directory();
        let mut text = format!("dmesg -n 1; report() {{ echo; echo \"$1=$2\"; }}\n{text}\nexit\n");
        while text.len() % 512 != 0 {
            text.push('\n');
        }
        fs::write(directory.path().join("script"), text).expect("a script");
        Script { directory }
    }

    /// Adds the script to a run, as `/dev/vdb`. Further disks come after it.
    pub fn on(&self, monitor: Monitor) -> Monitor {
        self.with_cmdline(monitor, "")
    }

    /// The same, with this on the kernel's command line besides.
    pub fn with_cmdline(&self, monitor: Monitor, more: &str) -> Monitor {
        let disk = format!("{},readonly,id=script", self.directory.path().join("script").display());
        let cmdline = format!("quiet {more} rvmm.exec=\"sh /dev/vdb\"");
        monitor.args(["--disk", &disk, "--cmdline", &cmdline])
    }

    /// Runs it to the end of the guest.
    pub fn run(&self, monitor: Monitor) -> Outcome {
        self.on(monitor).run_within(LINUX_PATIENCE)
    }

    /// Runs it to the end of the guest, which works for as long as `work`.
    pub fn run_long(&self, monitor: Monitor, work: Duration) -> Outcome {
        self.on(monitor).run_within(LINUX_PATIENCE + work)
    }
}
