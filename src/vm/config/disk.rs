//! Disks' descriptions.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;
use super::limits;
use crate::disk::{self, Cache, Io, Part};
use crate::virtio::rate::Limits;

/// The most request queues of a disk.
pub const MAX_DISK_QUEUES: u16 = 16;

/// A virtio-block disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Disk {
    /// The image: a raw file or a block device. Empty for a disk that is composed of parts.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub path: PathBuf,
    /// Files that are the partitions of a read-only disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// A JSON file with the same: `{"parts": [{"path": …, "name": …}, …]}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts_file: Option<PathBuf>,
    /// Whether the guest may only read, as it always may of a composed disk.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the image may be empty: a place for another one, which a restore names or a client of the control socket.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub may_be_empty: bool,
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
            parts: Vec::new(),
            parts_file: None,
            readonly: false,
            may_be_empty: false,
            id: None,
            queues: None,
            io: Io::default(),
            cache: Cache::default(),
            limits: Limits::default(),
        }
    }

    /// A read-only disk with these files as its partitions, and all defaults.
    pub fn composed(parts: Vec<Part>) -> Disk {
        Disk { parts, readonly: true, ..Disk::new("") }
    }

    /// Whether the guest may only read.
    pub fn is_read_only(&self) -> bool {
        self.readonly || !self.parts.is_empty() || self.parts_file.is_some()
    }

    /// The file that says where the disk's contents are: the image, the list of parts, or the first part.
    pub fn file(&self) -> &Path {
        let part = self.parts.first().map(|part| &part.path);
        self.parts_file.as_ref().or(part).unwrap_or(&self.path)
    }

    /// Puts one image in the place of what there was.
    pub fn set_path(&mut self, path: PathBuf) {
        self.path = path;
        self.parts.clear();
        self.parts_file = None;
    }

    /// Checks what can be known without opening the image.
    pub(super) fn check(&self) -> Result<(), Error> {
        let places = [!self.path.as_os_str().is_empty(), !self.parts.is_empty(), self.parts_file.is_some()];
        if places.iter().filter(|place| **place).count() != 1 {
            return Err(Error::DiskPlace(self.id.clone().unwrap_or_else(|| format!("{:?}", self.file()))));
        }
        if !self.parts.is_empty() {
            disk::check_parts(&self.parts).map_err(|error| Error::DiskParts(error.to_string()))?;
        }
        if let Some(queues) = self.queues.filter(|queues| !(1..=MAX_DISK_QUEUES).contains(queues)) {
            return Err(Error::DiskQueues { path: self.file().into(), queues });
        }
        if !self.limits.is_valid() {
            return Err(Error::Limits(format!("disk {:?}", self.file())));
        }
        match &self.id {
            Some(id) if id.is_empty() || id.len() > 20 || !id.bytes().all(|b| b.is_ascii_graphic()) => {
                Err(Error::DiskId { path: self.file().into(), id: id.clone() })
            }
            _ => Ok(()),
        }
    }
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// `PATH[,readonly][,id=ID][,queues=N][,io=auto|uring|sync][,cache=writeback|unsafe][,bw=SIZE][,ops=N]…`, or
/// `parts=LIST` in the place of `PATH`.
impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Disk, String> {
        let mut parts = text.split(',');
        let place =
            parts.next().filter(|place| !place.is_empty()).ok_or("the path of the disk image is missing")?;
        let mut disk = match place.strip_prefix("parts=") {
            None => Disk::new(place),
            Some("") => return Err("the path of the list of disk parts is missing".into()),
            Some(list) => Disk { parts_file: Some(list.into()), readonly: true, ..Disk::new("") },
        };
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
            readonly: true,
            id: Some("root".into()),
            queues: Some(2),
            io: Io::Sync,
            cache: Cache::Unsafe,
            ..Disk::new("/a b.img")
        };
        assert_eq!(disk, expected);
        let disk: Disk = "parts=layers.json,id=layers".parse().unwrap();
        assert!(disk.is_read_only() && disk.path.as_os_str().is_empty());
        assert_eq!((disk.file(), disk.id.as_deref()), (Path::new("layers.json"), Some("layers")));
        assert!("x,writable".parse::<Disk>().unwrap_err().contains("unknown disk option \"writable\""));
        for text in [
            "",
            ",readonly",
            "x,queues=many",
            "x,io=fast",
            "x,readonly=maybe",
            "x,cache",
            "parts=",
            "parts=,id=a",
        ] {
            assert!(text.parse::<Disk>().is_err(), "{text}");
        }
    }
    #[test]
    fn disk_has_one_place() {
        let part = |name: &str| Part { path: "layer".into(), name: name.into() };
        let check = |change: fn(&mut Disk)| {
            let mut disk = Disk::new("x");
            change(&mut disk);
            disk.check()
        };
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(Disk::composed(vec![part("a"), part("a")]).check(), Ok(()));
        assert_eq!(check(|disk| disk.path = "".into()), Err(Error::DiskPlace("\"\"".into())));
        assert!(matches!(check(|disk| disk.parts_file = Some("y".into())), Err(Error::DiskPlace(_))));
        for parts in [vec![part("a"); 256], vec![part(&"n".repeat(37))], vec![part("a\nb")]] {
            assert!(matches!(Disk::composed(parts).check(), Err(Error::DiskParts(_))));
        }
    }

    #[test]
    fn parts_are_read_from_a_configuration() {
        let text = "parts = [{ path = 'a', name = 'x' }, { path = 'b' }]\nid = 'layers'";
        let disk: Disk = toml::from_str(text).unwrap();
        let parts =
            vec![Part { path: "a".into(), name: "x".into() }, Part { path: "b".into(), name: String::new() }];
        let expected = Disk { id: Some("layers".into()), readonly: false, ..Disk::composed(parts) };
        assert_eq!(disk, expected);
        assert!(disk.is_read_only());
        let json = serde_json::to_string(&disk).unwrap();
        assert_eq!(serde_json::from_str::<Disk>(&json).unwrap(), disk);
        assert!(!json.contains("\"path\":\"\""));
        assert!(toml::from_str::<Disk>("parts = [{ pat = 'a' }]").is_err());
    }
}
