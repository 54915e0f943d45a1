//! Programs that are killed at any moment: the next command repairs, nothing is left and nothing is lost.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::home::{Home, IMAGE, Wall, can_run};
use crate::support::announce;

/// What is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Client,
    Supervisor,
    /// Everything of the container's but its own processes.
    Both,
}

/// Numbers that look random, and are the same again for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

fn murder(pid: i32) {
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Kills something while a container starts, runs or ends. The container writes to a volume before it is ready.
fn round(home: &Home, random: &mut Random, number: u64) {
    let victim = [Victim::Client, Victim::Supervisor, Victim::Both][(number % 3) as usize];
    let name = format!("victim{number}");
    let script = format!("echo {number} >>/kept/log; sync; for i in 1 2 3; do sleep 0.05; done; exit 3");
    let mut arguments = vec!["run", "--name", &name, "--network=none", "-v", "kept:/kept"];
    if random.below(2) == 0 {
        arguments.push("--rm");
    }
    arguments.extend([IMAGE, "sh", "-c", &script]);
    let mut command = home.command(&arguments);
    let mut client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("rvmm");
    std::thread::sleep(Duration::from_millis(random.below(400)));
    let client_pid = client.id() as i32;
    let binary = |line: &str| line.starts_with("rvmm ");
    if matches!(victim, Victim::Supervisor | Victim::Both) {
        // The supervisor is forked by the client, so it has the client's command line.
        for (pid, line) in home.processes() {
            if pid != client_pid && binary(&line) && line.contains(&name) {
                murder(pid);
            }
        }
    }
    if matches!(victim, Victim::Client | Victim::Both) {
        murder(client_pid);
    }
    let _ = client.wait();
    if matches!(victim, Victim::Client) {
        // The container goes on; its supervisor brings it to its end.
        let _ = home.run(&["wait", &name]);
    }
    // The next command repairs.
    let list = home.run(&["ps", "-a"]);
    assert_eq!((list.code, list.stderr.as_str()), (0, ""), "round {number}, {victim:?}");
    if list.stdout.contains(&name) {
        let removed = home.run(&["rm", "-f", &name]);
        assert!(
            removed.code == 0 || !home.run(&["ps", "-a"]).stdout.contains(&name),
            "{number}, {victim:?}: {removed:?}"
        );
    }
    assert_eq!(home.inspect("bystander")["State"]["Running"], true, "round {number}, {victim:?}");
}

/// What is there of one bystander, against which all else is measured.
fn rounds(count: u64, seed: u64) {
    let home = Home::new();
    home.start(Wall::Native, "bystander", &["-v", "kept:/kept"], "echo here >/kept/bystander; sleep 100000");
    let sorted = |mut list: Vec<String>| {
        list.sort();
        list
    };
    // Clients of mounts and processes that come and go apart, these are the bystander's.
    let before = sorted(home.left());
    let mut random = Random(seed);
    for number in 0..count {
        round(&home, &mut random, number);
        let mut after = sorted(home.left());
        for _ in 0..100 {
            if after == before {
                break;
            }
            // One that was killed may still be on its way out.
            std::thread::sleep(Duration::from_millis(50));
            home.run(&["ps"]).ok();
            after = sorted(home.left());
        }
        assert_eq!(after, before, "round {number} of seed {seed}");
    }
    // All lines of the volume are whole, and the bystander's file is there.
    let log =
        home.run(&["exec", "bystander", "sh", "-c", "cat /kept/bystander; grep -v -c '^[0-9]*$' /kept/log"]);
    assert_eq!(log.stdout, "here\n0\n");
    let id = home.inspect("bystander")["Id"].as_str().expect("an id").to_owned();
    home.run(&["rm", "-f", "bystander"]).ok();
    assert_eq!(Home::cgroups(&[id]), [] as [std::path::PathBuf; 0]);
    assert_eq!(home.left(), [] as [String; 0]);
    assert_eq!(home.run(&["volume", "ls", "-q"]).ok(), "kept\n");
    announce(&format!("{count} rounds of killing with seed {seed}"));
}

#[test]
fn killed_clients_and_supervisors_leave_and_lose_nothing() {
    if can_run(Wall::Native) {
        rounds(10, 1);
    }
}

#[test]
#[ignore = "long: 200 rounds"]
fn killed_clients_and_supervisors_leave_and_lose_nothing_200_times() {
    if can_run(Wall::Native) {
        let seed =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs();
        rounds(200, seed);
    }
}

#[test]
fn killed_monitor_ends_its_container_and_nothing_else() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    home.start(Wall::Native, "bystander", &[], "sleep 100000");
    let before = home.left().len();
    home.start(
        Wall::Microvm,
        "vm",
        &["-v", "kept:/kept"],
        "echo data >/kept/x; sync; echo ready; sleep 100000",
    );
    home.await_log("vm", "ready");
    // The process of a microVM is its monitor.
    murder(home.inspect("vm")["State"]["Pid"].as_i64().expect("a process") as i32);
    let end = home.await_state("vm", |found| found["State"]["Status"] == "exited");
    assert_eq!(end["State"]["ExitCode"], 137);
    home.run(&["rm", "vm"]).ok();
    assert_eq!(home.shell(Wall::Native, &["-v", "kept:/kept"], "cat /kept/x").ok(), "data\n");
    assert_eq!(home.inspect("bystander")["State"]["Running"], true);
    assert_eq!(home.left().len(), before, "{:?}", home.left());
}

#[test]
fn killed_supervisor_of_a_microvm_is_cleared_after() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    home.start(
        Wall::Microvm,
        "vm",
        &["-v", "kept:/kept"],
        "echo data >/kept/x; sync; echo ready; sleep 100000",
    );
    home.await_log("vm", "ready");
    murder(home.inspect("vm")["State"]["SupervisorPid"].as_i64().expect("a process") as i32);
    let end = home.await_state("vm", |found| found["State"]["Status"] == "exited");
    assert!(end["State"]["Error"].as_str().is_some_and(|text| text.contains("supervisor")), "{end}");
    home.run(&["rm", "vm"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
    assert_eq!(home.shell(Wall::Native, &["-v", "kept:/kept"], "cat /kept/x").ok(), "data\n");
}

#[test]
fn microvm_that_boots_is_removed_by_force_and_leaves_nothing() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    let isolation = ["create", "--network", "none", "--name", "vm", Wall::Microvm.flag(), IMAGE, "true"];
    home.run(&isolation).ok();
    let mut starting = home.command(&["start", "vm"]).spawn().expect("rvmm");
    // Its supervisor is at work, and it does not run.
    home.await_state("vm", |found| found["State"]["SupervisorPid"] != 0);
    home.run(&["rm", "--force", "vm"]).ok();
    let _ = starting.wait();
    assert_eq!(home.left(), [] as [String; 0]);
    home.run(&["inspect", "vm"]).fails();
}

#[test]
fn image_that_a_killed_client_held_is_let_go() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    home.run(&["run", "--rm", "--network=none", IMAGE, "true"]).ok();
    let image = home.run(&["image", "inspect", IMAGE]).ok();
    let image: serde_json::Value = serde_json::from_str(&image).expect("JSON");
    let hex = image[0]["Id"].as_str().and_then(|id| id.strip_prefix("sha256:")).expect("an id");
    let users = home.path("data/images/users").join(hex);
    std::fs::create_dir_all(&users).expect("a directory");
    std::fs::write(users.join("0".repeat(64)), "").expect("a file");
    home.run(&["rmi", IMAGE]).fails();
    home.run(&["ps"]).ok();
    home.run(&["rmi", IMAGE]).ok();
}
