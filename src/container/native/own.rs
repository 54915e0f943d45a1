//! The engine's own program, out of containers' reach.
//!
//! A process that is to run a container's program is the engine until its exec. If that program is `/proc/self/exe`, or is
//! interpreted by it, the engine's own file is run in the container, and what runs it can find the file by
//! `/proc/PID/exe` and, being root, overwrite it: the next container would be started by what is there then. So the engine
//! runs from a read-only mount of its file that is in no namespace.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;

use nix::fcntl::AtFlags;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::sys;
use crate::container::backend::Error;
use crate::program;

/// Starts this program anew from a read-only mount of its file, unless it runs from one. Does not return then.
///
/// To be called first in `main` of a program that makes native containers, as root or in a user namespace; it costs one
/// exec.
pub fn protect_own_program() -> Result<(), Error> {
    let failed = |what: &'static str| move |source: io::Error| Error::failed(what, source);
    let own = "/proc/self/exe";
    let system =
        rustix::fs::statvfs(own).map_err(|errno| failed("cannot look at the own program")(errno.into()))?;
    if system.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    let what = "cannot mount the own program read-only";
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let file = open_tree(CWD, own, flags).map_err(|errno| failed(what)(errno.into()))?;
    sys::make_mount_read_only(file.as_fd()).map_err(failed(what))?;
    let strings = |list: Vec<std::ffi::OsString>| -> Result<Vec<CString>, Error> {
        let all = list.into_iter().map(|text| CString::new(text.into_vec())).collect::<Result<Vec<_>, _>>();
        all.map_err(|source| Error::failed(what, source))
    };
    let args = strings(std::env::args_os().collect())?;
    let variable = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        let mut whole = name;
        whole.push("=");
        whole.push(value);
        whole
    };
    let place = program::directory().map_err(failed(what))?;
    let others = std::env::vars_os().filter(|(name, _)| name != program::DIRECTORY);
    let place = (program::DIRECTORY.into(), place.into_os_string());
    let env = strings(others.chain([place]).map(variable).collect())?;
    let Err(error) = nix::unistd::execveat(file.as_fd(), c"", &args, &env, AtFlags::AT_EMPTY_PATH);
    Err(Error::failed("cannot start the own program anew", io::Error::from(error)))
}
