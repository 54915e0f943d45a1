//! A container's file system, made from inside: its own root is the root already, so that no link in an image leads out.
//!
//! A part of what a child does; nothing here allocates.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{self, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process;

use crate::child::{at, close, write_file};
use crate::path::Path;
use crate::plan::{DevicePlan, MountPlan, MountWhat, RootPlan, Step};
use crate::system::set_mount_attributes;

type Failed = (Step, Errno);

/// `MOUNT_ATTR_RDONLY`
pub const READ_ONLY: u64 = 1;
/// What of a propagation's flags mount_setattr(2) takes.
const PROPAGATIONS: u64 = libc::MS_SHARED | libc::MS_PRIVATE | libc::MS_SLAVE | libc::MS_UNBINDABLE;

const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);
const FILE_MODE: Mode = Mode::from_raw_mode(0o644);

/// What is still needed of the agent's own file system.
pub struct OldRoot {
    root: OwnedFd,
    null: OwnedFd,
}

/// Makes the container's root the root.
pub fn enter(plan: &RootPlan) -> Result<OldRoot, Failed> {
    let enter = || -> Result<OldRoot, Errno> {
        let path_only = OFlags::PATH | OFlags::CLOEXEC;
        let root = fs::open(c"/", path_only | OFlags::DIRECTORY, Mode::empty())?;
        let null = fs::open(c"/dev/null", path_only, Mode::empty())?;
        process::chdir(plan.path.as_c_str())?;
        // The old root then lies over the new one, where paths do not see it but it can still be bound from.
        process::pivot_root(c".", c".")?;
        Ok(OldRoot { root, null })
    };
    enter().map_err(at(Step::Root))
}

/// Mounts, device files, links and kernel parameters.
pub fn furnish(plan: &RootPlan) -> Result<(), Failed> {
    for (index, mount) in plan.mounts.iter().enumerate() {
        add_mount(mount).map_err(at(Step::Mount(index)))?;
    }
    for (index, device) in plan.devices.iter().enumerate() {
        add_device(device).map_err(at(Step::Device(index)))?;
    }
    for (index, (path, target)) in plan.links.iter().enumerate() {
        match fs::symlink(target.as_c_str(), path.as_c_str()) {
            // An image's own stays.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err((Step::Link(index), error)),
        }
    }
    for (index, (path, value)) in plan.sysctls.iter().enumerate() {
        write_file(path, value).map_err(at(Step::Sysctl(index)))?;
    }
    Ok(())
}

/// What takes things away again, and the end of the agent's file system here.
pub fn finish(plan: &RootPlan, old: OldRoot) -> Result<(), Failed> {
    for (index, path) in plan.masked.iter().enumerate() {
        mask(path, &old).map_err(at(Step::Mask(index)))?;
    }
    for (index, path) in plan.read_only.iter().enumerate() {
        make_read_only(path).map_err(at(Step::ReadOnly(index)))?;
    }
    if plan.is_read_only {
        let root = || -> Result<(), Errno> {
            let root = fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            set_mount_attributes(&root, false, READ_ONLY)?;
            close(root);
            Ok(())
        };
        root().map_err(at(Step::ReadOnlyRoot))?;
    }
    let leave = || -> Result<(), Errno> {
        process::fchdir(&old.root)?;
        mount::unmount(c".", UnmountFlags::DETACH)?;
        process::chdir(c"/")?;
        if plan.propagation != 0 {
            let flags = MountPropagationFlags::from_bits_retain(plan.propagation as u32);
            mount::mount_change(c"/", flags)?;
        }
        Ok(())
    };
    leave().map_err(at(Step::Root))?;
    close(old.root);
    close(old.null);
    Ok(())
}

fn add_mount(plan: &MountPlan) -> Result<(), Errno> {
    let target = plan.target.as_c_str();
    let is_directory = match &plan.what {
        MountWhat::New(kind, flags, data) => {
            let new = || mount::mount(kind.as_c_str(), target, kind.as_c_str(), *flags, data.as_c_str());
            match new() {
                Err(Errno::NOENT) => {
                    make_target(target, true)?;
                    new()?;
                }
                other => other?,
            }
            return propagate(plan);
        }
        MountWhat::Tree(tree, is_directory) => {
            attach_or_make(tree, target, *is_directory)?;
            return propagate(plan);
        }
        MountWhat::Inside(source, ..) => {
            FileType::from_raw_mode(fs::stat(source.as_c_str())?.st_mode).is_dir()
        }
    };
    if let MountWhat::Inside(source, recursive, attributes) = &plan.what {
        let tree = clone_tree(source, *recursive)?;
        if *attributes != 0 {
            set_mount_attributes(&tree, *recursive, *attributes)?;
        }
        attach_or_make(&tree, target, is_directory)?;
        close(tree);
    }
    propagate(plan)
}

fn propagate(plan: &MountPlan) -> Result<(), Errno> {
    if plan.propagation & PROPAGATIONS == 0 {
        return Ok(());
    }
    mount::mount_change(
        plan.target.as_c_str(),
        MountPropagationFlags::from_bits_retain(plan.propagation as u32),
    )
}

fn clone_tree(path: &CStr, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    mount::open_tree(CWD, path, flags)
}

fn attach_or_make(tree: &OwnedFd, target: &CStr, is_directory: bool) -> Result<(), Errno> {
    match attach(tree, target) {
        Err(Errno::NOENT) => {
            make_target(target, is_directory)?;
            attach(tree, target)
        }
        other => other,
    }
}

fn attach(tree: impl AsFd, target: &CStr) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    mount::move_mount(tree, c"", CWD, target, flags)
}

/// Makes what a mount will cover, and the directories that lead there.
fn make_target(path: &CStr, is_directory: bool) -> Result<(), Errno> {
    let mut path = Path::new(path)?;
    if is_directory {
        return make_directories(&mut path);
    }
    make_parents(&path)?;
    match make_file(path.as_c_str()) {
        // A link to something that is not there, as images have them at /etc/resolv.conf.
        Err(Errno::NOENT) => {
            let mut buffer = [0; Path::BYTES_MAX];
            let len = fs::readlinkat_raw(CWD, path.as_c_str(), &mut buffer)?;
            let destination = buffer.get(..len).ok_or(Errno::NAMETOOLONG)?;
            if destination.first() == Some(&b'/') {
                path.truncate(0);
            } else {
                path.truncate(path.last_slash().map_or(0, |slash| slash + 1));
            }
            path.push(destination)?;
            make_parents(&path)?;
            make_file(path.as_c_str())
        }
        other => other,
    }
}

fn make_file(path: &CStr) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    close(fs::open(path, flags, FILE_MODE)?);
    Ok(())
}

fn make_parents(path: &Path) -> Result<(), Errno> {
    let mut parent = *path;
    match parent.last_slash() {
        Some(0) | None => Ok(()),
        Some(slash) => {
            parent.truncate(slash);
            make_directories(&mut parent)
        }
    }
}

/// Makes a directory and those that lead there.
pub fn make_directories(path: &mut Path) -> Result<(), Errno> {
    path.each_part(|part| match fs::mkdir(part, DIRECTORY_MODE) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        // A file system that cannot be written to says so of directories that are there, too.
        Err(Errno::ROFS) if fs::stat(part).is_ok() => Ok(()),
        Err(error) => Err(error),
    })
}

fn add_device(device: &DevicePlan) -> Result<(), Errno> {
    let path = device.path.as_c_str();
    let make = || fs::mknodat(CWD, path, device.kind, Mode::from_raw_mode(device.mode), device.number);
    match make() {
        Err(Errno::NOENT) => {
            make_parents(&Path::new(path)?)?;
            make()?;
        }
        // An image's own, or a bound one.
        Err(Errno::EXIST) => return Ok(()),
        other => other?,
    }
    if let Some((uid, gid)) = device.owner {
        fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// Covers a file with `/dev/null`, the agent's and not the image's, and a directory with an empty one.
fn mask(path: &CStr, old: &OldRoot) -> Result<(), Errno> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let null = mount::open_tree(&old.null, c"", flags)?;
    let attached = mount::move_mount(&null, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    close(null);
    match attached {
        Err(Errno::NOENT) => Ok(()),
        // It is a directory, or something before the last component is none.
        Err(Errno::INVAL | Errno::NOTDIR) => {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            match mount::mount(c"tmpfs", path, c"tmpfs", flags, c"nr_inodes=2") {
                Err(Errno::NOTDIR) => Ok(()),
                other => other,
            }
        }
        other => other,
    }
}

fn make_read_only(path: &CStr) -> Result<(), Errno> {
    let tree = match clone_tree(path, true) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        other => other?,
    };
    set_mount_attributes(&tree, true, READ_ONLY)?;
    attach(&tree, path)?;
    close(tree);
    Ok(())
}

/// Binds the process's terminal to `/dev/console`.
pub fn bind_console(slave: &OwnedFd) -> Result<(), Errno> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = mount::open_tree(slave, c"", flags)?;
    attach_or_make(&tree, c"/dev/console", false)?;
    close(tree);
    Ok(())
}
