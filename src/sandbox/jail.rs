//! The jail: a process whose file system is one directory, whose processes are its own, and whose user is nobody's.
//!
//! Everything is opened before the doors close, so nothing need be in the directory: no `/dev/kvm`, no image. What is in
//! it can be given to drives later, by paths in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{Gid, Signal, Uid};

use super::{Error, Step};

/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A jail, as the command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Jail {
    /// The root directory.
    pub directory: PathBuf,
    /// The user.
    pub uid: Option<u32>,
    /// The group; that of the user's number without it.
    pub gid: Option<u32>,
    /// A network namespace.
    pub netns: Option<PathBuf>,
    /// A control group's directory, from the root of the hierarchy or of the file system.
    pub cgroup: Option<PathBuf>,
}

/// Why a jail's description makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No directory.
    #[error("a jail needs a directory: DIR[,uid=N][,gid=N][,netns=PATH][,cgroup=PATH]")]
    NoDirectory,
    /// An unknown option.
    #[error("unknown option {0:?}; a jail has uid, gid, netns and cgroup")]
    Unknown(String),
    /// Not a number.
    #[error("{0:?} is no number of a user or group, which goes from 0 to 4294967294")]
    Number(String),
}

impl FromStr for Jail {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Jail, ParseError> {
        let mut parts = text.split(',');
        let directory = parts.next().filter(|first| !first.is_empty() && !first.contains('='));
        let directory = PathBuf::from(directory.ok_or(ParseError::NoDirectory)?);
        let mut jail = Jail { directory, uid: None, gid: None, netns: None, cgroup: None };
        let number = |text: &str| {
            let number = text.parse().ok().filter(|number| *number != u32::MAX);
            number.ok_or_else(|| ParseError::Number(text.into()))
        };
        for part in parts {
            match part.split_once('=') {
                Some(("uid", value)) => jail.uid = Some(number(value)?),
                Some(("gid", value)) => jail.gid = Some(number(value)?),
                Some(("netns", value)) => jail.netns = Some(value.into()),
                Some(("cgroup", value)) => jail.cgroup = Some(value.into()),
                _ => return Err(ParseError::Unknown(part.into())),
            }
        }
        Ok(jail)
    }
}

impl Jail {
    /// What happens before anything is opened: control group, network, and a PID namespace for the next child.
    pub(super) fn begin(&self) -> Result<(), Error> {
        if let Some(cgroup) = &self.cgroup {
            let directory = if cgroup.starts_with(CGROUPS) {
                cgroup.clone()
            } else {
                Path::new(CGROUPS).join(cgroup.strip_prefix("/").unwrap_or(cgroup))
            };
            fs::write(directory.join("cgroup.procs"), "0").step("enter the jail's control group")?;
        }
        if let Some(netns) = &self.netns {
            let file = fs::File::open(netns).step("open the jail's network namespace")?;
            nix::sched::setns(file, CloneFlags::CLONE_NEWNET).step("enter the jail's network namespace")?;
        }
        nix::sched::unshare(CloneFlags::CLONE_NEWPID)
            .step("make a PID namespace for the jail, which takes root")
    }

    /// Closes the doors of the file system. `beside` is a directory that relative paths lead to from then on, and
    /// nothing else is reached through it: unix sockets are known by paths.
    pub(super) fn close_files(&self, beside: Option<&Path>) -> Result<(), Error> {
        let flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
        nix::sched::unshare(flags).step("make the jail's namespaces, which takes root")?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).step("separate the jail's mounts from the host's")?;
        let copy = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        // A mount of this one directory, so that `..` leads nowhere.
        let beside = beside
            .map(|path| rustix::mount::open_tree(CWD, path, copy))
            .transpose()
            .step("take hold of the directory of the sockets")?;
        rustix::process::chdir(&self.directory).step("enter the jail's directory")?;
        let tree = rustix::mount::open_tree(CWD, c".", copy | OpenTreeFlags::AT_RECURSIVE)
            .step("take hold of the jail's directory")?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&tree, c"", CWD, c".", flags).step("mount the jail's directory")?;
        rustix::process::fchdir(&tree).step("enter the jail's mount")?;
        drop(tree);
        rustix::process::pivot_root(c".", c".").step("make the jail's directory the root")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH).step("leave the host's file systems")?;
        rustix::process::chdir(c"/").step("enter the new root")?;
        let flags = MountFlags::BIND
            | MountFlags::RDONLY
            | MountFlags::NOSUID
            | MountFlags::NODEV
            | MountFlags::NOEXEC;
        rustix::mount::mount_remount(c"/", flags, c"").step("restrict the jail's root")?;
        if let Some(beside) = beside {
            rustix::process::fchdir(&beside).step("enter the directory of the sockets")?;
        }
        Ok(())
    }

    /// Becomes the jail's user.
    pub(super) fn change_user(&self) -> Result<(), Error> {
        let gid = self.gid.or(self.uid);
        if gid.is_some() {
            rustix::thread::set_thread_groups(&[]).step("leave all groups")?;
        }
        if let Some(gid) = gid.map(Gid::from_raw) {
            rustix::thread::set_thread_res_gid(gid, gid, gid).step("become the jail's group")?;
        }
        if let Some(uid) = self.uid.map(Uid::from_raw) {
            rustix::thread::set_thread_res_uid(uid, uid, uid).step("become the jail's user")?;
        }
        // Without its keeper nobody would wait for it. Cleared by a change of user, so it comes last.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("follow the keeper")
    }

    /// Takes the keeper's file systems away, but for the jail's and the directories that it has open.
    pub(super) fn confine_keeper(&self) -> Result<(), Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.directory, flags, Mode::empty()).step("open the jail")?;
        rustix::process::fchdir(&directory).step("enter the jail")?;
        rustix::process::chroot(c".").step("make the jail the keeper's root")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_read() {
        let whole = "/srv/jail,uid=7,gid=8,netns=/run/netns/a,cgroup=vms/a".parse::<Jail>().unwrap();
        assert_eq!(whole.directory, Path::new("/srv/jail"));
        assert_eq!((whole.uid, whole.gid), (Some(7), Some(8)));
        assert_eq!(whole.netns.as_deref(), Some(Path::new("/run/netns/a")));
        assert_eq!(whole.cgroup.as_deref(), Some(Path::new("vms/a")));
        assert_eq!("d".parse::<Jail>().unwrap().uid, None);
        for (text, error) in [
            ("", ParseError::NoDirectory),
            ("uid=1", ParseError::NoDirectory),
            ("d,user=1", ParseError::Unknown("user=1".into())),
            ("d,uid=root", ParseError::Number("root".into())),
            ("d,uid=4294967295", ParseError::Number("4294967295".into())),
        ] {
            assert_eq!(text.parse::<Jail>(), Err(error));
        }
    }
}
