//! Where rvmm keeps things: data that stays, and what is gone after a reboot.

use std::env;
use std::path::PathBuf;

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
}

/// The two roots. Neither need exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Images, containers, volumes, networks.
    pub data: PathBuf,
    /// Locks, sockets, mount points.
    pub run: PathBuf,
}

impl Roots {
    /// The roots of this user: `$RVMM_ROOT` and `$RVMM_RUN_ROOT`, or the usual places.
    pub fn find() -> Result<Roots, Error> {
        Self::choose(nix::unistd::geteuid().is_root(), |name| env::var_os(name).map(PathBuf::from))
    }

    /// The image store of this user, who need not have a place for what is gone after a reboot.
    pub fn find_images() -> Result<PathBuf, Error> {
        let data =
            Self::choose_data(nix::unistd::geteuid().is_root(), |name| env::var_os(name).map(PathBuf::from));
        Ok(data?.join("images"))
    }

    fn choose(root: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Roots, Error> {
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let run = match root {
            true => Some(PathBuf::from("/run")),
            false => absolute("XDG_RUNTIME_DIR"),
        };
        let run = absolute("RVMM_RUN_ROOT").or_else(|| run.map(|path| path.join("rvmm")));
        Ok(Roots {
            data: Self::choose_data(root, &variable)?,
            run: run.ok_or(Error::Nowhere { what: "locks and sockets", variable: "XDG_RUNTIME_DIR" })?,
        })
    }

    fn choose_data(root: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, Error> {
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let data = match root {
            true => Some(PathBuf::from("/var/lib")),
            false => absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share"))),
        };
        let data = absolute("RVMM_ROOT").or_else(|| data.map(|path| path.join("rvmm")));
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

/// Digits of an id by which its run-time directories are called: a path with a whole one would be too long for a socket.
const RUN_NAME_DIGITS: usize = 24;

/// What the run-time directories of a container are called.
pub fn run_name(id: &str) -> &str {
    id.get(..RUN_NAME_DIGITS).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(root: bool, variables: &[(&str, &str)]) -> Result<Roots, Error> {
        Roots::choose(root, |name| Some(variables.iter().find(|(n, _)| *n == name)?.1.into()))
    }

    #[test]
    fn places_are_those_of_the_user_unless_variables_say_otherwise() {
        let roots = |data: &str, run: &str| Roots { data: data.into(), run: run.into() };
        assert_eq!(choose(true, &[]).unwrap(), roots("/var/lib/rvmm", "/run/rvmm"));
        let own = [("RVMM_ROOT", "/a"), ("RVMM_RUN_ROOT", "/b")];
        assert_eq!(choose(true, &own).unwrap(), roots("/a", "/b"));
        let user = [("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7")];
        assert_eq!(choose(false, &user).unwrap(), roots("/home/u/.local/share/rvmm", "/run/user/7/rvmm"));
        let relative = [("HOME", "/home/u"), ("XDG_DATA_HOME", "data"), ("XDG_RUNTIME_DIR", "/r")];
        assert_eq!(choose(false, &relative).unwrap(), roots("/home/u/.local/share/rvmm", "/r/rvmm"));
    }

    #[test]
    fn missing_places_are_named() {
        let error = choose(false, &[("HOME", "/home/u")]).unwrap_err();
        assert!(error.to_string().contains("$XDG_RUNTIME_DIR"), "{error}");
    }
}
