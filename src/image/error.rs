//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

use super::digest::Digest;
use super::{layers, reference, registry};

/// What can go wrong with images.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refuses something.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A name that cannot be one.
    #[error(transparent)]
    Reference(#[from] reference::NotAReference),
    /// There is no such image here.
    #[error("there is no image {0:?} here")]
    NotFound(String),
    /// An identifier that several images begin with.
    #[error("{prefix:?} is the beginning of {count} images' ids")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many there are.
        count: usize,
    },
    /// Containers need it.
    #[error("image {image} is used by {}", list(.containers))]
    InUse {
        /// The image.
        image: String,
        /// The containers' ids.
        containers: Vec<String>,
    },
    /// It has several names, and by its id all would go.
    #[error("image {image} has several names: {}; remove those, or use --force", names.join(", "))]
    SeveralNames {
        /// The image.
        image: String,
        /// Its names.
        names: Vec<String>,
    },
    /// JSON that is not what it should be.
    #[error("{what} is not valid")]
    Json {
        /// What it is.
        what: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Something that is not as it should be.
    #[error("{what}: {why}")]
    Invalid {
        /// What it is.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// Contents that are not those that were asked for.
    #[error("{what} has the digest {found}, not {expected}")]
    WrongDigest {
        /// What it is.
        what: String,
        /// The digest that it should have.
        expected: Digest,
        /// The one that it has.
        found: Digest,
    },
    /// Contents of another length.
    #[error("{what} has {found} bytes, not {expected}")]
    WrongSize {
        /// What it is.
        what: String,
        /// Bytes that it should have.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// Something that the store should have.
    #[error("{what} is missing from the store; pull or load the image again")]
    Missing {
        /// What it is.
        what: String,
    },
    /// Something in the store that is not what it was.
    #[error("{what} was damaged in the store and is removed; pull or load the image again")]
    Damaged {
        /// What it was.
        what: String,
    },
    /// A layer that cannot be unpacked.
    #[error("cannot unpack layer {}", layer.short())]
    Unpack {
        /// The layer's digest.
        layer: Digest,
        /// Why.
        #[source]
        source: layers::Error,
    },
    /// Changes that cannot be made into a layer.
    #[error("cannot pack the changes in {}", path.display())]
    Pack {
        /// Where they are.
        path: PathBuf,
        /// Why.
        #[source]
        source: layers::Error,
    },
    /// An archive that cannot be read.
    #[error("cannot read the archive {name}")]
    Archive {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: layers::Error,
    },
    /// Another program that failed.
    #[error("{program} failed: {output}")]
    Program {
        /// The program.
        program: String,
        /// What it said.
        output: String,
    },
    /// Another program that is not there.
    #[error("cannot run {program}{}", advice(program))]
    NoProgram {
        /// The program.
        program: String,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A registry that cannot be talked to, or that refuses.
    #[error("cannot {doing} {reference}")]
    Registry {
        /// What was being done.
        doing: &'static str,
        /// With which image.
        reference: String,
        /// Why.
        #[source]
        source: Box<registry::Error>,
    },
}

impl Error {
    pub(super) fn file(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::File { doing, path: path.to_owned(), source }
    }

    pub(super) fn json(what: impl Into<String>) -> impl FnOnce(serde_json::Error) -> Self {
        let what = what.into();
        move |source| Self::Json { what, source }
    }

    pub(super) fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), why: why.into() }
    }
}

fn list(ids: &[String]) -> String {
    let short = |id: &String| id.chars().take(12).collect::<String>();
    let list = ids.iter().map(short).collect::<Vec<_>>().join(", ");
    format!("{} {list}", if ids.len() == 1 { "container" } else { "containers" })
}

fn advice(program: &str) -> &'static str {
    match program {
        "mkfs.erofs" => " (install erofs-utils)",
        "docker" | "podman" => " (is it installed?)",
        _ => "",
    }
}
