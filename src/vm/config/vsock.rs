//! The socket device's description.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::virtio::vsock::unix::PATH_BYTES_MAX;

/// Addresses that a guest may have: 0 to 2 mean others, and the last one any (vsock(7)).
const CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;

/// A virtio-vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address.
    pub cid: u32,
    /// The unix socket through which the host reaches the guest.
    pub socket: PathBuf,
}

impl Vsock {
    /// Checks what can be known without opening the socket.
    pub(super) fn check(&self) -> Result<(), Error> {
        if !CIDS.contains(&self.cid) {
            return Err(Error::VsockCid(self.cid));
        }
        let len = self.socket.as_os_str().as_bytes().len();
        if !(1..=PATH_BYTES_MAX).contains(&len) {
            return Err(Error::VsockPath { path: self.socket.clone(), len });
        }
        Ok(())
    }
}

/// `cid=N,socket=PATH`.
impl FromStr for Vsock {
    type Err = String;

    fn from_str(text: &str) -> Result<Vsock, String> {
        let (mut cid, mut socket) = (None, None);
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("cid", n)) => {
                    cid = Some(n.parse().map_err(|_| format!("vsock option {part:?}: cid is a number"))?);
                }
                Some(("socket", path)) => socket = Some(path.into()),
                _ => return Err(format!("unknown vsock option {part:?}: there are cid=N and socket=PATH")),
            }
        }
        let cid = cid.ok_or("the guest's address is missing: cid=N")?;
        let socket = socket.ok_or("the path of the unix socket is missing: socket=PATH")?;
        Ok(Vsock { cid, socket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_options_are_read() {
        let vsock: Vsock = "cid=3,socket=/run/a b".parse().unwrap();
        assert_eq!(vsock, Vsock { cid: 3, socket: "/run/a b".into() });
        assert_eq!("socket=x,cid=4".parse(), Ok(Vsock { cid: 4, socket: "x".into() }));
        for text in ["", "cid=3", "socket=x", "cid=three,socket=x", "cid=-1,socket=x", "cid=3,socket=x,y"] {
            assert!(text.parse::<Vsock>().is_err(), "{text}");
        }
    }

    #[test]
    fn impossible_addresses_and_paths_are_refused() {
        let check = |cid, socket: &str| Vsock { cid, socket: socket.into() }.check();
        for cid in [0, 1, 2, u32::MAX] {
            assert_eq!(check(cid, "x"), Err(Error::VsockCid(cid)));
        }
        assert_eq!((check(3, "x"), check(u32::MAX - 1, &"x".repeat(96))), (Ok(()), Ok(())));
        assert!(matches!(check(3, &"x".repeat(97)), Err(Error::VsockPath { len: 97, .. })));
        assert!(matches!(check(3, ""), Err(Error::VsockPath { len: 0, .. })));
    }
}
