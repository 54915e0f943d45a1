//! How the file server shuts itself in, before it has seen a byte of the guest's.
//!
//! - A mount namespace of its own in which the folder is the root, and nothing else is. Mounts that the host makes below
//!   the folder later appear there, mounts made there would not appear on the host.
//! - As root: only the capabilities that keeping owners needs. Else a user namespace of its own, in which the user is
//!   root and the only one.
//! - A filter for system calls: no sockets, no programs, no signals to others, no executable memory.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::Options;
use crate::sandbox::privileges;

/// Descriptors that are asked for. The host may allow fewer.
const FDS_WANTED: u64 = 1 << 20;
/// What the kernel allows to programs that ask for nothing.
const FDS_DEFAULT: u64 = 1024;

/// Why the process could not shut itself in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step failed.
    #[error("cannot {what}")]
    Step {
        /// What was to be done.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The filter could not be made or set.
    #[error("cannot filter system calls")]
    Filter(#[source] seccompiler::Error),
    /// The same.
    #[error("cannot make a filter for system calls")]
    Rules(#[source] seccompiler::BackendError),
}

/// What there is inside.
pub(super) struct Inside {
    /// The folder.
    pub(super) root: OwnedFd,
    /// `/proc/self/fd`, and no way from there to the rest of `/proc`.
    pub(super) proc: OwnedFd,
    /// Whether files can have other owners than one.
    pub(super) many_owners: bool,
    /// How many descriptors the process may have.
    pub(super) fds_max: usize,
}

/// Closes what this process has inherited beside the standard descriptors.
pub(super) fn close_inherited() {
    // SAFETY: nothing in this process has opened a descriptor yet, so none that Rust code owns is closed. On kernels
    // that do not know the call, descriptors stay as whoever started rvmm left them.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
}

trait Step<T> {
    fn step(self, what: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Step { what, source: source.into() })
    }
}

/// Shuts the process in; it must have one thread only. No other descriptor of the folder may stay open.
pub(super) fn enter(folder: OwnedFd, options: &Options) -> Result<Inside, Error> {
    // A comfort only: it is lost when a file is made for another user. What counts is the end of the socket.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("follow the monitor")?;
    let _ = rustix::thread::set_name(c"rvmm-files");
    let fds_max = raise_limits();
    rustix::process::umask(Mode::empty());

    let mine = rustix::thread::capabilities(None).step("read capabilities")?;
    let many_owners = mine.effective.contains(needed(options) | CapabilitySet::SYS_ADMIN);
    // The working directory moves into the new namespace, a descriptor does not.
    rustix::process::fchdir(&folder).step("enter the folder")?;
    drop(folder);
    if many_owners {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).step("make a mount namespace")?;
        match rustix::thread::set_thread_groups(&[]) {
            // In a namespace of one user groups cannot be left, so that nobody gets around what a group is kept from.
            Err(Errno::PERM) if groups_are_fixed() => {}
            result => result.step("leave all groups")?,
        }
    } else {
        become_root_of_nothing()?;
    }
    let (root, proc) = change_root(options)?;
    drop_capabilities(needed(options))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("hide from debuggers")?;
    rustix::thread::set_no_new_privs(true).step("renounce privileges")?;
    Ok(Inside { root, proc, many_owners, fds_max })
}

fn groups_are_fixed() -> bool {
    std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|setting| setting.trim() == "deny")
}

/// The capabilities that keeping owners, modes and times of files takes.
fn needed(options: &Options) -> CapabilitySet {
    let owners = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID;
    if options.devices { owners | CapabilitySet::MKNOD } else { owners }
}

fn raise_limits() -> usize {
    use rustix::process::{getrlimit, setrlimit};
    let both = |value| Rlimit { current: value, maximum: value };
    let _ = setrlimit(Resource::Core, both(Some(0)));
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(FDS_WANTED).min(FDS_WANTED);
    if setrlimit(Resource::Nofile, both(Some(FDS_WANTED))).is_err() {
        let _ = setrlimit(Resource::Nofile, both(Some(most)));
    }
    getrlimit(Resource::Nofile).current.unwrap_or(FDS_DEFAULT) as usize
}

/// Makes a user namespace in which the user is root, and a mount namespace in it.
fn become_root_of_nothing() -> Result<(), Error> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .step("make a user namespace, which takes a host that allows it to users, or root")?;
    let maps = [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {uid} 1")),
        ("gid_map", format!("0 {gid} 1")),
    ];
    for (file, text) in maps {
        std::fs::write(format!("/proc/self/{file}"), text).step("map a user into the namespace")?;
    }
    Ok(())
}

/// Makes the working directory the root, and all else unreachable.
fn change_root(options: &Options) -> Result<(OwnedFd, OwnedFd), Error> {
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", slave).step("separate mounts from the host's")?;
    let copy = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // A mount of this one directory, so that `..` leads nowhere.
    let proc = rustix::mount::open_tree(CWD, c"/proc/self/fd", copy).step("take hold of /proc/self/fd")?;
    let tree = rustix::mount::open_tree(CWD, c".", copy | OpenTreeFlags::AT_RECURSIVE)
        .step("take hold of the folder")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&tree, c"", CWD, c".", flags).step("mount the folder")?;
    rustix::process::fchdir(&tree).step("enter the folder's mount")?;
    rustix::process::pivot_root(c".", c".").step("make the folder the root")?;
    rustix::mount::unmount(c".", UnmountFlags::DETACH).step("leave the host's file systems")?;
    rustix::process::chdir(c"/").step("enter the new root")?;
    drop(tree);
    restrict_mounts(options).step("restrict the folder's mounts")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(c"/", flags, Mode::empty()).step("open the new root")?;
    Ok((root, proc))
}

/// Nothing in the folder is a program or a device to this process, and what is not to be written cannot be.
fn restrict_mounts(options: &Options) -> io::Result<()> {
    let readonly = if options.readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC | readonly,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: `mount_setattr` reads a path that ends with NUL and a structure of the size that is given with it, both
    // of which live until it returns, and writes to neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        // Linux before 5.12. The server refuses writes by itself, too.
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

fn drop_capabilities(kept: CapabilitySet) -> Result<(), Error> {
    let what = "give up capabilities";
    privileges::bound(kept).step(what)?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).step(what)
}

/// System calls that the server makes on files, by descriptor or relative to one.
const FILE_CALLS: &[i64] = &[
    libc::SYS_close,
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_linkat,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_pwritev2,
    libc::SYS_readlinkat,
    libc::SYS_renameat2,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// System calls of the socket and of the process itself.
const OWN_CALLS: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sendto,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Leaves the process what it needs to serve; anything else kills it.
pub(super) fn filter_system_calls() -> Result<(), Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        FILE_CALLS.iter().chain(OWN_CALLS).map(|call| (*call, vec![])).collect();
    let not_executable = || -> Result<SeccompRule, seccompiler::BackendError> {
        let executable = libc::PROT_EXEC as u64;
        SeccompRule::new(vec![SeccompCondition::new(
            2,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(executable),
            0,
        )?])
    };
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![not_executable().map_err(Error::Rules)?]);
    }
    let filter =
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64);
    let program: BpfProgram = filter.and_then(TryInto::try_into).map_err(Error::Rules)?;
    seccompiler::apply_filter(&program).map_err(Error::Filter)
}
