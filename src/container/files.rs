//! Files that are whole at every moment, and locks that die with their holder.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, StatxFlags, statx};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a file could not be read, written or locked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host's file system.
    #[error("cannot {what} {path:?}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file is not what rvmm writes.
    #[error("{path:?} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether the file is not there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Error::Host { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// What the host said when something was done with a path.
pub(super) fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, path: path.into(), source }
}

/// Makes a directory that only this user may enter, and those above it.
pub fn make_directory(path: &Path) -> Result<(), Error> {
    loop {
        match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
            // It was there, and somebody has removed it since.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_gone(path) => {}
            result => return result.map_err(host("make the directory", path)),
        }
    }
}

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Makes a directory that others may enter, and those above it.
pub(super) fn make_open_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(host("make the directory", path))
}

/// Replaces a file by `value` as JSON, in one step: a reader sees the old or the new one, also after a crash.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|source| Error::Damaged { path: path.into(), source })?;
    bytes.push(b'\n');
    write(path, &bytes, 0o600)
}

/// Replaces a file in one step.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let new = path.with_extension(format!("new-{}", std::process::id()));
    let result = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&new)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&new, path));
    result.map_err(|source| {
        let _ = fs::remove_file(&new);
        Error::Host { what: "write", path: path.into(), source }
    })
}

/// Removes a directory with all that is in it, but nothing that is mounted there: a mount that is left is an error, and
/// what it shows is not touched.
pub fn remove_tree(path: &Path) -> Result<(), Error> {
    let remove = || -> io::Result<()> { remove_within(path, mount_of(path)?) };
    gone(remove()).map_err(host("remove", path))
}

/// What is not there any more, because somebody else is removing the same, is as it should be.
fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn mount_of(path: &Path) -> io::Result<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    Ok(statx(CWD, path, flags, StatxFlags::MNT_ID)?.stx_mnt_id)
}

fn remove_within(path: &Path, mount: u64) -> io::Result<()> {
    if mount_of(path)? != mount {
        return Err(io::Error::other(format!("{path:?} is a mount point")));
    }
    if !fs::symlink_metadata(path)?.is_dir() {
        return fs::remove_file(path);
    }
    for entry in fs::read_dir(path)? {
        gone(remove_within(&entry?.path(), mount))?;
    }
    fs::remove_dir(path)
}

/// Reads what [`write_json`] has written.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(host("read", path))?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Damaged { path: path.into(), source })
}

/// The same; `None` if there is no file.
pub(super) fn find_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    match read_json(path) {
        Err(error) if error.is_missing() => Ok(None),
        result => result.map(Some),
    }
}

/// Removes a file; nothing happens if there is none.
pub(super) fn remove_file(path: &Path) -> Result<(), Error> {
    gone(fs::remove_file(path)).map_err(host("remove", path))
}

/// Names of the files in a directory, in order; none if there is no directory.
pub(super) fn names(path: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        result => result.map_err(host("read", path))?,
    };
    let mut names = vec![];
    for entry in entries {
        names.extend(entry.map_err(host("read", path))?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

/// A held lock. It is free again when the value is dropped, or when every process that has inherited it has ended.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock at `path`, whose directory must be there.
    pub fn wait(path: &Path) -> Result<Lock, Error> {
        loop {
            if let Some(lock) = Self::take(path, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// Takes the lock if nobody holds it.
    pub fn try_take(path: &Path) -> Result<Option<Lock>, Error> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive)
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Option<Lock>, Error> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(host("open the lock", path))?;
            match rustix::fs::flock(&file, operation) {
                Ok(()) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(host("take the lock", path)(errno.into())),
            }
            // Whoever removed the directory meanwhile has left us a lock that nobody else can find.
            if is_same(&file, path) {
                return Ok(Some(Lock { _file: file }));
            }
        }
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_round_trips_and_damage_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/x.json");
        assert!(read_json::<Vec<u32>>(&path).unwrap_err().is_missing());
        make_directory(path.parent().unwrap()).unwrap();
        write_json(&path, &vec![1, 2]).unwrap();
        write_json(&path, &vec![3]).unwrap();
        assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), [3]);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        fs::write(&path, "[3").unwrap();
        assert!(matches!(read_json::<Vec<u32>>(&path), Err(Error::Damaged { .. })));
    }

    #[test]
    fn what_is_not_there_is_no_error_where_it_need_not_be() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        assert_eq!(find_json::<Vec<u32>>(&path).unwrap(), None);
        write_json(&path, &vec![1, 2]).unwrap();
        assert_eq!(find_json::<Vec<u32>>(&path).unwrap(), Some(vec![1, 2]));
        assert!(matches!(find_json::<String>(&path), Err(Error::Damaged { .. })));
        assert_eq!(names(directory.path()).unwrap(), ["a.json"]);
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        assert!(names(&path).unwrap().is_empty());
    }

    #[test]
    fn trees_are_removed_and_mounts_in_them_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, other) = (directory.path().join("tree"), directory.path().join("other"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("data"), "kept").unwrap();
        std::os::unix::fs::symlink(&other, tree.join("link")).unwrap();
        fs::write(tree.join("a/file"), "x").unwrap();
        if rustix::mount::mount_bind(&other, tree.join("a/b")).is_ok() {
            assert!(remove_tree(&tree).is_err());
            rustix::mount::unmount(tree.join("a/b"), rustix::mount::UnmountFlags::DETACH).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(fs::read_to_string(other.join("data")).unwrap(), "kept");
        remove_tree(&tree).unwrap();
    }

    #[test]
    fn tree_that_several_remove_is_gone_for_all() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        for number in 0..200 {
            fs::create_dir_all(tree.join(format!("{number}/a/b"))).unwrap();
            fs::write(tree.join(format!("{number}/file")), "x").unwrap();
        }
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(|| remove_tree(&tree))).collect();
            workers.into_iter().for_each(|worker| worker.join().unwrap().unwrap());
        });
        assert!(!tree.exists());
    }

    #[test]
    fn lock_waits_for_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        let (path, counter) = (directory.path().join("lock"), directory.path().join("counter"));
        write_json(&counter, &0u32).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        let _lock = Lock::wait(&path).unwrap();
                        let value: u32 = read_json(&counter).unwrap();
                        write_json(&counter, &(value + 1)).unwrap();
                    }
                });
            }
        });
        assert_eq!(read_json::<u32>(&counter).unwrap(), 160);
    }

    #[test]
    fn lock_is_for_one_and_follows_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let lock = Lock::wait(&path).unwrap();
        assert!(Lock::try_take(&path).unwrap().is_none());
        drop(lock);
        let lock = Lock::try_take(&path).unwrap().unwrap();
        fs::remove_file(&path).unwrap();
        // A new file, a new lock.
        assert!(Lock::try_take(&path).unwrap().is_some());
        drop(lock);
    }
}
