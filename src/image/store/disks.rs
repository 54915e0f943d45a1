//! Layers as file systems for microVMs: EROFS, uncompressed, since guests' kernels may be slow and the host's page cache
//! is shared by all of them.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::files::{self, Temporary};
use super::{Image, Layer, Store};
use crate::image::error::Error;

const PROGRAM: &str = "mkfs.erofs";
/// Disks are put behind each other, so each is whole pages.
const PAGE: u64 = 4096;
/// Bytes of what the program says that are kept.
const OUTPUT_MAX: u64 = 4096;

impl Store {
    fn disk_path(&self, layer: &Layer) -> PathBuf {
        self.path("disks").join(format!("{}.erofs", layer.chain_id.hex()))
    }

    /// Each layer as a file system, bottom first; those that are not made yet are. Hold the image before.
    pub fn layer_disks(&self, image: &Image) -> Result<Vec<PathBuf>, Error> {
        let mut disks = vec![];
        let paths: Vec<PathBuf> = image.layers.iter().map(|layer| self.disk_path(layer)).collect();
        if paths.iter().all(|path| path.exists()) {
            return Ok(paths);
        }
        let directories = self.layer_dirs(image)?;
        for (layer, directory) in image.layers.iter().zip(directories) {
            let path = self.disk_path(layer);
            if !path.exists() {
                let _making = self.making(layer)?;
                if !path.exists() {
                    self.make_disk(layer, &directory, &path)?;
                }
            }
            disks.push(path);
        }
        Ok(disks)
    }

    fn make_disk(
        &self,
        layer: &Layer,
        directory: &std::path::Path,
        path: &std::path::Path,
    ) -> Result<(), Error> {
        let new = self.path("disks").join(files::unfinished(&layer.chain_id.hex()));
        let failed = Error::file("make", &new);
        let locked = self.shared()?;
        let file = File::options().write(true).create_new(true).open(&new).map_err(&failed)?;
        let temporary = Temporary::new(new.clone());
        file.lock().map_err(&failed)?;
        drop(locked);
        let mut command = Command::new(PROGRAM);
        // The same layer gives the same bytes: its identifier is the layer's, times are those of the files.
        command.arg("--quiet").arg("--preserve-mtime").arg("-U").arg(uuid(&layer.chain_id.hex()));
        command.arg(&new).arg(directory);
        run(command)?;
        let length = file.metadata().map_err(&failed)?.len();
        let whole = length.checked_next_multiple_of(PAGE).unwrap_or(length);
        if length == 0 {
            return Err(Error::invalid(new.display().to_string(), format!("{PROGRAM} wrote nothing")));
        }
        file.set_len(whole).map_err(&failed)?;
        file.sync_all().map_err(&failed)?;
        files::rename(&new, path)?;
        temporary.keep();
        Ok(())
    }
}

/// The first 32 digits, written as an identifier.
fn uuid(hex: &str) -> String {
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32))
}

fn run(mut command: Command) -> Result<(), Error> {
    let no_program = |source| Error::NoProgram { program: PROGRAM.to_owned(), source };
    let pipes = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).env("LC_ALL", "C");
    let mut child = pipes.spawn().map_err(no_program)?;
    let mut output = vec![];
    if let Some(mut errors) = child.stderr.take() {
        let _ = (&mut errors).take(OUTPUT_MAX).read_to_end(&mut output);
        let _ = io::copy(&mut errors, &mut io::sink());
    }
    let status = child.wait().map_err(no_program)?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output).trim().replace('\n', "; ");
    let output = if said.is_empty() { status.to_string() } else { format!("{said} ({status})") };
    Err(Error::Program { program: PROGRAM.to_owned(), output })
}
