//! System calls that have no safe wrapper: new processes, signals, filters, terminals, programs for devices.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::container::backend::WindowSize;

/// Exit code of a child whose code has panicked.
const PANICKED: i32 = 70;

/// linux/sched.h; libc's is too narrow.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// `struct clone_args` of clone3(2), its first version with a control group.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A process that was made here.
#[derive(Debug)]
pub(super) struct Child {
    /// Its number, as this process sees it.
    pub(super) pid: i32,
    /// The process itself.
    pub(super) pidfd: OwnedFd,
}

/// Makes a child that runs a function and ends with the code that it returns.
///
/// `flags` are those of clone(2) that make namespaces, and `CLONE_PARENT`. The caller has one thread.
pub(super) fn spawn(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    child: impl FnOnce() -> i32,
) -> io::Result<Child> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: flags | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        // A sibling's is that of its new parent's earlier child.
        exit_signal: if flags & libc::CLONE_PARENT as u64 != 0 { 0 } else { libc::SIGCHLD as u64 },
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the structure has the size that is given and lives through the call, as does `pidfd`, which it points to.
    // Without a stack and without CLONE_VM the child goes on as fork's does, on its own copy of everything. This
    // process has one thread, so no lock can be held in the copy by a thread that is not there.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // What the parent has registered for its own exit is not run.
            exit(catch_unwind(AssertUnwindSafe(child)).unwrap_or(PANICKED))
        }
        pid => {
            // SAFETY: the kernel has made this descriptor for us and nobody else has it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Child { pid: pid as i32, pidfd })
        }
    }
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Makes a mount read-only, by a descriptor of it.
pub(super) fn make_mount_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    let attributes =
        MountAttributes { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, user_namespace: 0 };
    let (empty, flags) = (c"".as_ptr(), libc::AT_EMPTY_PATH);
    // SAFETY: the string ends with a zero byte, the structure has the size that is given, and both are only read.
    let result = unsafe {
        let size = size_of::<MountAttributes>();
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), empty, flags, &raw const attributes, size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves namespaces for new ones, by flags of unshare(2).
pub(super) fn unshare(flags: u32) -> io::Result<()> {
    // SAFETY: a plain call on a number; no memory or descriptor table is shared with others that it could be taken from.
    let result = unsafe { libc::unshare(flags as libc::c_int) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a child by fork(2), which filters know, and returns its number.
pub(super) fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: this process has one thread, so the copy is whole; it ends in the closure's code or at once.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => exit(catch_unwind(AssertUnwindSafe(child)).unwrap_or(PANICKED)),
        pid => Ok(pid),
    }
}

/// Ends the process at once.
pub(super) fn exit(code: i32) -> ! {
    // SAFETY: nothing comes after it.
    unsafe { libc::_exit(code) }
}

/// Closes all descriptors but the three of the streams. Only for a process that uses none of them any more.
pub(super) fn close_all_but_streams() {
    // SAFETY: the caller ends by `exit` without touching any value that owns a descriptor.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
}

/// Waits for any signal; all are blocked.
pub(super) fn wait_signal() -> i32 {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the first call fills the set in, and the second reads it and wants no details.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigwaitinfo(all.as_ptr(), std::ptr::null_mut())
    }
}

/// Sends a signal by its number, real-time ones too.
pub(super) fn send_signal(pid: i32, signal: i32) {
    // SAFETY: a plain call on numbers.
    unsafe { libc::kill(pid, signal) };
}

/// Sends a signal to exactly one process.
pub(super) fn signal_pidfd(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the descriptor is open, and without details there is nothing for the kernel to read.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Highest signal of the kernel, and the bytes of its set of signals.
const SIGNAL_MAX: i32 = 64;
const SIGNAL_SET_BYTES: usize = 8;

/// Gives all signals back their default actions, so that a program starts as it expects to.
pub(super) fn default_signals() {
    // The kernel's structure (handler, flags, restorer, mask), all zero: the default action. The C library's call does
    // not reach two signals that it keeps for itself, and they may have been ignored before this program was started.
    let default = [0u64; 4];
    let none = std::ptr::null_mut::<u64>();
    for signal in 1..=SIGNAL_MAX {
        // SAFETY: the structure is as large as the kernel's and is only read; no handler is set. Signals that cannot be
        // changed are refused, which changes nothing.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, SIGNAL_SET_BYTES) };
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

/// Loads a filter of system calls: instructions of 8 bytes each.
pub(super) fn load_filter(program: &[u8], flags: u32) -> io::Result<()> {
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(8)
        .map(|one| libc::sock_filter {
            code: u16::from_ne_bytes([one[0], one[1]]),
            jt: one[2],
            jf: one[3],
            k: u32::from_ne_bytes([one[4], one[5], one[6], one[7]]),
        })
        .collect();
    let len = u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    let operation = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the structure points to `len` instructions, both live through the call, and the kernel only reads them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets a terminal's size.
pub(super) fn set_window_size(terminal: BorrowedFd<'_>, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the call reads one `winsize`, which lives through it.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes this process's terminal serve a process group.
pub(super) fn set_foreground(group: i32) {
    // SAFETY: a plain call on a number; a descriptor that is no terminal is refused.
    unsafe { libc::tcsetpgrp(0, group) };
}

/// `union bpf_attr` for BPF_PROG_LOAD, as far as it is needed.
#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// `union bpf_attr` for BPF_PROG_ATTACH, its first version.
#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// The program holds together with those of the groups above and below.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Loads a program that decides about devices, and attaches it to a control group.
pub(super) fn attach_device_program(cgroup: BorrowedFd<'_>, instructions: &[u64]) -> io::Result<()> {
    let load = ProgramLoad {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..ProgramLoad::default()
    };
    // SAFETY: the structure has the size that is given; it points to the instructions, as many as it says, and to a
    // string that ends with a zero byte. All of them live through the call, and the kernel only reads them.
    let program =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<ProgramLoad>()) };
    if program < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let program = unsafe { OwnedFd::from_raw_fd(program as RawFd) };
    let attach = ProgramAttach {
        target: cgroup.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the structure has the size that is given, holds descriptors that are open, and is only read.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<ProgramAttach>())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
