//! System calls that rustix and nix do not have, or not without allocating. The only file with `unsafe` in it.
#![allow(unsafe_code)]

use std::arch::asm;
use std::ffi::{CStr, CString, c_char, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::Errno;

/// Bytes of the stack that children run on until they have become another program.
const STACK_BYTES: usize = 128 << 10;

/// A stack for children that share this process's memory. It is kept, so that its pages are there already for the next.
pub struct Stack(*mut c_void);

impl Stack {
    /// A stack whose pages come when they are touched.
    pub fn new() -> io::Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), STACK_BYTES, access, flags, -1, 0) };
        if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(base)) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this length, and no child runs on it: `spawn` waits for each.
        unsafe { libc::munmap(self.0, STACK_BYTES) };
    }
}

/// libc's has too few bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` up to what Linux 5.7 has.
#[derive(Default)]
#[repr(C)]
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

/// What a child does with what it was given. It must not return, and must not leave allocations behind.
pub type Entry<T> = fn(&mut T) -> !;

struct Start<'a, T> {
    entry: Entry<T>,
    value: &'a mut T,
}

extern "C" fn enter<T>(start: *mut Start<'_, T>) -> ! {
    // SAFETY: `spawn` passes a pointer to its own live value, which it does not touch before this child is gone or has
    // become another program.
    let start = unsafe { &mut *start };
    (start.entry)(start.value)
}

/// Makes a child that shares this process's memory, as vfork does: it runs `entry` on a stack of its own while this
/// process waits, until it has become another program or ended. No page is copied, no page table either. `flags` are
/// further `CLONE_*` flags. The child's number and a descriptor for it come back.
pub fn spawn<T>(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
    stack: &mut Stack,
    value: &mut T,
    entry: Entry<T>,
) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArgs {
        flags: flags | (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.0 as u64,
        stack_size: STACK_BYTES as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    let mut start = Start { entry, value };
    let result: isize;
    // SAFETY: the arguments are as clone3(2) wants them and live. With CLONE_VFORK this thread, the only one, does not run
    // while the child uses its memory. The child has its own stack, 16-byte aligned at its end because pages are, calls a
    // function that does not return, and so never reaches the code behind. The system call changes rax, rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") &raw mut arguments,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") &raw mut start,
            in("r13") enter::<T> as extern "C" fn(*mut Start<'_, T>) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32));
    }
    // SAFETY: the kernel has put a new descriptor there, which nobody else owns.
    Ok((result as i32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Makes a child with a copy of everything; `None` in the child.
pub fn fork() -> io::Result<Option<i32>> {
    // SAFETY: this process has one thread, so that its copy is as consistent as it is itself.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(pid)),
    }
}

/// Ends this process without running anything else of it.
pub fn exit(status: i32) -> ! {
    // SAFETY: it only ends the process.
    unsafe { libc::_exit(status) }
}

/// Strings as execve(2) wants them.
#[derive(Debug)]
pub struct Strings {
    // The pointers point into the strings, whose bytes do not move when the vector does.
    strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

impl Strings {
    /// Those strings.
    pub fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect();
        Self { strings, pointers }
    }

    /// The first of them.
    pub fn first(&self) -> &CStr {
        self.strings.first().map_or(c"", |string| string)
    }
}

/// execve(2); comes back only with an error.
pub fn exec(path: &CStr, arguments: &Strings, environment: &Strings) -> Errno {
    // SAFETY: all three end with NUL, and the lists of pointers with a null pointer; `Strings` keeps what they point to.
    unsafe { libc::execve(path.as_ptr(), arguments.pointers.as_ptr(), environment.pointers.as_ptr()) };
    last_error()
}

/// execveat(2) of the program behind a descriptor; comes back only with an error.
pub fn exec_fd(program: BorrowedFd<'_>, arguments: &Strings, environment: &Strings) -> Errno {
    // SAFETY: as in `exec`; the path is empty and ends with NUL.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            arguments.pointers.as_ptr(),
            environment.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    last_error()
}

fn last_error() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The result of a system call made by libc.
fn checked(result: impl Into<i64>) -> Result<i64, Errno> {
    let result = result.into();
    if result < 0 { Err(last_error()) } else { Ok(result) }
}

/// kill(2) with any number, real-time signals among them.
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    checked(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// prlimit(2) of this process with any number.
pub fn set_rlimit(resource: u32, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the new limit is live; the old one is not asked for.
    checked(unsafe { libc::prlimit64(0, resource as _, &limit, std::ptr::null_mut()) }).map(drop)
}

/// Has this process no longer share its descriptors with the one that made it.
pub fn unshare_files() -> Result<(), Errno> {
    // SAFETY: what the descriptors' owners see is the other process's table, which stays.
    checked(unsafe { libc::unshare(libc::CLONE_FILES) }).map(drop)
}

/// Puts this process into a control group namespace of its own.
pub fn unshare_cgroup() -> Result<(), Errno> {
    // SAFETY: no memory is involved.
    checked(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }).map(drop)
}

/// Marks all descriptors but the standard ones as to be closed on exec.
pub fn close_on_exec() -> Result<(), Errno> {
    // SAFETY: no memory is involved, and the descriptors stay.
    checked(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Makes a signal do what it does by default.
pub fn default_signal(signal: i32) {
    // SAFETY: no handler is set.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// mount_setattr(2) of what a descriptor stands for: sets `MOUNT_ATTR_*`.
pub fn set_mount_attributes(tree: impl AsFd, recursive: bool, set: u64) -> Result<(), Errno> {
    /// `MOUNT_ATTR__ATIME`: one of several values, of which the old one has to go first.
    const ACCESS_TIME: u64 = 0x70;
    let clear = if set & ACCESS_TIME == 0 { 0 } else { ACCESS_TIME };
    // What is set, what is cleared, a propagation, a user namespace.
    let attributes = [set, clear, 0, 0];
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is empty and ends with NUL; the attributes are four numbers, as long as is said.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    })
    .map(drop)
}

/// getcwd(2) into a buffer: how many bytes there are, with the NUL.
pub fn current_directory(buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the buffer is as long as is said.
    checked(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })
        .map(|len| len as usize)
}

/// seccomp(2): sets a filter of `struct sock_filter`s.
pub fn set_seccomp(program: &[u8], flags: u32) -> Result<(), Errno> {
    let len = u16::try_from(program.len() / 8).map_err(|_| Errno::INVAL)?;
    // The kernel reads it byte by byte, so its alignment is no matter; the type only says otherwise.
    let filter = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the filter is as long as is said and only read.
    checked(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const filter)
    })
    .map(drop)
}

/// The start of `union bpf_attr` for BPF_PROG_LOAD.
#[derive(Default)]
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
}

/// The same for BPF_PROG_ATTACH.
#[derive(Default)]
#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const BPF_PROG_LOAD: i32 = 5;
const BPF_PROG_ATTACH: i32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Has an eBPF program decide about the devices of a control group.
pub fn attach_device_filter(cgroup: impl AsFd, program: &[u8]) -> Result<(), Errno> {
    // The kernel wants them aligned no more than bytes are.
    let load = ProgramLoad {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instructions: u32::try_from(program.len() / 8).map_err(|_| Errno::INVAL)?,
        program: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..ProgramLoad::default()
    };
    // SAFETY: program and licence are live and as long as is said; the kernel reads as much of the structure as is given.
    let fd = checked(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<ProgramLoad>())
    })?;
    // SAFETY: the kernel has made a new descriptor, which nobody else owns.
    let program = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
    let attach = ProgramAttach {
        target: cgroup.as_fd().as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: as above.
    checked(unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<ProgramAttach>())
    })
    .map(drop)
}

/// Adds random bytes to the kernel's pool, and says that they are random.
pub fn add_entropy(random: impl AsFd, bytes: &[u8]) -> Result<(), Errno> {
    /// `_IOW('R', 0x03, int [2])`
    const RNDADDENTROPY: u64 = 0x4008_5203;
    // `struct rand_pool_info`: bits, bytes, and the bytes.
    let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= 4096).ok_or(Errno::INVAL)?;
    let mut info = vec![len * 8, len];
    info.extend(bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_ne_bytes(word)
    }));
    // SAFETY: the structure is live, and as many bytes follow as it says.
    checked(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDADDENTROPY, info.as_ptr()) }).map(drop)
}

/// Has the kernel's generator take in what is in its pool.
pub fn reseed(random: impl AsFd) -> Result<(), Errno> {
    /// `_IO('R', 0x07)`
    const RNDRESEEDCRNG: u64 = 0x5207;
    // SAFETY: no memory is involved.
    checked(unsafe { libc::ioctl(random.as_fd().as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// Has the kernel read a disk's partition table again.
pub fn reread_partitions(disk: impl AsFd) -> Result<(), Errno> {
    /// `_IO(0x12, 95)`
    const BLKRRPART: u64 = 0x125f;
    // SAFETY: no memory is involved.
    checked(unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), BLKRRPART, std::ptr::null::<c_void>()) }).map(drop)
}

/// Which keys an input device has, one bit each.
pub fn key_bits(device: impl AsFd) -> Result<[u8; 96], Errno> {
    /// `EVIOCGBIT(EV_KEY, 96)`
    const EVIOCGBIT: u64 = 0x8060_4521;
    let mut bits = [0; 96];
    // SAFETY: the request's number says how many bytes are written, and there are so many.
    checked(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), EVIOCGBIT, bits.as_mut_ptr()) })?;
    Ok(bits)
}

/// Has Ctrl-Alt-Del be a signal to process 1 and no reset.
pub fn signal_on_ctrl_alt_del() {
    // SAFETY: no memory is involved, and this command stops nothing.
    unsafe { libc::reboot(libc::RB_DISABLE_CAD) };
}

/// Powers the machine off. Comes back only if the kernel cannot.
pub fn power_off() {
    // SAFETY: no memory is involved.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
}
