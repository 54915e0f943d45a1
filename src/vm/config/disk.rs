//! Disks' descriptions.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;
use super::limits;
use crate::disk::{Cache, Io};
use crate::virtio::rate::Limits;

/// The most request queues of a disk.
pub const MAX_DISK_QUEUES: u16 = 16;

/// A virtio-block disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// The image: a raw file or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// The serial number that the guest sees; `None` for `diskN`.
    #[serde(default)]
    pub id: Option<String>,
    /// Request queues; `None` for one per vCPU, at most 4.
    #[serde(default)]
    pub queues: Option<u16>,
    /// How requests reach the host's kernel.
    #[serde(default)]
    pub io: Io,
    /// What a flush does.
    #[serde(default)]
    pub cache: Cache,
    /// Limits on what the guest reads and writes.
    #[serde(default)]
    pub limits: Limits,
}

impl Disk {
    /// A read-write disk with all defaults.
    pub fn new(path: impl Into<PathBuf>) -> Disk {
        Disk {
            path: path.into(),
            readonly: false,
            id: None,
            queues: None,
            io: Io::default(),
            cache: Cache::default(),
            limits: Limits::default(),
        }
    }

    /// Checks what can be known without opening the image.
    pub(super) fn check(&self) -> Result<(), Error> {
        if let Some(queues) = self.queues.filter(|queues| !(1..=MAX_DISK_QUEUES).contains(queues)) {
            return Err(Error::DiskQueues { path: self.path.clone(), queues });
        }
        if !self.limits.is_valid() {
            return Err(Error::Limits(format!("disk {:?}", self.path)));
        }
        match &self.id {
            Some(id) if id.is_empty() || id.len() > 20 || !id.bytes().all(|b| b.is_ascii_graphic()) => {
                Err(Error::DiskId { path: self.path.clone(), id: id.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// `PATH[,readonly][,id=ID][,queues=N][,io=auto|uring|sync][,cache=writeback|unsafe][,bw=SIZE][,ops=N]…`.
impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Disk, String> {
        let mut parts = text.split(',');
        let path =
            parts.next().filter(|path| !path.is_empty()).ok_or("the path of the disk image is missing")?;
        let mut disk = Disk::new(path);
        let mut limits = limits::Parser::default();
        for part in parts {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            let bad = |allowed: &str| format!("disk option {part:?}: {key} is {allowed}");
            match (key, value) {
                ("readonly" | "ro", None) => disk.readonly = true,
                ("id", Some(id)) => disk.id = Some(id.to_owned()),
                ("queues", Some(n)) => disk.queues = Some(n.parse().map_err(|_| bad("a number"))?),
                ("io", Some("auto")) => disk.io = Io::Auto,
                ("io", Some("uring")) => disk.io = Io::Uring,
                ("io", Some("sync")) => disk.io = Io::Sync,
                ("io", _) => return Err(bad("one of auto, uring, sync")),
                ("cache", Some("writeback")) => disk.cache = Cache::Writeback,
                ("cache", Some("unsafe")) => disk.cache = Cache::Unsafe,
                ("cache", _) => return Err(bad("one of writeback, unsafe")),
                (key, Some(value)) if limits.option("", key, value)? => {}
                _ => {
                    return Err(format!(
                        "unknown disk option {part:?}: there are readonly, id=ID, queues=N, io=auto|uring|sync, \
                         cache=writeback|unsafe, bw=SIZE, bw-burst=SIZE, ops=N and ops-burst=N"
                    ));
                }
            }
        }
        disk.limits = limits.finish("")?;
        Ok(disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_options_are_read() {
        let disk: Disk = "/a b.img,readonly,id=root,queues=2,io=sync,cache=unsafe".parse().unwrap();
        let expected = Disk {
            path: "/a b.img".into(),
            readonly: true,
            id: Some("root".into()),
            queues: Some(2),
            io: Io::Sync,
            cache: Cache::Unsafe,
            limits: Limits::default(),
        };
        assert_eq!(disk, expected);
        assert!("x,writable".parse::<Disk>().unwrap_err().contains("unknown disk option \"writable\""));
        for text in ["", ",readonly", "x,queues=many", "x,io=fast", "x,readonly=maybe", "x,cache"] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }
}
