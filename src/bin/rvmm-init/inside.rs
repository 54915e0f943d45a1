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

/// Links that lead to links, at most.
const LINKS_MAX: u32 = 8;

/// The agent's `/dev/null`, not the image's, to cover files with.
pub struct Null {
    mount: OwnedFd,
    is_attached: bool,
}

/// Makes the container's root the root. From then on no path leads to the agent's own file system.
pub fn enter(plan: &RootPlan) -> Result<Null, Failed> {
    let enter = || -> Result<Null, Errno> {
        let old = fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY, Mode::empty())?;
        let mount = clone_tree(c"/dev/null", false)?;
        process::chdir(plan.path.as_c_str())?;
        // The old root then lies over the new one. `/..` would lead there, so it must go before anything else is done.
        process::pivot_root(c".", c".")?;
        process::fchdir(&old)?;
        mount::unmount(c".", UnmountFlags::DETACH)?;
        process::chdir(c"/")?;
        close(old);
        Ok(Null { mount, is_attached: false })
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

/// What takes things away again.
pub fn finish(plan: &RootPlan, mut null: Null) -> Result<(), Failed> {
    for (index, path) in plan.masked.iter().enumerate() {
        mask(path, &mut null).map_err(at(Step::Mask(index)))?;
    }
    close(null.mount);
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
    if plan.propagation != 0 {
        let flags = MountPropagationFlags::from_bits_retain(plan.propagation as u32);
        mount::mount_change(c"/", flags).map_err(at(Step::Root))?;
    }
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
    for _ in 0..LINKS_MAX {
        match make_file(path.as_c_str()) {
            // A link to something that is not there, as images have them at /etc/resolv.conf.
            Err(Errno::NOENT) => {
                follow(&mut path)?;
                make_parents(&path)?;
            }
            other => return other,
        }
    }
    Err(Errno::LOOP)
}

/// Puts where a link leads in its place.
fn follow(link: &mut Path) -> Result<(), Errno> {
    let mut buffer = [0; Path::BYTES_MAX];
    let len = fs::readlinkat_raw(CWD, link.as_c_str(), &mut buffer)?;
    let destination = buffer.get(..len).ok_or(Errno::NAMETOOLONG)?;
    let keep = match destination.first() {
        Some(b'/') => 0,
        _ => link.last_slash().map_or(0, |slash| slash + 1),
    };
    link.truncate(keep);
    link.push(destination)
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

/// Makes a directory and those that lead there, also where links lead that lead nowhere yet.
pub fn make_directories(path: &mut Path) -> Result<(), Errno> {
    make_directories_within(path, LINKS_MAX)
}

fn make_directories_within(path: &mut Path, links: u32) -> Result<(), Errno> {
    path.each_part(|part| match fs::mkdir(part, DIRECTORY_MODE) {
        Ok(()) => Ok(()),
        // A file system that cannot be written to says so of directories that are there, too.
        Err(error @ (Errno::EXIST | Errno::ROFS)) => match fs::stat(part) {
            Ok(_) => Ok(()),
            Err(Errno::NOENT) if error == Errno::EXIST && links > 0 => {
                let mut destination = Path::new(part)?;
                follow(&mut destination)?;
                make_directories_within(&mut destination, links - 1)
            }
            Err(_) => Err(error),
        },
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

/// Covers a file with `/dev/null`, and a directory with an empty one.
fn mask(path: &CStr, null: &mut Null) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let attached = if null.is_attached {
        let another = clone_of(&null.mount)?;
        let attached = mount::move_mount(&another, c"", CWD, path, flags);
        close(another);
        attached
    } else {
        mount::move_mount(&null.mount, c"", CWD, path, flags)
    };
    match attached {
        Ok(()) => {
            null.is_attached = true;
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        // It is a directory, or something before the last component is none.
        Err(Errno::INVAL | Errno::NOTDIR) => {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            match mount::mount(c"tmpfs", path, c"tmpfs", flags, c"nr_inodes=2") {
                Err(Errno::NOTDIR) => Ok(()),
                other => other,
            }
        }
        Err(error) => Err(error),
    }
}

/// A copy of a mount, without a place.
fn clone_of(mount: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    mount::open_tree(mount, c"", flags)
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
    let tree = clone_of(slave)?;
    attach_or_make(&tree, c"/dev/console", false)?;
    close(tree);
    Ok(())
}
