//! What became of a container's network.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::container::config::Port;

/// What a container has of networks, inside and on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Status {
    /// Its devices; the first gives the default route.
    pub interfaces: Vec<Interface>,
    /// Published ports, with the number that was found in the place of 0.
    pub ports: Vec<Port>,
    /// Servers that know the names of containers.
    pub dns_servers: Vec<IpAddr>,
    /// Search domains that the user wants.
    pub search: Vec<String>,
}

impl Status {
    /// The gateway of the default route: the host, unless the first network is the host's own.
    pub fn gateway(&self) -> Option<IpAddr> {
        self.interfaces.iter().find_map(|interface| interface.gateway())
    }
}

/// A device in a container's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Interface {
    /// `eth0`, `eth1`, …
    pub name: String,
    /// The network that it is on.
    pub network: String,
    /// Its hardware address.
    pub mac: String,
    /// Its addresses, with their prefix.
    pub addresses: Vec<IpNet>,
    /// Gateways, one for each kind of address that has one; none on an internal network.
    pub gateways: Vec<IpAddr>,
    /// Priority of the routes through the gateways: less is better.
    pub metric: u32,
    /// The largest packet.
    pub mtu: u16,
}

impl Interface {
    /// The gateway of IPv4.
    pub fn gateway(&self) -> Option<IpAddr> {
        self.gateways.iter().copied().find(IpAddr::is_ipv4)
    }
}
