//! Where an entry belongs: a walk through the layer and those below it that follows links within the image, as a
//! process whose root is the image would, and never by a path of the host.
//!
//! What exists is opened relative to a layer's own directory with `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`, so the kernel
//! refuses whatever would lead out; links are followed here, by their text.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::unpack::WHITEOUT;
use super::{Error, Rights, attributes};

/// Links followed for one name, as the kernel has it.
const LINKS_MAX: usize = 40;
/// Parts of a name. Each is a descriptor while a tree is removed.
const DEPTH_MAX: usize = 200;
/// Bytes of a name: what one system call takes.
const PATH_MAX: usize = 4000;

/// A layer that is being unpacked, and those below it.
pub(super) struct Tree {
    /// The layer itself, then those below, topmost first.
    layers: Vec<OwnedFd>,
    pub(super) rights: Rights,
    /// Directories that were made on the way to entries, with what they are to have when nothing is made in them any more.
    pub(super) implied: RefCell<Vec<(Parts, Final)>>,
}

/// The parts of a name.
pub(super) type Parts = Vec<Vec<u8>>;

/// Permissions and time of a directory.
pub(super) type Final = (u32, (i64, u32));

/// What a name is in the image.
enum Found {
    Absent,
    /// The layers that have a part in the directory.
    Directory(Vec<usize>),
    Symlink(Vec<u8>),
    Other,
}

/// A directory on the way to an entry.
struct Step {
    name: Vec<u8>,
    layers: Vec<usize>,
}

/// Opens what a name of one layer leads to, links themselves included.
fn open(layer: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = if path.is_empty() { &b"."[..] } else { path };
    rustix::fs::openat2(layer, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), resolve)
}

/// Opens a directory for reading.
fn open_directory(layer: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    open(layer, path, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Whether a file stands for one that the layers below have and this one deleted.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether a name's part can be one of a file.
fn is_plain(part: &[u8]) -> bool {
    !part.is_empty() && part != b"." && part != b".."
}

/// The parts of a name from an archive. A leading slash means the image's root; `..` is nothing that anybody writes
/// who means well.
pub(super) fn parts(name: &[u8]) -> Result<Parts, Error> {
    let parts = || name.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".");
    if parts().any(|part| part == b"..") {
        return Err(Error::entry(name, "its name leads upwards"));
    }
    if name.len() > PATH_MAX || parts().count() > DEPTH_MAX {
        return Err(Error::entry(name, "its name is too long"));
    }
    Ok(parts().map(<[u8]>::to_vec).collect())
}

impl Tree {
    /// `layer` is empty; `below` begins with the layer right below it.
    pub(super) fn open(layer: &Path, below: &[&Path], rights: Rights) -> Result<Self, Error> {
        let open = |path: &Path| {
            let name = path.as_os_str().as_encoded_bytes();
            let file = File::open(path).map_err(Error::io(name, "open the layer's directory"))?;
            Ok(OwnedFd::from(file))
        };
        let paths = std::iter::once(layer).chain(below.iter().copied());
        let layers = paths.map(open).collect::<Result<_, Error>>()?;
        Ok(Self { layers, rights, implied: RefCell::default() })
    }

    /// Gives the root what it has right below, which the archive may say otherwise.
    pub(super) fn inherit_root(&self) -> Result<(), Errno> {
        let root = self.root()?;
        match self.layers.get(1) {
            Some(below) => attributes::copy(below.as_fd(), root, self.rights),
            None => rustix::fs::fchmod(root, Mode::from_raw_mode(0o755)),
        }?;
        let stat = rustix::fs::fstat(root)?;
        self.implied.borrow_mut().push((vec![], final_of(&stat)));
        // Whatever the root is to have, entries have to be made in it.
        rustix::fs::fchmod(root, Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o700))
    }

    fn layer(&self, index: usize) -> Result<BorrowedFd<'_>, Errno> {
        self.layers.get(index).map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// The layer's own directory.
    pub(super) fn root(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.layer(0)
    }

    /// A directory of this layer that is there already, without any link on the way.
    pub(super) fn directory(&self, parts: &[Vec<u8>]) -> Option<OwnedFd> {
        open_directory(self.root().ok()?, &parts.join(&b'/')).ok()
    }

    /// Whether a layer's directory hides those below.
    fn is_opaque(&self, layer: usize, directory: BorrowedFd<'_>) -> bool {
        let names = if layer == 0 {
            &[self.rights.opaque()][..]
        } else {
            &["trusted.overlay.opaque", "user.overlay.opaque"]
        };
        let mut value = [0; 1];
        names
            .iter()
            .any(|name| rustix::fs::fgetxattr(directory, *name, &mut value) == Ok(1) && value == *b"y")
    }

    fn look_up(&self, layers: &[usize], path: &[u8]) -> Result<Found, Errno> {
        let mut parts = vec![];
        for index in layers.iter().copied() {
            let layer = self.layer(index)?;
            let file = match open(layer, path, OFlags::PATH) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                result => result?,
            };
            let stat = rustix::fs::fstat(&file)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    parts.push(index);
                    if self.is_opaque(index, open_directory(layer, path)?.as_fd()) {
                        break;
                    }
                }
                _ if !parts.is_empty() || is_whiteout(&stat) => break,
                FileType::Symlink => {
                    return Ok(Found::Symlink(rustix::fs::readlinkat(&file, c"", vec![])?.into_bytes()));
                }
                _ => return Ok(Found::Other),
            }
        }
        Ok(if parts.is_empty() { Found::Absent } else { Found::Directory(parts) })
    }

    /// The directory that a name's parts lead to, with all links followed.
    fn walk(&self, name: &[u8], parts: &[Vec<u8>]) -> Result<Vec<Step>, Error> {
        let mut queue: VecDeque<Vec<u8>> = parts.iter().cloned().collect();
        let mut steps: Vec<Step> = vec![];
        let mut links = 0;
        while let Some(part) = queue.pop_front() {
            if part == b".." {
                steps.pop();
                continue;
            }
            let mut path = steps.iter().map(|step| step.name.as_slice()).collect::<Vec<_>>().join(&b'/');
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&part);
            if path.len() > PATH_MAX || steps.len() >= DEPTH_MAX {
                return Err(Error::entry(name, "its name is too long"));
            }
            let all: Vec<usize> = (0..self.layers.len()).collect();
            let layers = steps.last().map_or(&all, |step| &step.layers);
            match self.look_up(layers, &path).map_err(Error::file(name, "look its directory up"))? {
                Found::Absent => steps.push(Step { name: part, layers: vec![] }),
                Found::Directory(layers) => steps.push(Step { name: part, layers }),
                Found::Other => return Err(Error::entry(name, "it lies in something that is no directory")),
                Found::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Error::entry(name, "it lies behind too many symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        steps.clear();
                    }
                    let parts = target.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".");
                    for part in parts.rev() {
                        queue.push_front(part.to_vec());
                    }
                }
            }
        }
        Ok(steps)
    }

    /// The directory for an entry, made in this layer with the attributes that it has below, and its parts without links.
    pub(super) fn make_parents(&self, name: &[u8], parts: &[Vec<u8>]) -> Result<(OwnedFd, Parts), Error> {
        if let Some(directory) = self.directory(parts) {
            return Ok((directory, parts.to_vec()));
        }
        let failed = Error::file(name, "make its directory");
        let steps = self.walk(name, parts)?;
        let mut path: Parts = vec![];
        let mut directory = self.directory(&[]).ok_or_else(|| failed(Errno::NOENT))?;
        for step in steps {
            path.push(step.name.clone());
            directory = match open_directory(directory.as_fd(), &step.name) {
                Ok(directory) => directory,
                Err(Errno::NOENT | Errno::NOTDIR) => {
                    if step.name.starts_with(WHITEOUT) {
                        return Err(Error::entry(name, "its directory has the name of a whiteout"));
                    }
                    let made = self.make_directory(directory.as_fd(), &step.name).map_err(&failed)?;
                    if let Some(below) = step.layers.iter().find(|index| **index != 0) {
                        let below =
                            self.layer(*below).and_then(|layer| open_directory(layer, &path.join(&b'/')));
                        attributes::copy(below.map_err(&failed)?.as_fd(), made.as_fd(), self.rights)
                            .map_err(&failed)?;
                    }
                    let stat = rustix::fs::fstat(&made).map_err(&failed)?;
                    self.implied.borrow_mut().push((path.clone(), final_of(&stat)));
                    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o700);
                    rustix::fs::fchmod(&made, mode).map_err(&failed)?;
                    made
                }
                Err(errno) => return Err(failed(errno)),
            };
        }
        Ok((directory, path))
    }

    /// A new directory, in the place of a whiteout where there is one: then it is opaque.
    pub(super) fn make_directory(&self, parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
        let mut replaces_whiteout = false;
        if let Some(stat) = stat(parent, name)? {
            if !is_whiteout(&stat) {
                return Err(Errno::EXIST);
            }
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            replaces_whiteout = true;
        }
        rustix::fs::mkdirat(parent, name, Mode::RWXU)?;
        let directory = open_directory(parent, name)?;
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(0o755))?;
        attributes::set_time(&attributes::Target::File(directory.as_fd()), (0, 0))?;
        if replaces_whiteout {
            self.make_opaque(directory.as_fd())?;
        }
        Ok(directory)
    }

    /// Hides what the layers below have in a directory.
    pub(super) fn make_opaque(&self, directory: BorrowedFd<'_>) -> Result<(), Errno> {
        rustix::fs::fsetxattr(directory, self.rights.opaque(), b"y", rustix::fs::XattrFlags::empty())
    }

    /// A file for a hard link: its parent's parts and its own name, and the layer below that has it if this one has not.
    pub(super) fn find(&self, name: &[u8], parts: &[Vec<u8>]) -> Result<(Parts, Option<OwnedFd>), Error> {
        let missing = || Error::entry(name, "what it is a link to is not there");
        let (last, parents) = parts.split_last().ok_or_else(missing)?;
        let steps = self.walk(name, parents)?;
        let all: Vec<usize> = (0..self.layers.len()).collect();
        let layers = steps.last().map_or(all, |step| step.layers.clone());
        let mut path: Parts = steps.into_iter().map(|step| step.name).collect();
        path.push(last.clone());
        let joined = path.join(&b'/');
        let failed = Error::file(name, "find what it is a link to");
        for index in layers {
            let layer = self.layer(index).map_err(&failed)?;
            let file = match open(layer, &joined, OFlags::PATH) {
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                result => result.map_err(&failed)?,
            };
            let stat = rustix::fs::fstat(&file).map_err(&failed)?;
            return match FileType::from_raw_mode(stat.st_mode) {
                _ if is_whiteout(&stat) => Err(missing()),
                FileType::Directory => Err(Error::entry(name, "it is a hard link to a directory")),
                _ if index == 0 => Ok((path, None)),
                FileType::RegularFile => {
                    Ok((path, Some(open(layer, &joined, OFlags::RDONLY).map_err(&failed)?)))
                }
                _ => Err(Error::entry(name, "it is a hard link to a special file of another layer")),
            };
        }
        Err(missing())
    }
}

fn final_of(stat: &Stat) -> Final {
    (stat.st_mode & 0o7777, (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0)))
}

/// What is under a name, not following it.
pub(super) fn stat(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>, Errno> {
    if !is_plain(name) {
        return Err(Errno::INVAL);
    }
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Removes whatever is under a name, with all that is in it, without following anything.
pub(super) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(Errno::ACCESS) => return Err(Errno::ACCESS),
        result => return result,
    }
    let directory = match open_directory(parent, name) {
        // Without rights, a directory has to be made readable first.
        Err(Errno::ACCESS) => {
            rustix::fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
            open_directory(parent, name)?
        }
        result => result?,
    };
    if remove_contents(directory.as_fd()) == Err(Errno::ACCESS) {
        rustix::fs::fchmod(&directory, Mode::RWXU)?;
        remove_contents(directory.as_fd())?;
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn remove_contents(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    // Removing while reading may skip names, so read again until nothing is left.
    loop {
        let mut names = vec![];
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name: &CStr = entry.file_name();
            if is_plain(name.to_bytes()) {
                names.push(name.to_bytes().to_vec());
            }
            if names.len() >= 4096 {
                break;
            }
        }
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            match remove(directory, &name) {
                // Somebody else removes the same.
                Err(Errno::NOENT) => {}
                result => result?,
            }
        }
    }
}

/// Removes a directory and all that is in it; one that is not there is no error.
pub fn remove_tree(path: &Path) -> std::io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let parent = match File::open(parent) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    match remove(parent.as_fd(), name.as_encoded_bytes()) {
        Err(Errno::NOENT) => Ok(()),
        result => Ok(result?),
    }
}
