//! Shared folders' descriptions.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::fileserver::{Cache, Options};

/// Longest tag, in bytes (virtio 1.2 §5.11.4).
pub const MAX_TAG_BYTES: usize = 36;

/// A folder of the host's that the guest can mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Share {
    /// What the guest calls it: `mount -t virtiofs TAG DIRECTORY`.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the guest may make device files in it.
    #[serde(default)]
    pub devices: bool,
    /// How long the guest may rely on what it has seen.
    #[serde(default)]
    pub cache: Cache,
}

impl Share {
    /// A folder that the guest may read and write.
    pub fn new(tag: impl Into<String>, path: impl Into<PathBuf>) -> Share {
        Share { tag: tag.into(), path: path.into(), readonly: false, devices: false, cache: Cache::default() }
    }

    /// What its file server is told.
    pub fn options(&self) -> Options {
        Options { readonly: self.readonly, devices: self.devices, cache: self.cache }
    }

    /// Checks what can be known without opening the folder.
    pub(super) fn check(&self) -> Result<(), Error> {
        let legal = |byte: u8| byte.is_ascii_graphic();
        if self.tag.is_empty() || self.tag.len() > MAX_TAG_BYTES || !self.tag.bytes().all(legal) {
            return Err(Error::ShareTag(self.tag.clone()));
        }
        Ok(())
    }
}

/// `tag=NAME,path=DIR[,readonly][,devices][,cache=auto|always]`.
impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Share, String> {
        let (mut tag, mut path) = (None, None);
        let mut share = Share::new("", "");
        for part in text.split(',') {
            let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
            match (key, value) {
                ("tag", Some(value)) => tag = Some(value),
                ("path", Some(value)) if !value.is_empty() => path = Some(value),
                ("readonly" | "ro", None) => share.readonly = true,
                ("devices", None) => share.devices = true,
                ("cache", Some(value)) => {
                    share.cache = value
                        .parse()
                        .map_err(|allowed| format!("share option {part:?}: cache is {allowed}"))?;
                }
                _ => {
                    return Err(format!(
                        "unknown share option {part:?}: there are tag=NAME, path=DIR, readonly, devices and \
                         cache=auto|always"
                    ));
                }
            }
        }
        share.tag = tag.ok_or("the tag is missing: tag=NAME,path=DIR")?.into();
        share.path = path.ok_or("the path is missing: tag=NAME,path=DIR")?.into();
        Ok(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_options_are_read() {
        let share: Share = "tag=data,path=/srv/a b,readonly,devices,cache=always".parse().unwrap();
        let expected = Share {
            tag: "data".into(),
            path: "/srv/a b".into(),
            readonly: true,
            devices: true,
            cache: Cache::Always,
        };
        assert_eq!(share, expected);
        assert_eq!("path=x,tag=y".parse(), Ok(Share::new("y", "x")));
        assert!("tag=a,path=b,dax".parse::<Share>().unwrap_err().contains("unknown share option \"dax\""));
        for text in
            ["", "tag=a", "path=b", "tag=a,path=", "tag=a,path=b,cache=none", "tag=a,path=b,readonly=no"]
        {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        for tag in ["", "a b", "ä", &"t".repeat(37)] {
            assert_eq!(Share::new(tag, "x").check(), Err(Error::ShareTag(tag.into())));
        }
        assert_eq!(Share::new("t".repeat(36), "x").check(), Ok(()));
    }
}
