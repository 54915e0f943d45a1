//! What is given to containers while they run: addresses and ports of the host. One file, read and replaced under a lock,
//! and a record for each container of what was made for it, so that it can be taken away again by anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::netavark::Input;
use super::subnet;
use crate::container::files;

/// What all containers have.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct State {
    /// By network.
    leases: BTreeMap<String, Leases>,
    pub(super) ports: Vec<TakenPort>,
}

/// Addresses of one network.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Leases {
    /// The last that was given, of each kind: the next one is given next.
    last: Vec<IpAddr>,
    /// Who has which.
    held: BTreeMap<IpAddr, String>,
}

/// A port of the host that leads into a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct TakenPort {
    pub(super) host_ip: Option<IpAddr>,
    pub(super) port: u16,
    pub(super) protocol: String,
    pub(super) id: String,
    pub(super) name: String,
}

/// What was made for a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) netns: PathBuf,
    /// Whether pasta and not netavark connects it.
    #[serde(default)]
    pub(super) rootless: bool,
    pub(super) input: Input,
}

impl State {
    pub(super) fn read(path: &Path) -> Result<State, Error> {
        Ok(files::find_json(path)?.unwrap_or_default())
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), Error> {
        Ok(files::write_json(path, self)?)
    }

    /// Gives an address of a subnet to a container: this one, or any that is free.
    pub(super) fn lease(
        &mut self,
        id: &str,
        network: &str,
        subnet: &IpNet,
        gateway: Option<IpAddr>,
        wanted: Option<IpAddr>,
    ) -> Result<IpAddr, Error> {
        let leases = self.leases.entry(network.to_owned()).or_default();
        let address = match wanted {
            Some(address) => {
                let refused = |reason: String| Error::Address { address, network: network.into(), reason };
                if !subnet::is_host(subnet, address) {
                    return Err(refused(format!("it is no host's address in {subnet}")));
                }
                if gateway == Some(address) {
                    return Err(refused("it is the gateway's".into()));
                }
                if let Some(holder) = leases.held.get(&address) {
                    return Err(refused(format!("container {} has it", short(holder))));
                }
                address
            }
            None => {
                let taken: BTreeSet<IpAddr> = leases.held.keys().copied().chain(gateway).collect();
                let last = leases.last.iter().copied().find(|last| subnet.contains(last));
                let free = subnet::free_address(subnet, last, &taken);
                let free =
                    free.ok_or_else(|| Error::NoAddress { network: network.into(), subnet: *subnet })?;
                leases.last.retain(|last| last.is_ipv4() != free.is_ipv4());
                leases.last.push(free);
                free
            }
        };
        leases.held.insert(address, id.to_owned());
        Ok(address)
    }

    /// Takes everything back from a container; the result tells whether there was anything.
    pub(super) fn release(&mut self, id: &str) -> bool {
        let before = self.size();
        for leases in self.leases.values_mut() {
            leases.held.retain(|_, holder| holder != id);
        }
        self.ports.retain(|port| port.id != id);
        self.size() != before
    }

    fn size(&self) -> usize {
        self.ports.len() + self.leases.values().map(|leases| leases.held.len()).sum::<usize>()
    }

    /// Forgets a network.
    pub(super) fn forget(&mut self, network: &str) {
        self.leases.remove(network);
    }

    /// Everybody who has something.
    pub(super) fn holders(&self) -> BTreeSet<String> {
        let leases = self.leases.values().flat_map(|leases| leases.held.values());
        leases.chain(self.ports.iter().map(|port| &port.id)).cloned().collect()
    }
}

/// An id as people read it.
pub(super) fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// The directory of records.
pub(super) struct Records(pub(super) PathBuf);

impl Records {
    fn path(&self, id: &str) -> PathBuf {
        self.0.join(format!("{id}.json"))
    }

    pub(super) fn get(&self, id: &str) -> Result<Option<Record>, Error> {
        Ok(files::find_json(&self.path(id))?)
    }

    pub(super) fn put(&self, record: &Record) -> Result<(), Error> {
        files::make_open_directory(&self.0)?;
        Ok(files::write_json(&self.path(&record.id), record)?)
    }

    pub(super) fn remove(&self, id: &str) -> Result<(), Error> {
        Ok(files::remove_file(&self.path(id))?)
    }

    pub(super) fn ids(&self) -> Result<Vec<String>, Error> {
        let names = files::names(&self.0)?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".json")).map(str::to_owned).collect())
    }

    pub(super) fn all(&self) -> Result<Vec<Record>, Error> {
        self.ids()?.iter().filter_map(|id| self.get(id).transpose()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBNET: &str = "10.89.0.0/29";

    fn lease(state: &mut State, id: &str, wanted: Option<&str>) -> Result<String, Error> {
        let gateway = "10.89.0.1".parse().ok();
        let wanted = wanted.map(|address| address.parse().unwrap());
        state.lease(id, "web", &SUBNET.parse().unwrap(), gateway, wanted).map(|address| address.to_string())
    }

    #[test]
    fn addresses_are_given_once_and_again_after_release() {
        let mut state = State::default();
        for (id, address) in ["a", "b", "c", "d", "e"].iter().zip(2..) {
            assert_eq!(lease(&mut state, id, None).unwrap(), format!("10.89.0.{address}"));
        }
        assert!(matches!(lease(&mut state, "f", None), Err(Error::NoAddress { .. })));
        assert!(state.release("c") && !state.release("c"));
        assert_eq!(lease(&mut state, "f", None).unwrap(), "10.89.0.4");
        assert_eq!(state.holders().len(), 5);
    }

    #[test]
    fn fixed_address_must_be_free_and_a_hosts() {
        let mut state = State::default();
        assert_eq!(lease(&mut state, "a", Some("10.89.0.5")).unwrap(), "10.89.0.5");
        for (address, reason) in [
            ("10.89.0.5", "container a has it"),
            ("10.89.0.1", "the gateway's"),
            ("10.89.0.7", "no host's address"),
            ("10.90.0.2", "no host's address"),
        ] {
            let message = lease(&mut state, "b", Some(address)).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
        }
        assert_eq!(lease(&mut state, "b", None).unwrap(), "10.89.0.2");
    }

    #[test]
    fn state_survives_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        let mut state = State::read(&path).unwrap();
        assert_eq!(state, State::default());
        lease(&mut state, "a", None).unwrap();
        state.write(&path).unwrap();
        assert_eq!(State::read(&path).unwrap(), state);
    }
}
