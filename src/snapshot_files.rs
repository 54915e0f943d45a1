//! Where a snapshot's files lie, and how new ones come there.
//!
//! Both files are written without a name, made durable, and then given theirs, the state file last and in place of the
//! earlier one. Its memory file has a name that no other snapshot's has, so until that moment the earlier snapshot is
//! whole, and afterwards the new one is. What a killed process leaves is nothing, or in an instant between two calls a
//! file that the next snapshot there removes.
//!
//! A monitor behind its walls has this done by the keeper, and gets files to write to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, OFlags, flock, linkat};
use serde::{Deserialize, Serialize};

/// Names a snapshot's memory: a number that was given once.
pub type Id = [u8; 16];

/// Name of the state file in a directory that holds a snapshot.
const STATE: &str = "state";
/// How names of memory files begin; the identity follows.
const MEMORY: &str = "memory-";
/// How names begin that are on their way.
const UNFINISHED: &str = ".unfinished-";
/// Only the owner may read what a guest had in memory.
const MODE: u32 = 0o600;

/// Why files could not be written. An earlier snapshot is as before then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("cannot {what} {path:?}")]
    File {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Someone else writes there.
    #[error("another snapshot is being written to {0:?}")]
    Busy(PathBuf),
}

/// Where a snapshot is, or is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

    /// Name of the memory file of the snapshot `id`, if it lies beside the state file.
    pub fn memory_name(&self, id: &Id) -> Option<String> {
        self.memory.is_none().then(|| format!("{MEMORY}{}", hex(id)))
    }

    /// The memory file that a state file gives this name. One that we did not give might lead elsewhere: `None`.
    pub fn beside(&self, name: &str) -> Option<PathBuf> {
        let id = name.strip_prefix(MEMORY)?;
        let plain = id.len() == 2 * size_of::<Id>() && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        plain.then(|| parent(&self.state).join(name))
    }
}

/// A new snapshot's files, which have no names yet.
#[derive(Debug)]
pub struct Writing {
    place: Place,
    directory: PathBuf,
    /// Held so that no other snapshot is written there meanwhile.
    _lock: File,
    id: String,
    memory: Unnamed,
    state: Unnamed,
}

/// A file without a name, or where the file system knows no such thing, with one that says that it is unfinished.
#[derive(Debug)]
struct Unnamed {
    file: File,
    name: Option<PathBuf>,
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
    }
}

fn fail(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { what, path, source }
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

/// Gives a file without a name the name `name`.
fn link(file: &File, name: &Path) -> io::Result<()> {
    // The kernel lets root do this, or whoever opened the file. A process in a jail has no /proc for the other way.
    if linkat(file, c"", CWD, name, AtFlags::EMPTY_PATH).is_ok() {
        return Ok(());
    }
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, open, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
}

impl Unnamed {
    fn new(directory: &Path, id: &str) -> Result<Unnamed, Error> {
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
    fn put(mut self, directory: &Path, id: &str, path: &Path) -> Result<(), Error> {
        self.file.sync_all().map_err(fail("write", path))?;
        let from = match self.name.take() {
            Some(name) => name,
            None => {
                let name = directory.join(format!("{UNFINISHED}{id}"));
                link(&self.file, &name).map_err(fail("name a file in", directory))?;
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
    /// Makes the files of the snapshot `id`, and the directory if need be.
    pub fn begin(place: &Place, id: &Id) -> Result<Writing, Error> {
        let directory = parent(&place.state);
        std::fs::create_dir_all(&directory).map_err(fail("make the directory", &directory))?;
        let lock = File::open(&directory).map_err(fail("open", &directory))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(Error::Busy(directory)),
            // A file system without locks has one writer, as far as it can be known.
            Err(error) => tracing::debug!("cannot lock {directory:?}: {error}"),
            Ok(()) => {}
        }
        clean(&directory, |name| name.starts_with(UNFINISHED));
        let id = hex(id);
        let memory_directory = place.memory.as_deref().map_or_else(|| directory.clone(), parent);
        let memory = Unnamed::new(&memory_directory, &id)?;
        let state = Unnamed::new(&directory, &format!("{id}-state"))?;
        Ok(Writing { place: place.clone(), directory, _lock: lock, id, memory, state })
    }

    /// The memory file.
    pub fn memory(&self) -> &File {
        &self.memory.file
    }

    /// The state file.
    pub fn state(&self) -> &File {
        &self.state.file
    }

    /// Makes the snapshot durable, when all is written, and puts it in its place. Then the earlier one's memory is
    /// removed.
    pub fn finish(self) -> Result<(), Error> {
        self.finish_keeping(&[])
    }

    /// The same, for a snapshot that needs more files with these names.
    pub fn finish_keeping(self, keep: &[String]) -> Result<(), Error> {
        let Writing { place, directory, _lock, id, memory, state } = self;
        let name = format!("{MEMORY}{id}");
        match &place.memory {
            Some(path) => memory.put(&parent(path), &id, path)?,
            None => memory.put(&directory, &id, &directory.join(&name))?,
        }
        let put = state.put(&directory, &format!("{id}-state"), &place.state);
        if put.is_err() && place.memory.is_none() {
            let _ = std::fs::remove_file(directory.join(&name));
        }
        put?;
        let durable = File::open(&directory).and_then(|directory| directory.sync_all());
        durable.map_err(fail("write", &directory))?;
        // Only where the directory is a snapshot's own: elsewhere other state files may need theirs.
        if place.memory.is_none() && place.state.file_name().is_some_and(|file| file == STATE) {
            clean(&directory, |found| {
                found.starts_with(MEMORY) && found != name && keep.iter().all(|kept| kept != found)
            });
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const FIRST: Id = [1; 16];
    const SECOND: Id = [0xab; 16];

    fn write(place: &Place, id: &Id, state: &[u8]) {
        let writing = Writing::begin(place, id).unwrap();
        writing.memory().write_all(id).unwrap();
        writing.state().write_all(state).unwrap();
        writing.finish().unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn read(place: &Place, id: &Id) -> (Vec<u8>, Vec<u8>) {
        let memory = match place.memory_name(id) {
            Some(name) => place.beside(&name).unwrap(),
            None => place.memory.clone().unwrap(),
        };
        (std::fs::read(&place.state).unwrap(), std::fs::read(memory).unwrap())
    }

    #[test]
    fn new_snapshot_takes_the_place_of_the_earlier_one_whole() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("deep/er");
        let place = Place::directory(&at);
        write(&place, &FIRST, b"one");
        assert_eq!(names(&at), [format!("memory-{}", "01".repeat(16)), "state".into()]);
        assert_eq!(read(&place, &FIRST), (b"one".to_vec(), FIRST.to_vec()));

        // One that is given up leaves the earlier one, and nothing else.
        let writing = Writing::begin(&place, &SECOND).unwrap();
        writing.memory().write_all(b"half").unwrap();
        assert!(matches!(Writing::begin(&place, &SECOND), Err(Error::Busy(_))));
        drop(writing);
        assert_eq!(names(&at).len(), 2);
        assert_eq!(read(&place, &FIRST), (b"one".to_vec(), FIRST.to_vec()));

        std::fs::write(at.join(".unfinished-from-a-killed-process"), "x").unwrap();
        std::fs::write(at.join("memory-orphan"), "x").unwrap();
        std::fs::write(at.join("notes"), "the user's own").unwrap();
        write(&place, &SECOND, b"two");
        assert_eq!(names(&at), [format!("memory-{}", "ab".repeat(16)), "notes".into(), "state".into()]);
        assert_eq!(read(&place, &SECOND), (b"two".to_vec(), SECOND.to_vec()));
        assert_eq!(std::fs::metadata(&place.state).unwrap().mode() & 0o777, MODE);
    }

    #[test]
    fn files_lie_where_they_are_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let place = Place { state: at("vm.snap"), memory: Some(at("vm.mem")) };
        for (id, state) in [(FIRST, b"one"), (SECOND, b"two")] {
            write(&place, &id, state);
            assert_eq!(names(directory.path()), ["vm.mem", "vm.snap"]);
            assert_eq!(read(&place, &id), (state.to_vec(), id.to_vec()));
        }
    }

    #[test]
    fn name_of_memory_cannot_lead_elsewhere() {
        let place = Place::directory(Path::new("/s"));
        let name = format!("memory-{}", "0f".repeat(16));
        assert_eq!(place.beside(&name), Some(Path::new("/s").join(&name)));
        for name in ["", "memory-", "../state", "memory-/etc/passwd", "memory-0f", "/etc/passwd"] {
            assert_eq!(place.beside(name), None, "{name}");
        }
    }
}
