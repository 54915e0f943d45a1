//! Taking away what nothing needs: blobs, layers and disks of no image, and what crashes left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Locked, Store, blobs, files};
use crate::image::digest::Digest;
use crate::image::error::Error;
use crate::image::layers::remove_tree;
use crate::image::reference::Reference;

/// How long a broken-off download is kept, so that the next attempt goes on.
const PARTIAL_KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// What was taken away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Bytes on the disk.
    pub bytes: u64,
    /// Blobs, layers and disks.
    pub count: u64,
}

/// What `prune` did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Names that are gone.
    pub untagged: Vec<Reference>,
    /// Images that are gone.
    pub deleted: Vec<Digest>,
    /// What that gave.
    pub reclaimed: Reclaimed,
}

impl Store {
    /// Takes away what no image needs, and what crashes left behind.
    pub fn gc(&self) -> Result<Reclaimed, Error> {
        let locked = self.exclusive()?;
        self.collect(locked, PARTIAL_KEPT)
    }

    /// Removes images without a name that no container uses, with `all` also those with names; then collects garbage,
    /// broken-off downloads of today among it.
    pub fn prune(&self, all: bool) -> Result<Pruned, Error> {
        let locked = self.exclusive()?;
        let mut pruned = Pruned::default();
        let mut names = self.all_names()?;
        for id in self.ids()? {
            let names = names.remove(&id).unwrap_or_default();
            if !self.users(&id)?.is_empty() || (!all && names.iter().any(|name| name.tag().is_some())) {
                continue;
            }
            for name in names {
                self.remove_name(&name)?;
                pruned.untagged.push(name);
            }
            self.remove_record(&id)?;
            pruned.deleted.push(id);
        }
        pruned.reclaimed = self.collect(locked, Duration::ZERO)?;
        Ok(pruned)
    }

    fn collect(&self, locked: Locked, partial_kept: Duration) -> Result<Reclaimed, Error> {
        // A lease has digests of blobs and of layers alike.
        let mut blobs: BTreeSet<Digest> = self.leased()?.into_iter().collect();
        let mut chains = blobs.clone();
        for id in self.ids()? {
            // What cannot be read is not known to be unneeded: stop rather than remove.
            let Some(record) = self.record(&id)? else { continue };
            blobs.extend([id, record.manifest]);
            blobs.extend(record.layers.iter().map(|layer| layer.digest));
            chains.extend(record.layers.iter().map(|layer| layer.chain_id));
        }
        let mut doomed = vec![];
        self.look_for(&self.path("blobs/sha256"), &mut doomed, |name, _| {
            Ok(!Digest::from_hex(name).is_some_and(|digest| blobs.contains(&digest)))
        })?;
        let is_needed = |name: &str| Digest::from_hex(name).is_some_and(|chain| chains.contains(&chain));
        // What is being made is locked by its maker.
        let is_left = |name: &str, path: &Path| {
            if name.starts_with(files::UNFINISHED) { files::is_abandoned(path) } else { Ok(!is_needed(name)) }
        };
        self.look_for(&self.path("layers"), &mut doomed, is_left)?;
        self.look_for(&self.path("disks"), &mut doomed, |name, path| {
            is_left(name.strip_suffix(".erofs").unwrap_or(name), path)
        })?;
        self.look_for(&self.path("partial"), &mut doomed, |name, path| {
            let is_new = name.starts_with(blobs::NEW);
            Ok((is_new || is_older(path, partial_kept)) && files::is_abandoned(path)?)
        })?;
        // Small files are written under the lock, so nobody is writing them now.
        for directory in ["images", "repositories", "."] {
            self.look_for(&self.path(directory), &mut doomed, |name, _| {
                Ok(name.starts_with(files::UNFINISHED))
            })?;
        }
        self.look_for(&self.path("users"), &mut doomed, |name, path| {
            let is_image = Digest::from_hex(name).is_some_and(|id| self.record_path(&id).exists());
            Ok(!is_image && files::names(path)?.is_empty())
        })?;
        let trash = self.path("trash");
        for path in doomed {
            fs::rename(&path, trash.join(files::unique())).map_err(Error::file("remove", &path))?;
        }
        drop(locked);
        // Others may start using the store again while the disk works; and take part in this.
        let mut reclaimed = Reclaimed::default();
        for name in files::names(&trash)? {
            let path = trash.join(name);
            let bytes = size(&path);
            remove_tree(&path).map_err(Error::file("remove", &path))?;
            reclaimed.bytes = reclaimed.bytes.saturating_add(bytes);
            reclaimed.count += 1;
        }
        Ok(reclaimed)
    }

    fn look_for(
        &self,
        directory: &Path,
        doomed: &mut Vec<PathBuf>,
        is_doomed: impl Fn(&str, &Path) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        for name in files::names(directory)? {
            let path = directory.join(&name);
            if is_doomed(&name, &path)? {
                doomed.push(path);
            }
        }
        Ok(())
    }
}

fn is_older(path: &Path, age: Duration) -> bool {
    let changed = fs::metadata(path).and_then(|stat| stat.modified());
    // A time in the future is no age.
    changed.is_ok_and(|changed| changed.elapsed().unwrap_or_default() >= age)
}

/// Bytes that a file or tree takes on the disk, as far as it can be read.
fn size(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(stat) = fs::symlink_metadata(path) else { return 0 };
    let inner = if stat.is_dir() { fs::read_dir(path).ok() } else { None };
    let inner = inner.into_iter().flatten().flatten().map(|entry| size(&entry.path()));
    // A file with several names counts once for all of them.
    let names = if stat.is_dir() { 1 } else { stat.nlink().max(1) };
    inner.fold(stat.blocks().saturating_mul(512) / names, u64::saturating_add)
}
