//! Who a process runs as, by the files of its container.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rvmm::guest::protocol::Failure;
use rvmm::guest::spec::User;
use rvmm::guest::user::{self, FILE_BYTES_MAX, Identity};

use crate::failure::Doing;

/// Looks a user up below `root`.
pub fn resolve(user: &User, root: BorrowedFd<'_>) -> Result<Identity, Failure> {
    let passwd = read(root, "etc/passwd")?;
    match user {
        User::Ids { uid, gid, groups } => {
            Ok(Identity { uid: *uid, gid: *gid, groups: groups.clone(), home: user::home_of(*uid, &passwd) })
        }
        User::Named { user, groups } => {
            let group = read(root, "etc/group")?;
            user::resolve(user, groups, &passwd, &group).map_err(|error| match error {
                user::Error::NoUser(name) => Failure::NoUser(name),
                user::Error::NoGroup(name) => Failure::NoGroup(name),
                range @ user::Error::Range(_) => Failure::Invalid(range.to_string()),
            })
        }
    }
}

/// A file of an image, of which nothing is known; one that is not there has nothing in it.
fn read(root: BorrowedFd<'_>, path: &str) -> Result<Vec<u8>, Failure> {
    let doing = || format!("read /{path} of the container");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
        Err(error) => return Err(error).doing(doing),
    };
    let mut bytes = Vec::new();
    if file.metadata().doing(doing)?.is_file() {
        file.take(FILE_BYTES_MAX as u64).read_to_end(&mut bytes).doing(doing)?;
    }
    Ok(bytes)
}
