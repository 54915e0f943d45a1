//! Saving. The same images give the same bytes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::oci::{FULL_NAME, REF_NAME};
use crate::image::digest::{Digest, Hashing};
use crate::image::error::Error;
use crate::image::manifest::OCI_MANIFEST;
use crate::image::reference::Reference;
use crate::image::store::{Image, Store};

/// What is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// A tar archive that `docker load` and `podman load` take. It is an OCI archive too.
    #[default]
    DockerArchive,
    /// A tar archive by the specification.
    OciArchive,
    /// A folder by the specification.
    OciDir,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "docker-archive" | "docker" => Ok(Self::DockerArchive),
            "oci-archive" | "oci" => Ok(Self::OciArchive),
            "oci-dir" => Ok(Self::OciDir),
            _ => Err("one of docker-archive, oci-archive, oci-dir"),
        }
    }
}

/// Where files go.
enum Output<W: Write> {
    Tar(tar::Builder<W>),
    Folder(std::path::PathBuf),
}

/// Writes images with these names into an archive.
pub fn save(
    store: &Store,
    images: &[(Image, Vec<Reference>)],
    format: Format,
    output: impl Write,
) -> Result<(), Error> {
    let mut output = Output::Tar(tar::Builder::new(output));
    write(store, images, format, &mut output)?;
    match output {
        Output::Tar(builder) => {
            let written = builder.into_inner().and_then(|mut output| output.flush());
            written.map_err(Error::file("write", Path::new("the archive")))
        }
        Output::Folder(_) => Ok(()),
    }
}

/// Writes images with these names into a folder, which is made.
pub fn save_folder(store: &Store, images: &[(Image, Vec<Reference>)], path: &Path) -> Result<(), Error> {
    let blobs = path.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(Error::file("make", &blobs))?;
    write(store, images, Format::OciDir, &mut Output::<io::Sink>::Folder(path.to_owned()))
}

fn write<W: Write>(
    store: &Store,
    images: &[(Image, Vec<Reference>)],
    format: Format,
    output: &mut Output<W>,
) -> Result<(), Error> {
    let lease = store.lease()?;
    let mut written = BTreeSet::new();
    let (mut index, mut manifests) = (vec![], vec![]);
    let mut blobs = vec![];
    for (image, names) in images {
        blobs.extend(image.layers.iter().map(|layer| layer.digest));
        blobs.extend([image.id, image.manifest_digest]);
        let manifest_size = store.raw_manifest(image)?.len();
        index.extend(entries(image, manifest_size, names));
        let path = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
        manifests.push(json!({
            "Config": path(&image.id),
            "RepoTags": names.iter().map(Reference::familiar).collect::<Vec<_>>(),
            "Layers": image.layers.iter().map(|layer| path(&layer.digest)).collect::<Vec<_>>(),
        }));
    }
    store.protect(&lease, &blobs)?;
    output.bytes("oci-layout", json!({"imageLayoutVersion": "1.0.0"}))?;
    for digest in blobs {
        if written.insert(digest) {
            output.blob(store, &digest)?;
        }
    }
    if format == Format::DockerArchive {
        output.bytes("manifest.json", Value::Array(manifests))?;
    }
    output.bytes("index.json", json!({"schemaVersion": 2, "manifests": index}))
}

/// What `index.json` has of an image: an entry for each name.
fn entries(image: &Image, manifest_size: usize, names: &[Reference]) -> Vec<Value> {
    let media_type =
        image.manifest.media_type().as_ref().map_or(OCI_MANIFEST.to_owned(), ToString::to_string);
    let entry = json!({
        "mediaType": media_type,
        "digest": image.manifest_digest,
        "size": manifest_size,
        "platform": {"os": "linux", "architecture": "amd64"},
    });
    if names.is_empty() {
        return vec![entry];
    }
    let with_name = |name: &Reference| {
        let mut entry = entry.clone();
        let tag = name.tag().unwrap_or(crate::image::reference::DEFAULT_TAG);
        if let Value::Object(map) = &mut entry {
            map.insert("annotations".to_owned(), json!({FULL_NAME: name.to_string(), REF_NAME: tag}));
        }
        entry
    };
    names.iter().map(with_name).collect()
}

fn header(size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

impl<W: Write> Output<W> {
    fn bytes(&mut self, name: &str, value: Value) -> Result<(), Error> {
        let bytes = serde_json::to_vec(&value).map_err(Error::json(name))?;
        self.file(name, bytes.len() as u64, bytes.as_slice())
    }

    fn blob(&mut self, store: &Store, digest: &Digest) -> Result<(), Error> {
        let file = store.open_blob(digest)?;
        let name = format!("blobs/sha256/{}", digest.hex());
        let size = file.metadata().map_err(Error::file("read", Path::new(&name)))?.len();
        let mut reader = Hashing::new(file);
        self.file(&name, size, &mut reader)?;
        let (_, found, _) = reader.finish();
        if found == *digest {
            Ok(())
        } else {
            Err(Error::WrongDigest { what: name, expected: *digest, found })
        }
    }

    fn file(&mut self, name: &str, size: u64, mut data: impl Read) -> Result<(), Error> {
        match self {
            Self::Tar(builder) => {
                let appended = builder.append_data(&mut header(size), name, data.by_ref().take(size));
                appended.map_err(Error::file("write", Path::new(name)))
            }
            Self::Folder(folder) => {
                let path = folder.join(name);
                let new = path.with_extension("new");
                let written = File::create(&new).and_then(|mut file| {
                    io::copy(&mut data, &mut file)?;
                    file.sync_all()?;
                    fs::rename(&new, &path)
                });
                written.map_err(Error::file("write", &path))
            }
        }
    }
}
