//! Ports of the host: found free, and held, so that neither another container nor a program of the host takes one that
//! leads into a container already.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, getsockname, listen, setsockopt,
    socket, sockopt,
};

use super::error::Error;
use super::state::{TakenPort, short};
use crate::container::config::Port;

/// Tries to find a port that is free for every address.
const TRIES: usize = 64;

/// Sockets that hold ports of the host as long as they are open. Nothing is received by them: what arrives is sent into
/// the container before it comes to a socket.
#[derive(Debug, Default)]
pub struct PortLocks(Vec<OwnedFd>);

impl PortLocks {
    /// The sockets, for one who hands them to another process.
    pub fn into_sockets(self) -> Vec<OwnedFd> {
        self.0
    }
}

/// Checks and holds published ports; the result has the real numbers in the place of 0.
pub(super) fn reserve(
    ports: &[Port],
    ipv6: bool,
    taken: &[TakenPort],
    (id, name): (&str, &str),
) -> Result<(Vec<TakenPort>, PortLocks), Error> {
    let mut mine: Vec<TakenPort> = Vec::with_capacity(ports.len());
    let mut locks = PortLocks::default();
    for port in ports {
        let others: Vec<&TakenPort> = taken.iter().chain(&mine).collect();
        let (number, sockets) = reserve_one(port, ipv6, &others)?;
        locks.0.extend(sockets);
        mine.push(TakenPort {
            host_ip: port.host_ip,
            port: number,
            protocol: port.protocol.clone(),
            id: id.into(),
            name: name.into(),
        });
    }
    Ok((mine, locks))
}

fn reserve_one(port: &Port, ipv6: bool, taken: &[&TakenPort]) -> Result<(u16, Vec<OwnedFd>), Error> {
    let is_taken = |by: &str, number| Error::PortTaken {
        port: number,
        protocol: port.protocol.clone(),
        address: port.host_ip,
        by: by.into(),
    };
    let failed = |source| Error::Port {
        port: port.host,
        protocol: port.protocol.clone(),
        address: port.host_ip,
        source,
    };
    if !["tcp", "udp", "sctp"].contains(&port.protocol.as_str()) {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "the protocol is tcp, udp or sctp")));
    }
    if port.container == 0 {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidInput,
            "port 0 of a container leads nowhere",
        )));
    }
    if port.host_ip.is_some_and(|address| address.is_ipv6() && !ipv6) {
        let reason = "the container's networks have no IPv6; make one with `rvmm network create --ipv6`";
        return Err(failed(io::Error::new(io::ErrorKind::Unsupported, reason)));
    }
    if port.host != 0 {
        if let Some(other) = taken.iter().find(|other| conflicts(other, port, port.host)) {
            let name = if other.name.is_empty() { short(&other.id) } else { &other.name };
            return Err(is_taken(&format!("container {name}"), port.host));
        }
        return match hold(port, port.host, ipv6) {
            Ok((_, sockets)) => Ok((port.host, sockets)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(is_taken("a program of the host", port.host))
            }
            Err(error) => Err(failed(error)),
        };
    }
    for _ in 0..TRIES {
        match hold(port, 0, ipv6) {
            Ok((number, sockets)) if !taken.iter().any(|other| conflicts(other, port, number)) => {
                return Ok((number, sockets));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(failed(io::ErrorKind::AddrInUse.into()))
}

fn conflicts(other: &TakenPort, port: &Port, number: u16) -> bool {
    let all = |address: Option<IpAddr>| address.filter(|address| !address.is_unspecified());
    let address = match (all(other.host_ip), all(port.host_ip)) {
        (Some(one), Some(two)) => one == two,
        _ => true,
    };
    address && other.port == number && other.protocol == port.protocol
}

/// Binds sockets to a port at all addresses where it is published, and finds the number of port 0.
fn hold(port: &Port, number: u16, ipv6: bool) -> io::Result<(u16, Vec<OwnedFd>)> {
    let addresses = match port.host_ip {
        Some(address) => vec![address],
        None if ipv6 => vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
        None => vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
    };
    // Hosts often have no SCTP; the number is then as good as that of another protocol.
    let kind = if port.protocol == "udp" { SockType::Datagram } else { SockType::Stream };
    if port.protocol == "sctp" && number != 0 {
        return Ok((number, vec![]));
    }
    let mut number = number;
    let mut sockets = vec![];
    for address in addresses {
        let (bound, socket) = bind_one(kind, SocketAddr::new(address, number))?;
        number = bound;
        sockets.push(socket);
    }
    Ok((number, if port.protocol == "sctp" { vec![] } else { sockets }))
}

fn bind_one(kind: SockType, address: SocketAddr) -> io::Result<(u16, OwnedFd)> {
    let bound = match try_bind(kind, address, false) {
        // Connections that have ended keep a port for some time; a program that listens keeps it altogether.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && kind == SockType::Stream => {
            try_bind(kind, address, true)?
        }
        other => other?,
    };
    let name: SockaddrStorage = getsockname(bound.as_raw_fd())?;
    let number = name
        .as_sockaddr_in()
        .map(|name| name.port())
        .or_else(|| name.as_sockaddr_in6().map(|name| name.port()));
    Ok((number.unwrap_or(address.port()), bound))
}

fn try_bind(kind: SockType, address: SocketAddr, reuse: bool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    if reuse {
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    if reuse {
        listen(&socket, Backlog::new(1)?)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn port(host: u16, protocol: &str) -> Port {
        let host_ip = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Port { host_ip, host, container: 80, protocol: protocol.into() }
    }

    fn one(port: Port, taken: &[TakenPort]) -> Result<(Vec<TakenPort>, PortLocks), Error> {
        reserve(&[port], false, taken, ("0123456789abcdef", "web"))
    }

    #[test]
    fn port_0_becomes_one_that_is_held_until_the_end() {
        for protocol in ["tcp", "udp"] {
            let (ports, locks) = one(port(0, protocol), &[]).unwrap();
            let number = ports[0].port;
            assert_ne!(number, 0);
            let bind = || match protocol {
                "tcp" => TcpListener::bind(("127.0.0.1", number)).is_ok(),
                _ => UdpSocket::bind(("127.0.0.1", number)).is_ok(),
            };
            assert!(!bind(), "{protocol}");
            drop(locks);
            assert!(bind(), "{protocol}");
        }
    }

    #[test]
    fn taken_ports_are_refused_with_who_has_them() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let number = listener.local_addr().unwrap().port();
        let message = one(port(number, "tcp"), &[]).unwrap_err().to_string();
        assert!(message.ends_with("in use by a program of the host"), "{message}");
        one(port(number, "udp"), &[]).unwrap();

        let (ports, locks) = one(port(0, "udp"), &[]).unwrap();
        drop(locks);
        let mut again = port(ports[0].port, "udp");
        again.host_ip = None;
        let message = one(again, &ports).unwrap_err().to_string();
        assert!(message.contains("container web"), "{message}");
        let twice = [port(ports[0].port, "udp"), port(ports[0].port, "udp")];
        assert!(reserve(&twice, false, &[], ("a", "b")).is_err());
        let elsewhere = Port { host_ip: "127.0.0.2".parse().ok(), ..port(ports[0].port, "udp") };
        one(elsewhere, &ports).unwrap();
    }

    #[test]
    fn port_that_only_ended_connections_keep_is_free() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        let (server, _) = listener.accept().unwrap();
        // The side that closes first keeps the port.
        drop(server);
        drop(client);
        drop(listener);
        one(port(address.port(), "tcp"), &[]).unwrap();
    }

    #[test]
    fn impossible_ports_are_refused() {
        for wrong in [
            Port { protocol: "icmp".into(), ..port(80, "tcp") },
            Port { container: 0, ..port(80, "tcp") },
            Port { host_ip: "::1".parse().ok(), ..port(0, "tcp") },
            Port { host_ip: "192.0.2.77".parse().ok(), ..port(0, "tcp") },
        ] {
            assert!(matches!(one(wrong, &[]), Err(Error::Port { .. })));
        }
        let (ports, _) = one(port(0, "sctp"), &[]).unwrap();
        assert_ne!(ports[0].port, 0);
    }
}
