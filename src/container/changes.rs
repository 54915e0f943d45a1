//! What a container has written over its image, as a directory in overlayfs's form: for `diff` and `commit`.
//!
//! Natively that is the overlay's upper directory. A microVM has it on a disk that only its own kernel mounts, since the
//! container may have written anything there; so its agent packs it as a layer, which is unpacked here with the care that
//! layers of strangers get. A microVM that does not run is booted for that, without its network, volumes and process.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use super::config::{ContainerConfig, Isolation, NetworkMode};
use super::files::{self, host};
use super::prepare::{self, image_of, open_microvm};
use super::records::{Record, Records};
use super::{backend, records};
use crate::image::layers::{self, Limits, Options, Rights};

/// Why the changes cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Directories.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// Files.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The microVM's surroundings.
    #[error(transparent)]
    Prepare(#[from] prepare::Error),
    /// The microVM.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// What the microVM has sent.
    #[error("cannot unpack what the microVM has sent")]
    Unpack(#[source] layers::Error),
    /// It is on its way up or down.
    #[error("the container is being started or stopped: try again")]
    Busy,
}

/// A directory with what a container has written.
#[derive(Debug)]
pub struct Changes {
    path: PathBuf,
    /// Whether it is a copy, which goes with the value.
    copy: Option<PathBuf>,
}

impl Changes {
    /// Those of a container. One that runs may be writing still.
    pub fn of(records: &Records, record: &Record) -> Result<Changes, Error> {
        let config = &record.config;
        let home = records.roots().container(&config.id);
        let copy = home.join(format!("changes-{}", std::process::id()));
        files::remove_tree(&copy)?;
        let path = copy.join("upper");
        let changes = Changes { path: path.clone(), copy: Some(copy.clone()) };
        let upper = home.join("rw/upper");
        let is_on_disk = config.isolation == Isolation::Microvm
            && !matches!(config.network.mode, NetworkMode::Container(_));
        if !is_on_disk && upper.is_dir() {
            return Ok(Changes { path: upper, copy: None });
        }
        // One that was never started has written nothing.
        fs::create_dir_all(&path).map_err(host("make", &path))?;
        if is_on_disk && home.join("disk.img").exists() {
            let archive = copy.join("layer.tar");
            let mut file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&archive)
                .map_err(host("make", &archive))?;
            read(records, record, &mut file)?;
            file.rewind().map_err(host("read", &archive))?;
            let (_, _, below) = image_of(records, config)?;
            let below: Vec<&Path> = below.iter().rev().map(PathBuf::as_path).collect();
            let options = Options { limits: Limits::default(), rights: Rights::detect() };
            layers::unpack(BufReader::new(file), &path, &below, options).map_err(Error::Unpack)?;
        }
        Ok(changes)
    }

    /// Where they are.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        if let Some(copy) = &self.copy
            && let Err(error) = files::remove_tree(copy)
        {
            tracing::warn!("{}", crate::error_chain(&error));
        }
    }
}

/// Has a microVM's agent pack what its container has written.
fn read(records: &Records, record: &Record, to: &mut File) -> Result<(), Error> {
    let config = &record.config;
    let mut to = BufWriter::new(to);
    if record.state.status.is_live() {
        open_microvm(records, config)?.read_changes(&mut to)?;
    } else {
        let _life = records.take_life(&config.id)?.ok_or(Error::Busy)?;
        // What an earlier look has left when it was killed.
        prepare::clear(records, config)?;
        let config = alone(config);
        let result = boot_and_read(records, &config, &mut to);
        let cleared = prepare::clear(records, &config);
        result?;
        cleared?;
    }
    Ok(to.flush().map_err(host("write", &records.roots().container(&config.id)))?)
}

fn boot_and_read(records: &Records, config: &ContainerConfig, to: impl Write) -> Result<(), Error> {
    let mut prepared = prepare::prepare(records, config)?;
    prepared.backend.create(&prepared.bundle)?;
    open_microvm(records, config)?.read_changes(to)?;
    Ok(prepared.backend.delete()?)
}

/// The container with nothing around it.
fn alone(config: &ContainerConfig) -> ContainerConfig {
    let mut config = config.clone();
    config.network.mode = NetworkMode::None;
    config.network.ports.clear();
    config.mounts.clear();
    config.secrets.clear();
    config.process.terminal = false;
    config.process.stdin = false;
    config
}
