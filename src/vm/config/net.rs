//! Network devices' descriptions.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::limits;
use crate::tap::NAME_BYTES_MAX;
use crate::virtio::rate::Limits;

/// The most pairs of queues of a network device.
pub const MAX_NET_QUEUES: u16 = 16;
/// Smallest MTU: what IPv4 needs.
const MTU_MIN: u16 = 68;
/// Largest MTU: what a tap takes.
const MTU_MAX: u16 = 65521;

/// Why network devices are impossible.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NetError {
    /// No interface can have that name.
    #[error(
        "{what} name {name:?}: an interface has 1 to {NAME_BYTES_MAX} bytes without spaces, '/', ':' or '%'"
    )]
    Name {
        /// What it would name.
        what: &'static str,
        /// What was asked for.
        name: String,
    },
    /// Queue count out of range.
    #[error("{queues} queues for tap {tap}: a network device has 1 to {MAX_NET_QUEUES}")]
    Queues {
        /// The tap.
        tap: String,
        /// What was asked for.
        queues: u16,
    },
    /// The MTU is out of range.
    #[error("mtu={mtu} for tap {tap}: it is {MTU_MIN} to {MTU_MAX}")]
    Mtu {
        /// The tap.
        tap: String,
        /// What was asked for.
        mtu: u16,
    },
    /// An address that no interface can have.
    #[error("mac={mac} for tap {tap}: {why}")]
    Mac {
        /// The tap.
        tap: String,
        /// What was asked for.
        mac: Mac,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two devices have one address.
    #[error("two network devices have the address {0}")]
    DuplicateMac(Mac),
    /// Two devices are on one tap.
    #[error("two network devices use the tap {0}")]
    DuplicateTap(String),
    /// Two devices have one id.
    #[error("two network devices have the id {0:?}")]
    DuplicateId(String),
    /// A rate limit lets nothing through.
    #[error("tap {0}: size and refill-time of a rate limit must be at least 1")]
    Limits(String),
    /// vhost-net was demanded together with limits.
    #[error("tap {0}: vhost=on knows no rate limits; leave out one or the other")]
    VhostLimits(String),
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address that was given to nobody.
    pub fn random() -> Result<Mac, getrandom::Error> {
        let mut bytes = [0; 6];
        getrandom::fill(&mut bytes)?;
        // Locally administered, not a group.
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Ok(Mac(bytes))
    }

    /// What is wrong with it as the address of an interface.
    fn fault(self) -> Option<&'static str> {
        match self.0 {
            [0, 0, 0, 0, 0, 0] => Some("all zeroes is no address"),
            [first, ..] if first & 1 != 0 => {
                Some("a group's (multicast) address; the first byte must be even, as in 02:…")
            }
            _ => None,
        }
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Mac, String> {
        let bad = || format!("{text:?}: an address is six bytes as in 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && !part.starts_with('+')).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Mac(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Whether the host's kernel moves the packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostUse {
    /// Where it can, and as long as nothing is limited.
    #[default]
    Auto,
    /// Always, or the VM is not made.
    On,
    /// Never.
    Off,
}

/// A virtio network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Net {
    /// The host's tap; made if there is none of that name, and then it goes away with the VM.
    pub tap: String,
    /// What the device is called on the control socket; `None` for `netN`.
    #[serde(default)]
    pub id: Option<String>,
    /// The guest's address; `None` for a random one.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// Pairs of queues.
    #[serde(default = "one")]
    pub queues: u16,
    /// The network namespace that the tap is in.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// A bridge that the tap joins.
    #[serde(default)]
    pub bridge: Option<String>,
    /// The MTU that the guest is told, and that a tap gets which is made; `None` for the tap's own.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Whether the host's kernel moves the packets.
    #[serde(default)]
    pub vhost: VhostUse,
    /// Limits on what the guest receives.
    #[serde(default)]
    pub rx_limits: Limits,
    /// Limits on what the guest sends.
    #[serde(default)]
    pub tx_limits: Limits,
}

fn one() -> u16 {
    1
}

impl Net {
    /// A device on this tap with all defaults.
    pub fn new(tap: impl Into<String>) -> Net {
        Net {
            tap: tap.into(),
            id: None,
            mac: None,
            queues: 1,
            netns: None,
            bridge: None,
            mtu: None,
            vhost: VhostUse::Auto,
            rx_limits: Limits::default(),
            tx_limits: Limits::default(),
        }
    }

    /// The id of the device at `index`, named or not.
    pub fn id(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{index}"))
    }

    fn check(&self) -> Result<(), NetError> {
        let tap = || self.tap.clone();
        check_name("tap", &self.tap)?;
        if let Some(bridge) = &self.bridge {
            check_name("bridge", bridge)?;
        }
        if !(1..=MAX_NET_QUEUES).contains(&self.queues) {
            return Err(NetError::Queues { tap: tap(), queues: self.queues });
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !(MTU_MIN..=MTU_MAX).contains(mtu)) {
            return Err(NetError::Mtu { tap: tap(), mtu });
        }
        if let Some((mac, why)) = self.mac.and_then(|mac| Some((mac, mac.fault()?))) {
            return Err(NetError::Mac { tap: tap(), mac, why });
        }
        if !self.rx_limits.is_valid() || !self.tx_limits.is_valid() {
            return Err(NetError::Limits(tap()));
        }
        if self.vhost == VhostUse::On && (self.rx_limits, self.tx_limits) != Default::default() {
            return Err(NetError::VhostLimits(tap()));
        }
        Ok(())
    }
}

/// What the host's kernel takes as a name; `%` would stand for a number of its choice.
fn check_name(what: &'static str, name: &str) -> Result<(), NetError> {
    let bad = |c: char| c.is_whitespace() || matches!(c, '/' | ':' | '%' | '\0');
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if !fits || matches!(name, "." | "..") || name.contains(bad) {
        return Err(NetError::Name { what, name: name.into() });
    }
    Ok(())
}

/// Checks what can be known of all network devices without opening their taps.
pub(super) fn check(nets: &[Net]) -> Result<(), NetError> {
    let (mut macs, mut taps, mut ids) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (index, net) in nets.iter().enumerate() {
        net.check()?;
        if let Some(mac) = net.mac.filter(|mac| !macs.insert(*mac)) {
            return Err(NetError::DuplicateMac(mac));
        }
        if !taps.insert((&net.netns, &net.tap)) {
            return Err(NetError::DuplicateTap(net.tap.clone()));
        }
        let id = net.id(index);
        if !ids.insert(id.clone()) {
            return Err(NetError::DuplicateId(id));
        }
    }
    Ok(())
}

/// `tap=NAME[,mac=MAC][,queues=N][,netns=PATH][,bridge=NAME][,mtu=N][,vhost=auto|on|off][,id=ID][,[rx-|tx-]bw=SIZE]…`.
impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Net, String> {
        let mut net = Net::new("");
        let mut limits: [limits::Parser; 2] = Default::default();
        let [receive, transmit] = &mut limits;
        for part in text.split(',') {
            let (key, value) =
                part.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(|| {
                    format!("network option {part:?}: options are NAME=VALUE, and the first is tap=NAME")
                })?;
            let number = || value.parse().map_err(|_| format!("{part}: not a number up to 65535"));
            match key {
                "tap" => net.tap = value.into(),
                "id" => net.id = Some(value.into()),
                "mac" => net.mac = Some(value.parse().map_err(|error| format!("mac={error}"))?),
                "queues" => net.queues = number()?,
                "netns" => net.netns = Some(value.into()),
                "bridge" => net.bridge = Some(value.into()),
                "mtu" => net.mtu = Some(number()?),
                "vhost" => {
                    net.vhost = match value {
                        "auto" => VhostUse::Auto,
                        "on" => VhostUse::On,
                        "off" => VhostUse::Off,
                        _ => return Err(format!("{part}: vhost is one of auto, on, off")),
                    }
                }
                _ if receive.option("rx-", key, value)? || transmit.option("tx-", key, value)? => {}
                _ if receive.option("", key, value)? => {
                    transmit.option("", key, value)?;
                }
                _ => {
                    return Err(format!(
                        "unknown network option {part:?}: there are tap=NAME, mac=MAC, queues=N, netns=PATH, \
                         bridge=NAME, mtu=N, vhost=auto|on|off, id=ID, and bw=SIZE, bw-burst=SIZE, ops=N, ops-burst=N, each also as \
                         rx-… and tx-…"
                    ));
                }
            }
        }
        if net.tap.is_empty() {
            return Err("tap=NAME is missing".into());
        }
        let [receive, transmit] = limits;
        (net.rx_limits, net.tx_limits) = (receive.finish("rx-")?, transmit.finish("tx-")?);
        Ok(net)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::rate::Bucket;

    #[test]
    fn options_are_read() {
        let net: Net = "tap=vm0,mac=02:00:00:00:AB:01,queues=2,netns=/run/netns/a,bridge=br0,mtu=9000,id=eth0,bw=1M,tx-ops=10"
            .parse()
            .unwrap();
        let bandwidth = Some(Bucket::per_second(1 << 20, None));
        let expected = Net {
            id: Some("eth0".into()),
            mac: Some(Mac([2, 0, 0, 0, 0xab, 1])),
            queues: 2,
            netns: Some("/run/netns/a".into()),
            bridge: Some("br0".into()),
            mtu: Some(9000),
            rx_limits: Limits { bandwidth, operations: None },
            tx_limits: Limits { bandwidth, operations: Some(Bucket::per_second(10, None)) },
            ..Net::new("vm0")
        };
        assert_eq!(net, expected);
        assert_eq!(check(&[net]), Ok(()));
        for (text, part) in [
            ("", "tap=NAME"),
            ("mac=02:00:00:00:00:01", "tap=NAME is missing"),
            ("tap=", "NAME=VALUE"),
            ("tap=a,fast", "NAME=VALUE"),
            ("tap=a,speed=1", "unknown network option"),
            ("tap=a,mac=02:00:00:00:00", "six bytes"),
            ("tap=a,mac=02:00:00:00:00:01:02", "six bytes"),
            ("tap=a,mac=2:0:0:0:0:1", "six bytes"),
            ("tap=a,mac=02:00:00:00:00:+1", "six bytes"),
            ("tap=a,queues=many", "not a number"),
            ("tap=a,mtu=70000", "not a number up to 65535"),
            ("tap=a,bw=5", "no unit"),
            ("tap=a,vhost=maybe", "auto, on, off"),
            ("tap=a,ops=0", "more than 0"),
            ("tap=a,bw-burst=1M", "bw-burst says nothing without"),
        ] {
            let error = text.parse::<Net>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn impossible_devices_are_refused() {
        let refused = |text: &str| check(&[text.parse().unwrap()]).unwrap_err().to_string();
        assert!(refused("tap=a-name-too-long0").contains("1 to 15 bytes"));
        for name in ["a b", "a/b", "..", "a%d", "a:1"] {
            assert!(check(&[Net::new(name)]).is_err(), "{name}");
        }
        assert!(refused("tap=a,queues=0").contains("1 to 16"));
        assert!(refused("tap=a,queues=17").contains("1 to 16"));
        assert!(refused("tap=a,mtu=67").contains("68 to 65521"));
        assert!(refused("tap=a,mac=01:00:5e:00:00:01").contains("multicast"));
        assert!(refused("tap=a,mac=ff:ff:ff:ff:ff:ff").contains("multicast"));
        assert!(refused("tap=a,mac=00:00:00:00:00:00").contains("no address"));
        assert!(refused("tap=a,vhost=on,bw=1M").contains("no rate limits"));
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        let net = |tap: &str| Net { mac: Some(mac), ..Net::new(tap) };
        assert_eq!(check(&[net("a"), net("b")]), Err(NetError::DuplicateMac(mac)));
        assert_eq!(check(&[Net::new("a"), Net::new("a")]), Err(NetError::DuplicateTap("a".into())));
        let elsewhere = Net { netns: Some("/run/netns/x".into()), ..Net::new("a") };
        assert_eq!(check(&[Net::new("a"), elsewhere]), Ok(()));
        let named = Net { id: Some("net1".into()), ..Net::new("a") };
        assert_eq!(check(&[named, Net::new("b")]), Err(NetError::DuplicateId("net1".into())));
    }

    #[test]
    fn random_addresses_are_addresses() {
        for _ in 0..100 {
            let mac = Mac::random().unwrap();
            assert_eq!(mac.fault(), None);
            assert_eq!(mac.0[0] & 3, 2);
        }
    }
}
