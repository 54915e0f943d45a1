//! Machines in a container's namespace: a tap beside its device.

use std::path::Path;

use rvmm::container::network::{plug_tap, unplug_tap};

use super::lab::{HOST, Machine, WORLD, echo, footprint, inside, lab, look_up, on, port, talk};
use crate::support::{LINUX_PATIENCE, Script, linux};

/// Bytes and packets that a machine has received.
fn received(namespace: &Path) -> (u64, u64) {
    let shown = inside(namespace, "ip -j -s link show vm0");
    let links: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let number = |name: &str| links[0]["stats64"]["rx"][name].as_u64().expect("a number");
    (number("bytes"), number("packets"))
}

#[test]
fn machine_behind_a_tap_has_its_containers_place() {
    let Some(lab) = lab() else { return };
    let world = lab.world();
    echo(&world, 80);
    let before = footprint();
    let (peer, attached) = lab.connected("peer", &["bridge"]);
    let peer_address = attached.status.interfaces[0].addresses[0].addr().to_string();
    echo(&peer.netns, 80);
    let container = lab.container("machine");
    let mut wanted = on(&["bridge"]);
    wanted.ports = vec![port(8080, 80, "tcp")];
    let attached = lab.connect(&container, &wanted).unwrap();
    let interface = &attached.status.interfaces[0];
    // Twice is as good as once.
    assert_eq!(
        plug_tap(&container.netns, interface, 1).unwrap(),
        plug_tap(&container.netns, interface, 1).unwrap()
    );
    let plug = plug_tap(&container.netns, interface, 1).unwrap();
    assert_eq!((plug.tap.as_str(), plug.mtu, &plug.mac), ("tap0", 1400, &interface.mac));
    let address = interface.addresses[0].to_string();
    let gateway = interface.gateway().unwrap().to_string();
    let machine = Machine::new(&lab, "guest", (&container.netns, &plug.tap), &plug.mac, &address, &gateway);
    let inside_guest = Some(machine.namespace.as_path());
    // Large enough for segments that are only cut on the last wire, or never.
    let big = vec![5; 4 << 20];
    assert_eq!(talk(inside_guest, (WORLD, 80), &big).as_deref(), Some(HOST));
    assert_eq!(
        talk(inside_guest, (&peer_address, 80), &big),
        Some(interface.addresses[0].addr().to_string())
    );
    echo(&machine.namespace, 80);
    assert_eq!(talk(Some(&world), (HOST, 8080), &big).as_deref(), Some(WORLD));
    let before_talk = received(&machine.namespace);
    assert!(talk(Some(&peer.netns), (&interface.addresses[0].addr().to_string(), 80), &big).is_some());
    let (bytes, packets) = received(&machine.namespace);
    let (bytes, packets) = (bytes - before_talk.0, packets - before_talk.1);
    // Segments are never cut between a container and a machine on one bridge.
    assert!(bytes > big.len() as u64 && bytes / packets > 3 * 1400, "{bytes} bytes in {packets} packets");
    let server = attached.status.dns_servers[0];
    assert_eq!(look_up(&machine.namespace, server, "peer"), Some(peer_address));
    assert!(look_up(&peer.netns, server, "machine").is_some());
    drop(machine);
    unplug_tap(&container.netns, &plug).unwrap();
    unplug_tap(&container.netns, &plug).unwrap();
    let links = inside(&container.netns, "ip link");
    assert!(links.contains("eth0") && !links.contains("tap0"), "{links}");
    lab.disconnect(&container);
    lab.disconnect(&peer);
    assert_eq!(footprint(), before);
}

#[test]
fn machine_may_be_on_several_networks() {
    let Some(lab) = lab() else { return };
    let web = rvmm::container::network::CreateOptions { name: "web".into(), ..Default::default() };
    lab.networks.create(&web).unwrap();
    let (peer, attached) = lab.connected("peer", &["web"]);
    let peer_address = attached.status.interfaces[0].addresses[0].addr().to_string();
    echo(&peer.netns, 80);
    let container = lab.container("machine");
    let attached = lab.connect(&container, &on(&["bridge", "web"])).unwrap();
    let interfaces = &attached.status.interfaces;
    let plugs: Vec<_> =
        interfaces.iter().map(|interface| plug_tap(&container.netns, interface, 2).unwrap()).collect();
    assert_eq!((plugs[0].tap.as_str(), plugs[1].tap.as_str()), ("tap0", "tap1"));
    let address = interfaces[1].addresses[0].to_string();
    let gateway = interfaces[1].gateway().unwrap().to_string();
    let plug = (container.netns.as_path(), plugs[1].tap.as_str());
    let machine = Machine::new(&lab, "guest", plug, &plugs[1].mac, &address, &gateway);
    assert!(talk(Some(&machine.namespace), (&peer_address, 80), b"hello").is_some());
    drop(machine);
    // Nothing need be unplugged before the namespace goes.
    lab.disconnect(&container);
    lab.disconnect(&peer);
}

#[test]
fn guest_behind_a_tap_reaches_containers_by_name() {
    let Some(linux) = linux() else { return };
    let Some(lab) = lab() else { return };
    let (peer, attached) = lab.connected("peer", &["bridge"]);
    let peer_address = attached.status.interfaces[0].addresses[0].addr();
    echo(&peer.netns, 80);
    let container = lab.container("machine");
    let attached = lab.connect(&container, &on(&["bridge"])).unwrap();
    let interface = &attached.status.interfaces[0];
    let plug = plug_tap(&container.netns, interface, 1).unwrap();
    let script = Script::new(&format!(
        "
ip link set eth0 up; ip addr add {address} dev eth0; ip route add default via {gateway}
report mac $(cat /sys/class/net/eth0/address)
report mtu $(cat /sys/class/net/eth0/mtu)
report name $(nslookup peer {server} | sed -n 's/^Address.*: *//p' | tail -n 1 | cut -d ' ' -f 1)
report seen $(printf 'x' | nc {peer_address} 80 | head -n 1)
dd if=/dev/zero bs=64k count=16 2>/dev/null | nc {peer_address} 80 >/tmp/back; report back $(wc -c </tmp/back)",
        address = interface.addresses[0],
        gateway = interface.gateway().unwrap(),
        server = attached.status.dns_servers[0],
    ));
    let net =
        format!("tap={},netns={},mac={},mtu={}", plug.tap, container.netns.display(), plug.mac, plug.mtu);
    let outcome = script.on(linux.monitor()).args(["--net", &net]).run_within(LINUX_PATIENCE);
    outcome.exits(0).reports("mac", &interface.mac).reports("mtu", &interface.mtu.to_string());
    outcome.reports("name", &peer_address.to_string());
    let own = interface.addresses[0].addr().to_string();
    outcome.reports("seen", &own).reports("back", &((1 << 20) + own.len() + 1).to_string());
    lab.disconnect(&container);
    lab.disconnect(&peer);
}
