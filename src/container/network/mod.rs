//! Networks of containers, natively and in microVMs: made once, by netavark, in a network namespace that either is in.
//!
//! [`Networks`] holds what networks there are (files below `networks` of the data directory) and who is on them (files
//! below `networks` of the run-time directory). A container's part is connected by [`Networks::setup`] and taken away by
//! [`Networks::teardown`]; a microVM is plugged into the same namespace by [`plug_tap`].

mod attach;
mod definition;
mod error;
mod etc;
mod firewall;
mod nameserver;
mod netavark;
mod netlink;
pub mod netns;
mod pasta;
mod plug;
mod ports;
pub mod relay;
mod state;
mod status;
mod subnet;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

pub use attach::{Attachment, Request, Starting};
pub use definition::{CreateOptions, DEFAULT_NETWORK, Definition, Driver, Subnet};
pub use error::Error;
pub use etc::{host_resolv_conf, hosts, resolv_conf};
pub use plug::{TapPlug, plug_tap, unplug_tap};
pub use ports::PortLocks;
pub use status::{Interface, Status};

use self::definition::Definitions;
use self::state::{Record, Records, State};
use super::config::{Isolation, Network, NetworkMode};
use super::files;

/// Why users without root have one network.
const NEEDS_ROOT: &str = "networks other than \"bridge\" need root: without, each container is alone with its way out (publish \
                          ports, or share one network by --network container:NAME)";

/// All networks of a host.
#[derive(Clone, Debug)]
pub struct Networks {
    data: PathBuf,
    run: PathBuf,
}

impl Networks {
    /// The networks of these two roots: what stays, and what is gone after a reboot.
    pub fn new(data_root: &Path, run_root: &Path) -> Networks {
        Networks { data: data_root.join("networks"), run: run_root.join("networks") }
    }

    fn run_directory(&self) -> &Path {
        &self.run
    }

    fn definitions(&self) -> Definitions {
        Definitions(self.data.clone())
    }

    fn records(&self) -> Records {
        Records(self.run.join("attached"))
    }

    fn state_path(&self) -> PathBuf {
        self.run.join("state.json")
    }

    /// Whether there has been a container on a network since the host was started.
    fn exists(&self) -> bool {
        self.run.is_dir()
    }

    /// One at a time may change networks, as netavark demands.
    fn lock(&self) -> Result<files::Lock, Error> {
        files::make_open_directory(&self.run)?;
        let lock = files::Lock::wait(&self.run.join("lock"))?;
        netavark::wait_for_orphan(&self.run)?;
        Ok(lock)
    }

    /// All networks by name. The default one is among them when it was used.
    pub fn list(&self) -> Result<Vec<Definition>, Error> {
        self.definitions().all()
    }

    /// The network of that name, or whose id begins so; the default one is made.
    pub fn get(&self, name: &str) -> Result<Definition, Error> {
        if name == DEFAULT_NETWORK {
            let _lock = self.lock()?;
            return self.default_network_locked();
        }
        self.definitions().find(name)
    }

    fn default_network_locked(&self) -> Result<Definition, Error> {
        if let Some(found) = self.definitions().get(DEFAULT_NETWORK)? {
            return Ok(found);
        }
        let name = DEFAULT_NETWORK.to_owned();
        self.definitions().create(&CreateOptions { name, ..CreateOptions::default() })
    }

    /// Makes a network. Nothing happens on the host before a container is on it.
    pub fn create(&self, options: &CreateOptions) -> Result<Definition, Error> {
        if pasta::is_needed() {
            return Err(Error::Mode(NEEDS_ROOT.into()));
        }
        let _lock = self.lock()?;
        self.definitions().create(options)
    }

    /// Forgets a network that no container is on; returns its name.
    pub fn remove(&self, name: &str) -> Result<String, Error> {
        if name == DEFAULT_NETWORK {
            return Err(Error::Reserved(name.into()));
        }
        let _lock = self.lock()?;
        let network = self.definitions().find(name)?.name;
        let users = self.users(&network)?;
        if !users.is_empty() {
            return Err(Error::InUse { network, users: users.into_iter().map(|user| user.name).collect() });
        }
        self.remove_locked(&network)?;
        Ok(network)
    }

    /// Forgets all networks but the default one that no container is on, and that `is_wanted` does not keep; returns
    /// their names.
    pub fn prune(&self, is_wanted: impl Fn(&Definition) -> bool) -> Result<Vec<String>, Error> {
        let _lock = self.lock()?;
        let mut removed = vec![];
        for network in self.definitions().all()? {
            if network.name != DEFAULT_NETWORK
                && !is_wanted(&network)
                && self.users(&network.name)?.is_empty()
            {
                self.remove_locked(&network.name)?;
                removed.push(network.name);
            }
        }
        Ok(removed)
    }

    fn remove_locked(&self, name: &str) -> Result<(), Error> {
        self.definitions().remove(name)?;
        let mut state = State::read(&self.state_path())?;
        state.forget(name);
        state.write(&self.state_path())
    }

    /// The containers that are on a network now.
    pub fn users(&self, network: &str) -> Result<Vec<User>, Error> {
        let definition = self.definitions().get(network)?;
        let prefix = |address: &IpAddr| {
            let subnets = definition.iter().flat_map(|definition| &definition.subnets);
            let subnet = subnets.map(|subnet| subnet.subnet).find(|subnet| subnet.contains(address))?;
            IpNet::new(*address, subnet.prefix_len()).ok()
        };
        let user = |record: Record| {
            let joined = record.input.networks.get(network)?;
            let addresses = joined.static_ips.iter().filter_map(prefix).collect();
            Some(User { id: record.id, name: record.name, addresses })
        };
        Ok(self.records().all()?.into_iter().filter_map(user).collect())
    }
}

/// A container that is on a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its addresses there.
    pub addresses: Vec<IpNet>,
}

/// Refuses what goes together with no mode, or not with this isolation.
pub fn check(network: &Network, isolation: Isolation) -> Result<(), Error> {
    let refuse = |reason: &str| Err(Error::Mode(reason.into()));
    match &network.mode {
        NetworkMode::Host if isolation == Isolation::Microvm => refuse(
            "a microVM has a kernel of its own, and cannot share the host's network; publish ports instead, or use \
             --isolation native",
        ),
        NetworkMode::Host if !network.ports.is_empty() => {
            refuse("ports cannot be published with the host's network: the container has all of them already")
        }
        NetworkMode::None if !network.ports.is_empty() => {
            refuse("ports cannot be published without a network")
        }
        NetworkMode::Container(_) if !network.ports.is_empty() => refuse(
            "ports cannot be published in another container's network: publish them with that container",
        ),
        NetworkMode::Container(_) if !network.dns.is_empty() || !network.hosts.is_empty() => {
            refuse("a container in another one's network has the other's names: give them to that container")
        }
        NetworkMode::Networks(joins) if joins.is_empty() => {
            refuse("a container on networks names one at least")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Port;
    use super::*;

    fn wanted(mode: NetworkMode) -> Network {
        let (ports, hosts) = (vec![], vec![]);
        Network { mode, ports, dns: vec![], dns_search: vec![], dns_options: vec![], hosts }
    }

    #[test]
    fn modes_that_do_not_go_together_are_refused_with_their_reason() {
        let published = |mode| {
            let port = Port { host_ip: None, host: 80, container: 80, protocol: "tcp".into() };
            Network { ports: vec![port], ..wanted(mode) }
        };
        let named = |mode| Network { hosts: vec![("a".into(), "192.0.2.1".into())], ..wanted(mode) };
        let other = || NetworkMode::Container("abc".into());
        for (network, isolation, reason) in [
            (wanted(NetworkMode::Host), Isolation::Microvm, "a microVM has a kernel of its own"),
            (published(NetworkMode::Host), Isolation::Native, "has all of them already"),
            (published(NetworkMode::None), Isolation::Native, "without a network"),
            (published(other()), Isolation::Microvm, "publish them with that container"),
            (named(other()), Isolation::Native, "give them to that container"),
            (wanted(NetworkMode::Networks(vec![])), Isolation::Native, "names one at least"),
        ] {
            let message = check(&network, isolation).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
        }
        let joins = vec![super::super::config::NetworkJoin::default()];
        check(&published(NetworkMode::Networks(joins)), Isolation::Microvm).unwrap();
        check(&wanted(NetworkMode::Host), Isolation::Native).unwrap();
        check(&named(NetworkMode::Host), Isolation::Native).unwrap();
        check(&wanted(other()), Isolation::Microvm).unwrap();
    }
}
