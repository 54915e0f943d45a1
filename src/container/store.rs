//! Small files that several processes read and replace: JSON, renamed into place, and locks that die with their holder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a file could not be read, replaced or locked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused.
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
    /// The file is not of the form that it should have.
    #[error("{path} is damaged")]
    Form {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: serde_json::Error,
    },
}

fn host<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Host { what, path: path.to_path_buf(), source }
}

/// Reads a file; `None` if there is none.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(host("read", path))?,
    };
    let form = |source| Error::Form { path: path.to_path_buf(), source };
    serde_json::from_slice(&bytes).map(Some).map_err(form)
}

/// Puts a file in the place of what was there, in one step.
pub(super) fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let form = |source| Error::Form { path: path.to_path_buf(), source };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(form)?;
    bytes.push(b'\n');
    let directory = path.parent().unwrap_or(Path::new("."));
    let failed = host("write", path);
    let mut file = tempfile::Builder::new()
        .prefix(".new-")
        .permissions(PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .map_err(&failed)?;
    file.write_all(&bytes).map_err(&failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Removes a file; nothing happens if there is none.
pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(host("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes a directory and those above it.
pub(super) fn make_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(host("make", path))
}

/// Names of the files in a directory; none if there is no directory.
pub(super) fn names(path: &Path) -> Result<Vec<String>, Error> {
    let failed = host("read", path);
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        other => other.map_err(&failed)?,
    };
    let mut names = vec![];
    for entry in entries {
        names.extend(entry.map_err(&failed)?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// A lock on a file, given up when the value is dropped or the process ends.
#[derive(Debug)]
pub(super) struct Lock(#[allow(dead_code, reason = "holds the lock")] File);

/// Waits for the lock on the file at `path`, which is made if it is not there.
pub(super) fn lock(path: &Path) -> Result<Lock, Error> {
    let failed = host("lock", path);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(&failed)?;
    loop {
        match flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(Lock(file)),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_replaced_and_absence_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
        write(&path, &vec![1, 2]).unwrap();
        write(&path, &vec![3]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), Some(vec![3]));
        assert_eq!(names(directory.path()).unwrap(), ["a.json"]);
        assert!(matches!(read::<String>(&path), Err(Error::Form { .. })));
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(names(&path).unwrap().is_empty());
    }

    #[test]
    fn lock_waits_for_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let counter = directory.path().join("counter");
        write(&counter, &0u32).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let _lock = lock(&path).unwrap();
                        let value: u32 = read(&counter).unwrap().unwrap();
                        write(&counter, &(value + 1)).unwrap();
                    }
                });
            }
        });
        assert_eq!(read(&counter).unwrap(), Some(160u32));
    }
}
