//! Named volumes: directories that outlive containers.
//!
//! ```text
//! DATA/volumes/lock
//! DATA/volumes/NAME/_data          what containers see
//! DATA/volumes/NAME/volume.json    name, time, labels
//! DATA/volumes/NAME/users/ID       an empty file for each container that names the volume
//! DATA/volumes/NAME/lock           held while the volume is filled from an image
//! DATA/volumes/NAME/copy.new, copy what an image has there: being copied, and whole
//! ```

mod copy;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::files;

/// Longest name of a volume.
const NAME_BYTES_MAX: usize = 128;
/// A volume that is being removed is renamed to this and its name.
const REMOVED: &str = ".removed-";

/// Why a volume cannot be made, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("there is no volume {0:?}; `rvmm volume ls` lists them")]
    Missing(String),
    /// Not a volume's name.
    #[error(
        "{0:?} as a volume's name: it has letters, digits, `_`, `.` and `-`, and begins with a letter or digit"
    )]
    Name(String),
    /// Not a container's id.
    #[error("{0:?} is no id of a container")]
    Id(String),
    /// Containers name it.
    #[error("volume {volume:?} is in use by {}", .users.join(", "))]
    InUse {
        /// The volume.
        volume: String,
        /// Ids of containers.
        users: Vec<String>,
    },
    /// The host failed.
    #[error("cannot {what} {path}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file of ours.
    #[error(transparent)]
    Store(#[from] files::Error),
    /// The host has no random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] getrandom::Error),
}

fn host<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Host { what, path: path.to_path_buf(), source }
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Creation time in nanoseconds since 1970.
    pub created_ns: u64,
    /// Labels of the user.
    pub labels: BTreeMap<String, String>,
    /// Whether its name was made up, because nobody gave one.
    pub anonymous: bool,
}

/// All volumes of a host.
#[derive(Clone, Debug)]
pub struct Volumes {
    directory: PathBuf,
}

/// Whether a name is one that was made up for a volume without one: the form of an id.
fn is_made_up(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

impl Volumes {
    /// The volumes below this root of data.
    pub fn new(data_root: &Path) -> Volumes {
        Volumes { directory: data_root.join("volumes") }
    }

    /// A volume's directory as containers see it.
    pub fn data(&self, name: &str) -> PathBuf {
        self.place(name).join("_data")
    }

    fn place(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn lock(&self) -> Result<files::Lock, Error> {
        if !self.directory.is_dir() {
            // Nobody but root looks into volumes past their containers.
            let mut builder = fs::DirBuilder::new();
            let made = builder.recursive(true).mode(0o711).create(&self.directory);
            made.map_err(host("make", &self.directory))?;
        }
        Ok(files::Lock::wait(&self.directory.join("lock"))?)
    }

    /// Makes a volume, with a name that is made up if none is given. One that is there stays as it is.
    pub fn create(&self, name: Option<&str>, labels: &BTreeMap<String, String>) -> Result<Volume, Error> {
        let _lock = self.lock()?;
        self.create_locked(name, labels)
    }

    fn create_locked(&self, name: Option<&str>, labels: &BTreeMap<String, String>) -> Result<Volume, Error> {
        let made_up = match name {
            Some(_) => String::new(),
            None => random_name()?,
        };
        let anonymous = name.is_none_or(is_made_up);
        let name = name.unwrap_or(&made_up);
        if let Some(found) = self.get(name)? {
            return Ok(found);
        }
        let place = self.place(name);
        for directory in [self.data(name), place.join("users")] {
            files::make_open_directory(&directory)?;
        }
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let created_ns = u64::try_from(created.as_nanos()).unwrap_or(u64::MAX);
        let volume = Volume { name: name.into(), created_ns, labels: labels.clone(), anonymous };
        // Last, since a volume is there when this file is.
        files::write_json(&place.join("volume.json"), &volume)?;
        Ok(volume)
    }

    /// The volume of that name.
    pub fn get(&self, name: &str) -> Result<Option<Volume>, Error> {
        check_name(name)?;
        Ok(files::find_json(&self.place(name).join("volume.json"))?)
    }

    /// All volumes, by name.
    pub fn list(&self) -> Result<Vec<Volume>, Error> {
        let names = files::names(&self.directory)?;
        let names = names.iter().filter(|name| check_name(name).is_ok() && self.place(name).is_dir());
        names.filter_map(|name| self.get(name).transpose()).collect()
    }

    /// Has a container use a volume, which is made if it is not there. As long as one does, the volume cannot be removed.
    pub fn acquire(&self, name: Option<&str>, id: &str) -> Result<Volume, Error> {
        check_id(id)?;
        let _lock = self.lock()?;
        let volume = self.create_locked(name, &BTreeMap::new())?;
        let path = self.place(&volume.name).join("users").join(id);
        fs::write(&path, "").map_err(host("write", &path))?;
        Ok(volume)
    }

    /// Ends a container's use of all its volumes; those without a name of their own go too, if nobody else uses them
    /// and they are not wanted any more.
    pub fn release(&self, id: &str, remove_anonymous: bool) -> Result<(), Error> {
        check_id(id)?;
        if !self.directory.is_dir() {
            return Ok(());
        }
        let lock = self.lock()?;
        let mut unwanted = vec![];
        for volume in self.list()? {
            let path = self.place(&volume.name).join("users").join(id);
            if !path.exists() {
                continue;
            }
            files::remove_file(&path)?;
            if remove_anonymous && volume.anonymous && self.users(&volume.name)?.is_empty() {
                unwanted.push(self.set_aside(&volume.name)?);
            }
        }
        drop(lock);
        unwanted.iter().try_for_each(|path| delete(path))
    }

    /// Ends the use of all volumes by containers that are not there.
    pub fn repair(&self, is_there: impl Fn(&str) -> bool) -> Result<(), Error> {
        let mut gone = std::collections::BTreeSet::new();
        for volume in self.list()? {
            gone.extend(self.users(&volume.name)?.into_iter().filter(|id| !is_there(id)));
        }
        gone.iter().try_for_each(|id| self.release(id, false))
    }

    /// Ids of the containers that use a volume.
    pub fn users(&self, name: &str) -> Result<Vec<String>, Error> {
        check_name(name)?;
        Ok(files::names(&self.place(name).join("users"))?)
    }

    /// Removes a volume that no container uses, and everything in it.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let lock = self.lock()?;
        if self.get(name)?.is_none() {
            return Err(Error::Missing(name.into()));
        }
        let users = self.users(name)?;
        if !users.is_empty() {
            return Err(Error::InUse { volume: name.into(), users });
        }
        let removed = self.set_aside(name)?;
        drop(lock);
        delete(&removed)
    }

    /// Removes the volumes that no container uses and that `is_unwanted` names; returns their names and how many bytes
    /// they took.
    pub fn prune(&self, is_unwanted: impl Fn(&Volume) -> bool) -> Result<(Vec<String>, u64), Error> {
        let lock = self.lock()?;
        let (mut names, mut bytes, mut removed) = (vec![], 0u64, vec![]);
        // And what a removal left that was interrupted.
        let left = files::names(&self.directory)?;
        removed.extend(
            left.iter().filter(|name| name.starts_with(REMOVED)).map(|name| self.directory.join(name)),
        );
        for volume in self.list()? {
            if is_unwanted(&volume) && self.users(&volume.name)?.is_empty() {
                bytes = bytes.saturating_add(size(&self.data(&volume.name)));
                removed.push(self.set_aside(&volume.name)?);
                names.push(volume.name);
            }
        }
        drop(lock);
        removed.iter().try_for_each(|path| delete(path))?;
        Ok((names, bytes))
    }

    /// Takes a volume out of sight in one step.
    fn set_aside(&self, name: &str) -> Result<PathBuf, Error> {
        let place = self.place(name);
        let aside = self.directory.join(format!("{REMOVED}{}", random_name()?));
        fs::rename(&place, &aside).map_err(host("remove", &place))?;
        Ok(aside)
    }

    /// Fills an empty volume with what an image has at `target`, below its root file system at `root`: contents, owners,
    /// modes, times, extended attributes, symbolic and hard links. Links do not lead out of the root. Of several
    /// containers that do this at once, one does it and the others wait. Tells whether anything was done.
    pub fn fill(&self, name: &str, root: &Path, target: &Path) -> Result<bool, Error> {
        check_name(name)?;
        let place = self.place(name);
        let data = self.data(name);
        let _lock = files::Lock::wait(&place.join("lock"))?;
        let (unfinished, whole) = (place.join("copy.new"), place.join("copy"));
        if whole.is_dir() {
            // Somebody copied and was stopped before it was moved.
            copy::move_into(&whole, &data)?;
            return Ok(true);
        }
        let mut entries = fs::read_dir(&data).map_err(host("read", &data))?;
        if entries.next().is_some() {
            return Ok(false);
        }
        let Some(source) = copy::open_below(root, target)? else { return Ok(false) };
        if unfinished.exists() {
            delete(&unfinished)?;
        }
        fs::create_dir(&unfinished).map_err(host("make", &unfinished))?;
        copy::copy_tree(&source, &unfinished)?;
        fs::rename(&unfinished, &whole).map_err(host("rename", &unfinished))?;
        copy::move_into(&whole, &data)?;
        Ok(true)
    }
}

/// Bytes that a directory's files take on the disk.
pub fn size(directory: &Path) -> u64 {
    let mut seen = std::collections::BTreeSet::new();
    let mut bytes = 0u64;
    let mut directories = vec![directory.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() < 2 || metadata.is_dir() || seen.insert((metadata.dev(), metadata.ino())) {
                bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
            }
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    bytes
}

fn delete(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        // Another one is at it, or was.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => delete(path),
        other => other.map_err(host("remove", path)),
    }
}

fn random_name() -> Result<String, Error> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn check_name(name: &str) -> Result<(), Error> {
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if first && rest && name.len() <= NAME_BYTES_MAX { Ok(()) } else { Err(Error::Name(name.into())) }
}

fn check_id(id: &str) -> Result<(), Error> {
    let fits =
        (1..=NAME_BYTES_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if fits { Ok(()) } else { Err(Error::Id(id.into())) }
}

#[cfg(test)]
#[path = "volume/tests.rs"]
mod tests;
