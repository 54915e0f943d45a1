//! Networks of containers: namespaces on bridges, names, ports, the way out and the way back, and that nothing is left.

mod kill;
mod lab;
mod machine;
mod rootless;

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::time::Duration;

use rvmm::container::config::NetworkMode;
use rvmm::container::network::{CreateOptions, Driver, Error, netns};

use self::lab::{
    HOST, Lab, WORLD, echo, echo_datagrams, footprint, inside, ip, lab, look_up, on, port, processes, talk,
    within,
};
use crate::support::announce;

fn create(lab: &Lab, name: &str, change: impl FnOnce(&mut CreateOptions)) {
    let mut options = CreateOptions { name: name.into(), ..CreateOptions::default() };
    change(&mut options);
    lab.networks.create(&options).expect("a network");
}

#[test]
fn containers_find_each_other_by_name_alias_and_id() {
    let Some(lab) = lab() else { return };
    create(&lab, "web", |_| {});
    for network in ["bridge", "web"] {
        let (one, first) = lab.connected("one", &[network]);
        let mut wanted = on(&[network]);
        if let NetworkMode::Networks(joins) = &mut wanted.mode {
            joins[0].aliases = vec!["database".into()];
        }
        let two = lab.container("two");
        let second = lab.connect(&two, &wanted).unwrap();
        let address = second.status.interfaces[0].addresses[0].addr().to_string();
        echo(&two.netns, 80);
        let server = first.status.dns_servers[0];
        for name in ["two", "database", &two.id[..12]] {
            assert_eq!(look_up(&one.netns, server, name), Some(address.clone()), "{name} on {network}");
        }
        assert_eq!(look_up(&one.netns, server, "three"), None);
        let seen = talk(Some(&one.netns), (&address, 80), b"hello");
        assert_eq!(seen, Some(first.status.interfaces[0].addresses[0].addr().to_string()));
        lab.disconnect(&two);
        assert_eq!(look_up(&one.netns, server, "two"), None);
        lab.disconnect(&one);
    }
}

#[test]
fn gateway_keeps_its_hardware_address_while_containers_come_and_go() {
    let Some(lab) = lab() else { return };
    let mac = || ip("-o link show type bridge").split("link/ether ").nth(1).map(|rest| rest[..17].to_owned());
    let (stays, attached) = lab.connected("stays", &["bridge"]);
    let before = mac().expect("a bridge");
    let server = attached.status.dns_servers[0];
    for round in 0..8 {
        // Lower and higher than all that there were.
        let container = lab.container("comes");
        let mut wanted = on(&["bridge"]);
        if let NetworkMode::Networks(joins) = &mut wanted.mode {
            joins[0].mac = Some(format!("0{}:00:00:00:00:01", if round % 2 == 0 { "2" } else { "e" }));
        }
        lab.connect(&container, &wanted).unwrap();
        assert_eq!(mac().as_ref(), Some(&before));
        assert!(look_up(&stays.netns, server, "comes").is_some());
        lab.disconnect(&container);
        assert_eq!(mac().as_ref(), Some(&before));
    }
    lab.disconnect(&stays);
}

#[test]
fn way_out_is_translated_and_published_ports_lead_in() {
    let Some(lab) = lab() else { return };
    let world = lab.world();
    echo(&world, 80);
    let container = lab.container("server");
    let mut wanted = on(&["bridge"]);
    let mut local = port(0, 80, "tcp");
    local.host_ip = "127.0.0.1".parse().ok();
    wanted.ports = vec![port(8080, 80, "tcp"), port(0, 80, "tcp"), port(5300, 53, "udp"), local];
    let attached = lab.connect(&container, &wanted).unwrap();
    // The world's wire has an MTU of 1400, and so has what leads to it.
    assert_eq!(attached.status.interfaces[0].mtu, 1400);
    let big = vec![7; 300_000];
    assert_eq!(talk(Some(&container.netns), (WORLD, 80), &big).as_deref(), Some(HOST));

    echo(&container.netns, 80);
    echo_datagrams(&container.netns, 53);
    let found = attached.status.ports[1].host;
    let local = attached.status.ports[3].host;
    assert!(found != 0 && local != 0 && found != local);
    assert_eq!(talk(Some(&world), (HOST, 8080), &big).as_deref(), Some(WORLD));
    assert_eq!(talk(Some(&world), (HOST, found), b"x").as_deref(), Some(WORLD));
    for address in ["127.0.0.1", HOST] {
        assert!(talk(None, (address, 8080), b"x").is_some(), "{address}");
    }
    assert!(talk(None, ("127.0.0.1", local), b"x").is_some());
    assert_eq!(talk(Some(&world), (HOST, local), b"x"), None);
    let socket = within(&world, || UdpSocket::bind("0.0.0.0:0"));
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.send_to(b"ask", (HOST, 5300)).unwrap();
    let mut answer = [0; 16];
    assert_eq!(socket.recv(&mut answer).expect("an answer"), 3);

    // Another one may not have the port, whoever holds it.
    let other = lab.container("other");
    let mut wanted = on(&["bridge"]);
    wanted.ports = vec![port(8080, 80, "tcp")];
    let message = lab.connect(&other, &wanted).unwrap_err().to_string();
    assert!(message.contains("8080/tcp") && message.contains("container server"), "{message}");
    let taken = std::net::TcpListener::bind("0.0.0.0:8099").unwrap();
    wanted.ports = vec![port(8099, 80, "tcp")];
    let message = lab.connect(&other, &wanted).unwrap_err().to_string();
    assert!(message.contains("8099/tcp") && message.contains("a program of the host"), "{message}");
    drop(taken);
    lab.connect(&other, &wanted).unwrap();
    lab.disconnect(&container);
    assert_eq!(talk(Some(&world), (HOST, 8080), b"x"), None);
    lab.disconnect(&other);
}

#[test]
fn nothing_is_left_when_the_last_container_is_gone() {
    let Some(lab) = lab() else { return };
    let _world = lab.world();
    let before = footprint();
    create(&lab, "web", |options| options.ipv6 = true);
    create(&lab, "db", |options| options.internal = true);
    let mut containers = vec![];
    for name in ["a", "b", "c"] {
        let container = lab.container(name);
        let mut wanted = on(&["web", "db", "bridge"]);
        wanted.ports = vec![port(0, 80, "tcp"), port(0, 80, "udp")];
        let attached = lab.connect(&container, &wanted).unwrap();
        assert_eq!(attached.status.interfaces.len(), 3);
        assert_eq!(attached.status.interfaces[0].addresses.len(), 2);
        containers.push(container);
    }
    assert_ne!(footprint(), before);
    assert_eq!(processes("aardvark-dns"), 1);
    for container in &containers {
        assert!(matches!(lab.networks.remove("web"), Err(Error::InUse { .. })));
        lab.disconnect(container);
        // Twice is as good as once.
        lab.networks.teardown(&container.id).unwrap();
    }
    assert_eq!(footprint(), before);
    assert_eq!(processes("aardvark-dns"), 0);
    let left: Vec<_> = std::fs::read_dir(lab.path("run/networks/attached")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(lab.networks.prune(|network| network.name == "db").unwrap(), ["web"]);
    assert_eq!(lab.networks.remove("db").unwrap(), "db");
    assert!(matches!(lab.networks.remove("db"), Err(Error::Missing(_))));
    assert!(matches!(lab.networks.remove("bridge"), Err(Error::Reserved(_))));
}

#[test]
fn namespace_that_is_gone_is_no_hindrance() {
    let Some(lab) = lab() else { return };
    let before = footprint();
    let (stays, _) = lab.connected("stays", &["bridge"]);
    let gone = lab.container("gone");
    let mut wanted = on(&["bridge"]);
    wanted.ports = vec![port(8080, 80, "tcp")];
    let attached = lab.connect(&gone, &wanted).unwrap();
    let address = attached.status.interfaces[0].addresses[0].addr();
    drop(attached);
    netns::delete(&gone.netns).unwrap();
    lab.networks.teardown(&gone.id).unwrap();
    let rules = ip("link") + &footprint();
    assert!(!rules.contains("8080") && !rules.contains(&gone.id), "{rules}");
    let server = lab.networks.get("bridge").unwrap().subnets[0].gateway.unwrap();
    assert_eq!(look_up(&stays.netns, server, "gone"), None);
    assert!(look_up(&stays.netns, server, "stays").is_some());
    // Its port and, when all others were given, its address are free again.
    let (again, attached) = (lab.container("again"), on(&["bridge"]));
    let mut attached = attached;
    attached.ports = vec![port(8080, 80, "tcp")];
    if let (NetworkMode::Networks(joins), std::net::IpAddr::V4(address)) = (&mut attached.mode, address) {
        joins[0].ip = Some(address);
        joins[0].mac = Some("02:11:22:33:44:55".into());
    }
    let status = lab.connect(&again, &attached).unwrap().status;
    assert_eq!(status.interfaces[0].addresses[0].addr(), address);
    assert_eq!(status.interfaces[0].mac, "02:11:22:33:44:55");
    for container in [&again, &stays] {
        lab.disconnect(container);
    }
    assert_eq!(footprint(), before);
}

#[test]
fn many_at_once_get_addresses_of_their_own() {
    const COUNT: usize = 20;
    let Some(lab) = lab() else { return };
    let before = footprint();
    let containers: Vec<_> = (0..COUNT).map(|index| lab.container(&format!("c{index}"))).collect();
    let mut found = BTreeSet::new();
    let mut ports = BTreeSet::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = containers
            .iter()
            .map(|container| {
                let lab = &lab;
                scope.spawn(move || {
                    let mut wanted = on(&["bridge"]);
                    wanted.ports = vec![port(0, 80, "tcp")];
                    lab.connect(container, &wanted).unwrap()
                })
            })
            .collect();
        let attached: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        for attachment in &attached {
            assert!(found.insert(attachment.status.interfaces[0].addresses[0]));
            assert!(ports.insert(attachment.status.ports[0].host));
        }
    });
    assert_eq!((found.len(), ports.len()), (COUNT, COUNT));
    std::thread::scope(|scope| {
        for container in &containers {
            scope.spawn(|| lab.disconnect(container));
        }
    });
    assert_eq!(footprint(), before);
}

#[test]
fn networks_are_apart_and_a_container_may_be_on_several() {
    let Some(lab) = lab() else { return };
    let world = lab.world();
    echo(&world, 80);
    for name in ["front", "back"] {
        create(&lab, name, |_| {});
    }
    create(&lab, "inner", |options| options.internal = true);
    let (front, _) = lab.connected("front", &["front"]);
    let (back, attached) = lab.connected("back", &["back", "inner"]);
    let back_address = attached.status.interfaces[0].addresses[0].addr().to_string();
    echo(&back.netns, 80);
    assert_eq!(talk(Some(&front.netns), (&back_address, 80), b"x"), None, "networks are not apart");
    let (both, attached) = lab.connected("both", &["front", "back"]);
    assert!(talk(Some(&both.netns), (&back_address, 80), b"x").is_some());
    let interfaces = &attached.status.interfaces;
    assert_eq!((interfaces[0].network.as_str(), interfaces[1].network.as_str()), ("front", "back"));
    let routes = inside(&both.netns, "ip route get 203.0.113.1");
    assert!(routes.contains("dev eth0"), "{routes}");
    assert_eq!(talk(Some(&both.netns), (WORLD, 80), b"x").as_deref(), Some(HOST));
    // Inside of an internal network there is nothing but the network.
    let (inner, attached) = lab.connected("inner", &["inner"]);
    assert!(attached.status.gateway().is_none());
    assert_eq!(talk(Some(&inner.netns), (WORLD, 80), b"x"), None);
    let server = attached.status.dns_servers[0];
    let address = look_up(&inner.netns, server, "back").expect("a name on the internal network");
    assert!(talk(Some(&inner.netns), (&address, 80), b"x").is_some());
    for container in [&front, &back, &both, &inner] {
        lab.disconnect(container);
    }
}

#[test]
fn servers_that_the_user_names_are_asked_for_other_names() {
    let Some(lab) = lab() else { return };
    let world = lab.world();
    let server = within(&world, || UdpSocket::bind((WORLD, 53)));
    std::thread::spawn(move || {
        let mut bytes = [0; 512];
        while let Ok((len, peer)) = server.recv_from(&mut bytes) {
            // The question again, with one answer: 192.0.2.99. Whatever follows the question is left out.
            let Some(end) = bytes[12..len].iter().position(|byte| *byte == 0) else { continue };
            let mut answer = bytes[..12 + end + 5].to_vec();
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 99]);
            let _ = server.send_to(&answer, peer);
        }
    });
    let container = lab.container("asks");
    let mut wanted = on(&["bridge"]);
    wanted.dns = vec![WORLD.parse().unwrap()];
    let attached = lab.connect(&container, &wanted).unwrap();
    let server = attached.status.dns_servers[0];
    assert_eq!(look_up(&container.netns, server, "example.org").as_deref(), Some("192.0.2.99"));
    lab.disconnect(&container);
}

#[test]
fn macvlan_is_beside_the_host_in_its_network() {
    let Some(lab) = lab() else { return };
    let world = lab.world();
    echo(&world, 80);
    create(&lab, "lan", |options| {
        options.driver = Driver::Macvlan;
        options.parent = Some("up0".into());
        options.subnets = vec!["203.0.113.0/24".parse().unwrap()];
        options.gateways = vec![WORLD.parse().unwrap()];
    });
    let before = footprint();
    let container = lab.container("beside");
    let mut wanted = on(&["lan"]);
    if let NetworkMode::Networks(joins) = &mut wanted.mode {
        joins[0].ip = "203.0.113.77".parse().ok();
    }
    let attached = lab.connect(&container, &wanted).unwrap();
    assert!(attached.status.dns_servers.is_empty());
    assert_eq!(talk(Some(&container.netns), (WORLD, 80), b"x").as_deref(), Some("203.0.113.77"));
    lab.disconnect(&container);
    assert_eq!(footprint(), before);
}

#[test]
fn failed_setup_leaves_nothing() {
    let Some(lab) = lab() else { return };
    let before = footprint();
    create(&lab, "lan", |options| {
        options.driver = Driver::Macvlan;
        options.parent = Some("nothere0".into());
        options.subnets = vec!["203.0.113.0/24".parse().unwrap()];
    });
    let container = lab.container("fails");
    let error = lab.connect(&container, &on(&["bridge", "lan"])).unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    announce(&format!("  what is said of a parent that is not there: {error}"));
    assert!(lab.connect(&container, &on(&["bridge", "none-such"])).is_err());
    assert!(lab.connect(&container, &on(&["bridge", "bridge"])).is_err());
    assert!(lab.networks.users("bridge").unwrap().is_empty());
    assert_eq!(footprint(), before);
    assert_eq!(processes("aardvark-dns"), 0);
    // An address that was given is free again.
    let attached = lab.connect(&container, &on(&["bridge"])).unwrap();
    assert_eq!(attached.status.interfaces.len(), 1);
    lab.disconnect(&container);
}
