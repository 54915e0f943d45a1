//! From the kernel's first process to a place where containers can be made.

use std::ffi::CStr;
use std::os::unix::fs::FileExt;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::{Mode, mkdir};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{DumpableBehavior, chdir, chroot, set_dumpable_behavior, umask};
use rustix::system::sethostname;

use crate::system;

/// The ports of docs/guest-event-port.md.
const PORT_MARK: u64 = 0x5f0;
const PORT_POWER: u64 = 0x600;
/// The first user process runs.
const MARK_USER_SPACE: u8 = 1;
/// What the monitor answers at the mark's port.
const MONITOR_ID: u8 = 0x52;
const POWER_OFF: u8 = 0x34;

/// Where containers' directories are.
pub const CONTAINERS: &str = "/c";
/// Where memory that containers share is.
pub const MEMORY: &str = "/m";
/// Where the shared folder is.
pub const SHARE: &str = "/share";
/// Where control groups are.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// Why the guest cannot be used.
#[derive(Debug)]
pub struct Error(pub &'static str, pub Errno);

/// What happens to this process from outside.
pub fn signals() -> Result<SignalFd, nix::Error> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGPWR] {
        set.add(signal);
    }
    // The terminal of a process must not stop this one.
    let mut blocked = set;
    blocked.add(Signal::SIGTTOU);
    blocked.add(Signal::SIGPIPE);
    blocked.thread_set_mask()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Makes file systems, and a root that a container's process can leave.
pub fn prepare() -> Result<(), Error> {
    umask(Mode::empty());
    // Children are born with it, and so are containers' processes: Rust ignores this signal.
    system::default_signal(libc::SIGPIPE);
    system::signal_on_ctrl_alt_del();
    // A container's root, without a right of its own to trace, must not reach what shares this process's memory.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|error| Error("be untraceable", error))?;
    let none = MountFlags::empty();
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // The kernel's own root cannot be left by pivot_root(2), so another one goes over it.
    new_mount(c"tmpfs", c"/r", none, c"mode=0755")?;
    chdir(c"/r").map_err(|error| Error("enter the new root", error))?;
    for (name, mode) in
        [(c"dev", 0o755), (c"proc", 0o555), (c"sys", 0o555), (c"c", 0o700), (c"m", 0o700), (c"share", 0o700)]
    {
        match mkdir(name, Mode::from_raw_mode(mode)) {
            Ok(()) => {}
            Err(error) => return Err(Error("make a directory", error)),
        }
    }
    new_mount(c"devtmpfs", c"dev", MountFlags::NOSUID | MountFlags::NOEXEC, c"mode=0755")?;
    new_mount(c"proc", c"proc", safe, c"")?;
    new_mount(c"sysfs", c"sys", safe, c"")?;
    new_mount(c"cgroup2", c"sys/fs/cgroup", safe, c"")?;
    mount_move(c".", c"/").map_err(|error| Error("move the new root", error))?;
    chroot(c".").map_err(|error| Error("change the root", error))?;
    chdir(c"/").map_err(|error| Error("enter the root", error))?;
    // Until the host says another one.
    sethostname(b"rvmm").map_err(|error| Error("set the host name", error))?;
    Ok(())
}

fn new_mount(kind: &CStr, target: &CStr, flags: MountFlags, data: &CStr) -> Result<(), Error> {
    mount(kind, target, kind, flags, data).map_err(|error| Error("mount a file system", error))
}

/// Tells the monitor that user space is reached. The initrd has the device's file.
pub fn mark_start() {
    // Elsewhere than under rvmm there is no such port, and nothing is lost.
    let _ = write_port(PORT_MARK, MARK_USER_SPACE);
}

fn write_port(port: u64, value: u8) -> std::io::Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open("/dev/port")?;
    file.write_all_at(&[value], port)
}

fn read_port(port: u64) -> std::io::Result<u8> {
    let mut byte = [0xff];
    std::fs::File::open("/dev/port")?.read_exact_at(&mut byte, port)?;
    Ok(byte[0])
}

/// Ends the machine.
pub fn power_off() -> ! {
    // A kernel without a power switch would only halt; the monitor has one.
    let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let kernel_can = std::path::Path::new("/sys/firmware/acpi").exists() || cmdline.contains("rvmm_ports");
    if !kernel_can && read_port(PORT_MARK).is_ok_and(|id| id == MONITOR_ID) {
        let _ = write_port(PORT_POWER, POWER_OFF);
    }
    system::power_off();
    // Only if the kernel has refused. Process 1 must not end.
    loop {
        std::thread::park();
    }
}
