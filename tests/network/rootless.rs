//! Users without privileges: pasta in the place of bridges. Debian 12's pasta loses and repeats bytes of connections that one
//! side has ended for itself, so peers tell the end of what they say otherwise here.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rvmm::container::network::{Networks, Request, netns};

use super::lab::{HOST, WORLD, echo_lines, id, inside, lab, on, port, processes, talk_in_lines};
use crate::support::{has_tool, tool};

/// A user's container, in namespaces of the user's; not a test, but the other process of the one below.
#[test]
#[ignore = "run by users_containers_reach_the_world_and_are_reached"]
fn connect_as_user() {
    let Some(directory) = std::env::var_os("RVMM_TEST_ROOTLESS").map(PathBuf::from) else { return };
    let networks = Networks::new(&directory.join("data"), &directory.join("run"));
    let (id, path) = (id("user"), directory.join("netns"));
    let mut wanted = on(&["web"]);
    let setup = |wanted: &_| {
        networks.setup(&Request { id: &id, name: "user", netns: &path, network: wanted, guest: false })
    };
    assert!(setup(&wanted).is_err(), "a network other than the default one");
    wanted = on(&["bridge"]);
    wanted.ports = vec![port(0, 80, "tcp")];
    netns::create(&path).unwrap();
    for _ in 0..2 {
        // The second one finds what the first has left.
        let attached = setup(&wanted).unwrap();
        let interface = &attached.status.interfaces[0];
        let devices = inside(&path, "ip addr");
        let address = interface.addresses[0].to_string();
        assert!(devices.contains(&interface.mac) && devices.contains(&address), "{devices}");
        println!("port={}", attached.status.ports[0].host);
    }
    echo_lines(&path, 80);
    println!("seen={}", talk_in_lines(&path, (WORLD, 80), &"x".repeat(1 << 20)).unwrap_or_default());
    println!("ready");
    let _ = std::io::stdin().read_line(&mut String::new());
    networks.teardown(&id).unwrap();
    networks.teardown(&id).unwrap();
    netns::delete(&path).unwrap();
    println!("left={}", processes("pasta") + processes("passt.avx2") + processes("pasta.avx2"));
}

#[test]
fn users_containers_reach_the_world_and_are_reached() {
    if !["pasta", "setpriv", "unshare"].iter().all(|name| has_tool(name)) {
        return;
    }
    let Some(lab) = lab() else { return };
    let world = lab.world();
    echo_lines(&world, 80);
    // The host's own may be root's alone.
    tool("mount", &["-t", "tmpfs", "tmpfs", "/dev/net"]);
    tool("mknod", &["-m", "666", "/dev/net/tun", "c", "10", "200"]);
    let home = tempfile::Builder::new().prefix("rvmm-user-").tempdir().unwrap();
    std::os::unix::fs::chown(home.path(), Some(65534), Some(65534)).unwrap();
    let mut child = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "unshare", "-Urm"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "network::rootless::connect_as_user", "--ignored", "--nocapture"])
        .env("RVMM_TEST_ROOTLESS", home.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut value = |name: &str| {
        let prefix = format!("{name}=");
        let line = lines.find(|line| line.contains(&prefix)).unwrap_or_else(|| panic!("no {name}"));
        line.rsplit('=').next().unwrap().to_owned()
    };
    let _first = value("port");
    let found: u16 = value("port").parse().unwrap();
    assert_eq!(value("seen"), HOST);
    assert!(talk_in_lines(&world, (HOST, found), &"y".repeat(1 << 20)).is_some());
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert_eq!(value("left"), "0");
    assert!(child.wait().unwrap().success());
    assert_eq!(talk_in_lines(&world, (HOST, found), "gone"), None);
}
