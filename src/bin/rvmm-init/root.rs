//! A container's root file system, put together in the agent's own view.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rvmm::guest::protocol::Failure;
use rvmm::guest::spec::{ContainerSpec, Root, Upper, Volume};

use crate::boot::CONTAINERS;
use crate::disks::Disks;
use crate::failure::Doing;
use crate::share::Share;

/// Layers that one overlay may have: OVL_MAX_STACK.
const LAYERS_MAX: usize = 500;

/// A mounted root. It is unmounted when the value is dropped.
pub struct RootMount {
    /// The container's directory.
    directory: PathBuf,
    /// Directories in it that were made, in order.
    made: Vec<PathBuf>,
    /// What is mounted, in order.
    mounted: Vec<PathBuf>,
    /// The overlay's upper directory, which has no other place.
    upper: Option<OwnedFd>,
}

impl RootMount {
    /// Mounts the root of a container.
    pub fn new(spec: &ContainerSpec, disks: &mut Disks, share: &Share) -> Result<Self, Failure> {
        let directory = Path::new(CONTAINERS).join(&spec.id);
        let mut root =
            Self { directory: directory.clone(), made: Vec::new(), mounted: Vec::new(), upper: None };
        root.make(directory)?;
        let path = root.path();
        root.make(path.clone())?;
        match &spec.root {
            Root::Share { path: below } => {
                share.attach(below, &path)?;
                root.mounted.push(path);
            }
            Root::Layers { lower, upper } => root.mount_layers(lower, upper, disks)?,
        }
        Ok(root)
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// What was written over the layers, if that is in a directory of its own.
    pub fn upper(&self) -> Option<BorrowedFd<'_>> {
        self.upper.as_ref().map(OwnedFd::as_fd)
    }

    fn make(&mut self, path: PathBuf) -> Result<(), Failure> {
        fs::create_dir(&path).doing(|| format!("make {}", path.display()))?;
        self.made.push(path);
        Ok(())
    }

    /// Mounts a disk's file system.
    fn mount_volume(
        &mut self,
        volume: &Volume,
        at: PathBuf,
        flags: MountFlags,
        disks: &mut Disks,
    ) -> Result<(), Failure> {
        let device = disks.find(volume)?;
        mount(&device, &at, volume.kind.as_str(), flags, c_string(&volume.data)?.as_c_str()).doing(|| {
            format!("mount partition {} of disk {:?} as {}", volume.partition, volume.disk, volume.kind)
        })?;
        self.mounted.push(at);
        Ok(())
    }

    fn mount_layers(&mut self, lower: &[Volume], upper: &Upper, disks: &mut Disks) -> Result<(), Failure> {
        if lower.is_empty() || lower.len() > LAYERS_MAX {
            return Err(Failure::Invalid(format!("{} layers, and 1 to {LAYERS_MAX} can be", lower.len())));
        }
        if let ([layer], Upper::None) = (lower, upper) {
            return self.mount_volume(layer, self.path(), MountFlags::RDONLY, disks);
        }
        let directory = self.directory.clone();
        for (index, layer) in lower.iter().enumerate() {
            let at = directory.join(index.to_string());
            self.make(at.clone())?;
            self.mount_volume(layer, at, MountFlags::RDONLY, disks)?;
        }
        // The names are short and relative, since all of them must fit into a page.
        let mut options = String::from("lowerdir=");
        for index in (0..lower.len()).rev() {
            options.push_str(&index.to_string());
            options.push(if index == 0 { ',' } else { ':' });
        }
        options.pop();
        let at = directory.join("u");
        match upper {
            Upper::None => {}
            Upper::Memory(data) => {
                self.make(at.clone())?;
                mount("tmpfs", &at, "tmpfs", MountFlags::empty(), c_string(data)?.as_c_str())
                    .doing(|| "mount memory over the layers".to_owned())?;
                self.mounted.push(at);
            }
            Upper::Volume(volume) => {
                self.make(at.clone())?;
                self.mount_volume(volume, at, MountFlags::empty(), disks)?;
            }
        }
        if *upper != Upper::None {
            self.prepare_upper(&directory.join((lower.len() - 1).to_string()))
                .doing(|| "prepare the writable layer".to_owned())?;
            options.push_str(",upperdir=u/upper,workdir=u/work");
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let opened = rustix::fs::open(directory.join("u/upper"), flags, Mode::empty());
            self.upper = Some(opened.doing(|| "open the writable layer".to_owned())?);
        }
        self.mount_overlay(&options).doing(|| format!("mount {} layers over each other", lower.len()))?;
        // The overlay holds them; here they would only be copied into each container's mounts.
        let overlay = self.path();
        for at in std::mem::replace(&mut self.mounted, vec![overlay]) {
            if at != self.path() {
                unmount(&at, UnmountFlags::DETACH).doing(|| format!("unmount {}", at.display()))?;
            }
        }
        Ok(())
    }

    /// Makes the directories of an overlay that is written to. Its root looks as that of the highest layer.
    fn prepare_upper(&self, highest: &Path) -> std::io::Result<()> {
        let at = self.directory.join("u");
        for name in ["upper", "work"] {
            match fs::create_dir(at.join(name)) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Ok(()) if name == "upper" => {
                    let like = fs::metadata(highest)?;
                    chown(at.join(name), Some(like.uid()), Some(like.gid()))?;
                    fs::set_permissions(at.join(name), fs::Permissions::from_mode(like.mode() & 0o7777))?;
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn mount_overlay(&mut self, options: &str) -> Result<(), Errno> {
        let options = CString::new(options).map_err(|_| Errno::INVAL)?;
        let directory = CString::new(self.directory.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
        rustix::process::chdir(directory.as_c_str())?;
        let mounted = mount(c"overlay", c"root", c"overlay", MountFlags::empty(), options.as_c_str());
        rustix::process::chdir(c"/")?;
        mounted?;
        self.mounted.push(self.path());
        Ok(())
    }

    /// Unmounts everything and removes what was made for it.
    fn unmount(&mut self) {
        self.upper = None;
        for at in self.mounted.drain(..).rev() {
            // A process in another container's view may still be in it; then it goes when that does.
            if unmount(&at, UnmountFlags::empty()).is_err() {
                let _ = unmount(&at, UnmountFlags::DETACH);
            }
        }
        // Small files that are bound into the container.
        for file in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            if file.file_type().is_ok_and(|kind| kind.is_file()) {
                let _ = fs::remove_file(file.path());
            }
        }
        for path in self.made.drain(..).rev() {
            let _ = fs::remove_dir(path);
        }
    }
}

impl Drop for RootMount {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// A string for the kernel.
pub fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::Invalid(format!("{text:?} has a NUL in it")))
}
