//! Network namespaces that outlive their processes: a file of the namespace, bound to a path.
//!
//! A namespace is a thread's. Everything here is done by a thread that lives as long as the call, so that the caller
//! stays where it is and has one thread again afterwards.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::error::Error;
use super::netlink::Netlink;

/// Makes a network namespace with a loopback device and binds it to `path`, which must not exist.
pub fn create(path: &Path) -> Result<(), Error> {
    let host = |what| move |source| Error::Namespace { what, path: path.to_path_buf(), source };
    OpenOptions::new().write(true).create_new(true).mode(0o400).open(path).map_err(host("make"))?;
    let made = in_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        bring_up_loopback()?;
        set_defaults();
        Ok(mount_bind("/proc/thread-self/ns/net", path)?)
    });
    made.map_err(|source| {
        let _ = fs::remove_file(path);
        host("make")(source)
    })
}

/// Removes the namespace at `path`, which lives on while processes are in it. Nothing happens if there is none.
pub fn delete(path: &Path) -> Result<(), Error> {
    let host = |source| Error::Namespace { what: "remove", path: path.to_path_buf(), source };
    // Once for each time that it was bound there.
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => break,
            Err(errno) => return Err(host(errno.into())),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(host(error)),
        _ => Ok(()),
    }
}

/// Whether a network namespace is bound to `path`.
pub fn exists(path: &Path) -> bool {
    const NSFS_MAGIC: u32 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type as u32 == NSFS_MAGIC)
}

/// Calls `work` in the namespace at `path`.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> Result<T, Error> {
    let host = |source| Error::Namespace { what: "work in", path: path.to_path_buf(), source };
    let file = File::open(path).map_err(host)?;
    in_thread(|| {
        setns(&file, CloneFlags::CLONE_NEWNET)?;
        work()
    })
    .map_err(host)
}

fn in_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn bring_up_loopback() -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    match netlink.link("lo")? {
        Some(loopback) => netlink.set_up(loopback.index),
        None => Ok(()),
    }
}

/// What is allowed in every container, since a namespace's ports and echo sockets are its own. Kernels without these
/// settings, or a user namespace in which they are not allowed, go without.
fn set_defaults() {
    for (name, value) in [("ip_unprivileged_port_start", "0"), ("ping_group_range", "0 2147483647")] {
        if let Err(error) = fs::write(format!("/proc/sys/net/ipv4/{name}"), value) {
            tracing::debug!(%error, "cannot set net.ipv4.{name} in a network namespace");
        }
    }
}
