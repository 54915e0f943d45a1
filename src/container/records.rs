//! The containers of this user, as directories: made, found, changed, and mended after a crash.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::config::ContainerConfig;
use super::files::{self, Lock, host};
use super::roots::Roots;
use super::state::{State, Status, now_ns};

/// Exit code of a container whose supervisor is gone.
const LOST: u8 = 255;
/// Prefix of directories that are being made or removed.
const UNFINISHED: &str = ".unfinished-";

/// Why a container could not be found, made or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing has that name.
    #[error("there is no container {0:?}")]
    Unknown(String),
    /// Several ids begin so.
    #[error("{0:?} is the beginning of several containers' ids")]
    Ambiguous(String),
    /// The name is taken.
    #[error("the name {name:?} belongs to container {id} already", id = short(.id))]
    NameTaken {
        /// The name.
        name: String,
        /// Whose it is.
        id: String,
    },
    /// No container can have that name.
    #[error("{0:?} is no name: it has letters, digits, '_', '.' and '-', and begins with a letter or digit")]
    BadName(String),
    /// A file.
    #[error(transparent)]
    File(#[from] files::Error),
}

/// The first 12 digits of an id.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Whether a container may have that name.
pub fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name.len() <= 255
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// A container as it was found.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was asked for.
    pub config: ContainerConfig,
    /// What became of it.
    pub state: State,
}

/// All containers of this user.
#[derive(Clone, Debug)]
pub struct Records {
    roots: Roots,
}

impl Records {
    /// Those below `roots`, which are made if they are not there.
    pub fn open(roots: &Roots) -> Result<Records, Error> {
        files::make_directory(&roots.containers())?;
        files::make_directory(&roots.run.join("containers"))?;
        Ok(Records { roots: roots.clone() })
    }

    /// Where things lie.
    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    /// The lock under which containers are made, named and removed.
    pub fn lock(&self) -> Result<Lock, Error> {
        Ok(Lock::wait(&self.roots.containers().join("lock"))?)
    }

    /// Keeps a new container. Its name must be free.
    pub fn create(&self, config: &ContainerConfig) -> Result<(), Error> {
        if !is_name(&config.name) {
            return Err(Error::BadName(config.name.clone()));
        }
        let _lock = self.lock()?;
        if let Some(other) = self.all()?.into_iter().find(|other| other.config.name == config.name) {
            return Err(Error::NameTaken { name: config.name.clone(), id: other.config.id });
        }
        let new = self.roots.containers().join(format!("{UNFINISHED}{}", config.id));
        files::make_directory(&new)?;
        files::write_json(&new.join("config.json"), config)?;
        files::write_json(&new.join("state.json"), &State::default())?;
        let place = self.roots.container(&config.id);
        Ok(fs::rename(&new, &place).map_err(host("make", &place))?)
    }

    /// Gives a container another name.
    pub fn rename(&self, id: &str, name: &str) -> Result<(), Error> {
        if !is_name(name) {
            return Err(Error::BadName(name.into()));
        }
        let _lock = self.lock()?;
        if let Some(other) = self.all()?.into_iter().find(|other| other.config.name == name) {
            return Err(Error::NameTaken { name: name.into(), id: other.config.id });
        }
        let mut record = self.read(id)?;
        record.config.name = name.into();
        Ok(files::write_json(&self.roots.container(id).join("config.json"), &record.config)?)
    }

    /// The container with that id.
    pub fn read(&self, id: &str) -> Result<Record, Error> {
        let directory = self.roots.container(id);
        let read = || -> Result<Record, files::Error> {
            Ok(Record {
                config: files::read_json(&directory.join("config.json"))?,
                state: files::read_json(&directory.join("state.json"))?,
            })
        };
        read().map_err(|error| if error.is_missing() { Error::Unknown(id.into()) } else { error.into() })
    }

    /// All containers, the newest first. One that is damaged is left out, with a warning.
    pub fn all(&self) -> Result<Vec<Record>, Error> {
        let mut records = vec![];
        for id in self.ids()? {
            match self.read(&id) {
                Ok(record) => records.push(record),
                // Removed meanwhile.
                Err(Error::Unknown(_)) => {}
                Err(error) => tracing::warn!("{}", crate::error_chain(&error)),
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.config.created_ns));
        Ok(records)
    }

    /// The ids of containers whose files cannot be read, and why.
    pub fn damaged(&self) -> Result<Vec<(String, Error)>, Error> {
        let ids = self.ids()?.into_iter();
        let read = |id: String| match self.read(&id) {
            Ok(_) => None,
            // Removed meanwhile.
            Err(_) if !self.roots.container(&id).exists() => None,
            Err(error) => Some((id, error)),
        };
        Ok(ids.filter_map(read).collect())
    }

    /// What can still be read of a container's configuration.
    pub fn salvage(&self, id: &str) -> Option<ContainerConfig> {
        let config: ContainerConfig = files::read_json(&self.roots.container(id).join("config.json")).ok()?;
        // It tells which places are cleared: another's must not be.
        (config.id == id).then_some(config)
    }

    fn ids(&self) -> Result<Vec<String>, Error> {
        let place = self.roots.containers();
        let entries = fs::read_dir(&place).map_err(host("read", &place))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.filter(|name| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit())).collect())
    }

    /// The id of the container that is called so, or whose id begins so.
    pub fn find(&self, text: &str) -> Result<String, Error> {
        let ids = self.ids()?;
        if ids.iter().any(|id| id == text) {
            return Ok(text.into());
        }
        if let Some(record) = self.all()?.into_iter().find(|record| record.config.name == text) {
            return Ok(record.config.id);
        }
        let mut found = ids.into_iter().filter(|id| !text.is_empty() && id.starts_with(text));
        match (found.next(), found.next()) {
            (Some(id), None) => Ok(id),
            (Some(_), Some(_)) => Err(Error::Ambiguous(text.into())),
            (None, _) => Err(Error::Unknown(text.into())),
        }
    }

    /// Replaces what became of a container.
    pub fn write_state(&self, id: &str, state: &State) -> Result<(), Error> {
        Ok(files::write_json(&self.roots.container(id).join("state.json"), state)?)
    }

    /// The lock that a container's supervisor holds as long as it lives.
    fn life(&self, id: &str) -> Result<PathBuf, Error> {
        let directory = self.roots.container_run(id);
        files::make_directory(&directory)?;
        Ok(directory.join("lock"))
    }

    /// Takes a container's life: nobody else is its supervisor, starts it or removes it. `None` if somebody is.
    pub fn take_life(&self, id: &str) -> Result<Option<Lock>, Error> {
        self.with_life(id, Lock::try_take)
    }

    /// Waits until nobody has a container's life, and takes it.
    pub fn await_life(&self, id: &str) -> Result<Lock, Error> {
        self.with_life(id, Lock::wait)
    }

    fn with_life<T>(&self, id: &str, take: impl Fn(&Path) -> Result<T, files::Error>) -> Result<T, Error> {
        loop {
            match take(&self.life(id)?) {
                // Whoever removes or clears up containers has taken the directory away before the lock was there.
                Err(error) if error.is_missing() && self.roots.container(id).exists() => {}
                Err(error) if error.is_missing() => return Err(Error::Unknown(id.into())),
                result => return Ok(result?),
            }
        }
    }

    /// Whether a container has a supervisor.
    pub fn is_supervised(&self, id: &str) -> bool {
        let lock = self.roots.container_run(id).join("lock");
        // Looking must not make anything.
        lock.exists() && matches!(Lock::try_take(&lock), Ok(None))
    }

    /// What a container is whose supervisor is gone although it ran. To be called with its life taken, after what it has
    /// left was cleared away.
    pub fn bury(&self, record: &mut Record) -> Result<(), Error> {
        let state = &mut record.state;
        if state.status.is_live() {
            state.status = Status::Exited;
            state.exit_code = Some(LOST);
            state.finished_ns = Some(now_ns());
            state.error = Some("its supervisor was killed, or the host was restarted".into());
        }
        state.pid = None;
        state.supervisor = None;
        state.endpoints = vec![];
        self.write_state(&record.config.id, &record.state)
    }

    /// Removes all that is kept of a container, with its life taken.
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        let place = self.roots.container(id);
        let gone = self.roots.containers().join(format!("{UNFINISHED}{id}"));
        {
            let _lock = self.lock()?;
            match fs::rename(&place, &gone) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(host("remove", &place))?,
            }
        }
        files::remove_tree(&gone)?;
        Ok(files::remove_tree(&self.roots.container_run(id))?)
    }

    /// Removes what half-made and half-removed containers have left.
    pub fn sweep(&self) -> Result<(), Error> {
        let _lock = self.lock()?;
        let place = self.roots.containers();
        for entry in fs::read_dir(&place).map_err(host("read", &place))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                files::remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn life_is_taken_while_its_directory_is_cleared_up() {
        let directory = tempfile::tempdir().unwrap();
        let roots = Roots { data: directory.path().join("data"), run: directory.path().join("run") };
        let records = Records { roots: roots.clone() };
        let id = "a".repeat(64);
        fs::create_dir_all(roots.container(&id)).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = files::remove_tree(&roots.container_run(&id));
                }
            });
            let failed = (0..1000).find_map(|_| records.await_life(&id).err());
            stop.store(true, Ordering::Relaxed);
            assert!(failed.is_none(), "{failed:?}");
        });
    }
}
