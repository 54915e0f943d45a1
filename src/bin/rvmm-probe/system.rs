//! Calls of the kernel that no safe interface has: what is measured here is the call itself.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::filters::Instruction;

/// Forks; the child runs `child` and ends with the code that it returns. Returns when the child has ended.
///
/// The process must have one thread.
pub fn fork_and_wait(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: this program has one thread, so no lock can be left taken in the child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = child();
            // SAFETY: ends the child at once, without what the parent has registered for its own end.
            unsafe { libc::_exit(code) }
        }
        pid => wait_for(pid),
    }
}

/// Forks and leaves the child, which runs `child`, to itself.
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: as above.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = child();
            // SAFETY: as above.
            unsafe { libc::_exit(code) }
        }
        pid => Ok(pid),
    }
}

/// Waits for a child.
pub fn wait_for(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: `status` lives through the call.
        if unsafe { libc::waitpid(pid, &raw mut status, 0) } == pid {
            return Ok(status);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Ends a child.
pub fn kill(pid: i32) {
    // SAFETY: takes no pointers.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Replaces this process by a program; returns only if that fails.
pub fn exec(program: &str, arguments: &[&str]) -> io::Error {
    let words: Result<Vec<CString>, _> =
        std::iter::once(&program).chain(arguments).map(|word| CString::new(*word)).collect();
    let Ok(words) = words else { return io::ErrorKind::InvalidInput.into() };
    let mut pointers: Vec<*const libc::c_char> = words.iter().map(|word| word.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: the strings and the list of pointers to them, which ends with null, live through the call.
    unsafe { libc::execv(pointers[0], pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// The least system call, without anything that a library may remember.
pub fn getppid() -> i64 {
    // SAFETY: takes nothing.
    unsafe { libc::syscall(libc::SYS_getppid) }
}

/// Touches each page of a private mapping of a file once, and returns how many there are.
pub fn touch_file(file: BorrowedFd<'_>, bytes: usize) -> io::Result<usize> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let pages = bytes / 4096;
    for page in 0..pages {
        // SAFETY: within the mapping, which the caller made no longer than the file.
        std::hint::black_box(unsafe { start.cast::<u8>().add(page * 4096).read_volatile() });
    }
    // SAFETY: the mapping from above, to which nothing refers any more.
    unsafe { libc::munmap(start, bytes) };
    Ok(pages)
}

/// Touches each page of new memory once. Small pages only, so that each costs a fault.
pub fn touch_memory(bytes: usize) -> io::Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start =
        unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping from above. A kernel without huge pages says no, and needs no telling.
    unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
    let pages = bytes / 4096;
    for page in 0..pages {
        // SAFETY: within the mapping.
        unsafe { start.cast::<u8>().add(page * 4096).write_volatile(1) };
    }
    // SAFETY: as above.
    unsafe { libc::munmap(start, bytes) };
    Ok(pages)
}

fn result(returned: i64) -> io::Result<()> {
    if returned == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches to a process as a debugger does, and lets it go at once.
pub fn trace(pid: i32) -> io::Result<()> {
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: PTRACE_SEIZE and PTRACE_DETACH take no addresses.
    result(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, null, null) })?;
    // SAFETY: as above.
    unsafe { libc::ptrace(libc::PTRACE_DETACH, pid, null, null) };
    Ok(())
}

/// The filters of system calls of a thread, the last one first. It is stopped for as long as they are read.
pub fn filters(thread: i32) -> io::Result<Vec<Vec<Instruction>>> {
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: PTRACE_SEIZE, PTRACE_INTERRUPT and PTRACE_DETACH take no addresses.
    result(unsafe { libc::ptrace(libc::PTRACE_SEIZE, thread, null, null) })?;
    // SAFETY: as above.
    let stopped = result(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, thread, null, null) })
        .and_then(|()| wait_for_stop(thread));
    let found = stopped
        .and_then(|()| (0..MAX_FILTERS).map_while(|index| filter(thread, index).transpose()).collect());
    // SAFETY: as above.
    unsafe { libc::ptrace(libc::PTRACE_DETACH, thread, null, null) };
    found
}

/// Filters of a thread that are read at most.
const MAX_FILTERS: usize = 64;

fn wait_for_stop(thread: i32) -> io::Result<()> {
    let mut status = 0;
    loop {
        // SAFETY: `status` lives through the call.
        if unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) } == thread {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// A filter by its place; `None` behind the last.
fn filter(thread: i32, index: usize) -> io::Result<Option<Vec<Instruction>>> {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    let place = index as *mut libc::c_void;
    // SAFETY: without a place to write to, the kernel says how many instructions there are.
    let count = unsafe {
        libc::ptrace(PTRACE_SECCOMP_GET_FILTER, thread, place, std::ptr::null_mut::<libc::c_void>())
    };
    if count < 0 {
        let error = io::Error::last_os_error();
        // None at this place, and none at all.
        return match error.raw_os_error() {
            Some(libc::ENOENT | libc::EINVAL) => Ok(None),
            _ => Err(error),
        };
    }
    let empty = libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 };
    let mut program = vec![empty; usize::try_from(count).unwrap_or(0)];
    let to = program.as_mut_ptr().cast::<libc::c_void>();
    // SAFETY: the thread is stopped and so its filter is still the one whose length was asked for, which `program` has.
    let written = unsafe { libc::ptrace(PTRACE_SECCOMP_GET_FILTER, thread, place, to) };
    result(written.min(0))?;
    let instruction =
        |one: libc::sock_filter| Instruction { code: one.code, then: one.jt, otherwise: one.jf, k: one.k };
    Ok(Some(program.into_iter().map(instruction).collect()))
}

/// Adds a key to the session's keyring and takes it away.
pub fn add_key() -> io::Result<()> {
    const KEYRING_SESSION: i32 = -3;
    const KEYCTL_REVOKE: i32 = 3;
    // SAFETY: the strings end with a zero and live through the call, the payload has four bytes.
    let key = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            c"rvmm-probe".as_ptr(),
            c"none".as_ptr(),
            4,
            KEYRING_SESSION,
        )
    };
    result(key)?;
    // SAFETY: takes no pointers.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_REVOKE, key) };
    Ok(())
}

/// Asks the kernel to load what is no module. It looks at the right to do so first.
pub fn load_nothing(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the string ends with a zero.
    result(unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) })
}

/// Asks for a new session keyring, BPF map, performance counter, io_uring and so on: entry points of the kernel that are
/// often shut. Each is called with arguments that no kernel accepts.
pub fn is_reachable(number: i64) -> bool {
    // SAFETY: all arguments are invalid as pointers, descriptors and numbers; the callers name calls that have no effect then.
    let returned = unsafe { libc::syscall(number, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64) };
    let error = io::Error::last_os_error().raw_os_error();
    returned != -1 || !matches!(error, Some(libc::EPERM | libc::ENOSYS | libc::EACCES))
}

/// Has the kernel end this process after so many seconds.
pub fn alarm(seconds: u32) {
    // SAFETY: takes no pointers.
    unsafe { libc::alarm(seconds) };
}
