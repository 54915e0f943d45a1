//! How `rvmm` becomes `rvmm-engine`, which lies beside it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;

use crate::program;

/// The engine's file name.
pub const NAME: &str = "rvmm-engine";

/// Where the engine is: in the directory of this program.
pub fn path() -> anyhow::Result<PathBuf> {
    Ok(program::directory().context("cannot find out where rvmm is")?.join(NAME))
}

/// Replaces this process by the engine. Returns only if that fails.
pub fn replace(arguments: impl IntoIterator<Item = OsString>) -> anyhow::Result<ExitCode> {
    let path = path()?;
    let error = Command::new(&path).arg0("rvmm").args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {path:?}, which rvmm needs beside it for this"))
}
