//! What happens when a thread makes a system call that it may not: the VM ends, and says which call it was.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;

use super::{Kind, name};

/// Exit code of a VM whose monitor made a system call that it may not.
pub const EXIT_VIOLATION: u8 = 124;

/// Where in `siginfo_t` a SIGSYS tells the call's number (`sigaction(2)`: address, then number, behind a header of 16).
const SYSCALL_OFFSET: usize = 24;

thread_local! {
    static KIND: Cell<Option<Kind>> = const { Cell::new(None) };
}

/// Notes what this thread is, for the message.
pub(super) fn name_thread(kind: Kind) {
    KIND.set(Some(kind));
}

/// Has the process end when a thread makes a system call that is not in its list. The signal must not be blocked, or the
/// kernel ends the process without a word.
pub(super) fn install() -> io::Result<()> {
    // SAFETY: an all-zero `sigaction` is a valid value; the handler has the type that goes with SA_SIGINFO and makes no
    // calls but async-signal-safe ones. The set is filled before it is used.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_violation as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGSYS);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A line that is put together without memory from the heap, which the thread may have locked.
struct LineBuffer {
    bytes: [u8; 256],
    len: usize,
}

impl LineBuffer {
    fn push(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, number: u32) {
        let mut digits = [0u8; 10];
        let mut rest = number;
        let mut count = 0;
        for place in digits.iter_mut().rev() {
            *place = b'0' + (rest % 10) as u8;
            rest /= 10;
            count += 1;
            if rest == 0 {
                break;
            }
        }
        let text = digits.get(digits.len() - count..).unwrap_or_default();
        self.push(std::str::from_utf8(text).unwrap_or_default());
    }
}

extern "C" fn on_violation(_: libc::c_int, info: *const libc::siginfo_t, context: *mut libc::c_void) {
    #[cfg(debug_assertions)]
    if super::escape::is_trying() {
        // SAFETY: the kernel passes a whole `ucontext_t`, which is this handler's until it returns.
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RAX as usize] = -1 };
        return;
    }
    let _ = context;
    #[cfg(debug_assertions)]
    if super::escape::is_trying() {
        // SAFETY: the kernel passes a whole `ucontext_t`, which is this handler's until it returns.
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RAX as usize] = -1 };
        return;
    }
    let _ = context;
    crate::terminal::restore();
    // SAFETY: the kernel passes a whole `siginfo_t`, and at this place of one for SIGSYS there is an int.
    let number = unsafe { info.cast::<u8>().add(SYSCALL_OFFSET).cast::<libc::c_int>().read() };
    let mut line = LineBuffer { bytes: [0; 256], len: 0 };
    line.push("rvmm: the sandbox ends the VM: a thread of kind ");
    line.push(KIND.get().map_or("unknown", Kind::name));
    line.push(" made the system call ");
    line.push(name(number.into()).unwrap_or("without a name"));
    line.push(" (");
    line.push_number(number.unsigned_abs());
    line.push("), which it may not (docs/security.md; --no-sandbox turns the sandbox off)\n");
    // SAFETY: plain system calls with a buffer that lives until they return.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::syscall(libc::SYS_exit_group, libc::c_long::from(EXIT_VIOLATION));
    }
}
