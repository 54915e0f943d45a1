//! Containers that talk: names, ports, another's network, the host's.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use super::home::{Home, IMAGE, Wall, can_run};
use crate::support::{LINUX_PATIENCE, has_tool, skip, tool};

/// A server that greets whoever connects.
const SERVER: &str = "echo ready; exec nc -ll -p 80 -e echo hello";

/// Puts this thread, and all that it starts, into a network of its own; says so if that cannot be.
pub fn can_connect(wall: Wall) -> bool {
    if !can_run(wall) || !["ip", "nft"].iter().all(|name| has_tool(name)) {
        return false;
    }
    if !["netavark", "aardvark-dns"].iter().all(|name| Path::new("/usr/lib/podman").join(name).is_file()) {
        skip("needs netavark and aardvark-dns");
        return false;
    }
    if unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).is_err() {
        skip("cannot make a network namespace");
        return false;
    }
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .expect("a mount namespace");
    tool("ip", &["link", "set", "lo", "up"]);
    true
}

fn greeting(port: u16) -> String {
    let deadline = Instant::now() + LINUX_PATIENCE;
    loop {
        let mut text = String::new();
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = stream.write_all(b"x\n");
            let _ = stream.read_to_string(&mut text);
        }
        if !text.is_empty() || Instant::now() > deadline {
            return text;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn talk(home: &Home, wall: Wall) {
    home.run(&["network", "create", "web"]).ok();
    home.start(
        wall,
        "server",
        &["--network=web", "--network-alias=other", "-p", "8080:80", "-v", "kept:/kept"],
        SERVER,
    );
    home.await_log("server", "ready");
    assert!(home.inspect("server")["NetworkSettings"]["Networks"]["web"]["IPAddress"].as_str() > Some(""));
    assert_eq!(home.run(&["port", "server"]).ok(), "80/tcp -> 0.0.0.0:8080\n");
    assert_eq!(home.run(&["port", "server", "80"]).ok(), "0.0.0.0:8080\n");
    assert_eq!(greeting(8080), "hello\n");
    let stats = home.run(&["stats", "--no-stream", "--format=json", "server"]).ok();
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
    let counted =
        stats["NetIO"].as_str().expect("numbers").split(" / ").map(str::to_owned).collect::<Vec<_>>();
    assert!(counted.len() == 2 && counted.iter().all(|bytes| bytes != "0B"), "{stats}");
    // From a native one, by name and by alias.
    let ask = "for name in server other; do echo x | nc -w 20 $name 80; done";
    let answer = home.run(&["run", "--rm", "--network=web", IMAGE, "sh", "-c", ask]);
    assert_eq!(answer.ok(), "hello\nhello\n");
    // In its network, with its loopback device.
    let ask = "echo x | nc -w 20 127.0.0.1 80; ip addr show eth0 | grep -c inet";
    let inside =
        home.run(&["run", "--rm", wall.flag(), "--network=container:server", IMAGE, "sh", "-c", ask]);
    assert!(inside.code == 0 && inside.stdout.starts_with("hello\n"), "{inside:?}");
    let taken = home.run(&["run", "--rm", "-p", "8080:80", IMAGE, "true"]);
    assert!(taken.code == 125 && taken.stderr.contains("8080"), "{taken:?}");
    assert!(home.run(&["network", "rm", "web"]).fails().contains("web"));
    home.run(&["rm", "-f", "server"]).ok();
    home.run(&["network", "rm", "web"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
    let links = tool("ip", &["-o", "link"]);
    assert!(!links.contains("veth") && !links.contains("tap"), "{links}");
}

#[test]
fn native_containers_reach_each_other_and_are_reached() {
    if can_connect(Wall::Native) {
        let home = Home::new();
        talk(&home, Wall::Native);
    }
}

#[test]
fn microvms_reach_each_other_and_are_reached() {
    if can_connect(Wall::Microvm) {
        let home = Home::new();
        talk(&home, Wall::Microvm);
    }
}

#[test]
fn all_exposed_ports_are_published_on_free_ones_of_the_host() {
    if !can_connect(Wall::Native) {
        return;
    }
    let home = Home::new();
    home.run(&["create", "--name=base", "--network=none", IMAGE, "true"]).ok();
    let expose = ["commit", "--change=EXPOSE 80", "--change=EXPOSE 53/udp", "base", "exposing"];
    home.run(&expose).ok();
    let arguments = ["run", "-d", "--name=one", "-P", "-p", "8088:80", "exposing", "sh", "-c", SERVER];
    home.run(&arguments).ok();
    home.await_log("one", "ready");
    // One that was published by itself is not published again.
    let ports = home.run(&["port", "one"]).ok();
    let lines: Vec<&str> = ports.lines().collect();
    assert_eq!(lines.len(), 2, "{ports}");
    assert!(ports.contains("80/tcp -> 0.0.0.0:8088") && ports.contains("53/udp -> 0.0.0.0:"), "{ports}");
    home.run(&["rm", "-f", "one", "base"]).ok();
    home.run(&["run", "-d", "--name=two", "--publish-all", "exposing", "sh", "-c", SERVER]).ok();
    home.await_log("two", "ready");
    let line = home.run(&["port", "two", "80"]).ok();
    let port = line.trim().strip_prefix("0.0.0.0:").and_then(|port| port.parse().ok()).expect("a port");
    assert_eq!(greeting(port), "hello\n");
    home.run(&["rm", "-f", "two"]).ok();
}

#[test]
fn networks_that_cannot_be_are_refused_with_the_reason() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    let refused = |options: &[&str], words: &str| {
        let mut arguments = vec!["run", "--rm"];
        arguments.extend(options);
        arguments.extend([IMAGE, "true"]);
        let ran = home.run(&arguments);
        assert!(ran.code == 125 && ran.stderr.contains(words), "{options:?}: {ran:?}");
    };
    refused(&["--isolation=microvm", "--network=host"], "network devices of its own");
    refused(&["--network=container:nowhere"], "nowhere");
    refused(&["--network=none", "--network=web"], "none");
    refused(&["--network=nowhere"], "nowhere");
    home.start(Wall::Native, "one", &[], "sleep 1000");
    refused(&["--isolation=microvm", "--network=container:one"], "isolation");
    refused(&["--network=container:one", "-h", "box"], "hostname");
    refused(&["--network=container:one", "-p", "1:1"], "publish");
    home.run(&["rm", "-f", "one"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn the_hosts_network_is_the_hosts() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    let links =
        home.run(&["run", "--rm", "--network=host", IMAGE, "sh", "-c", "readlink /proc/self/ns/net"]).ok();
    assert_eq!(
        links.trim(),
        std::fs::read_link("/proc/self/ns/net").expect("a link").to_str().expect("text")
    );
}
