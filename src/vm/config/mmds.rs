//! The metadata service's description.

use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Net, VhostUse};
use crate::mmds::{self, Version};

/// Why a metadata service is impossible. The first three texts are Firecracker's, which its clients look for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MmdsError {
    /// It would be on no network device.
    #[error("The list of network interface IDs that allow forwarding MMDS requests is empty.")]
    NoInterfaces,
    /// It would be on one that there is not.
    #[error(
        "The list of network interface IDs provided contains at least one ID that does not correspond to any existing \
         network interface."
    )]
    UnknownInterface,
    /// An address that others may have.
    #[error("The MMDS IPv4 address is not link local.")]
    Address,
    /// The host's kernel would move packets past it.
    #[error("tap {0}: vhost=on moves packets past the metadata service; leave out one or the other")]
    Vhost(String),
}

/// What tells the guest metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Mmds {
    /// Network devices on whose networks it is.
    pub interfaces: Vec<String>,
    /// Whether the guest needs tokens.
    #[serde(default)]
    pub version: Version,
    /// Its address.
    #[serde(default = "default_address")]
    pub address: Ipv4Addr,
    /// Whether it answers in text whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

fn default_address() -> Ipv4Addr {
    mmds::ADDRESS
}

impl Mmds {
    /// One with all defaults.
    pub fn new(interfaces: Vec<String>) -> Mmds {
        Mmds { interfaces, version: Version::V1, address: mmds::ADDRESS, imds_compat: false }
    }

    /// Whether it is on the network of the device at `index`.
    pub fn is_on(&self, net: &Net, index: usize) -> bool {
        self.interfaces.contains(&net.id(index))
    }

    /// Checks it against the network devices.
    pub(super) fn check(&self, nets: &[Net]) -> Result<(), MmdsError> {
        if self.interfaces.is_empty() {
            return Err(MmdsError::NoInterfaces);
        }
        let known = |id: &String| nets.iter().enumerate().any(|(index, net)| net.id(index) == *id);
        if !self.interfaces.iter().all(known) {
            return Err(MmdsError::UnknownInterface);
        }
        // RFC 3927 §2.1 reserves the first and the last 256.
        if !matches!(self.address.octets(), [169, 254, 1..=254, _]) {
            return Err(MmdsError::Address);
        }
        let past = |(index, net): &(usize, &Net)| self.is_on(net, *index) && net.vhost == VhostUse::On;
        match nets.iter().enumerate().find(past) {
            Some((_, net)) => Err(MmdsError::Vhost(net.tap.clone())),
            None => Ok(()),
        }
    }
}

/// `net=ID[,net=ID]…[,version=V1|V2][,address=ADDRESS][,imds-compat]`.
impl FromStr for Mmds {
    type Err = String;

    fn from_str(text: &str) -> Result<Mmds, String> {
        let mut mmds = Mmds::new(Vec::new());
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("net", id)) if !id.is_empty() => mmds.interfaces.push(id.to_owned()),
                Some(("version", "V1")) => mmds.version = Version::V1,
                Some(("version", "V2")) => mmds.version = Version::V2,
                Some(("address", address)) => {
                    mmds.address = address.parse().map_err(|_| format!("{part}: not an IPv4 address"))?;
                }
                None if part == "imds-compat" => mmds.imds_compat = true,
                _ => {
                    return Err(format!(
                        "unknown option {part:?}: there are net=ID, version=V1|V2, address=ADDRESS and imds-compat"
                    ));
                }
            }
        }
        if mmds.interfaces.is_empty() {
            return Err("the network device is missing: net=ID".into());
        }
        Ok(mmds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let mmds: Mmds = "net=net0,net=a,version=V2,address=169.254.170.2,imds-compat".parse().unwrap();
        let interfaces = vec!["net0".to_owned(), "a".to_owned()];
        let address = Ipv4Addr::new(169, 254, 170, 2);
        assert_eq!(mmds, Mmds { interfaces, version: Version::V2, address, imds_compat: true });
        assert_eq!("net=x".parse(), Ok(Mmds::new(vec!["x".into()])));
        for text in [
            "",
            "version=V1",
            "net=",
            "net=a,version=V3",
            "net=a,address=x",
            "net=a,x",
            "net=a,imds-compat=1",
        ] {
            assert!(text.parse::<Mmds>().is_err(), "{text}");
        }
    }

    #[test]
    fn impossible_services_are_refused() {
        let nets = ["tap=a", "tap=b,id=eth1", "tap=c,vhost=on"].map(|net| net.parse().unwrap());
        let check = |text: &str| text.parse::<Mmds>().unwrap().check(&nets);
        assert_eq!((check("net=net0"), check("net=net0,net=eth1")), (Ok(()), Ok(())));
        assert_eq!(check("net=net0,net=net1"), Err(MmdsError::UnknownInterface));
        assert_eq!(check("net=net2"), Err(MmdsError::Vhost("c".into())));
        assert_eq!(Mmds::new(vec![]).check(&nets), Err(MmdsError::NoInterfaces));
        for address in ["169.254.0.1", "169.254.255.1", "10.0.0.1", "0.0.0.0", "255.255.255.255"] {
            assert_eq!(check(&format!("net=net0,address={address}")), Err(MmdsError::Address), "{address}");
        }
    }
}
