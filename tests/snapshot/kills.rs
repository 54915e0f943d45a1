//! What is left when a VM is killed while it is saved or restored.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Saved, memory_of, names, restore, snapshot};
use crate::support::{PATIENCE, binary, directory, has_kvm};

/// Numbers without order.
struct Random(u64);

impl Random {
    fn new() -> Random {
        Random(u64::from(std::process::id()) << 17 | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Kills a VM at a random moment while it is being saved; then what is in the directory is restored.
fn kill_at_random(rounds: u32) {
    let mut first = Saved::start(&["--rng"]);
    first.feed("abc");
    let place = first.snapshot();
    drop(first.running);
    let mut random = Random::new();
    let mut least = 3;
    for round in 0..rounds {
        // A dead process's keeper may still be at work.
        let socket = first.guest.path(&format!("kill{round}"));
        let mut running = restore(&place).arg("--api-socket").arg(&socket).start_with_input();
        running.send("x");
        if random.below(4) > 0 {
            running.expect("x");
        }
        let client = Command::new(binary())
            .arg("snapshot")
            .args([&socket, &place])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut client = client.expect("a client");
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        running.signal(Signal::SIGKILL);
        drop(running);
        client.wait().expect("a client");
        // What it has begun to put in its place, its keeper finishes.
        fs::File::open(&place).and_then(|directory| directory.lock()).expect("a directory");
        let left = names(&place);
        assert!(
            left.contains(&"state".to_owned()) && left.contains(&"memory".to_owned()),
            "{round}: {left:?}"
        );
        assert!(left.len() <= 4, "round {round} leaves {left:?}");

        let mut running = restore(&place).start_with_input();
        running.send("q");
        let outcome = running.wait(PATIENCE);
        let count = outcome.status.code().expect("a code") - 1;
        // One round later there is one byte more, or what there was.
        outcome.check((least..=least + 1).contains(&count), &format!("round {round}: {least}, then {count}"));
        least = count;
    }
    // What a killed process has left goes away with the next snapshot.
    let socket = first.guest.path("last");
    let mut running = restore(&place).arg("--api-socket").arg(&socket).start_with_input();
    running.send("x");
    running.expect("x");
    snapshot(&socket, &place);
    assert_eq!(names(&place), ["memory", "state"]);
    running.send("q");
    running.wait(PATIENCE);
}

#[test]
fn earlier_snapshot_survives_a_kill_at_any_moment() {
    if has_kvm() {
        kill_at_random(20);
    }
}

#[test]
#[ignore = "long: kills 200 VMs"]
fn earlier_snapshot_survives_kills_at_200_moments() {
    if has_kvm() {
        kill_at_random(200);
    }
}

/// Processes whose command line names this place.
fn processes_of(place: &Path) -> Vec<String> {
    let name = place.to_str().expect("a path");
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let lines = processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(name))
        .collect()
}

/// Kills VMs at random moments while they are restored, and some a little later.
fn kill_restores(rounds: u32) {
    let directory = directory();
    let vsock = format!("cid=9,socket={}", directory.path().join("vsock").display());
    let first = Saved::start(&["--rng", "--balloon", "--vsock", &vsock]);
    let place = first.snapshot();
    drop(first.running);
    let around = first.guest.directory.path();
    let before = (fs::read(place.join("state")).unwrap(), fs::read(memory_of(&place)).unwrap());
    let others = names(around);
    let mut random = Random::new();
    let (api, vsock) = (first.guest.path("api-of-killed"), first.guest.path("vsock-of-killed"));
    let start = || {
        let monitor = restore(&place).arg("--api-socket").arg(&api).arg("--vsock").arg(&vsock);
        monitor.start_with_input()
    };
    // How long a restore takes here, so that kills come before, in and after each part of it.
    let begin = Instant::now();
    let mut running = start();
    while !(api.exists() && vsock.exists()) {
        assert!(begin.elapsed() < PATIENCE, "no sockets\n{}", running.story());
        std::thread::sleep(Duration::from_micros(100));
    }
    let takes = begin.elapsed().as_micros() as u64;
    for round in 0..rounds {
        running.signal(Signal::SIGKILL);
        drop(running);
        // The keeper ends after it has removed what the monitor has left.
        let end = Instant::now() + PATIENCE;
        while !processes_of(around).is_empty() {
            assert!(Instant::now() < end, "round {round} leaves {:?}", processes_of(around));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(names(around), others, "round {round}");
        assert_eq!(names(&place), ["memory", "state"], "round {round}");
        let after = (fs::read(place.join("state")).unwrap(), fs::read(memory_of(&place)).unwrap());
        assert!(after == before, "round {round} changes the snapshot");
        running = start();
        std::thread::sleep(Duration::from_micros(random.below(2 * takes)));
    }
    drop(running);
    let mut running = restore(&place).arg("--vsock").arg(first.guest.path("last")).start_with_input();
    running.send("q");
    running.wait(PATIENCE).exits(1);
}

#[test]
fn restores_that_are_killed_leave_nothing() {
    if has_kvm() {
        kill_restores(20);
    }
}

#[test]
#[ignore = "long: kills 200 restores"]
fn restores_that_are_killed_at_200_moments_leave_nothing() {
    if has_kvm() {
        kill_restores(200);
    }
}
