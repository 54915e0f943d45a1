//! The sandbox's shared folder, and memory that its containers share.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};
use rvmm::guest::protocol::Failure;

use crate::boot::{MEMORY, SHARE};
use crate::failure::Doing;
use crate::root::c_string;

/// The shared folder.
#[derive(Default)]
pub struct Share {
    tag: Option<String>,
}

impl Share {
    /// Mounts it. Once is enough.
    pub fn mount(&mut self, tag: &str) -> Result<(), Failure> {
        match &self.tag {
            Some(mounted) if mounted == tag => return Ok(()),
            Some(mounted) => {
                return Err(Failure::Invalid(format!("the shared folder {mounted:?} is mounted already")));
            }
            None => {}
        }
        mount(tag, SHARE, "virtiofs", MountFlags::NODEV, None)
            .doing(|| format!("mount the shared folder {tag:?}"))?;
        self.tag = Some(tag.to_owned());
        Ok(())
    }

    /// A copy of the mounts at a path of it, which has no place yet, and whether it is a directory.
    pub fn tree(&self, path: &str, recursive: bool) -> Result<(OwnedFd, bool), Failure> {
        let doing = || format!("find {path:?} in the shared folder");
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = open(SHARE, flags | OFlags::DIRECTORY, Mode::empty()).doing(doing)?;
        // What lies there may have been written by a container.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let path = match path.trim_matches('/') {
            "" => ".",
            below => below,
        };
        let found = openat2(root, path, flags, Mode::empty(), resolve).doing(doing)?;
        copy_of(found, recursive).doing(doing)
    }

    /// Puts a path of it somewhere else in the agent's view.
    pub fn attach(&self, path: &str, at: &Path) -> Result<(), Failure> {
        let (tree, _) = self.tree(path, true)?;
        move_mount(tree, c"", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .doing(|| format!("mount {path:?} of the shared folder"))
    }
}

/// A copy of what is mounted where a descriptor leads, and whether that is a directory.
pub fn copy_of(found: OwnedFd, recursive: bool) -> rustix::io::Result<(OwnedFd, bool)> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let is_directory = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode).is_dir();
    Ok((open_tree(found, c"", flags)?, is_directory))
}

/// Memory that containers share by a name; made if nobody has yet.
pub fn memory(name: &str, data: &str) -> Result<OwnedFd, Failure> {
    let at = PathBuf::from(MEMORY).join(name);
    let doing = || format!("make the shared memory {name:?}");
    match fs::create_dir(&at) {
        Ok(()) => {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            if let Err(error) = mount("tmpfs", &at, "tmpfs", flags, c_string(data)?.as_c_str()) {
                let _ = fs::remove_dir(&at);
                return Err(error).doing(doing);
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error).doing(doing),
    }
    let found = open(&at, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).doing(doing)?;
    copy_of(found, false).map(|(tree, _)| tree).doing(doing)
}
