//! What can go wrong with networks.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::container::files;
use crate::tap;

/// Why a network, or a container's part in it, cannot be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("there is no network {0:?}; `rvmm network ls` lists them")]
    Missing(String),
    /// There is one.
    #[error("there is a network {0:?} already")]
    Exists(String),
    /// Not a network's name.
    #[error(
        "{0:?} as a network's name: it has letters, digits, `_`, `.` and `-`, and begins with a letter or digit"
    )]
    Name(String),
    /// A name that means something else.
    #[error("{0:?} is no network that one can make or remove")]
    Reserved(String),
    /// Containers are on it.
    #[error("network {network:?} is in use by {}", .users.join(", "))]
    InUse {
        /// The network.
        network: String,
        /// Names of containers.
        users: Vec<String>,
    },
    /// The subnet is not free.
    #[error("subnet {subnet} overlaps with {with}; take another with --subnet")]
    Overlap {
        /// What was asked for.
        subnet: IpNet,
        /// What is there.
        with: String,
    },
    /// All subnets of the pool are taken.
    #[error("no subnet is free; name one with --subnet")]
    NoSubnet,
    /// The description makes no sense.
    #[error("network {network:?}: {reason}")]
    Definition {
        /// The network.
        network: String,
        /// Why.
        reason: String,
    },
    /// All addresses of a network are taken.
    #[error("network {network:?} has no free address in {subnet}")]
    NoAddress {
        /// The network.
        network: String,
        /// Its subnet.
        subnet: IpNet,
    },
    /// An address cannot be given.
    #[error("address {address} on network {network:?}: {reason}")]
    Address {
        /// What was asked for.
        address: IpAddr,
        /// The network.
        network: String,
        /// Why not.
        reason: String,
    },
    /// A hardware address is none.
    #[error(
        "{0:?} as a hardware address: six pairs of hexadecimal digits, the first of an even number, as 02:00:00:00:00:01"
    )]
    Mac(String),
    /// A port of the host is taken.
    #[error("port {port}/{protocol} of the host{} is in use by {by}", on(*.address))]
    PortTaken {
        /// The port.
        port: u16,
        /// `tcp`, `udp` or `sctp`.
        protocol: String,
        /// Address on the host.
        address: Option<IpAddr>,
        /// Who has it.
        by: String,
    },
    /// A port cannot be published.
    #[error("cannot publish port {port}/{protocol}{}", on(*.address))]
    Port {
        /// The port.
        port: u16,
        /// `tcp`, `udp` or `sctp`.
        protocol: String,
        /// Address on the host.
        address: Option<IpAddr>,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The mode does not go together with something else.
    #[error("{0}")]
    Mode(String),
    /// A program is not there.
    #[error("{program} is not installed; `apt-get install {package}`, or set {variable} to its path")]
    Program {
        /// The program.
        program: &'static str,
        /// Debian's package.
        package: &'static str,
        /// What names another place.
        variable: &'static str,
    },
    /// A program failed.
    #[error("{program} cannot {what}: {message}")]
    Failed {
        /// The program.
        program: &'static str,
        /// What was being done.
        what: String,
        /// What it said.
        message: String,
    },
    /// A program could not be run.
    #[error("cannot run {program}")]
    Run {
        /// The program.
        program: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The relay between a tap and passt.
    #[error("cannot {what}")]
    Relay {
        /// What was being done.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A network namespace.
    #[error("cannot {what} the network namespace {path}")]
    Namespace {
        /// What was being done.
        what: &'static str,
        /// Its file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A device that should be in a namespace is not there.
    #[error("there is no device {device} in the network namespace {path}")]
    NoDevice {
        /// The device.
        device: String,
        /// The namespace's file.
        path: PathBuf,
    },
    /// The host's devices or routes.
    #[error("cannot {what}")]
    Netlink {
        /// What was being done.
        what: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The tap of a microVM.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// A file of ours.
    #[error(transparent)]
    Store(#[from] files::Error),
    /// The host has no random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] getrandom::Error),
}

fn on(address: Option<IpAddr>) -> String {
    address.map_or_else(String::new, |address| format!(" at {address}"))
}
