//! As much of rtnetlink as network devices with addresses and routes need.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};
use rvmm::guest::protocol::{Failure, Interface, Route};

use crate::failure::Doing;

/// The protocol's number is 0, for which there is no value.
pub const NETLINK_ROUTE: Option<Protocol> = None;

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const IFF_UP: u32 = 1;

const HEADER_BYTES: usize = 16;
/// Bytes of `struct ifinfomsg`.
const LINK_BYTES: usize = 16;
/// Bytes of an answer at most: the kernel sends no more at once.
const ANSWER_BYTES: usize = 32 << 10;
/// The loopback device's number, in every network namespace.
const LOOPBACK: u32 = 1;

/// Messages behind each other.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Where the message that is being written begins.
    start: usize,
    count: u32,
}

impl Batch {
    /// Begins a message with the fixed part `head`.
    fn begin(&mut self, kind: u16, flags: u16, head: &[u8]) {
        self.start = self.bytes.len();
        self.count += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.count.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(head);
        self.finish();
    }

    /// Adds an attribute to the message.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let len = (value.len() + 4) as u16;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.finish();
    }

    /// Brings the message's length up to date.
    fn finish(&mut self) {
        let len = (self.bytes.len() - self.start) as u32;
        if let Some(place) = self.bytes.get_mut(self.start..self.start + 4) {
            place.copy_from_slice(&len.to_ne_bytes());
        }
    }

    fn set_link(&mut self, index: u32, name: Option<&str>, mtu: Option<u32>, up: bool) {
        let mut head = [0; LINK_BYTES];
        head[4..8].copy_from_slice(&index.to_ne_bytes());
        // The flags, and which of them are meant.
        head[8..12].copy_from_slice(&if up { IFF_UP } else { 0 }.to_ne_bytes());
        head[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
        self.begin(RTM_NEWLINK, NLM_F_ACK, &head);
        if let Some(name) = name {
            self.attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
        }
        if let Some(mtu) = mtu {
            self.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        }
    }

    fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) {
        // An address that was given needs no search for whoever else may have it.
        let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
        let [i0, i1, i2, i3] = index.to_ne_bytes();
        let head = [family(address), prefix, flags, 0, i0, i1, i2, i3];
        self.begin(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &head);
        let bytes = octets(address);
        self.attribute(IFA_LOCAL, &bytes);
        self.attribute(IFA_ADDRESS, &bytes);
        if let IpAddr::V4(address) = address
            && prefix < 31
        {
            let hosts = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            self.attribute(IFA_BROADCAST, &(address.to_bits() | hosts).to_be_bytes());
        }
    }

    fn add_route(&mut self, index: u32, route: &Route) {
        let (destination, prefix) = route.destination;
        let scope = if route.gateway.is_none() && destination.is_ipv4() { RT_SCOPE_LINK } else { 0 };
        let mut head =
            [family(destination), prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST].to_vec();
        head.extend_from_slice(&[0; 4]);
        self.begin(RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &head);
        if prefix > 0 {
            self.attribute(RTA_DST, &octets(destination));
        }
        self.attribute(RTA_OIF, &index.to_ne_bytes());
        if let Some(gateway) = route.gateway {
            self.attribute(RTA_GATEWAY, &octets(gateway));
        }
        if let Some(metric) = route.metric {
            self.attribute(RTA_PRIORITY, &metric.to_ne_bytes());
        }
    }
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// A message that brings up the loopback device of whoever sends it.
pub fn loopback_up() -> Vec<u8> {
    let mut batch = Batch::default();
    batch.set_link(LOOPBACK, None, None, true);
    batch.bytes
}

/// A network device.
#[derive(Debug, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// Messages that an answer consists of: each with its kind and what is in it.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<HEADER_BYTES>()?;
        let len = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let body = bytes.get(HEADER_BYTES..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Attributes: each with its kind and its value.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([header[2], header[3]]), value))
    })
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let index = body.get(4..8)?.try_into().ok().map(u32::from_ne_bytes)?;
    let mut link = Link { index, name: String::new(), mac: Vec::new() };
    for (kind, value) in attributes(body.get(LINK_BYTES..)?) {
        match kind {
            IFLA_IFNAME => {
                let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
                link.name = String::from_utf8_lossy(name).into_owned();
            }
            IFLA_ADDRESS => link.mac = value.to_vec(),
            _ => {}
        }
    }
    Some(link)
}

/// A socket to the kernel's networks.
struct Socket(OwnedFd);

impl Socket {
    fn open() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC;
        socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, NETLINK_ROUTE).map(Self)
    }

    fn send(&self, bytes: &[u8]) -> Result<(), Errno> {
        sendto(&self.0, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).map(drop)
    }

    fn links(&self) -> Result<Vec<Link>, Errno> {
        let mut batch = Batch::default();
        batch.begin(RTM_GETLINK, NLM_F_DUMP, &[0; LINK_BYTES]);
        self.send(&batch.bytes)?;
        let mut links = Vec::new();
        let mut buffer = vec![0; ANSWER_BYTES];
        loop {
            let (_, len) = recv(&self.0, &mut *buffer, RecvFlags::empty())?;
            for (kind, body) in messages(buffer.get(..len).unwrap_or_default()) {
                match kind {
                    RTM_NEWLINK => links.extend(parse_link(body)),
                    NLMSG_DONE => return Ok(links),
                    NLMSG_ERROR => return Err(error_of(body).unwrap_or(Errno::IO)),
                    _ => {}
                }
            }
        }
    }

    /// Has all messages carried out; the first error counts.
    fn carry_out(&self, batch: &Batch) -> Result<(), Errno> {
        self.send(&batch.bytes)?;
        let mut first = Ok(());
        let mut answered = 0;
        let mut buffer = vec![0; ANSWER_BYTES];
        while answered < batch.count {
            let (_, len) = recv(&self.0, &mut *buffer, RecvFlags::empty())?;
            for (kind, body) in messages(buffer.get(..len).unwrap_or_default()) {
                if kind == NLMSG_ERROR {
                    answered += 1;
                    first = first.and(error_of(body).map_or(Ok(()), Err));
                }
            }
        }
        first
    }
}

/// The error in an answer; none if it says that all is well.
fn error_of(body: &[u8]) -> Option<Errno> {
    let number = body.first_chunk().map_or(-libc::EIO, |bytes| i32::from_ne_bytes(*bytes));
    (number != 0).then(|| Errno::from_raw_os_error(number.saturating_neg()))
}

/// Sets up network devices, and the loopback device.
pub fn configure(interfaces: &[Interface]) -> Result<(), Failure> {
    let socket = Socket::open().doing(|| "open a socket for networks".to_owned())?;
    let mut up = Batch::default();
    up.set_link(LOOPBACK, None, None, true);
    socket.carry_out(&up).doing(|| "bring the loopback device up".to_owned())?;
    if interfaces.is_empty() {
        return Ok(());
    }
    let links = socket.links().doing(|| "list network devices".to_owned())?;
    let mut found = Vec::new();
    for interface in interfaces {
        let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"/:".contains(&byte);
        let length = interface.name.len();
        if !(1..16).contains(&length)
            || !interface.name.bytes().all(is_plain)
            || interface.name.starts_with('.')
        {
            return Err(Failure::Invalid(format!("{:?} is no name of a network device", interface.name)));
        }
        let mac = interface.found_by.unwrap_or(interface.mac);
        let link = links.iter().find(|link| link.mac == mac);
        found.push((interface, link.ok_or(Failure::NoInterface(mac))?));
    }
    // One that is up cannot be renamed, and one that is to have another's name has to wait until that has stepped aside.
    let mut aside = Batch::default();
    for (_, link) in found.iter().filter(|(interface, link)| interface.name != link.name) {
        aside.set_link(link.index, None, None, false);
        aside.set_link(link.index, Some(&format!("rvmm{}", link.index)), None, false);
    }
    if aside.count > 0 {
        socket.carry_out(&aside).doing(|| "rename network devices".to_owned())?;
    }
    for (interface, link) in found {
        let mut batch = Batch::default();
        let name = Some(interface.name.as_str()).filter(|name| *name != link.name);
        batch.set_link(link.index, name, interface.mtu, true);
        if link.mac != interface.mac {
            batch.attribute(IFLA_ADDRESS, &interface.mac);
        }
        for (address, prefix) in &interface.addresses {
            batch.add_address(link.index, *address, *prefix);
        }
        for route in &interface.routes {
            batch.add_route(link.index, route);
        }
        socket.carry_out(&batch).doing(|| format!("set up the network device {}", interface.name))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_lengths() {
        let mut batch = Batch::default();
        batch.set_link(3, Some("eth0"), Some(1400), true);
        batch.add_address(3, "10.1.2.3".parse().unwrap(), 24);
        let all: Vec<_> = messages(&batch.bytes).collect();
        assert_eq!(all.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [RTM_NEWLINK, RTM_NEWADDR]);
        let of_link: Vec<_> = attributes(&all[0].1[LINK_BYTES..]).collect();
        assert_eq!(of_link, [(IFLA_IFNAME, &b"eth0\0"[..]), (IFLA_MTU, &1400u32.to_ne_bytes())]);
        let of_address: Vec<_> = attributes(&all[1].1[8..]).collect();
        assert_eq!(of_address[2], (IFA_BROADCAST, &[10, 1, 2, 255][..]));
    }

    #[test]
    fn link_is_read_as_it_is_written() {
        let mut batch = Batch::default();
        let mut head = [0; LINK_BYTES];
        head[4] = 7;
        batch.begin(RTM_NEWLINK, 0, &head);
        batch.attribute(IFLA_IFNAME, b"eth1\0");
        batch.attribute(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 9]);
        let (_, body) = messages(&batch.bytes).next().unwrap();
        let link = Link { index: 7, name: "eth1".into(), mac: vec![2, 0, 0, 0, 0, 9] };
        assert_eq!(parse_link(body), Some(link));
    }

    #[test]
    fn broken_answers_end() {
        assert_eq!(messages(&[1, 0, 0, 0, 2]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0, 0, 1, 0, 9]).count(), 0);
        assert_eq!(error_of(&(-libc::EEXIST).to_ne_bytes()), Some(Errno::EXIST));
    }

    #[test]
    fn loopback_can_be_set_up_in_a_namespace_of_its_own() {
        // A kernel that answers at all takes the same messages for any device.
        let Ok(socket) = Socket::open() else { return };
        assert!(socket.links().unwrap().iter().any(|link| link.name == "lo"));
    }
}
