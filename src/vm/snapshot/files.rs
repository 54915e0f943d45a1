//! Where a snapshot's files lie, and how they come there.
//!
//! Both files are written without a name, made durable, and then given theirs, the state file last and in place of the
//! earlier one. Its memory file has a name that no other snapshot's has, so until that moment the earlier snapshot is
//! whole, and afterwards the new one is. What a killed process leaves is nothing, or in an instant between two calls a
//! file that the next snapshot there removes.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, OFlags, flock, linkat};

use super::error::{CreateError, LoadError};
use super::format::BYTES_MAX;
use crate::memory::file::Id;

/// Name of the state file in a directory that holds a snapshot.
const STATE: &str = "state";
/// How names of memory files begin; the identity follows.
const MEMORY: &str = "memory-";
/// How names begin that are on their way.
const UNFINISHED: &str = ".unfinished-";
/// Only the owner may read what a guest had in memory.
const MODE: u32 = 0o600;
/// Attempts to open a snapshot that is being replaced meanwhile.
const ATTEMPTS: usize = 5;

/// Where a snapshot is, or is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The state file.
    pub state: PathBuf,
    /// The memory file; `None` for one beside the state file, which knows its name.
    pub memory: Option<PathBuf>,
}

impl Place {
    /// In a directory of its own.
    pub fn directory(path: &Path) -> Place {
        Place { state: path.join(STATE), memory: None }
    }
}

/// A new snapshot's files, which have no names yet.
pub(super) struct Writing {
    place: Place,
    directory: PathBuf,
    /// Held so that no other snapshot is written there meanwhile.
    _lock: File,
    id: String,
    pub(super) memory: Unnamed,
}

/// A file without a name, or where the file system knows no such thing, with one that says that it is unfinished.
pub(super) struct Unnamed {
    pub(super) file: File,
    name: Option<PathBuf>,
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
    }
}

fn fail(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CreateError {
    let path = path.to_owned();
    move |source| CreateError::File { what, path, source }
}

fn hex(id: &Id) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

impl Unnamed {
    fn new(directory: &Path, id: &str) -> Result<Unnamed, CreateError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(MODE);
        let unnamed = options.clone().custom_flags(OFlags::TMPFILE.bits() as i32).open(directory);
        match unnamed {
            Ok(file) => Ok(Unnamed { file, name: None }),
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) =>
            {
                let name = directory.join(format!("{UNFINISHED}{id}"));
                let file = options.create_new(true).open(&name).map_err(fail("make a file in", directory))?;
                Ok(Unnamed { file, name: Some(name) })
            }
            Err(error) => Err(fail("make a file in", directory)(error)),
        }
    }

    /// Makes the contents durable, and gives the file its name, in place of another one.
    fn put(mut self, directory: &Path, id: &str, path: &Path) -> Result<(), CreateError> {
        self.file.sync_all().map_err(fail("write", path))?;
        let from = match self.name.take() {
            Some(name) => name,
            None => {
                let name = directory.join(format!("{UNFINISHED}{id}"));
                let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(CWD, open, CWD, &name, AtFlags::SYMLINK_FOLLOW)
                    .map_err(|error| fail("name a file in", directory)(error.into()))?;
                name
            }
        };
        self.name = Some(from.clone());
        std::fs::rename(&from, path).map_err(fail("replace", path))?;
        self.name = None;
        Ok(())
    }
}

impl Writing {
    /// Makes the memory file of the snapshot `id`, and the directory if need be.
    pub(super) fn begin(place: &Place, id: &Id) -> Result<Writing, CreateError> {
        let directory = parent(&place.state);
        std::fs::create_dir_all(&directory).map_err(fail("make the directory", &directory))?;
        let lock = File::open(&directory).map_err(fail("open", &directory))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(CreateError::Busy(directory)),
            // A file system without locks has one writer, as far as it can be known.
            Err(error) => tracing::debug!("cannot lock {directory:?}: {error}"),
            Ok(()) => {}
        }
        clean(&directory, |name| name.starts_with(UNFINISHED));
        let id = hex(id);
        let memory_directory = place.memory.as_deref().map_or_else(|| directory.clone(), parent);
        let memory = Unnamed::new(&memory_directory, &id)?;
        Ok(Writing { place: place.clone(), directory, _lock: lock, id, memory })
    }

    /// Name of the memory file, if it lies beside the state file.
    pub(super) fn memory_name(&self) -> Option<String> {
        self.place.memory.is_none().then(|| format!("{MEMORY}{}", self.id))
    }

    /// Makes the snapshot durable and puts it in its place. Then the earlier one's memory is removed.
    pub(super) fn finish(self, state: &[u8]) -> Result<(), CreateError> {
        let Writing { place, directory, _lock, id, memory } = self;
        let mut written = Unnamed::new(&directory, &format!("{id}-state"))?;
        written.file.write_all(state).map_err(fail("write", &place.state))?;
        let name = format!("{MEMORY}{id}");
        match &place.memory {
            Some(path) => memory.put(&parent(path), &id, path)?,
            None => memory.put(&directory, &id, &directory.join(&name))?,
        }
        let put = written.put(&directory, &format!("{id}-state"), &place.state);
        if put.is_err() && place.memory.is_none() {
            let _ = std::fs::remove_file(directory.join(&name));
        }
        put?;
        let durable = File::open(&directory).and_then(|directory| directory.sync_all());
        durable.map_err(fail("write", &directory))?;
        // Only where the directory is a snapshot's own: elsewhere other state files may need theirs.
        if place.memory.is_none() && place.state.file_name().is_some_and(|file| file == STATE) {
            clean(&directory, |found| found.starts_with(MEMORY) && found != name);
        }
        Ok(())
    }
}

/// Removes files that nobody needs any more. One that stays takes room and does no other harm.
fn clean(directory: &Path, unneeded: impl Fn(&str) -> bool) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(&unneeded)
            && let Err(error) = std::fs::remove_file(entry.path())
        {
            tracing::debug!("cannot remove {:?}: {error}", entry.path());
        }
    }
}

/// Reads a state file, as much of it as one may have.
pub(super) fn read_state(path: &Path) -> Result<Vec<u8>, LoadError> {
    let fail = |what, source| LoadError::File { what, path: path.to_owned(), source };
    // A pipe or a device that somebody put there must not keep us waiting.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => LoadError::Missing(path.to_owned()),
        _ => fail("open", error),
    })?;
    if !file.metadata().map_err(|error| fail("read", error))?.is_file() {
        return Err(LoadError::Foreign(path.to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| fail("read", error))?;
    Ok(bytes)
}

/// Opens a memory file.
fn open_memory(path: &Path) -> Result<File, LoadError> {
    let fail = |what, source| LoadError::File { what, path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(|error| fail("open the memory of the snapshot,", error))?;
    match file.metadata().map_err(|error| fail("read", error))?.is_file() {
        true => Ok(file),
        false => Err(LoadError::Foreign(path.to_owned())),
    }
}

/// Reads the state at `place` with `parse`, which gives the memory file's name, and opens that. A snapshot that is replaced
/// in between is read anew.
pub(super) fn open<T>(
    place: &Place,
    parse: impl Fn(&[u8]) -> Result<(T, Option<String>), LoadError>,
) -> Result<(T, PathBuf, File), LoadError> {
    let mut attempt = 0;
    loop {
        let bytes = read_state(&place.state)?;
        let (state, name) = parse(&bytes)?;
        let path = match (&place.memory, name) {
            (Some(path), _) => path.clone(),
            (None, Some(name)) if is_plain(&name) => parent(&place.state).join(name),
            (None, _) => return Err(LoadError::Foreign(place.state.clone())),
        };
        match open_memory(&path) {
            Ok(file) => return Ok((state, path, file)),
            Err(error) => {
                attempt += 1;
                if attempt == ATTEMPTS || read_state(&place.state)? == bytes {
                    return Err(error);
                }
            }
        }
    }
}

/// Whether a name from a state file is one that we gave: it must not lead elsewhere.
fn is_plain(name: &str) -> bool {
    let id = name.strip_prefix(MEMORY);
    id.is_some_and(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
