//! Where rvmm keeps things: data that stays, and what is gone after a reboot.

use std::env;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Why there is no place.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No variable says where, and there is no default for this user.
    #[error("there is no place for {what}: set ${variable}")]
    Nowhere {
        /// What would be kept.
        what: &'static str,
        /// The variable that tells.
        variable: &'static str,
    },
    /// The place in `/tmp` cannot be had.
    #[error("there is no place for locks and sockets: set $XDG_RUNTIME_DIR, since {path:?} cannot be made")]
    Temporary {
        /// The place.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The place in `/tmp` is somebody else's.
    #[error("there is no place for locks and sockets: set $XDG_RUNTIME_DIR, since {0:?} is not yours alone")]
    Foreign(PathBuf),
}

/// The variable that says where data is.
pub const DATA_VARIABLE: &str = "RVMM_ROOT";
/// The variable that says where the rest is.
pub const RUN_VARIABLE: &str = "RVMM_RUN_ROOT";

/// The two roots. Neither need exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Images, containers, volumes, networks.
    pub data: PathBuf,
    /// Locks, sockets, mount points.
    pub run: PathBuf,
}

impl Roots {
    /// The roots of this user: `$RVMM_ROOT` and `$RVMM_RUN_ROOT`, or the usual places. For a user without
    /// `$XDG_RUNTIME_DIR`, as after `su`, a directory in `/tmp` is made.
    pub fn find() -> Result<Roots, Error> {
        let user = nix::unistd::geteuid();
        let roots = Self::choose(user.as_raw(), |name| env::var_os(name).map(PathBuf::from))?;
        if !user.is_root() && roots.run == Self::temporary(user.as_raw()) {
            own_directory(&roots.run, user.as_raw())?;
        }
        Ok(roots)
    }

    fn temporary(user: u32) -> PathBuf {
        PathBuf::from(format!("/tmp/rvmm-run-{user}"))
    }

    fn choose(user: u32, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Roots, Error> {
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let usual = || match user {
            0 => PathBuf::from("/run/rvmm"),
            _ => absolute("XDG_RUNTIME_DIR").map_or_else(|| Self::temporary(user), |path| path.join("rvmm")),
        };
        Ok(Roots {
            data: Self::choose_data(user == 0, &variable)?,
            run: absolute(RUN_VARIABLE).unwrap_or_else(usual),
        })
    }

    fn choose_data(root: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, Error> {
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let data = match root {
            true => Some(PathBuf::from("/var/lib")),
            false => absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share"))),
        };
        let data = absolute(DATA_VARIABLE).or_else(|| data.map(|path| path.join("rvmm")));
        data.ok_or(Error::Nowhere { what: "images and containers", variable: "HOME" })
    }

    /// The image store.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// What stays of all containers.
    pub fn containers(&self) -> PathBuf {
        self.data.join("containers")
    }

    /// What stays of a container.
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    /// A container's locks and sockets.
    pub fn container_run(&self, id: &str) -> PathBuf {
        self.run.join("containers").join(run_name(id))
    }

    /// A sandbox's: its network namespace, and the VM's sockets.
    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.run.join("sandboxes").join(run_name(id))
    }
}

/// Makes a directory in `/tmp` where everybody could have made it, and sees that it is the user's own and nobody else's.
fn own_directory(path: &Path, user: u32) -> Result<(), Error> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Temporary { path: path.into(), source });
        }
        _ => {}
    }
    let found =
        fs::symlink_metadata(path).map_err(|source| Error::Temporary { path: path.into(), source })?;
    let is_own = found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0;
    if is_own { Ok(()) } else { Err(Error::Foreign(path.into())) }
}

/// Digits of an id by which its run-time directories are called: a path with a whole one would be too long for a socket.
const RUN_NAME_DIGITS: usize = 24;

/// What the run-time directories of a container are called.
pub fn run_name(id: &str) -> &str {
    id.get(..RUN_NAME_DIGITS).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(user: u32, variables: &[(&str, &str)]) -> Result<Roots, Error> {
        Roots::choose(user, |name| Some(variables.iter().find(|(n, _)| *n == name)?.1.into()))
    }

    #[test]
    fn places_are_those_of_the_user_unless_variables_say_otherwise() {
        let roots = |data: &str, run: &str| Roots { data: data.into(), run: run.into() };
        assert_eq!(choose(0, &[]).unwrap(), roots("/var/lib/rvmm", "/run/rvmm"));
        let own = [("RVMM_ROOT", "/a"), ("RVMM_RUN_ROOT", "/b")];
        assert_eq!(choose(0, &own).unwrap(), roots("/a", "/b"));
        let user = [("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7")];
        assert_eq!(choose(7, &user).unwrap(), roots("/home/u/.local/share/rvmm", "/run/user/7/rvmm"));
        let relative = [("HOME", "/home/u"), ("XDG_DATA_HOME", "data"), ("XDG_RUNTIME_DIR", "/r")];
        let home = [("HOME", "/home/u")];
        assert_eq!(choose(7, &home).unwrap(), roots("/home/u/.local/share/rvmm", "/tmp/rvmm-run-7"));
        assert_eq!(choose(7, &relative).unwrap(), roots("/home/u/.local/share/rvmm", "/r/rvmm"));
    }

    #[test]
    fn missing_places_are_named() {
        let error = choose(7, &[("XDG_RUNTIME_DIR", "/run/user/7")]).unwrap_err();
        assert!(error.to_string().contains("$HOME"), "{error}");
    }

    #[test]
    fn directory_that_others_could_have_made_is_checked() {
        let guard = tempfile::tempdir().unwrap();
        let (path, user) = (guard.path().join("run"), nix::unistd::geteuid().as_raw());
        own_directory(&path, user).unwrap();
        own_directory(&path, user).unwrap();
        assert!(matches!(own_directory(&path, user + 1), Err(Error::Foreign(_))));
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(matches!(own_directory(&path, user), Err(Error::Foreign(_))));
        let link = guard.path().join("link");
        std::os::unix::fs::symlink(guard.path(), &link).unwrap();
        assert!(matches!(own_directory(&link, user), Err(Error::Foreign(_))));
        assert!(matches!(own_directory(&guard.path().join("a/b"), user), Err(Error::Temporary { .. })));
    }
}
