use serde_json::json;
use smoltcp::wire::IpEndpoint;

use super::*;
use crate::mmds::{ADDRESS, Store, Version};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 2);

/// A guest with a TCP of its own, on a wire with the service.
struct Guest {
    interface: Interface,
    sockets: SocketSet<'static>,
    wire: Wire,
    stack: Stack,
    next_port: u16,
    began: Instant,
}

impl Guest {
    fn new(metadata: serde_json::Value) -> Self {
        let store = Store::default();
        store.put(metadata).unwrap();
        let service = Arc::new(Service::new(Arc::new(store), Version::V1, false).unwrap());
        let mut wire = Wire::default();
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut wire, Time::ZERO);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(GUEST.into(), 0)).unwrap());
        let stack = Stack::new(service, ADDRESS).unwrap();
        let sockets = SocketSet::new(Vec::new());
        Self { interface, sockets, wire, stack, next_port: 40_000, began: Instant::now() }
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 4096]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        self.next_port += 1;
        let service = IpEndpoint::new(ADDRESS.into(), PORT);
        socket.connect(self.interface.context(), service, self.next_port).unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn state(&mut self, handle: SocketHandle) -> State {
        self.socket(handle).state()
    }

    /// Lets packets pass until there are no more.
    fn pump(&mut self) {
        loop {
            let now = time(self.began.elapsed());
            self.interface.poll(now, &mut self.wire, &mut self.sockets);
            let mut quiet = true;
            for packet in std::mem::take(&mut self.wire.outgoing) {
                self.stack.receive(&ethernet(ETHERTYPE_IPV4, &packet));
                quiet = false;
            }
            self.stack.poll();
            while let Some(frame) = self.stack.frame(0) {
                self.stack.sent();
                assert_eq!(frame[..6], GUEST_MAC);
                assert_eq!(frame[6..12], MAC);
                self.wire.incoming = Some(frame[ETHERNET_BYTES..].to_vec());
                let now = time(self.began.elapsed());
                self.interface.poll(now, &mut self.wire, &mut self.sockets);
                quiet = false;
            }
            if quiet {
                return;
            }
        }
    }

    /// Sends all of a text, and reads until the other side is silent.
    fn exchange(&mut self, handle: SocketHandle, text: &str) -> String {
        let (mut sent, mut answer) = (0, Vec::new());
        loop {
            self.pump();
            let socket = self.socket(handle);
            let before = (sent, answer.len());
            if socket.can_send() {
                sent += socket.send_slice(&text.as_bytes()[sent..]).unwrap();
            }
            let mut part = [0; 4096];
            if socket.can_recv() {
                let len = socket.recv_slice(&mut part).unwrap();
                answer.extend(&part[..len]);
            }
            self.pump();
            if before == (sent, answer.len()) && !self.socket(handle).can_recv() {
                return String::from_utf8(answer).unwrap();
            }
        }
    }
}

fn ethernet(kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
    [&MAC[..], &GUEST_MAC, &kind, packet].concat()
}

fn arp(operation: u8, target: Ipv4Addr) -> Vec<u8> {
    let packet =
        [&ARP_KIND[..], &[0, operation], &GUEST_MAC, &GUEST.octets(), &[0; 6], &target.octets()].concat();
    ethernet(ETHERTYPE_ARP, &packet)
}

#[test]
fn only_the_service_is_answered_for() {
    let mut guest = Guest::new(json!({}));
    let stack = &mut guest.stack;
    let question = arp(1, ADDRESS);
    assert!(stack.wants(&question) && stack.wants(&question[..HEAD_BYTES]));
    stack.receive(&question);
    let reply = [&ARP_KIND[..], &[0, 2], &MAC, &ADDRESS.octets(), &GUEST_MAC, &GUEST.octets()].concat();
    let frame = [&GUEST_MAC[..], &MAC, &ETHERTYPE_ARP, &reply].concat();
    assert_eq!(stack.frame(0), Some(frame.clone()));
    assert_eq!(stack.frame(3), Some([&[0; 3], &frame[..]].concat()));
    stack.sent();
    assert_eq!(stack.frame(0), None);
    // What is no question is taken from the wire and has no answer.
    let mut odd = arp(1, ADDRESS);
    odd[15] = 6;
    for silent in [arp(2, ADDRESS), arp(3, ADDRESS), odd, question[..41].to_vec()] {
        stack.receive(&silent);
        assert_eq!(stack.frame(0), None);
    }
    let other = arp(1, Ipv4Addr::new(169, 254, 169, 253));
    let ipv6 = [&question[..12], &[0x86, 0xdd], &question[14..]].concat();
    for foreign in [&other[..], &ipv6, &[], &question[..13], &question[..41]] {
        assert!(!stack.wants(foreign));
    }
}

#[test]
fn metadata_of_any_size_arrive_whole() {
    for len in [1, 1460, 50_000] {
        let text = "0123456789".repeat(5000)[..len].to_owned();
        let mut guest = Guest::new(json!({"a": text.clone()}));
        let socket = guest.connect();
        let answer = guest.exchange(socket, "GET /a HTTP/1.0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer:.100}");
        assert!(answer.ends_with(&format!("\r\n\r\n{text}")));
        assert_eq!(guest.state(socket), State::CloseWait, "the service has closed");
        guest.socket(socket).close();
        guest.pump();
        assert!(
            guest.stack.connections.iter().all(|connection| {
                guest.stack.sockets.get::<Socket<'_>>(connection.socket).is_listening()
            })
        );
    }
}

#[test]
fn connection_serves_one_request_after_the_other() {
    let mut guest = Guest::new(json!({"a": "1", "b": "2"}));
    let socket = guest.connect();
    let get = |path: &str| format!("GET /{path} HTTP/1.1\r\n\r\n");
    assert!(guest.exchange(socket, &get("a")).ends_with("\r\n\r\n1"));
    assert!(guest.exchange(socket, &get("b")).ends_with("\r\n\r\n2"));
    let answers = guest.exchange(socket, &get("a").repeat(100));
    assert_eq!(answers.matches("\r\n\r\n1").count(), 100);
    let answers = guest.exchange(socket, &format!("{}nonsense\r\n\r\n{}", get("b"), get("a")));
    assert!(answers.contains("\r\n\r\n2HTTP/1.1 400 "), "{answers}");
    assert!(!answers.contains("\r\n\r\n1"));
}

#[test]
fn guest_that_has_said_all_is_answered_and_let_go() {
    let mut guest = Guest::new(json!({"a": "1"}));
    let socket = guest.connect();
    guest.pump();
    guest.socket(socket).send_slice(b"GET /a HTTP/1.1\r\n\r\n").unwrap();
    guest.socket(socket).close();
    guest.pump();
    let mut answer = [0; 1000];
    let len = guest.socket(socket).recv_slice(&mut answer).unwrap();
    assert!(answer[..len].ends_with(b"\r\n\r\n1"));
    assert_eq!(guest.state(socket), State::TimeWait);
    assert_eq!(guest.stack.connections.len(), 1);
}

#[test]
fn connections_are_limited_and_make_room_when_they_are_idle() {
    let mut guest = Guest::new(json!({"a": "1"}));
    let mut sockets = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        sockets.push(guest.connect());
        guest.pump();
    }
    assert!(sockets.iter().all(|socket| guest.state(*socket) == State::Established));
    let refused = guest.connect();
    guest.pump();
    assert_eq!(guest.state(refused), State::Closed);
    assert_eq!(guest.stack.connections.len(), CONNECTIONS_MAX);
    assert!(guest.exchange(sockets[0], "GET /a HTTP/1.1\r\n\r\n").ends_with('1'));
    guest.stack.advance(SHORT_PATIENCE);
    guest.pump();
    assert_eq!(guest.state(sockets[1]), State::Closed, "the one that was idle longest");
    let taken = guest.connect();
    assert!(guest.exchange(taken, "GET /a HTTP/1.1\r\n\r\n").ends_with('1'));
    guest.stack.advance(PATIENCE);
    guest.pump();
    assert!(sockets.iter().all(|socket| guest.state(*socket) == State::Closed));
    assert_eq!(guest.stack.connections.len(), 1);
}

#[test]
fn guest_that_takes_no_answers_fills_nothing() {
    let mut guest = Guest::new(json!({"a": "x".repeat(50_000)}));
    let socket = guest.connect();
    guest.pump();
    // Its window is 4 KiB, and it reads nothing.
    guest.socket(socket).send_slice(&b"GET /a HTTP/1.1\r\n\r\n".repeat(200)).unwrap();
    guest.pump();
    assert_eq!(guest.socket(socket).recv_queue(), 4096);
    let connection = &guest.stack.connections[0];
    assert!(connection.request.len() <= REQUEST_BYTES_MAX && connection.answer.len() < 60_000);
    // Nor does a wire that nobody empties grow.
    let mut syn = Vec::new();
    guest.connect();
    let now = time(guest.began.elapsed());
    guest.interface.poll(now, &mut guest.wire, &mut guest.sockets);
    syn.extend(guest.wire.outgoing.pop_back().unwrap());
    for port in 0..10_000u16 {
        syn[20..22].copy_from_slice(&port.to_be_bytes());
        guest.stack.receive(&ethernet(ETHERTYPE_IPV4, &syn));
    }
    assert!(guest.stack.connections.len() <= CONNECTIONS_MAX);
    assert!(guest.stack.wire.outgoing.len() <= FRAMES_MAX);
    assert!(guest.stack.due().is_some());
    while guest.stack.frame(0).is_some() {
        guest.stack.sent();
    }
    guest.stack.advance(PATIENCE);
    let fresh = guest.connect();
    assert!(guest.exchange(fresh, "GET / HTTP/1.1\r\n\r\n").ends_with('a'));
}

#[test]
fn driver_that_begins_anew_finds_nothing_of_before() {
    let mut guest = Guest::new(json!({"a": "1"}));
    let old = guest.connect();
    guest.pump();
    guest.stack.reset();
    assert_eq!((guest.stack.frame(0), guest.stack.due()), (None, None));
    guest.socket(old).send_slice(b"GET").unwrap();
    guest.pump();
    assert_eq!(guest.state(old), State::Closed);
    let fresh = guest.connect();
    assert!(guest.exchange(fresh, "GET /a HTTP/1.1\r\n\r\n").ends_with('1'));
}

#[test]
fn idle_service_waits_for_nothing() {
    let mut guest = Guest::new(json!({}));
    assert_eq!(guest.stack.due(), None);
    let socket = guest.connect();
    guest.pump();
    assert!(guest.stack.due().is_some_and(|due| due <= PATIENCE));
    guest.socket(socket).abort();
    guest.pump();
    assert_eq!(guest.stack.due(), None);
}

#[test]
fn guest_that_comes_late_and_takes_its_time_is_served() {
    let mut guest = Guest::new(json!({"a": "1"}));
    for _ in 0..3 {
        let socket = guest.connect();
        // Nothing has called the service for long.
        guest.stack.began -= PATIENCE * 2;
        guest.pump();
        assert_eq!(guest.state(socket), State::Established);
        guest.stack.advance(PATIENCE - Duration::from_secs(2));
        assert!(guest.exchange(socket, "GET /a HTTP/1.1\r\n\r\n").ends_with('1'));
        guest.stack.advance(PATIENCE - Duration::from_secs(2));
        assert!(guest.exchange(socket, "GET /a HTTP/1.0\r\n\r\n").ends_with('1'));
        guest.socket(socket).close();
        guest.pump();
    }
}
