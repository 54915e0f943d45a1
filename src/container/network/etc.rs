//! `/etc/resolv.conf` and `/etc/hosts` of a container, as Docker makes them.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};

use super::status::Status;
use crate::container::config::{Network, NetworkMode};

/// Whom to ask where the host names nobody that a container could reach: Google's servers, as with Docker.
const PUBLIC_SERVERS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(8, 8, 8, 8)), IpAddr::V4(Ipv4Addr::new(8, 8, 4, 4))];
/// The address of a name that means the host, whatever its address is.
const HOST_GATEWAY: &str = "host-gateway";

/// The host's `resolv.conf`, which is systemd-resolved's own list where `/etc/resolv.conf` only names its loopback address.
pub fn host_resolv_conf() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let text = read("/etc/resolv.conf");
    let stub =
        text.lines().filter_map(server).all(|server| server == IpAddr::V4(Ipv4Addr::new(127, 0, 0, 53)));
    let servers = read("/run/systemd/resolve/resolv.conf");
    if stub && servers.lines().any(|line| server(line).is_some()) { servers } else { text }
}

/// A container's `resolv.conf`, from what the user wants, its networks' servers and the host's file.
pub fn resolv_conf(network: &Network, status: &Status, host: &str) -> String {
    let shares_host = network.mode == NetworkMode::Host;
    let mut servers: Vec<IpAddr> = if !status.dns_servers.is_empty() {
        // They ask the user's servers, or the host's, for what they do not know.
        status.dns_servers.clone()
    } else if !network.dns.is_empty() {
        network.dns.clone()
    } else {
        host.lines().filter_map(server).filter(|server| shares_host || !server.is_loopback()).collect()
    };
    if servers.is_empty() && !shares_host {
        servers.extend(PUBLIC_SERVERS);
    }
    let from_host = |key: &str| -> Vec<String> {
        let mut lines = host.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(key)).then(|| words.map(str::to_owned).collect())
        });
        // The last line of its kind counts.
        lines.next_back().unwrap_or_default()
    };
    let search = if network.dns_search.is_empty() { from_host("search") } else { network.dns_search.clone() };
    let options =
        if network.dns_options.is_empty() { from_host("options") } else { network.dns_options.clone() };

    let mut text = String::new();
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    // A single dot means no domain at all.
    if !search.is_empty() && search != ["."] {
        let _ = writeln!(text, "search {}", search.join(" "));
    }
    if !options.is_empty() {
        let _ = writeln!(text, "options {}", options.join(" "));
    }
    text
}

fn server(line: &str) -> Option<IpAddr> {
    let address = line.trim().strip_prefix("nameserver")?.trim();
    // An address of one link, `fe80::1%eth0`, means nothing elsewhere.
    address.parse().ok()
}

/// A container's `hosts`, from what the user wants, its addresses and its host name; `host` is the host's file, which
/// containers see that share its network.
pub fn hosts(network: &Network, status: &Status, hostname: &str, host: &str) -> String {
    let mut text = match network.mode {
        NetworkMode::Host => host.to_owned(),
        _ => concat!(
            "127.0.0.1\tlocalhost\n",
            "::1\tlocalhost ip6-localhost ip6-loopback\n",
            "fe00::0\tip6-localnet\n",
            "ff00::0\tip6-mcastprefix\n",
            "ff02::1\tip6-allnodes\n",
            "ff02::2\tip6-allrouters\n",
        )
        .to_owned(),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    let gateway = status.gateway().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    for (name, address) in &network.hosts {
        let _ = match address.as_str() {
            HOST_GATEWAY => writeln!(text, "{gateway}\t{name}"),
            address => writeln!(text, "{address}\t{name}"),
        };
    }
    for address in status.interfaces.iter().flat_map(|interface| &interface.addresses) {
        // The first label is a name of its own.
        let short = hostname.split_once('.').map_or(String::new(), |(first, _)| format!(" {first}"));
        let _ = writeln!(text, "{}\t{hostname}{short}", address.addr());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::status::Interface;
    use super::*;

    fn network(mode: NetworkMode) -> Network {
        Network { mode, ports: vec![], dns: vec![], dns_search: vec![], dns_options: vec![], hosts: vec![] }
    }

    fn bridged() -> Network {
        network(NetworkMode::Networks(vec![]))
    }

    fn status() -> Status {
        let interface = Interface {
            name: "eth0".into(),
            network: "bridge".into(),
            mac: "02:00:00:00:00:01".into(),
            addresses: vec!["10.88.0.2/16".parse().unwrap()],
            gateways: vec!["10.88.0.1".parse().unwrap()],
            metric: 100,
            mtu: 1500,
        };
        let dns_servers = vec!["10.88.0.1".parse().unwrap()];
        Status { interfaces: vec![interface], dns_servers, ..Status::default() }
    }

    const HOST: &str = "# made by hand\nnameserver 127.0.0.1\nnameserver 192.0.2.53\nsearch example.org corp\noptions edns0\n";

    #[test]
    fn networks_servers_come_before_all_others() {
        let mut wanted = bridged();
        assert_eq!(
            resolv_conf(&wanted, &status(), HOST),
            "nameserver 10.88.0.1\nsearch example.org corp\noptions edns0\n"
        );
        wanted.dns = vec!["9.9.9.9".parse().unwrap()];
        wanted.dns_search = vec![".".into()];
        wanted.dns_options = vec!["ndots:2".into(), "rotate".into()];
        assert_eq!(resolv_conf(&wanted, &status(), HOST), "nameserver 10.88.0.1\noptions ndots:2 rotate\n");
    }

    #[test]
    fn without_a_server_of_its_own_a_network_has_the_users_or_the_hosts() {
        let none = Status::default();
        let mut wanted = bridged();
        assert!(resolv_conf(&wanted, &none, HOST).starts_with("nameserver 192.0.2.53\nsearch"));
        assert_eq!(
            resolv_conf(&wanted, &none, "nameserver ::1\n"),
            "nameserver 8.8.8.8\nnameserver 8.8.4.4\n"
        );
        wanted.dns = vec!["9.9.9.9".parse().unwrap()];
        assert!(resolv_conf(&wanted, &none, HOST).starts_with("nameserver 9.9.9.9\n"));
        let shared = network(NetworkMode::Host);
        assert!(
            resolv_conf(&shared, &none, HOST).starts_with("nameserver 127.0.0.1\nnameserver 192.0.2.53\n")
        );
        assert_eq!(resolv_conf(&shared, &none, ""), "");
    }

    #[test]
    fn hosts_names_the_container_and_what_the_user_added() {
        let mut wanted = bridged();
        wanted.hosts =
            vec![("db".into(), "192.0.2.7".into()), ("host.docker.internal".into(), "host-gateway".into())];
        let text = hosts(&wanted, &status(), "web.example.org", "");
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(
            text.ends_with(
                "192.0.2.7\tdb\n10.88.0.1\thost.docker.internal\n10.88.0.2\tweb.example.org web\n"
            )
        );
    }

    #[test]
    fn container_in_the_hosts_network_sees_the_hosts_file() {
        let mut wanted = network(NetworkMode::Host);
        wanted.hosts = vec![("gate".into(), "host-gateway".into())];
        let text = hosts(&wanted, &Status::default(), "here", "127.0.0.1 localhost\n192.0.2.1 printer");
        assert_eq!(text, "127.0.0.1 localhost\n192.0.2.1 printer\n127.0.0.1\tgate\n");
    }
}
