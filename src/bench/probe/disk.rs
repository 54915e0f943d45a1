//! `disk`: the root file system and a volume, by the helper. docs/probes/disk.md

use std::fs;

use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, Job};

/// Where the volume is inside.
const VOLUME: &str = "/rvmm-probe-volume";
/// A directory of the root file system.
const ROOT: &str = "/root";

/// Reads, writes, and how long until a write is safe.
pub struct Disk;

impl Probe for Disk {
    fn names(&self) -> Vec<&'static str> {
        vec!["disk"]
    }

    fn weight(&self) -> f64 {
        1.5
    }

    fn starts(&self) -> f64 {
        2.0
    }

    fn seconds(&self) -> f64 {
        1.5
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let mut found = vec![];
        match root(context, executor) {
            Ok(figures) => found.extend(figures),
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) => found.push(Found::failed("root_read", crate::error_chain(&error))),
        }
        match volume(context, executor) {
            Ok(figures) => found.extend(figures),
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) => found.push(Found::failed("volume_read", crate::error_chain(&error))),
        }
        Ok(found.into_iter().map(|found| ("disk", found)).collect())
    }
}

fn root(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    if executor.name() == "qemu-microvm" {
        return Err(Error::Other("its root is an initrd, which lies in memory".into()));
    }
    measure(context, executor, "root", ROOT, vec![])
}

fn volume(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let host = context.directory.join("volume-disk");
    fs::create_dir_all(&host).map_err(|error| Error::Other(format!("cannot make {host:?}: {error}")))?;
    measure(context, executor, "volume", VOLUME, vec![(host, VOLUME.to_owned())])
}

fn measure(
    context: &Context,
    executor: &dyn Executor,
    what: &str,
    place: &str,
    volumes: Vec<(std::path::PathBuf, String)>,
) -> Result<Vec<Found>, Error> {
    let (mebibytes, milliseconds) = if context.quick { ("32", "150") } else { ("256", "1000") };
    let job = Job { volumes, ..context.helper(["disk", place, mebibytes, milliseconds]) };
    let said = context.run_helper(executor, &job)?;
    let line = said.iter().find(|line| line.get("fsync").is_some());
    let line = line.ok_or_else(|| Error::Other("the helper said no figures".into()))?;
    let figure = |name: &str| Some(Found::number(&format!("{what}_{name}"), line.get(name)?.as_f64()?));
    Ok(["read", "write", "random_read", "random_write", "fsync"]
        .iter()
        .filter_map(|name| figure(name))
        .collect())
}
