//! Connecting a container's namespace to its networks, and taking all of it away again, whatever happened in between.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};

use super::definition::{DEFAULT_NETWORK, Definition, Driver, host_mtu};
use super::error::Error;
use super::firewall::{self, Unwanted};
use super::nameserver::{self, Question};
use super::netavark::{self, Answer, Info, InfoSubnet, Input, Joined, Netavark, PortMapping, Running};
use super::netlink::Netlink;
use super::ports::{self, PortLocks};
use super::state::{Record, State, TakenPort, short};
use super::status::{Interface, Status};
use super::{NEEDS_ROOT, Networks, netns, pasta};
use crate::container::config::{Network, NetworkJoin, NetworkMode, Port};
use crate::container::files::Lock;
use crate::container::roots::run_name;

/// The default route through the first network has this metric, and the next ones have more.
const METRIC: u32 = 100;

/// A container that is to be connected.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The container's id, by which its network is taken away again.
    pub id: &'a str,
    /// Its name, which others on its networks find it by.
    pub name: &'a str,
    /// Its network namespace, a file.
    pub netns: &'a Path,
    /// What it wants: [`NetworkMode::Networks`], the other modes need nothing here.
    pub network: &'a Network,
    /// Whether the namespace is a microVM's, which a tap will be plugged into ([`super::plug_tap`]).
    pub guest: bool,
}

/// A connected container.
#[derive(Debug)]
pub struct Attachment {
    /// What it has.
    pub status: Status,
    /// Holds its ports on the host against other programs as long as it lives. To be dropped before the same container is
    /// connected again, which would find its own ports taken.
    pub ports: PortLocks,
}

/// A container that is being connected, while the caller does something else. Dropped, all is taken away again.
pub struct Starting<'a> {
    networks: &'a Networks,
    record: Record,
    joins: Vec<(NetworkJoin, Definition)>,
    search: Vec<String>,
    ports: Vec<Port>,
    locks: Option<PortLocks>,
    running: Option<Running>,
    rootless: Option<Status>,
    done: bool,
    _lock: Lock,
}

impl Networks {
    /// Connects a container and waits for it.
    pub fn setup(&self, request: &Request<'_>) -> Result<Attachment, Error> {
        self.start(request)?.finish()
    }

    /// Begins to connect a container. What was left of an earlier one of its id goes first. Other containers wait until
    /// the result is finished with.
    pub fn start<'a>(&'a self, request: &Request<'_>) -> Result<Starting<'a>, Error> {
        let NetworkMode::Networks(joins) = &request.network.mode else {
            return Err(Error::Mode("only containers on networks are connected to them".into()));
        };
        check_id(request.id)?;
        let lock = self.lock()?;
        if pasta::is_needed() {
            return self.start_rootless(request, joins, lock);
        }
        let netavark = Netavark::find(self.run_directory())?;
        self.teardown_locked(request.id)?;
        let joins = self.resolve(joins)?;
        let mut state = State::read(&self.state_path())?;
        let ipv6 = joins.iter().any(|(_, definition)| definition.has_ipv6());
        let who = (request.id, request.name);
        let (taken, locks) = ports::reserve(&request.network.ports, ipv6, &state.ports, who)?;
        let input = input(request, &joins, &taken, &mut state)?;
        let ports = found_ports(request, &taken);
        state.ports.extend(taken);
        let record = Record { input, ..record(request) };
        // The record comes first: whatever is made afterwards can be taken away by it.
        self.records().put(&record)?;
        let mut starting = Starting {
            networks: self,
            record,
            joins,
            search: request.network.dns_search.clone(),
            ports,
            locks: Some(locks),
            running: None,
            rootless: None,
            done: false,
            _lock: lock,
        };
        state.write(&self.state_path())?;
        starting.running = Some(netavark.setup(request.netns, &starting.record.input)?);
        Ok(starting)
    }

    /// Users without privileges have one network, on which each container is alone.
    fn start_rootless<'a>(
        &'a self,
        request: &Request<'_>,
        joins: &[NetworkJoin],
        lock: Lock,
    ) -> Result<Starting<'a>, Error> {
        let refuse = |reason: &str| Err(Error::Mode(reason.into()));
        match joins {
            [join] if join.network == DEFAULT_NETWORK => match (&join.ip, &join.mac) {
                (None, None) => {}
                _ => return refuse("a fixed address needs root: without, all containers have the same"),
            },
            _ => return refuse(NEEDS_ROOT),
        }
        if request.network.ports.iter().any(|port| port.protocol == "sctp") {
            return refuse("publishing SCTP ports needs root");
        }
        self.teardown_locked(request.id)?;
        let mut state = State::read(&self.state_path())?;
        let who = (request.id, request.name);
        let (taken, locks) = ports::reserve(&request.network.ports, false, &state.ports, who)?;
        let ports = found_ports(request, &taken);
        state.ports.extend(taken);
        let record = Record { rootless: true, ..record(request) };
        self.records().put(&record)?;
        let mut starting = Starting {
            networks: self,
            joins: vec![],
            search: request.network.dns_search.clone(),
            ports: vec![],
            // pasta listens at the ports itself.
            locks: None,
            running: None,
            rootless: None,
            done: false,
            record,
            _lock: lock,
        };
        state.write(&self.state_path())?;
        drop(locks);
        let mac = random_mac()?;
        let pid_file = self.pid_file(request.id);
        let side = pasta::Side {
            netns: request.netns,
            socket: request.guest.then(|| self.passt_socket(request.id)),
            mac: &mac,
            pid_file: &pid_file,
        };
        starting.rootless = Some(pasta::start(&side, &ports, &request.network.dns)?);
        Ok(starting)
    }

    fn pid_file(&self, id: &str) -> PathBuf {
        self.run_directory().join(format!("pasta-{id}.pid"))
    }

    fn passt_socket(&self, id: &str) -> PathBuf {
        self.run_directory().join(format!("passt-{}.sock", run_name(id)))
    }

    /// The networks of a container, each once. The default one is made when it is first wanted.
    fn resolve(&self, joins: &[NetworkJoin]) -> Result<Vec<(NetworkJoin, Definition)>, Error> {
        if joins.is_empty() {
            return Err(Error::Mode("a container on networks names one at least".into()));
        }
        let mut resolved: Vec<(NetworkJoin, Definition)> = vec![];
        for join in joins {
            let definition = if join.network == DEFAULT_NETWORK {
                self.default_network_locked()?
            } else {
                self.definitions().find(&join.network)?
            };
            if resolved.iter().any(|(_, before)| before.name == definition.name) {
                return Err(Error::Mode(format!("network {:?} is named twice", definition.name)));
            }
            if let Some(mac) = &join.mac {
                check_mac(mac)?;
            }
            resolved.push((join.clone(), definition));
        }
        Ok(resolved)
    }

    /// Takes a container's network away: devices, rules, names, addresses and ports. Nothing happens if it has none. It
    /// does not matter whether the container's namespace is still there, or how far its setup came.
    pub fn teardown(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        if !self.exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        self.teardown_locked(id)
    }

    /// Takes away the networks of all containers that are not alive.
    pub fn repair(&self, is_alive: impl Fn(&str) -> bool) -> Result<(), Error> {
        if !self.exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        let mut ids: BTreeSet<String> = self.records().ids()?.into_iter().collect();
        ids.extend(State::read(&self.state_path())?.holders());
        for id in ids.iter().filter(|id| !is_alive(id)) {
            self.teardown_locked(id)?;
        }
        Ok(())
    }

    fn teardown_locked(&self, id: &str) -> Result<(), Error> {
        if let Some(record) = self.records().get(id)? {
            self.disconnect(&record)?;
        }
        let mut state = State::read(&self.state_path())?;
        if state.release(id) {
            state.write(&self.state_path())?;
        }
        self.records().remove(id)
    }

    /// Undoes what netavark did, or had begun to do.
    fn disconnect(&self, record: &Record) -> Result<(), Error> {
        if record.rootless {
            return pasta::stop(&self.pid_file(&record.id), &self.passt_socket(&record.id));
        }
        let others: Vec<Record> =
            self.records().all()?.into_iter().filter(|other| other.id != record.id).collect();
        let mut failed = None;
        if netns::exists(&record.netns) {
            let netavark = Netavark::find(self.run_directory())?;
            failed = netavark.teardown(&record.netns, &record.input).err();
        }
        if failed.is_some() || !netns::exists(&record.netns) {
            tracing::debug!(?failed, "taking away what netavark did not of container {}", short(&record.id));
            self.disconnect_by_hand(record, &others)?;
        } else if others.is_empty() {
            firewall::clean(&Unwanted { everything: true, ..Unwanted::default() })?;
        }
        // Those who stay behind keep their names.
        let stays =
            |network: &&String| others.iter().any(|other| other.input.network_info.contains_key(*network));
        let infos =
            record.input.network_info.iter().filter(|(network, info)| info.dns_enabled && stays(network));
        let gateways = infos.filter_map(|(_, info)| {
            info.subnets.iter().filter_map(|subnet| subnet.gateway).find(IpAddr::is_ipv4)
        });
        let questions: Vec<Question<'_>> =
            gateways.map(|gateway| Question { gateway, name: short(&record.id), address: None }).collect();
        nameserver::settle(&questions);
        Ok(())
    }

    fn disconnect_by_hand(&self, record: &Record, others: &[Record]) -> Result<(), Error> {
        let names = record.input.networks.values().map(|joined| joined.interface_name.as_str());
        if netns::exists(&record.netns) {
            netns::within(&record.netns, || delete_links(names))?;
        }
        nameserver::forget(self.run_directory(), &record.id)?;
        let is_used =
            |network: &str| others.iter().any(|other| other.input.network_info.contains_key(network));
        let infos = &record.input.network_info;
        let unused: Vec<&Info> =
            infos.iter().filter(|(name, _)| !is_used(name)).map(|(_, info)| info).collect();
        let bridges: Vec<&str> = unused
            .iter()
            .filter(|info| info.driver == "bridge")
            .filter_map(|info| info.network_interface.as_deref())
            .collect();
        firewall::clean(&Unwanted {
            ids: vec![&record.id],
            addresses: record
                .input
                .networks
                .values()
                .flat_map(|joined| &joined.static_ips)
                .copied()
                .collect(),
            subnets: unused
                .iter()
                .flat_map(|info| &info.subnets)
                .map(|subnet| subnet.subnet.to_string())
                .collect(),
            bridges: bridges.clone(),
            everything: others.is_empty(),
        })?;
        let failed = |source| Error::Netlink { what: "remove the devices of a network".into(), source };
        delete_links(bridges.into_iter()).map_err(failed)?;
        if others.is_empty() {
            nameserver::end(self.run_directory())?;
        }
        Ok(())
    }
}

impl Starting<'_> {
    /// Waits until the container is connected. If that fails, all of it is taken away again.
    pub fn finish(mut self) -> Result<Attachment, Error> {
        if let Some(mut status) = self.rootless.take() {
            status.search = std::mem::take(&mut self.search);
            self.done = true;
            return Ok(Attachment { status, ports: PortLocks::default() });
        }
        let answers = match self.running.take() {
            Some(running) => running.finish()?,
            None => BTreeMap::new(),
        };
        self.fix_bridges()?;
        let netns = &self.record.netns;
        let links = netns::within(netns, || Netlink::open()?.links())?;
        let mtu = |name: &str| links.iter().find(|link| link.name == name).map_or(1500, |link| link.mtu);
        let mut status = Status {
            ports: std::mem::take(&mut self.ports),
            search: std::mem::take(&mut self.search),
            ..Status::default()
        };
        for (index, (_, definition)) in (0u32..).zip(&self.joins) {
            let Some(answer) = answers.get(&definition.name) else { continue };
            let servers = answer.dns_server_ips.iter().filter(|server| !status.dns_servers.contains(server));
            let servers: Vec<IpAddr> = servers.copied().collect();
            status.dns_servers.extend(servers);
            status.interfaces.extend(interfaces(definition, answer, METRIC + index, &mtu));
        }
        let questions: Vec<Question<'_>> = self.joins.iter().filter_map(|join| self.question(join)).collect();
        nameserver::settle(&questions);
        self.done = true;
        Ok(Attachment { status, ports: self.locks.take().unwrap_or_default() })
    }
}

impl Starting<'_> {
    /// A bridge without an address of its own takes the lowest of its ports', which changes with the containers on it; and
    /// those who stay send to the address that they know for half a minute.
    fn fix_bridges(&self) -> Result<(), Error> {
        let fix = || {
            let mut netlink = Netlink::open()?;
            let links = netlink.links()?;
            let bridges = self.joins.iter().filter(|(_, definition)| definition.driver == Driver::Bridge);
            let names: Vec<&String> =
                bridges.filter_map(|(_, definition)| definition.interface.as_ref()).collect();
            links
                .iter()
                .filter(|link| names.contains(&&link.name))
                .try_for_each(|link| netlink.set_mac(link.index, &link.mac))
        };
        fix()
            .map_err(|source| Error::Netlink { what: "keep the hardware address of a bridge".into(), source })
    }

    /// Whether a network's name server knows the container.
    fn question(&self, (_, definition): &(NetworkJoin, Definition)) -> Option<Question<'_>> {
        let joined = self.record.input.networks.get(&definition.name)?;
        let address = joined.static_ips.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })?;
        let gateway = definition.subnets.iter().filter_map(|subnet| subnet.gateway).find(IpAddr::is_ipv4)?;
        definition.has_dns().then(|| Question {
            gateway,
            name: short(&self.record.id),
            address: Some(address),
        })
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(running) = self.running.take() {
            let _ = running.finish();
        }
        if let Err(error) = self.networks.teardown_locked(&self.record.id) {
            let error = crate::error_chain(&error);
            tracing::warn!("the network of container {} stays behind: {error}", self.record.name);
        }
    }
}

fn interfaces(
    definition: &Definition,
    answer: &Answer,
    metric: u32,
    mtu: &impl Fn(&str) -> u32,
) -> Vec<Interface> {
    let interface = |(name, found): (&String, &netavark::AnswerInterface)| Interface {
        name: name.clone(),
        network: definition.name.clone(),
        mac: found.mac_address.clone(),
        addresses: found.subnets.iter().map(|subnet| subnet.ipnet).collect(),
        gateways: match definition.internal {
            true => vec![],
            false => found.subnets.iter().filter_map(|subnet| subnet.gateway).collect(),
        },
        metric,
        mtu: u16::try_from(mtu(name)).unwrap_or(u16::MAX),
    };
    answer.interfaces.iter().map(interface).collect()
}

fn input(
    request: &Request<'_>,
    joins: &[(NetworkJoin, Definition)],
    taken: &[TakenPort],
    state: &mut State,
) -> Result<Input, Error> {
    let mut input = Input {
        container_id: request.id.into(),
        container_name: request.name.into(),
        dns_servers: request.network.dns.clone(),
        port_mappings: request.network.ports.iter().zip(taken).map(mapping).collect(),
        ..Input::default()
    };
    let host_mtu = host_mtu();
    for (index, (join, definition)) in (0u32..).zip(joins) {
        let mut static_ips = vec![];
        for subnet in &definition.subnets {
            let wanted = join.ip.map(IpAddr::V4).filter(|_| subnet.subnet.addr().is_ipv4());
            let (network, gateway) = (&definition.name, subnet.gateway);
            static_ips.push(state.lease(request.id, network, &subnet.subnet, gateway, wanted)?);
        }
        let mut aliases = join.aliases.clone();
        aliases.push(short(request.id).to_owned());
        let joined = Joined {
            static_ips,
            static_mac: join.mac.clone(),
            interface_name: format!("eth{index}"),
            aliases,
        };
        input.networks.insert(definition.name.clone(), joined);
        input.network_info.insert(definition.name.clone(), info(definition, index, host_mtu));
    }
    Ok(input)
}

fn info(definition: &Definition, index: u32, host_mtu: Option<u16>) -> Info {
    let mut options = BTreeMap::from([("metric".to_owned(), (METRIC + index).to_string())]);
    if let Some(mtu) = definition.mtu.or(host_mtu) {
        options.insert("mtu".into(), mtu.to_string());
    }
    if definition.isolate && definition.has_dns() {
        options.insert("isolate".into(), "true".into());
    }
    let subnets = definition.subnets.iter();
    Info {
        name: definition.name.clone(),
        id: definition.id.clone(),
        driver: definition.driver.name().into(),
        network_interface: definition.interface.clone(),
        subnets: subnets
            .map(|subnet| InfoSubnet { subnet: subnet.subnet, gateway: subnet.gateway })
            .collect(),
        ipv6_enabled: definition.has_ipv6(),
        internal: definition.internal,
        dns_enabled: definition.has_dns(),
        options,
        ipam_options: BTreeMap::from([("driver".to_owned(), "host-local".to_owned())]),
    }
}

fn record(request: &Request<'_>) -> Record {
    Record {
        id: request.id.into(),
        name: request.name.into(),
        netns: request.netns.into(),
        rootless: false,
        input: Input::default(),
    }
}

/// Published ports with the numbers that were found for them.
fn found_ports(request: &Request<'_>, taken: &[TakenPort]) -> Vec<Port> {
    let found = |(port, taken): (&Port, &TakenPort)| Port { host: taken.port, ..port.clone() };
    request.network.ports.iter().zip(taken).map(found).collect()
}

/// A hardware address that is nobody's.
fn random_mac() -> Result<String, Error> {
    let mut bytes = [0; 5];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(bytes.iter().fold("02".to_owned(), |mac, byte| format!("{mac}:{byte:02x}")))
}

fn mapping((port, taken): (&Port, &TakenPort)) -> PortMapping {
    let all = |address: &IpAddr| *address == IpAddr::V6(Ipv6Addr::UNSPECIFIED) || address.is_unspecified();
    PortMapping {
        container_ip: String::new(),
        container_port: port.container,
        host_ip: port.host_ip.filter(|address| !all(address)).map_or_else(String::new, |ip| ip.to_string()),
        host_port: taken.port,
        protocol: port.protocol.clone(),
        range: 1,
    }
}

fn delete_links<'a>(names: impl Iterator<Item = &'a str>) -> std::io::Result<()> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    for name in names {
        if let Some(link) = links.iter().find(|link| link.name == name) {
            netlink.delete_link(link.index)?;
        }
    }
    Ok(())
}

/// Ids become names of files.
fn check_id(id: &str) -> Result<(), Error> {
    let fits = (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if fits { Ok(()) } else { Err(Error::Mode(format!("{id:?} is no id of a container"))) }
}

/// A hardware address of one device.
fn check_mac(mac: &str) -> Result<(), Error> {
    let mut bytes = mac.split(':').map(|pair| u8::from_str_radix(pair, 16).ok().filter(|_| pair.len() == 2));
    let is_single = bytes.next().flatten().is_some_and(|first| first & 1 == 0);
    if is_single && bytes.by_ref().take(5).filter(Option::is_some).count() == 5 && bytes.next().is_none() {
        Ok(())
    } else {
        Err(Error::Mac(mac.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_are_checked() {
        assert!(check_mac("02:00:00:00:00:01").is_ok());
        for mac in
            ["", "03:00:00:00:00:01", "02:00:00:00:00", "02:00:00:00:00:01:02", "02:00:00:00:0:01", "02-00"]
        {
            assert!(matches!(check_mac(mac), Err(Error::Mac(_))), "{mac}");
        }
    }

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for id in ["", "../x", "a/b", "a.b", &"a".repeat(129)] {
            assert!(check_id(id).is_err(), "{id}");
        }
        assert!(check_id("0123abc").is_ok());
    }
}
