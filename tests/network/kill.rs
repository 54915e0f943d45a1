//! Engines that are killed while they connect a container.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rvmm::container::network::{Networks, Request};

use super::lab::{footprint, id, lab, on, port, processes};

/// Connects a container until it is killed; not a test, but the other process of the one below.
#[test]
#[ignore = "run by killed_engines_leave_nothing_that_repair_does_not_find"]
fn connect_until_killed() {
    let Some(directory) = std::env::var_os("RVMM_TEST_CONNECT").map(std::path::PathBuf::from) else { return };
    let networks = Networks::new(&directory.join("data"), &directory.join("run"));
    let mut wanted = on(&["bridge", "web"]);
    wanted.ports = vec![port(8080, 80, "tcp")];
    let (id, netns) = (id("killed"), directory.join("netns-killed"));
    println!("connecting");
    loop {
        networks
            .setup(&Request { id: &id, name: "killed", netns: &netns, network: &wanted, guest: false })
            .unwrap();
        networks.teardown(&id).unwrap();
    }
}

#[test]
fn killed_engines_leave_nothing_that_repair_does_not_find() {
    use std::io::{BufRead, BufReader};
    let Some(lab) = lab() else { return };
    let web = rvmm::container::network::CreateOptions { name: "web".into(), ..Default::default() };
    lab.networks.create(&web).unwrap();
    let before = footprint();
    let killed = lab.container("killed");
    let mut found = 0;
    // Spread over the whole of a setup and the teardown behind it.
    for round in 0..12u32 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "network::kill::connect_until_killed", "--ignored", "--nocapture"])
            .env("RVMM_TEST_CONNECT", lab.path(""))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("connecting")));
        std::thread::sleep(Duration::from_millis(u64::from(round) * 37));
        child.kill().unwrap();
        child.wait().unwrap();
        // Every other time its namespace is gone too.
        if round % 2 == 1 {
            rvmm::container::network::netns::delete(&killed.netns).unwrap();
        }
        found += usize::from(footprint() != before);
        lab.networks.repair(|_| false).unwrap();
        assert_eq!(footprint(), before, "round {round}");
        assert!(lab.networks.users("bridge").unwrap().is_empty());
        let end = Instant::now() + crate::support::PATIENCE;
        while processes("aardvark-dns") > 0 {
            assert!(Instant::now() < end, "a name server is left");
            std::thread::sleep(Duration::from_millis(10));
        }
        if round % 2 == 1 {
            rvmm::container::network::netns::create(&killed.netns).unwrap();
        }
    }
    assert!(found > 3, "only {found} were killed at work");
    lab.disconnect(&killed);
}
