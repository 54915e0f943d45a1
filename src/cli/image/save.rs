//! `save`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

use crate::image::archive::{self, Format};
use crate::image::{Image, Reference, Store};

/// Writes images into an archive
#[derive(Args)]
pub struct SaveArguments {
    /// Names or ids
    #[arg(required = true)]
    images: Vec<String>,
    /// Where to; standard output without
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// docker-archive, oci-archive or oci-dir
    #[arg(long, default_value = "docker-archive")]
    format: Format,
}

/// Writes the archive; a file is there when it is whole.
pub fn run(arguments: &SaveArguments, store: &Store) -> anyhow::Result<ExitCode> {
    let mut images: Vec<(Image, Vec<Reference>)> = vec![];
    for name in &arguments.images {
        let image = store.resolve(name)?;
        let tag = Reference::parse(name).ok().map(Reference::or_latest);
        let tag = tag.filter(|tag| tag.tag().is_some() && image.names.contains(tag));
        match images.iter_mut().find(|(other, _)| other.id == image.id) {
            Some((_, tags)) => tags.extend(tag),
            None => images.push((image, tag.into_iter().collect())),
        }
    }
    match (&arguments.output, arguments.format) {
        (Some(path), Format::OciDir) => archive::save_folder(store, &images, path)?,
        (None, Format::OciDir) => bail!("a folder cannot be written to standard output; use --output"),
        (Some(path), format) => save_file(store, &images, format, path)?,
        (None, _) if io::stdout().is_terminal() => {
            bail!("standard output is a terminal; use --output, or send it elsewhere")
        }
        (None, format) => archive::save(store, &images, format, io::stdout().lock())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn save_file(
    store: &Store,
    images: &[(Image, Vec<Reference>)],
    format: Format,
    path: &Path,
) -> anyhow::Result<()> {
    let failed = || format!("cannot write {}", path.display());
    // A device or a pipe cannot be replaced.
    if path.exists() && !path.is_file() {
        let file = File::options().write(true).open(path).with_context(failed)?;
        return Ok(archive::save(store, images, format, file)?);
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(directory).with_context(failed)?;
    let mut writer = BufWriter::new(file);
    archive::save(store, images, format, &mut writer)?;
    writer.flush().with_context(failed)?;
    let file = writer.into_inner().with_context(failed)?;
    file.as_file().sync_all().with_context(failed)?;
    file.persist(path).with_context(failed)?;
    Ok(())
}
