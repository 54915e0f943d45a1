//! Opening a snapshot's files. How they are written is [`crate::snapshot_files`]'s.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::error::LoadError;
use super::format::BYTES_MAX;
use crate::snapshot_files::Place;

/// Attempts to open a snapshot that is being replaced meanwhile.
const ATTEMPTS: usize = 5;

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
pub(super) fn open_memory(path: &Path) -> Result<File, LoadError> {
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
            (None, name) => {
                let beside = name.and_then(|name| place.beside(&name));
                beside.ok_or_else(|| LoadError::Foreign(place.state.clone()))?
            }
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

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
