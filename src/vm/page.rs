//! A file that is replaced as a whole, so that who reads it never sees half of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the next page is written before it takes the place of the one before.
fn next(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".next");
    path.with_file_name(name)
}

/// Replaces the file at `path`.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let next = next(path);
    fs::write(&next, bytes)?;
    fs::rename(next, path)
}
