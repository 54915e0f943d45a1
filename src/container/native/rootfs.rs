//! The root file system: an overlay of unpacked layers and of what the container writes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount,
    mount_change, move_mount, unmount,
};

/// Longest string that fsconfig(2) takes.
const CONFIG_BYTES_MAX: usize = 255;
/// Times that a mount point is cleared: more mounts on top of each other than anybody makes.
const MOUNTS_MAX: usize = 16;

/// An overlay to be mounted.
pub(super) struct Overlay<'a> {
    /// The bottom one first.
    pub(super) layers: &'a [PathBuf],
    /// Has `upper` and `work`, which are made if they are not there.
    pub(super) writable: &'a Path,
    pub(super) target: &'a Path,
    /// Whether this is not the host's root.
    pub(super) user_namespace: bool,
    /// Whether what is written need not be on the disk when it is unmounted: it goes away with the container. Without
    /// this, the unmount writes the whole file system below it out, others' files too.
    pub(super) volatile: bool,
}

/// Mounts one.
///
/// The new mount calls take a layer at a time, so there may be as many as the kernel's overlay takes (500). Before 6.5 all
/// of them have to go into one page of options; they are named by descriptors then, which is 4 to 6 bytes for each.
pub(super) fn mount_overlay(overlay: &Overlay) -> io::Result<()> {
    let (upper, work) = (overlay.writable.join("upper"), overlay.writable.join("work"));
    let is_new = !upper.exists();
    for directory in [overlay.target, &upper, &work] {
        std::fs::create_dir_all(directory)?;
    }
    if let (true, Some(top)) = (is_new, overlay.layers.last()) {
        // An overlay's root has the attributes of its upper directory.
        let of_image = std::fs::metadata(top)?;
        let owned = std::os::unix::fs::chown(&upper, Some(of_image.uid()), Some(of_image.gid()));
        if !overlay.user_namespace {
            owned?;
        }
        std::fs::set_permissions(&upper, of_image.permissions())?;
    }
    if overlay.volatile {
        // The mark of one that was not unmounted; it keeps the kernel from mounting what may be half written.
        let _ = std::fs::remove_dir_all(work.join("work/incompat"));
    }
    match mount_new(overlay, &upper, &work) {
        // The option for one layer is not known, or the calls are not.
        Err(Errno::INVAL | Errno::NOSYS) => mount_old(overlay, &upper, &work)?,
        result => result?,
    }
    // A mount point that others see; what is mounted in it they need not.
    mount_change(overlay.target, MountPropagationFlags::PRIVATE)?;
    Ok(())
}

fn mount_new(overlay: &Overlay, upper: &Path, work: &Path) -> rustix::io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let mut kept: Vec<OwnedFd> = vec![];
    let mut set = |key: &str, path: &Path| -> rustix::io::Result<()> {
        if path.as_os_str().len() <= CONFIG_BYTES_MAX {
            return fsconfig_set_string(context.as_fd(), key, path);
        }
        let descriptor = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let short = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        kept.push(descriptor);
        fsconfig_set_string(context.as_fd(), key, short)
    };
    for layer in overlay.layers.iter().rev() {
        set("lowerdir+", layer)?;
    }
    set("upperdir", upper)?;
    set("workdir", work)?;
    for flag in overlay.flags() {
        fsconfig_set_flag(context.as_fd(), flag)?;
    }
    fsconfig_set_string(context.as_fd(), "source", "overlay")?;
    fsconfig_create(context.as_fd())?;
    let made = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(made.as_fd(), "", CWD, overlay.target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn mount_old(overlay: &Overlay, upper: &Path, work: &Path) -> io::Result<()> {
    let mut kept: Vec<OwnedFd> = vec![];
    let mut short = |path: &Path| -> io::Result<String> {
        let descriptor = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let name = descriptor.as_raw_fd().to_string();
        kept.push(descriptor);
        Ok(name)
    };
    let lower =
        overlay.layers.iter().rev().map(|layer| short(layer)).collect::<io::Result<Vec<_>>>()?.join(":");
    let mut options = format!("lowerdir={lower},upperdir={},workdir={}", short(upper)?, short(work)?);
    for flag in overlay.flags() {
        options.push(',');
        options.push_str(flag);
    }
    let target = std::path::absolute(overlay.target)?;
    let options = std::ffi::CString::new(options).map_err(io::Error::other)?;
    // Names in the options are relative to the working directory.
    let before = rustix::fs::open(".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::process::chdir("/proc/self/fd")?;
    let mounted = mount("overlay", &target, "overlay", MountFlags::empty(), Some(options.as_c_str()));
    rustix::process::fchdir(&before)?;
    Ok(mounted?)
}

impl Overlay<'_> {
    fn flags(&self) -> impl Iterator<Item = &'static str> {
        [(self.user_namespace, "userxattr"), (self.volatile, "volatile")]
            .into_iter()
            .filter(|(wanted, _)| *wanted)
            .map(|(_, flag)| flag)
    }
}

/// A small file system in memory, for secrets.
pub(super) fn mount_memory(target: &Path) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", target, "tmpfs", flags, Some(c"mode=755,size=16m"))?;
    mount_change(target, MountPropagationFlags::PRIVATE)?;
    Ok(())
}

/// Takes away what is mounted at a place, and the place. What is not there is no error.
pub(super) fn unmount_and_remove(target: &Path) -> io::Result<()> {
    for _ in 0..MOUNTS_MAX {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(()),
            // Not a mount point; without rights there is nothing of ours.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match std::fs::remove_dir(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes a directory and those above it in a root file system, as a process in it would; those that are there stay.
pub(super) fn make_directory(root: &Path, path: &Path) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut current = rustix::fs::open(root, flags, Mode::empty())?;
    let root = current.try_clone()?;
    let mut prefix = PathBuf::new();
    for component in path.components() {
        let std::path::Component::Normal(name) = component else { continue };
        prefix.push(name);
        let open = || openat2(&root, &prefix, flags, Mode::empty(), ResolveFlags::IN_ROOT);
        current = match open() {
            Err(Errno::NOENT) => {
                match mkdirat(&current, name, Mode::from_raw_mode(0o755)) {
                    // A link that leads nowhere, or somebody was faster.
                    Err(Errno::EXIST) | Ok(()) => {}
                    Err(error) => return Err(error.into()),
                }
                open()?
            }
            opened => opened?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Both ways of mounting, for root alone.
    #[test]
    fn old_way_of_mounting_takes_many_layers_too() {
        if !rustix::process::getuid().is_root() {
            let text = b"skipped: old_way_of_mounting_takes_many_layers_too: needs root\n";
            let _ = io::Write::write_all(&mut io::stderr(), text);
            return;
        }
        let guard = tempfile::tempdir().unwrap();
        let layers: Vec<PathBuf> = (0..120).map(|n| guard.path().join(format!("{n:0>200}"))).collect();
        for (n, layer) in layers.iter().enumerate() {
            fs::create_dir(layer).unwrap();
            fs::write(layer.join("top"), n.to_string()).unwrap();
        }
        let target = guard.path().join("target");
        let (upper, work) = (guard.path().join("upper"), guard.path().join("work"));
        for directory in [&target, &upper, &work] {
            fs::create_dir(directory).unwrap();
        }
        for volatile in [false, true] {
            let overlay = Overlay {
                layers: &layers,
                writable: guard.path(),
                target: &target,
                user_namespace: false,
                volatile,
            };
            mount_old(&overlay, &upper, &work).unwrap();
            assert_eq!(fs::read_to_string(target.join("top")).unwrap(), "119");
            unmount_and_remove(&target).unwrap();
            fs::create_dir(&target).unwrap();
        }
    }

    #[test]
    fn directories_are_made_inside_and_links_do_not_lead_out() {
        let guard = tempfile::tempdir().unwrap();
        let (root, outside) = (guard.path().join("root"), guard.path().join("outside"));
        fs::create_dir_all(root.join("real")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink("/real", root.join("inside")).unwrap();
        symlink("../../outside", root.join("away")).unwrap();
        make_directory(&root, Path::new("/a/b")).unwrap();
        make_directory(&root, Path::new("/inside/x")).unwrap();
        assert!(root.join("a/b").is_dir() && root.join("real/x").is_dir());
        // In the root, the link leads to /outside, which is not there.
        assert!(make_directory(&root, Path::new("/away/x")).is_err());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        make_directory(&root, Path::new("/a/b")).unwrap();
    }

    #[test]
    fn what_is_not_mounted_is_no_error() {
        let guard = tempfile::tempdir().unwrap();
        let place = guard.path().join("place");
        unmount_and_remove(&place).unwrap();
        fs::create_dir(&place).unwrap();
        unmount_and_remove(&place).unwrap();
        assert!(!place.exists());
    }
}
