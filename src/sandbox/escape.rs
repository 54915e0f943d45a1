//! What code in the monitor's address space would try: for tests, in debug builds only.
//!
//! With `RVMM_SANDBOX_ESCAPE` in the environment each thread, once its walls are up, makes system calls that would lead
//! out. A call that a filter traps fails here instead of ending the VM. Each thread reports one line.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::CString;

use super::Kind;

thread_local! {
    static TRYING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread tries to escape just now.
pub(super) fn is_trying() -> bool {
    TRYING.get()
}

type Attempt = (&'static str, libc::c_long, [libc::c_long; 6]);

fn attempts(paths: &Paths) -> Vec<Attempt> {
    let at = |text: &CString| text.as_ptr() as libc::c_long;
    let (secret, image, fresh, program) =
        (at(&paths.secret), at(&paths.image), at(&paths.fresh), at(&paths.program));
    let here = libc::c_long::from(libc::AT_FDCWD);
    let executable = libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC);
    let anonymous = libc::c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let (inet, stream) = (libc::c_long::from(libc::AF_INET), libc::c_long::from(libc::SOCK_STREAM));
    let user = libc::c_long::from(libc::CLONE_NEWUSER);
    let mount = libc::c_long::from(libc::CLONE_NEWNS);
    let write = libc::c_long::from(libc::O_WRONLY);
    let address = paths.address.as_ptr() as libc::c_long;
    let how = paths.how.as_ptr() as libc::c_long;
    vec![
        ("open a file outside", libc::SYS_open, [secret, 0, 0, 0, 0, 0]),
        ("openat a file outside", libc::SYS_openat, [here, secret, 0, 0, 0, 0]),
        ("openat2 a file outside", libc::SYS_openat2, [here, secret, how, 24, 0, 0]),
        ("write to another VM's image", libc::SYS_openat, [here, image, write, 0, 0, 0]),
        ("make a file", libc::SYS_creat, [fresh, 0o600, 0, 0, 0, 0]),
        ("truncate another VM's image", libc::SYS_truncate, [image, 0, 0, 0, 0, 0]),
        ("open by handle", libc::SYS_open_by_handle_at, [here, how, 0, 0, 0, 0]),
        ("remove a file", libc::SYS_unlink, [image, 0, 0, 0, 0, 0]),
        ("rename a file", libc::SYS_rename, [image, fresh, 0, 0, 0, 0]),
        ("link a file", libc::SYS_link, [image, fresh, 0, 0, 0, 0]),
        ("change rights", libc::SYS_chmod, [image, 0o777, 0, 0, 0, 0]),
        ("change an owner", libc::SYS_chown, [image, 0, 0, 0, 0, 0]),
        ("make a device", libc::SYS_mknod, [fresh, 0o020_600, 0x101, 0, 0, 0]),
        ("make a memory file", libc::SYS_memfd_create, [secret, 0, 0, 0, 0, 0]),
        ("an IPv4 socket", libc::SYS_socket, [inet, stream, 0, 0, 0, 0]),
        ("an IPv6 socket", libc::SYS_socket, [libc::AF_INET6.into(), stream, 0, 0, 0, 0]),
        ("a netlink socket", libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0, 0, 0, 0]),
        ("a packet socket", libc::SYS_socket, [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0, 0, 0, 0]),
        ("listen at an address", libc::SYS_bind, [0, address, 16, 0, 0, 0]),
        ("attach to a process", libc::SYS_ptrace, [16, 1, 0, 0, 0, 0]),
        ("read another's memory", libc::SYS_process_vm_readv, [1, how, 1, how, 1, 0]),
        ("write another's memory", libc::SYS_process_vm_writev, [1, how, 1, how, 1, 0]),
        ("run a program", libc::SYS_execve, [program, 0, 0, 0, 0, 0]),
        ("run a program by descriptor", libc::SYS_execveat, [here, program, 0, 0, 0, 0]),
        ("fork", libc::SYS_fork, [0; 6]),
        ("a process in a user namespace", libc::SYS_clone, [user | 17, 0, 0, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [how, 8, 0, 0, 0, 0]),
        ("a user namespace", libc::SYS_unshare, [user, 0, 0, 0, 0, 0]),
        ("a mount namespace", libc::SYS_unshare, [mount, 0, 0, 0, 0, 0]),
        ("another's namespace", libc::SYS_setns, [0, 0, 0, 0, 0, 0]),
        ("mount", libc::SYS_mount, [program, program, 0, libc::MS_BIND as libc::c_long, 0, 0]),
        ("unmount", libc::SYS_umount2, [program, 0, 0, 0, 0, 0]),
        ("change the root", libc::SYS_chroot, [program, 0, 0, 0, 0, 0]),
        ("signal another process", libc::SYS_tgkill, [1 << 20, 1 << 20, 0, 0, 0, 0]),
        ("a descriptor of a process", libc::SYS_pidfd_open, [1, 0, 0, 0, 0, 0]),
        ("memory to run", libc::SYS_mmap, [0, 4096, executable, anonymous, -1, 0]),
        ("make memory runnable", libc::SYS_mprotect, [program & !0xfff, 4096, executable, 0, 0, 0]),
        ("make all that is read runnable", libc::SYS_personality, [0x040_0000, 0, 0, 0, 0, 0]),
        ("become root", libc::SYS_setuid, [0, 0, 0, 0, 0, 0]),
        ("take capabilities", libc::SYS_capset, [how, how, 0, 0, 0, 0]),
        ("show itself to debuggers", libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0, 0, 0]),
        ("load a BPF program", libc::SYS_bpf, [0, how, 24, 0, 0, 0]),
        ("watch the processor", libc::SYS_perf_event_open, [how, 0, -1, -1, 0, 0]),
        ("the kernel's keys", libc::SYS_keyctl, [0, 0, 0, 0, 0, 0]),
        ("handle page faults", libc::SYS_userfaultfd, [0; 6]),
        ("load a module", libc::SYS_init_module, [how, 24, secret, 0, 0, 0]),
        ("another ring", libc::SYS_io_uring_setup, [8, how, 0, 0, 0, 0]),
        ("type into a terminal", libc::SYS_ioctl, [0, 0x5412, how, 0, 0, 0]),
        ("another VM", libc::SYS_ioctl, [0, 0xae01, 0, 0, 0, 0]),
        ("set the clock", libc::SYS_settimeofday, [how, 0, 0, 0, 0, 0]),
    ]
}

/// What the attempts point to, made before the walls are tried.
struct Paths {
    secret: CString,
    image: CString,
    fresh: CString,
    program: CString,
    address: [u64; 2],
    how: [u64; 16],
}

/// Tries, if tests ask for it.
pub(super) fn try_all(kind: Kind) {
    let Some(directory) = std::env::var_os("RVMM_SANDBOX_ESCAPE") else { return };
    let directory = directory.to_string_lossy().into_owned();
    let text = |text: String| CString::new(text).unwrap_or_default();
    let paths = Paths {
        secret: text("/etc/passwd".into()),
        image: text(format!("{directory}/image")),
        fresh: text(format!("{directory}/fresh")),
        program: text("/bin/true".into()),
        address: [2, 0],
        how: [0; 16],
    };
    let attempts = attempts(&paths);
    let mut escaped = Vec::new();
    for (what, call, arguments) in &attempts {
        TRYING.set(true);
        let [a, b, c, d, e, f] = *arguments;
        // SAFETY: none: this is what an attacker would do. All that is pointed to lives in `paths`, and the calls that
        // would end or change the process must not succeed, which is what is tested.
        let result = unsafe { libc::syscall(*call, a, b, c, d, e, f) };
        TRYING.set(false);
        if result >= 0 {
            escaped.push(*what);
        }
    }
    let report = format!(
        "escape: {}: {} of {} attempts failed{}\n",
        kind.name(),
        attempts.len() - escaped.len(),
        attempts.len(),
        if escaped.is_empty() { String::new() } else { format!("; escaped by: {}", escaped.join(", ")) }
    );
    let _ = std::io::Write::write_all(&mut std::io::stderr(), report.as_bytes());
}
