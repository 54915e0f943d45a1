//! `rvmm diff`.

use std::fs::{self, Metadata};
use std::io::{self, Write, stdout};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use crate::container::changes::Changes;
use crate::container::prepare;
use crate::container::records::Records;

/// The attributes that mark an opaque directory.
const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// Show which files a container has added (A), changed (C) and deleted (D)
#[derive(clap::Args)]
#[command(after_help = "Example:\n  rvmm diff web")]
pub struct DiffArguments {
    /// The container
    container: String,
}

/// Shows them.
pub fn run(arguments: &DiffArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let record = records.read(&records.find(&arguments.container)?)?;
    let written = Changes::of(records, &record)?;
    let (_, _, layers) = prepare::image_of(records, &record.config)?;
    let mut changes = vec![];
    walk(written.path(), Path::new(""), &layers, &mut changes)
        .with_context(|| format!("cannot read {:?}", written.path()))?;
    drop(written);
    changes.sort_by(|(_, a), (_, b)| a.cmp(b));
    let mut output = io::BufWriter::new(stdout().lock());
    for (kind, path) in changes {
        output.write_all(kind)?;
        output.write_all(b" /")?;
        output.write_all(path.as_os_str().as_bytes())?;
        output.write_all(b"\n")?;
    }
    output.flush()?;
    Ok(ExitCode::SUCCESS)
}

type Changed = (&'static [u8], PathBuf);

/// Goes through what a container has written. It may be writing still.
fn walk(upper: &Path, at: &Path, layers: &[PathBuf], changes: &mut Vec<Changed>) -> io::Result<()> {
    for entry in fs::read_dir(upper.join(at))? {
        let path = at.join(entry?.file_name());
        let full = upper.join(&path);
        let metadata = match fs::symlink_metadata(&full) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result?,
        };
        let below = find(layers, &path)?;
        if is_whiteout(&metadata) {
            // Of what nobody can see any more, no more is to be said.
            if below.is_some() {
                changes.push((b"D", path));
            }
            continue;
        }
        changes.push((if below.is_some() { b"C" } else { b"A" }, path.clone()));
        if !metadata.is_dir() {
            continue;
        }
        if below.is_some_and(|below| below.is_dir()) && is_opaque(&full) {
            deleted(&full, &path, layers, changes)?;
        }
        walk(upper, &path, layers, changes)?;
    }
    Ok(())
}

/// What an opaque directory hides, and has not itself.
fn deleted(full: &Path, path: &Path, layers: &[PathBuf], changes: &mut Vec<Changed>) -> io::Result<()> {
    let mut names = std::collections::BTreeSet::new();
    for layer in layers {
        if find(std::slice::from_ref(layer), path)?.is_some_and(|below| below.is_dir()) {
            for entry in fs::read_dir(layer.join(path))? {
                names.insert(entry?.file_name());
            }
        }
    }
    for name in names {
        let inner = path.join(&name);
        if fs::symlink_metadata(full.join(&name)).is_err() && find(layers, &inner)?.is_some() {
            changes.push((b"D", inner));
        }
    }
    Ok(())
}

/// What the layers, the bottom one first, show at a path.
fn find(layers: &[PathBuf], path: &Path) -> io::Result<Option<Metadata>> {
    'layers: for layer in layers.iter().rev() {
        let mut full = layer.clone();
        let mut hides = false;
        let mut parts = path.components().peekable();
        while let Some(part) = parts.next() {
            full.push(part);
            let metadata = match fs::symlink_metadata(&full) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && hides => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue 'layers,
                result => result?,
            };
            if is_whiteout(&metadata) {
                return Ok(None);
            }
            if parts.peek().is_none() {
                return Ok(Some(metadata));
            }
            // A link too: nothing of the layers below is seen through it.
            if !metadata.is_dir() {
                return Ok(None);
            }
            hides |= is_opaque(&full);
        }
    }
    Ok(None)
}

fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn is_opaque(directory: &Path) -> bool {
    let mut value = [0; 1];
    OPAQUE.iter().any(|name| rustix::fs::lgetxattr(directory, *name, &mut value) == Ok(1) && value == *b"y")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_from_what_the_layers_show() {
        let directory = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        };
        ["a/etc/old", "b/etc/new", "upper/etc/old", "upper/etc/new", "upper/etc/own"]
            .into_iter()
            .for_each(make);
        let layers = ["a", "b"].map(|name| directory.path().join(name));
        // A file in the place of a directory hides what is below.
        ["a/opt/x/deep", "upper/opt/x/deep"].into_iter().for_each(make);
        make("b/opt/x");
        let mut changes = vec![];
        let failed = walk(&directory.path().join("upper"), Path::new(""), &layers, &mut changes);
        failed.unwrap();
        changes.sort_by(|(_, a), (_, b)| a.cmp(b));
        let shown: Vec<String> = changes
            .iter()
            .map(|(kind, path)| format!("{} {}", String::from_utf8_lossy(kind), path.display()))
            .collect();
        let expected = ["C etc", "C etc/new", "C etc/old", "A etc/own", "C opt", "C opt/x", "A opt/x/deep"];
        assert_eq!(shown, expected);
    }
}
