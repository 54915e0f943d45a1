//! Making a template: a guest boots up to where its agent waits for a container, and is saved.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::super::machine::{self, Class};
use super::super::monitor::{API, Monitor};
use super::super::sandbox::{BOOT_PATIENCE, CALL_PATIENCE};
use super::key::Key;
use super::{Error, host};
use crate::api::client as api;
use crate::container::files;
use crate::container::network::netns;

/// How long a killed monitor may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(20);

/// Where a template is made. Who holds the class's lock has it alone.
pub(super) struct Site {
    /// The snapshot on its way.
    pub(super) data: PathBuf,
    /// The VM.
    pub(super) run: PathBuf,
}

impl Site {
    /// That of a class.
    pub(super) fn of(data: &Path, run: &Path, class: &str) -> Site {
        Site { data: data.join(format!(".new-{class}")), run: run.join(class) }
    }

    /// Makes its directories.
    pub(super) fn begin(&self) -> Result<(), Error> {
        files::make_directory(&self.data)?;
        files::make_directory(&self.run)?;
        Ok(())
    }

    /// Takes away all that is there, a VM too.
    pub(super) fn clear(&self) -> Result<(), Error> {
        if self.run.is_dir() {
            if let Ok(Some(monitor)) = Monitor::open(&self.run) {
                monitor.kill(KILL_PATIENCE);
            }
            netns::delete(&self.run.join("netns"))?;
            files::remove_tree(&self.run)?;
        }
        Ok(files::remove_tree(&self.data)?)
    }
}

/// Boots a guest of the class and saves it into the site.
pub(super) fn build(site: &Site, class: &Class, key: &Key) -> Result<(), Error> {
    let share = site.run.join("share");
    fs::create_dir(&share).map_err(host("make", &share))?;
    let netns = (!class.mtus.is_empty()).then(|| site.run.join("netns"));
    if let Some(netns) = &netns {
        netns::create(netns)?;
    }
    let mut config = machine::empty(class, &site.run, netns.as_deref())?;
    config.kernel = Some(key.kernel().into());
    let file = site.run.join("vm.json");
    files::write_json(&file, &config)?;
    let socket = site.run.join(API);
    // No jail: there is nothing of anybody's in this guest, and the snapshot's files are to lie where templates do.
    let arguments: [OsString; 4] =
        ["--config".into(), file.into(), "--api-socket".into(), socket.clone().into()];
    let monitor = Monitor::start(&site.run, &arguments)?;
    let mut client = monitor.connect(BOOT_PATIENCE, false)?;
    client.set_patience(Some(CALL_PATIENCE));
    client.settle().map_err(Error::Agent)?;
    drop(client);
    let state = site.data.join("state");
    let body = json!({ "snapshot_type": "Full", "snapshot_path": state }).to_string();
    api::put(&socket, "/snapshot/create", &body).map_err(Error::Save)?;
    monitor.kill(KILL_PATIENCE);
    Ok(())
}
