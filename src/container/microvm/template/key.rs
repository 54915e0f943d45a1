//! What a template depends on, as a number: of two that differ in it, neither can stand in for the other.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::super::machine::{self, Class};
use super::{Error, host};
use crate::kvm::Kvm;
use crate::kvm::features::Features;
use crate::kvm::kind::{self, Kind};
use crate::program;
use crate::vm::config::VmConfig;
use crate::vm::snapshot::FORMAT_VERSION;
use crate::vm::{find_kernel, kernel_file_name};

/// Bytes of the number that are used.
const BYTES: usize = 8;

/// What the templates of a class depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    hash: String,
    kernel: PathBuf,
}

#[derive(Serialize)]
struct Parts<'a> {
    version: &'static str,
    format: u32,
    program: File,
    kernel: File,
    agent: File,
    kind: Kind,
    features: &'a Features,
    config: &'a VmConfig,
}

/// A file, by what changes when its contents do. Its contents are some ten megabytes, too many to be read for each start.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct File {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl File {
    fn of(path: &Path) -> io::Result<File> {
        let found = fs::metadata(path)?;
        Ok(File {
            device: found.dev(),
            inode: found.ino(),
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

impl Key {
    /// The key of this host's templates of a class.
    pub fn of(class: &Class) -> Result<Key, Error> {
        let kvm = Kvm::open()?;
        let kind = kind::detect(kvm.fd());
        let features = Features::of_host(kind, kvm.supported_cpuid()?.as_slice());
        let kernel = find_kernel(kind).ok_or(Error::NoKernel(kernel_file_name(kind)))?;
        let kernel = std::path::absolute(&kernel).map_err(host("find", &kernel))?;
        let agent = machine::agent()?;
        let directory = program::directory().map_err(host("find", Path::new("rvmm")))?;
        let file = |path: &Path| File::of(path).map_err(host("find", path));
        let parts = Parts {
            version: env!("CARGO_PKG_VERSION"),
            format: FORMAT_VERSION,
            program: file(&directory.join("rvmm"))?,
            kernel: file(&kernel)?,
            agent: file(&agent)?,
            kind,
            features: &features,
            config: &machine::outline(class),
        };
        Ok(Key { hash: hash(&parts)?, kernel })
    }

    /// The kernel that a template of it boots.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// As part of a file name.
    pub fn as_str(&self) -> &str {
        &self.hash
    }

    #[cfg(test)]
    pub(super) fn made_up(hash: &str) -> Key {
        Key { hash: hash.into(), kernel: PathBuf::new() }
    }
}

fn hash(parts: &impl Serialize) -> Result<String, Error> {
    let bytes = serde_json::to_vec(parts).map_err(Error::Encode)?;
    let digest = Sha256::digest(&bytes);
    Ok(digest.iter().take(BYTES).map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_replaced_is_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.cpio");
        fs::write(&path, "one").unwrap();
        let first = File::of(&path).unwrap();
        assert_eq!(File::of(&path).unwrap(), first);
        let new = directory.path().join("new");
        fs::write(&new, "two").unwrap();
        fs::rename(&new, &path).unwrap();
        assert_ne!(File::of(&path).unwrap(), first);
    }

    #[test]
    fn keys_differ_by_what_guests_see() {
        let class = |memory_bytes| Class { memory_bytes, cpus: 1, mtus: vec![] };
        let of = |class| hash(&machine::outline(&class)).unwrap();
        assert_eq!(of(class(1 << 28)), of(class(1 << 28)));
        assert_ne!(of(class(1 << 28)), of(class(1 << 29)));
        assert_eq!(of(class(1 << 28)).len(), 2 * BYTES);
    }
}
