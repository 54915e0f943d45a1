//! Networks as they were made: a file each.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::netlink::{Netlink, Route};
use super::subnet;
use crate::container::files;

/// The network that containers are on if nothing else is said.
pub const DEFAULT_NETWORK: &str = "bridge";
/// Names that mean something else on a command line.
const RESERVED: [&str; 4] = ["none", "host", "default", "container"];
/// Longest name of a network.
const NAME_BYTES_MAX: usize = 128;

/// How a network is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Driver {
    /// A bridge of the host, which translates addresses towards the world.
    #[default]
    Bridge,
    /// Devices beside a device of the host, in its own network.
    Macvlan,
}

impl Driver {
    /// As the user writes it.
    pub fn name(self) -> &'static str {
        match self {
            Driver::Bridge => "bridge",
            Driver::Macvlan => "macvlan",
        }
    }
}

/// A subnet and the host in it that leads elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// Its gateway; for a bridge the host's own address.
    pub gateway: Option<IpAddr>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Creation time in nanoseconds since 1970.
    pub created_ns: u64,
    /// How it is made.
    pub driver: Driver,
    /// The bridge, or the parent of macvlan devices; `None` for the device of the host's default route.
    pub interface: Option<String>,
    /// One of IPv4, and perhaps one of IPv6.
    pub subnets: Vec<Subnet>,
    /// Whether nothing leads out of it.
    pub internal: bool,
    /// Whether other networks of rvmm are kept out.
    pub isolate: bool,
    /// The largest packet; `None` for that of the host's default route, at most 1500.
    pub mtu: Option<u16>,
    /// Labels of the user.
    pub labels: BTreeMap<String, String>,
}

impl Definition {
    /// Whether containers on it find each other by name.
    pub fn has_dns(&self) -> bool {
        self.driver == Driver::Bridge
    }

    /// Whether it has IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.subnets.iter().any(|subnet| subnet.subnet.addr().is_ipv6())
    }
}

/// What a new network should be. What is left out is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Its name.
    pub name: String,
    /// How it is made.
    pub driver: Driver,
    /// Subnets, at most one of each kind of address.
    pub subnets: Vec<IpNet>,
    /// Gateways in them.
    pub gateways: Vec<IpAddr>,
    /// Whether nothing leads out of it.
    pub internal: bool,
    /// Whether it has IPv6 beside IPv4.
    pub ipv6: bool,
    /// The parent of macvlan devices.
    pub parent: Option<String>,
    /// The largest packet.
    pub mtu: Option<u16>,
    /// Whether other networks may send to it.
    pub open: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// The directory of definitions.
pub(super) struct Definitions(pub(super) PathBuf);

impl Definitions {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.json"))
    }

    /// All networks, by name.
    pub(super) fn all(&self) -> Result<Vec<Definition>, Error> {
        let names = files::names(&self.0)?;
        let names = names.iter().filter_map(|name| name.strip_suffix(".json"));
        names.filter(|name| check_name(name).is_ok()).filter_map(|name| self.get(name).transpose()).collect()
    }

    /// The network of that name.
    pub(super) fn get(&self, name: &str) -> Result<Option<Definition>, Error> {
        check_name(name)?;
        Ok(files::find_json(&self.path(name))?)
    }

    /// The network of that name, or whose id begins so.
    pub(super) fn find(&self, name: &str) -> Result<Definition, Error> {
        if let Ok(Some(found)) = self.get(name) {
            return Ok(found);
        }
        let missing = || Error::Missing(name.into());
        if name.len() < 4 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let mut found = self.all()?.into_iter().filter(|network| network.id.starts_with(name));
        match (found.next(), found.next()) {
            (Some(network), None) => Ok(network),
            _ => Err(missing()),
        }
    }

    /// Makes a network; the caller holds the lock.
    pub(super) fn create(&self, options: &CreateOptions) -> Result<Definition, Error> {
        check_name(&options.name)?;
        if RESERVED.contains(&options.name.as_str()) {
            return Err(Error::Reserved(options.name.clone()));
        }
        files::make_open_directory(&self.0)?;
        let others = self.all()?;
        if others.iter().any(|other| other.name == options.name) {
            return Err(Error::Exists(options.name.clone()));
        }
        let definition = define(options, &others, &Host::look()?)?;
        files::write_json(&self.path(&options.name), &definition)?;
        Ok(definition)
    }

    /// Forgets a network.
    pub(super) fn remove(&self, name: &str) -> Result<(), Error> {
        check_name(name)?;
        Ok(files::remove_file(&self.path(name))?)
    }
}

/// What the host has that a new network must not disturb.
#[derive(Default)]
struct Host {
    routes: Vec<IpNet>,
    devices: Vec<String>,
}

impl Host {
    fn look() -> Result<Host, Error> {
        let look = || {
            let mut netlink = Netlink::open()?;
            let devices = netlink.links()?.into_iter().map(|link| link.name).collect();
            let routes = netlink.routes()?.into_iter().filter_map(|route| route.destination).collect();
            Ok(Host { routes, devices })
        };
        look().map_err(|source| Error::Netlink { what: "list the host's routes".into(), source })
    }
}

/// The MTU of the host's way into the world, if it is less than Ethernet's.
pub(super) fn host_mtu() -> Option<u16> {
    let mut netlink = Netlink::open().ok()?;
    let routes = netlink.routes().ok()?;
    let best = routes
        .iter()
        .filter(|route| route.destination.is_none())
        .min_by_key(|Route { metric, .. }| *metric)?;
    let link = netlink.links().ok()?.into_iter().find(|link| Some(link.index) == best.device)?;
    u16::try_from(link.mtu).ok().filter(|mtu| (1280..1500).contains(mtu))
}

fn check_name(name: &str) -> Result<(), Error> {
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if first && rest && name.len() <= NAME_BYTES_MAX { Ok(()) } else { Err(Error::Name(name.into())) }
}

fn define(options: &CreateOptions, others: &[Definition], host: &Host) -> Result<Definition, Error> {
    let wrong = |reason: String| Error::Definition { network: options.name.clone(), reason };
    let interface = match options.driver {
        Driver::Bridge if options.parent.is_some() => {
            return Err(wrong("a bridge has no parent; did you mean --driver macvlan?".into()));
        }
        Driver::Bridge => Some(free_bridge(others, host)),
        Driver::Macvlan if options.subnets.is_empty() => {
            return Err(wrong(
                "a macvlan network is in its parent's subnet, which --subnet must name".into(),
            ));
        }
        Driver::Macvlan => options.parent.clone(),
    };
    if let Some(mtu) = options.mtu.filter(|mtu| *mtu < if options.ipv6 { 1280 } else { 68 }) {
        return Err(wrong(format!("an MTU of {mtu} is too small")));
    }
    let subnets = define_subnets(options, others, host)?;
    let mut id = [0; 32];
    getrandom::fill(&mut id).map_err(Error::Random)?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(Definition {
        name: options.name.clone(),
        id: id.iter().map(|byte| format!("{byte:02x}")).collect(),
        created_ns: u64::try_from(created.as_nanos()).unwrap_or(u64::MAX),
        driver: options.driver,
        interface,
        subnets,
        internal: options.internal,
        isolate: !options.open,
        mtu: options.mtu,
        labels: options.labels.clone(),
    })
}

fn define_subnets(options: &CreateOptions, others: &[Definition], host: &Host) -> Result<Vec<Subnet>, Error> {
    let wrong = |reason: String| Error::Definition { network: options.name.clone(), reason };
    // A macvlan network is where its parent is, so it overlaps with a route of the host, and with others beside it.
    let shared = options.driver == Driver::Macvlan;
    let mut subnets: Vec<IpNet> = options.subnets.iter().map(IpNet::trunc).collect();
    for (index, subnet) in subnets.iter().enumerate() {
        if subnets.iter().take(index).any(|before| before.addr().is_ipv4() == subnet.addr().is_ipv4()) {
            return Err(wrong("it can have one subnet of IPv4 and one of IPv6".into()));
        }
        if subnet::first_address(subnet).is_none()
            || subnet.prefix_len() == 0
            || subnet.prefix_len() == subnet.max_prefix_len()
        {
            return Err(wrong(format!("{subnet} is no subnet for hosts")));
        }
        let other = others.iter().find(|other| {
            !(shared && other.driver == Driver::Macvlan)
                && other.subnets.iter().any(|taken| subnet::overlap(&taken.subnet, subnet))
        });
        if let Some(other) = other {
            return Err(Error::Overlap { subnet: *subnet, with: format!("network {:?}", other.name) });
        }
        if let Some(route) = host.routes.iter().find(|route| !shared && subnet::overlap(route, subnet)) {
            return Err(Error::Overlap { subnet: *subnet, with: format!("the host's route to {route}") });
        }
    }
    let taken = || others.iter().flat_map(|other| &other.subnets).map(|subnet| subnet.subnet);
    if !subnets.iter().any(|subnet| subnet.addr().is_ipv4()) {
        let taken: Vec<IpNet> = host.routes.iter().copied().chain(taken()).collect();
        subnets.insert(0, subnet::free(&taken, options.name == DEFAULT_NETWORK).ok_or(Error::NoSubnet)?);
    }
    if options.ipv6 && !subnets.iter().any(|subnet| subnet.addr().is_ipv6()) {
        let mut random = [0; 7];
        getrandom::fill(&mut random).map_err(Error::Random)?;
        subnets.push(subnet::unique_local(random).ok_or(Error::NoSubnet)?);
    }
    let mut gateways = options.gateways.clone();
    let subnets: Vec<Subnet> = subnets
        .into_iter()
        .map(|subnet| {
            let named = gateways.iter().position(|gateway| subnet::is_host(&subnet, *gateway));
            let named = named.map(|index| gateways.swap_remove(index));
            Subnet { subnet, gateway: named.or_else(|| subnet::first_address(&subnet)) }
        })
        .collect();
    match gateways.first() {
        Some(gateway) => Err(wrong(format!("gateway {gateway} is no host of its subnets"))),
        None => Ok(subnets),
    }
}

/// A device name that neither the host nor another network has.
fn free_bridge(others: &[Definition], host: &Host) -> String {
    let taken = |name: &String| {
        host.devices.contains(name) || others.iter().any(|other| other.interface.as_ref() == Some(name))
    };
    (0u32..).map(|number| format!("rvmm{number}")).find(|name| !taken(name)).unwrap_or_default()
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
