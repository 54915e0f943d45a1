//! What is asked of the kernel's network devices, by rtnetlink: links, addresses, routes, and the redirection between
//! two devices. A socket belongs to the network namespace of the thread that opened it.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType,
    TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
    TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
}

/// A route of the main table, or one that leads everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Option<IpNet>,
    pub(super) device: Option<u32>,
    pub(super) metric: u32,
}

pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> io::Result<Netlink> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// Sends a request, and collects what comes before the kernel says that it is done.
    fn request(&mut self, message: Message, flags: u16) -> io::Result<Vec<Message>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = vec![];
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<Message>::deserialize(rest).map_err(io::Error::other)?;
                let len = (answer.header.length as usize).next_multiple_of(4).clamp(1, rest.len());
                rest = rest.get(len..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }

    fn change(&mut self, message: Message, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).map(drop)
    }

    /// All devices of the namespace.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.request(Message::GetLink(LinkMessage::default()), NLM_F_DUMP)?;
        let link = |message| match message {
            Message::NewLink(message) => Some(link(&message)),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(link).collect())
    }

    /// The device of that name.
    pub(super) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    pub(super) fn set_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(Message::SetLink(message), 0)
    }

    pub(super) fn set_mac(&mut self, index: u32, mac: &[u8]) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::Address(mac.to_vec())];
        self.change(Message::SetLink(message), 0)
    }

    pub(super) fn delete_link(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.change(Message::DelLink(message), 0)
    }

    /// Takes all addresses off a device.
    pub(super) fn delete_addresses(&mut self, index: u32) -> io::Result<()> {
        for message in self.request(Message::GetAddress(AddressMessage::default()), NLM_F_DUMP)? {
            let Message::NewAddress(message) = message else { continue };
            if message.header.index != index {
                continue;
            }
            let local = message.attributes.iter().any(|a| matches!(a, AddressAttribute::Local(_)));
            let mut request = AddressMessage::default();
            request.header = message.header;
            // IPv6 addresses have no local part of their own.
            request.attributes = message
                .attributes
                .into_iter()
                .filter(|attribute| match attribute {
                    AddressAttribute::Local(_) => true,
                    AddressAttribute::Address(_) => !local,
                    _ => false,
                })
                .collect();
            match self.change(Message::DelAddress(request), 0) {
                // It went away with another address of its subnet.
                Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Routes of the main table.
    pub(super) fn routes(&mut self) -> io::Result<Vec<Route>> {
        let answers = self.request(Message::GetRoute(RouteMessage::default()), NLM_F_DUMP)?;
        let route = |message| match message {
            Message::NewRoute(message) if message.header.table == libc::RT_TABLE_MAIN => route(&message),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(route).collect())
    }

    /// Sends every frame that comes in at `from` out at `to`. The namespace's own stack sees none of them.
    pub(super) fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        match self.change(Message::NewQueueDiscipline(ingress(from)), NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.change(Message::NewTrafficFilter(redirection(from, to)), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Ends the redirection of what comes in at a device.
    pub(super) fn end_redirection(&mut self, from: u32) -> io::Result<()> {
        match self.change(Message::DelQueueDiscipline(ingress(from)), 0) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
            other => other,
        }
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link { index: message.header.index, ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    link
}

fn route(message: &RouteMessage) -> Option<Route> {
    let mut route = Route { destination: None, device: None, metric: 0 };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                let prefix = message.header.destination_prefix_length;
                route.destination = IpNet::new(IpAddr::V4(*address), prefix).ok();
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                let prefix = message.header.destination_prefix_length;
                route.destination = IpNet::new(IpAddr::V6(*address), prefix).ok();
            }
            RouteAttribute::Oif(device) => route.device = Some(*device),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            _ => {}
        }
    }
    let is_default = message.header.destination_prefix_length == 0;
    (route.destination.is_some() || is_default).then_some(route)
}

fn device(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message
}

/// The queueing discipline to which filters of incoming frames are tied.
fn ingress(index: u32) -> TcMessage {
    let mut message = device(index);
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.header.parent = TcHandle::INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".into())];
    message
}

/// A filter that matches every frame and hands it to another device. `u32` with an empty mask is what kernels without
/// `matchall` have.
fn redirection(from: u32, to: u32) -> TcMessage {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];

    let mut message = device(from);
    message.header.parent = TcHandle { major: u16::MAX, minor: 0 };
    const PRIORITY: u32 = 1;
    message.header.info = PRIORITY << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    message
}
