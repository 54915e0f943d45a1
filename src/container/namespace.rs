//! The namespaces that all commands of a user without root share.
//!
//! Such a user's containers are made in a user namespace, where the user is root, and in a mount namespace of it
//! ([`super::native::enter_user_namespace`]). Each command goes there first: mounts and network namespaces that one has
//! made are there for the next, and files of the containers' users can be removed. Nobody holds the namespaces open for
//! their own sake. They live as long as a process is in them, and processes that are in them are noted in
//! `RUN/namespace`: by its first supervisor the next command finds the way in.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

use super::backend;
use super::files::{self, Lock};
use super::native;
use super::roots::Roots;

/// Why the namespaces could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Files of the run-time directory.
    #[error(transparent)]
    File(#[from] files::Error),
    /// New namespaces.
    #[error(transparent)]
    Make(#[from] backend::Error),
    /// A step into those that are there.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Host { what, source: source.into() }
}

fn directory(roots: &Roots) -> PathBuf {
    roots.run.join("namespace")
}

/// Takes this process, which has one thread, into the user's namespaces; they are made if nobody is in them. Nothing
/// happens for root, or in a process that was started by one that is there.
pub fn enter(roots: &Roots) -> Result<(), Error> {
    if geteuid().is_root() {
        return Ok(());
    }
    let place = directory(roots);
    files::make_directory(&place)?;
    let lock = Lock::wait(&place.join("lock"))?;
    // Where the names of the command line are looked for; going into a mount namespace leads to its root.
    let here = std::env::current_dir().ok();
    let found = members(&place)?.into_iter().find_map(|member| enter_both(&member));
    let found = match found {
        Some(entered) => Some(entered),
        None => left_containers(roots).into_iter().find_map(|member| enter_beside(&member)),
    };
    match found {
        Some(entered) => entered?,
        None => native::enter_user_namespace()?,
    }
    if let Some(here) = here {
        // It may be gone, or be where root of the namespace cannot go.
        let _ = std::env::set_current_dir(here);
    }
    note_in(&place)?;
    drop(lock);
    Ok(())
}

/// Notes that this process is in the namespaces, as the children of one that has entered them are.
pub fn note(roots: &Roots) -> Result<(), Error> {
    let place = directory(roots);
    if !native::is_user_namespace() || !place.is_dir() {
        return Ok(());
    }
    let _lock = Lock::wait(&place.join("lock"))?;
    note_in(&place)
}

/// Takes this process's note away, at its end.
pub fn leave(roots: &Roots) {
    let place = directory(roots);
    if place.is_dir()
        && let Some(own) = own_note(&place)
    {
        let _ = fs::remove_file(own);
    }
}

fn own_note(place: &Path) -> Option<PathBuf> {
    let pid = std::process::id();
    let started = native::start_ticks(i32::try_from(pid).ok()?)?;
    Some(place.join(format!("{pid}-{started}")))
}

fn note_in(place: &Path) -> Result<(), Error> {
    let missing = || host("find this process in /proc")(io::Error::from(io::ErrorKind::NotFound));
    let own = own_note(place).ok_or_else(missing)?;
    File::create(&own).map(drop).map_err(host("note that this process is in the user's namespaces"))
}

/// A process that lives: its number and what keeps the number from being given to another.
struct Member {
    pid: i32,
    _process: rustix::fd::OwnedFd,
}

/// The process of that number and start, if it lives.
fn living(pid: i32, started: u64) -> Option<Member> {
    let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&at_once)) != Ok(0) {
        // It has ended, and nobody has taken note yet.
        return None;
    }
    // Asked with the descriptor open, so that the number is still that process's.
    (native::start_ticks(pid) == Some(started)).then_some(Member { pid, _process: process })
}

/// The processes that are noted and live. Notes of others are removed.
fn members(place: &Path) -> Result<Vec<Member>, Error> {
    let mut members = vec![];
    for entry in fs::read_dir(place).map_err(host("read the notes of who is in the user's namespaces"))? {
        let path = entry.map_err(host("read the notes of who is in the user's namespaces"))?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let Some((pid, started)) = name.split_once('-') else { continue };
        let (Ok(pid), Ok(started)) = (pid.parse(), started.parse()) else { continue };
        match living(pid, started) {
            Some(member) => members.push(member),
            None => drop(fs::remove_file(&path)),
        }
    }
    Ok(members)
}

/// Native containers whose supervisors were killed. They are in the user namespace, and have mounts of their own.
fn left_containers(roots: &Roots) -> Vec<Member> {
    let entries = fs::read_dir(roots.run.join("containers")).into_iter().flatten().flatten();
    let first = |entry: fs::DirEntry| {
        let (pid, started) = native::recorded_process(&entry.path())?;
        living(pid, started)
    };
    entries.filter_map(first).collect()
}

fn namespace(member: &Member, kind: &str) -> Option<File> {
    File::open(format!("/proc/{}/ns/{kind}", member.pid)).ok()
}

/// The user namespace of a process, unless it is this one's own.
fn user_namespace(member: &Member) -> Option<File> {
    let found = namespace(member, "user")?;
    let own = fs::metadata("/proc/self/ns/user").ok()?.ino();
    (found.metadata().ok()?.ino() != own).then_some(found)
}

/// Goes where a process is. `None` if there is no way, or it is nowhere else.
fn enter_both(member: &Member) -> Option<Result<(), Error>> {
    let (user, mounts) = (user_namespace(member)?, namespace(member, "mnt")?);
    setns(user.as_fd(), CloneFlags::CLONE_NEWUSER).ok()?;
    // There is no way back from here on.
    Some(setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS).map_err(host("enter the user's mount namespace")))
}

/// Goes into the user namespace of a process, with mounts of our own.
fn enter_beside(member: &Member) -> Option<Result<(), Error>> {
    let user = user_namespace(member)?;
    setns(user.as_fd(), CloneFlags::CLONE_NEWUSER).ok()?;
    let separate = || -> Result<(), Error> {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(host("make a mount namespace"))?;
        let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        mount_change("/", flags).map_err(host("take the mounts for this process alone"))
    };
    Some(separate())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_living_processes_are_members_and_other_notes_go() {
        let guard = tempfile::tempdir().unwrap();
        let place = guard.path();
        fs::write(place.join("lock"), "").unwrap();
        note_in(place).unwrap();
        let own = own_note(place).unwrap();
        // The number is this process's, but it has not been started then.
        let stale = place.join(format!("{}-1", std::process::id()));
        fs::write(&stale, "").unwrap();
        fs::write(place.join("2147483000-5"), "").unwrap();
        let found = members(place).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, std::process::id() as i32);
        assert!(own.exists() && !stale.exists() && place.join("lock").exists());
        assert_eq!(fs::read_dir(place).unwrap().count(), 2);
        // It is where this process is.
        assert!(enter_both(&found[0]).is_none());
    }
}
