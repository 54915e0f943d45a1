//! Where this program is, and with it what belongs to it.

use std::io;
use std::path::{Path, PathBuf};

/// The variable in which a program that runs from a copy of its file is told where the file is.
pub const DIRECTORY: &str = "RVMM_PROGRAM_DIRECTORY";

/// The directory of this program's file.
pub fn directory() -> io::Result<PathBuf> {
    if let Some(told) = std::env::var_os(DIRECTORY).map(PathBuf::from).filter(|path| path.is_absolute()) {
        return Ok(told);
    }
    Ok(std::env::current_exe()?.parent().unwrap_or(Path::new("/")).to_path_buf())
}
