//! The engine's own program, out of containers' reach.
//!
//! A process that is to run a container's program is the engine until its exec. If that program is `/proc/self/exe`, or is
//! interpreted by it, the engine's own file is run in the container, and what runs it can find the file by
//! `/proc/PID/exe` and, being root, overwrite it: the next container would be started by what is there then. So the engine
//! runs from a read-only mount of its file that is in no namespace.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use nix::fcntl::AtFlags;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::sys;
use crate::container::backend::Error;
use crate::program;

/// A mount of this program's file, in no namespace.
fn clone_mount(own: &str) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, own, flags) {
        // This process has changed its mount namespace since it was started, and the file it runs from is not in the new
        // one. By its name it is.
        Err(Errno::INVAL) => {
            let file = open_tree(CWD, std::fs::read_link(own)?, flags)?;
            let (ours, found) = (rustix::fs::stat(own)?, rustix::fs::fstat(&file)?);
            if (ours.st_dev, ours.st_ino) != (found.st_dev, found.st_ino) {
                return Err(io::Error::other("the program's file has been replaced"));
            }
            Ok(file)
        }
        result => Ok(result?),
    }
}

/// Starts this program anew from a read-only mount of its file, unless it runs from one. Does not return then.
///
/// To be called first in `main` of a program that makes native containers, as root or in a user namespace; it costs one
/// exec. `told` are variables that the program is to find in its environment then.
pub fn protect_own_program(told: &[(&str, &Path)]) -> Result<(), Error> {
    let failed = |what: &'static str| move |source: io::Error| Error::failed(what, source);
    let own = "/proc/self/exe";
    let system =
        rustix::fs::statvfs(own).map_err(|errno| failed("cannot look at the own program")(errno.into()))?;
    if system.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        return Ok(());
    }
    let what = "cannot mount the own program read-only";
    let file = clone_mount(own).map_err(failed(what))?;
    sys::make_mount_read_only(file.as_fd()).map_err(failed(what))?;
    let strings = |list: Vec<OsString>| -> Result<Vec<CString>, Error> {
        let all = list.into_iter().map(|text| CString::new(text.into_vec())).collect::<Result<Vec<_>, _>>();
        all.map_err(|source| Error::failed(what, source))
    };
    let args = strings(std::env::args_os().collect())?;
    let variable = |(name, value): (OsString, OsString)| {
        let mut whole = name;
        whole.push("=");
        whole.push(value);
        whole
    };
    let place = program::directory().map_err(failed(what))?;
    let told = told.iter().copied().chain([(program::DIRECTORY, place.as_path())]);
    let told: Vec<(OsString, OsString)> = told.map(|(name, value)| (name.into(), value.into())).collect();
    let others = std::env::vars_os().filter(|(name, _)| told.iter().all(|(new, _)| new != name));
    let env = strings(others.chain(told.clone()).map(variable).collect())?;
    let Err(error) = nix::unistd::execveat(file.as_fd(), c"", &args, &env, AtFlags::AT_EMPTY_PATH);
    Err(Error::failed("cannot start the own program anew", io::Error::from(error)))
}
