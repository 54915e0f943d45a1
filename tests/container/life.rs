//! A container's life behind either wall: what each subcommand does to it, and what it says of it.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::home::{Home, IMAGE, Wall, can_run, finish};
use crate::support::{has_tool, skip};

/// A program that says which signals it gets, and ends by SIGTERM with 5.
const TALKER: &str = "trap 'echo usr1' USR1; trap 'echo hup' HUP; trap 'echo term; exit 5' TERM
    echo ready; echo err >&2; while :; do sleep 0.1; done";

/// Checks a whole life, which for a microVM takes one boot and one more for the second start.
fn a_life(wall: Wall) {
    let home = Home::new();
    let secret = home.file("secret", "hidden-word\n");
    let secret = format!("id=pw,src={secret}");
    let options = [
        "--label=table=yes",
        "--memory=96M",
        "--pids-limit=50",
        "-e",
        "OWN=1",
        "--secret",
        &secret,
        "-v",
        "kept:/kept",
        "--stop-timeout=20",
        "-h",
        "box",
    ];
    let mut create = vec!["create", wall.flag(), "--name=one", "--network=none"];
    create.extend(options);
    create.extend([IMAGE, "sh", "-c", TALKER]);
    let id = home.run(&create).ok().trim().to_owned();
    assert_eq!(home.inspect("one")["State"]["Status"], "created");
    assert_eq!(home.run(&["logs", "one"]).ok(), "");
    assert!(home.run(&["exec", "one", "true"]).fails().contains("not running"));
    assert!(home.run(&["stop", "nowhere"]).fails().contains("nowhere"));
    let taken = home.run(&["create", "--name=one", IMAGE]);
    assert!(taken.code == 125 && taken.stderr.contains("one"), "{taken:?}");

    assert_eq!(home.run(&["start", "one"]).ok(), "one\n");
    home.await_log("one", "ready");
    inspected(&home, wall, &id);
    executed(&home);
    listed(&home, wall, &id);

    for (signal, word) in [("USR1", "usr1"), ("SIGHUP", "hup"), ("10", "usr1\nhup\nusr1")] {
        home.run(&["kill", "-s", signal, "one"]).ok();
        home.await_log("one", word);
    }
    assert!(home.run(&["kill", "-s", "NOT", "one"]).fails().contains("NOT"));

    home.run(&["pause", "one"]).ok();
    assert_eq!(home.inspect("one")["State"]["Paused"], true);
    assert!(home.run(&["exec", "one", "true"]).fails().contains("paused"));
    let lines = home.run(&["logs", "one"]).stdout;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(home.run(&["logs", "one"]).stdout, lines);
    home.run(&["unpause", "one"]).ok();
    home.run(&["exec", "one", "true"]).ok();

    home.run(&["rename", "one", "two"]).ok();
    assert!(home.run(&["inspect", "--type=container", "one"]).code != 0);
    assert!(home.run(&["rm", "two"]).fails().contains("running"));
    attached(&home);
    logged(&home);

    let waiting =
        home.command(&["wait", "two"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("rvmm");
    home.run(&["stop", "two"]).ok();
    let mut waiting = waiting;
    waiting.stdin = None;
    assert_eq!(finish(waiting, b"", &["wait"]).stdout, "5\n");
    assert!(home.run(&["logs", "two"]).stdout.ends_with("term\n"));
    let end = home.inspect("two");
    assert_eq!((&end["State"]["Status"], &end["State"]["ExitCode"]), (&json!("exited"), &json!(5)));
    assert_eq!(home.run(&["ps", "-q"]).ok(), "");
    assert_eq!(home.run(&["wait", "two"]).ok(), "5\n");
    assert!(home.run(&["kill", "two"]).fails().contains("not running"));

    // What it has written is there at its second start.
    home.run(&["start", "two"]).ok();
    assert_eq!(home.run(&["exec", "two", "cat", "/written", "/kept/x"]).ok(), "layer\nvolume\n");
    home.run(&["kill", "two"]).ok();
    assert_eq!(home.inspect("two")["State"]["ExitCode"], 137);
    home.run(&["rm", "two"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
    assert_eq!(Home::cgroups(&[id]), [] as [std::path::PathBuf; 0]);

    // A volume is the same behind either wall.
    assert_eq!(home.shell(Wall::Native, &["-v", "kept:/kept"], "cat /kept/x").ok(), "volume\n");
    home.run(&["volume", "rm", "kept"]).ok();
}

fn inspected(home: &Home, wall: Wall, id: &str) {
    let found = home.inspect("one");
    let walls = if wall == Wall::Native { "native" } else { "microvm" };
    let fields = [
        ("/Id", json!(id)),
        ("/Name", json!("one")),
        ("/Path", json!("sh")),
        ("/State/Status", json!("running")),
        ("/State/Running", json!(true)),
        ("/State/OOMKilled", json!(false)),
        ("/RestartCount", json!(0)),
        ("/Config/Hostname", json!("box")),
        ("/Config/WorkingDir", json!("/home")),
        ("/Config/Labels", json!({"of": "image", "table": "yes"})),
        ("/Config/Env", json!(["PATH=/bin", "OF_IMAGE=yes", "BOTH=image", "OWN=1"])),
        ("/Config/StopTimeout", json!(20)),
        ("/HostConfig/Isolation", json!(walls)),
        ("/HostConfig/Memory", json!(96 << 20)),
        ("/HostConfig/PidsLimit", json!(50)),
        ("/HostConfig/NetworkMode", json!("none")),
        ("/HostConfig/Secrets", json!(["pw"])),
        ("/Mounts/0/Name", json!("kept")),
        ("/Mounts/0/Destination", json!("/kept")),
    ];
    for (field, wanted) in fields {
        assert_eq!(found.pointer(field), Some(&wanted), "{field}");
    }
    assert!(found["State"]["Pid"].as_u64() > Some(1));
    assert!(!found.to_string().contains("hidden-word"));
    for file in ["config.json", "state.json"] {
        let text = std::fs::read_to_string(home.path("data/containers").join(id).join(file)).expect("a file");
        assert!(!text.contains("hidden-word"), "{file}");
    }
    // By the beginning of its id as well.
    assert_eq!(home.inspect(&id[..8])["Id"], id);
}

fn executed(home: &Home) {
    let exec = |options: &[&str], script: &str| {
        let mut arguments = vec!["exec"];
        arguments.extend(options);
        arguments.extend(["one", "sh", "-c", script]);
        home.run(&arguments)
    };
    // Many checks in one process, since starting one takes long in some guests.
    let all = exec(
        &["-u", "ann", "-e", "A=1", "-w", "/tmp"],
        "id -u; pwd; echo $A$OWN$OF_IMAGE; echo err >&2; exit 9",
    );
    assert_eq!((all.code, all.stdout.as_str(), all.stderr.as_str()), (9, "1000\n/tmp\n11yes\n", "err\n"));
    let all =
        exec(&[], "pwd; cat /run/secrets/pw; hostname; echo layer >/written; echo volume >/kept/x; sync");
    assert_eq!(all.ok(), "/home\nhidden-word\nbox\n");
    assert_eq!(home.run_with(&["exec", "-i", "one", "cat"], b"a\0b").ok(), "a\0b");
    // What looks like an option after the container's name is the command's.
    assert_eq!(home.run(&["exec", "one", "echo", "-u", "--", "ann"]).ok(), "-u -- ann\n");
    assert_eq!(home.run(&["exec", "one", "nowhere"]).code, 127);
    assert_eq!(home.run(&["exec", "one", "/etc"]).code, 126);
    let killed = exec(&[], "kill -9 $$");
    assert_eq!(killed.code, 137, "{killed:?}");
    home.run(&["exec", "-d", "one", "sh", "-c", "echo detached >/kept/detached"]).ok();
    let terminal = home.run(&["exec", "-t", "one", "sh", "-c", "test -t 1 && echo terminal"]);
    assert_eq!(terminal.ok(), "terminal\r\n");
}

fn listed(home: &Home, wall: Wall, id: &str) {
    let table = home.run(&["ps"]).ok();
    let line = table.lines().nth(1).expect("a line");
    assert!(line.starts_with(&id[..12]) && line.contains("Up ") && line.ends_with("one"), "{table}");
    let walls = if wall == Wall::Native { "native" } else { "microvm" };
    for (filter, count) in [
        ("name=on", 1),
        ("name=two", 0),
        ("status=running", 1),
        ("status=exited", 0),
        ("label=table=yes", 1),
        ("label=no", 0),
    ] {
        assert_eq!(home.run(&["ps", "-q", "-f", filter]).ok().lines().count(), count, "{filter}");
    }
    assert_eq!(home.run(&["ps", "-q", "-f", &format!("isolation={walls}")]).ok().lines().count(), 1);
    let line = home.run(&["ps", "--format=json"]).ok();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&line).expect("JSON")["Names"], "one");
    let top = home.run(&["top", "one"]).ok();
    assert!(top.contains("sleep 0.1") || top.contains("sh -c"), "{top}");
    let stats = home.run(&["stats", "--no-stream", "--format=json", "one"]).ok();
    let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
    assert!(stats["MemUsage"].as_str().is_some_and(|usage| usage.contains("/ 96")), "{stats}");
    assert!(
        stats["PIDs"].as_str().and_then(|count| count.parse::<u32>().ok()).is_some_and(|count| count >= 1)
    );
}

fn attached(home: &Home) {
    let client =
        home.command(&["attach", "--no-stdin", "two"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let client = client.expect("rvmm");
    std::thread::sleep(Duration::from_millis(500));
    // A client's signals are the container's; one that is killed ends nothing.
    kill(Pid::from_raw(client.id() as i32), Signal::SIGUSR1).expect("a signal");
    home.await_log("two", "usr1\nhup\nusr1\nusr1\n");
    kill(Pid::from_raw(client.id() as i32), Signal::SIGKILL).expect("a signal");
    let ran = finish(client, b"", &["attach"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (-9, "usr1\n"));
    assert_eq!(home.inspect("two")["State"]["Running"], true);
}

fn logged(home: &Home) {
    let log = home.run(&["logs", "two"]);
    assert_eq!((log.stdout.as_str(), log.stderr.as_str()), ("ready\nusr1\nhup\nusr1\nusr1\n", "err\n"));
    assert_eq!(home.run(&["logs", "--tail=2", "two"]).ok(), "usr1\nusr1\n");
    assert_eq!(home.run(&["logs", "--since=2100-01-01T00:00:00Z", "two"]).ok(), "");
    let stamped = home.run(&["logs", "-t", "-n1", "two"]).ok();
    assert!(stamped.starts_with("20") && stamped.ends_with("Z usr1\n"), "{stamped}");
    assert!(home.run(&["logs", "--tail=x", "two"]).fails().contains("x"));
}

#[test]
fn a_whole_life_natively() {
    if can_run(Wall::Native) {
        a_life(Wall::Native);
    }
}

#[test]
fn a_whole_life_in_a_microvm() {
    if can_run(Wall::Microvm) {
        a_life(Wall::Microvm);
    }
}

/// What a container has written is the same layer behind either wall, while it runs and afterwards.
fn changes(wall: Wall) {
    let home = Home::new();
    // Few processes, since starting one takes long in some guests.
    let script = "echo new >/new; rm -r /data; mkdir /data; echo own >/data/own; chown 33:34 /new; chmod 4751 /new; ln /new /hard
        echo more >>/etc/group; sync; echo ready; while read -r line; do :; done; exit 3";
    home.run(&["run", "-d", "-i", wall.flag(), "--name=one", "--network=none", IMAGE, "sh", "-c", script])
        .ok();
    home.await_log("one", "ready");
    let expected = ["A /data/own", "A /hard", "A /new", "C /data", "C /etc", "C /etc/group", "D /data/seed"];
    let diff = || {
        let text = home.run(&["diff", "one"]).ok();
        // Where something is mounted.
        let mounted = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "A /dev", "A /proc", "A /sys"];
        let lines = text.lines().filter(|line| !mounted.iter().any(|path| line.ends_with(path)));
        let mut lines: Vec<String> = lines.map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(diff(), expected);
    home.run(&["commit", "one", "changed"]).ok();
    let script = "stat -c '%u:%g %a %h' /new; cat /data/own; ls /data; tail -n1 /etc/group";
    let seen = home.run(&["run", "--rm", "--network=none", "changed", "sh", "-c", script]);
    assert_eq!(seen.ok(), "33:34 4751 2\nown\nown\nmore\n");
    assert_eq!(home.inspect("one")["State"]["Running"], true);
    home.run(&["kill", "one"]).ok();
    let before = home.inspect("one")["State"].clone();
    assert_eq!(diff(), expected);
    assert_eq!(home.inspect("one")["State"], before);
    home.run(&["rm", "one"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn changes_natively() {
    if can_run(Wall::Native) {
        changes(Wall::Native);
    }
}

#[test]
fn changes_in_a_microvm() {
    if can_run(Wall::Microvm) {
        changes(Wall::Microvm);
    }
}

#[test]
fn terminals_have_the_size_of_the_callers() {
    if !can_run(Wall::Native) || !has_tool("script") {
        return;
    }
    let home = Home::new();
    let inside = |command: &str| {
        let mut script = Command::new("script");
        let binary = home.command(&[]).get_program().to_str().expect("a path").to_owned();
        let line = format!("stty rows 33 cols 101; {binary} {command}");
        script
            .args(["-qec", &line, "/dev/null"])
            .envs(home.command(&[]).get_envs().filter_map(|(name, value)| Some((name, value?))));
        script.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(script.spawn().expect("script"), b"", &["script"])
    };
    let ran = inside(&format!("run --rm -it --network none {IMAGE} sh -c 'stty size; exit 6'"));
    // `script` itself may add what it was given.
    assert!(ran.code == 6 && ran.stdout.contains("33 101\r\n"), "{ran:?}");
    home.start(Wall::Native, "one", &[], "sleep 100");
    let ran = inside("exec -it one sh -c 'stty size; exit 7'");
    assert!(ran.code == 7 && ran.stdout.contains("33 101\r\n"), "{ran:?}");
    let none = home.run_with(&["run", "--rm", "-it", IMAGE, "true"], b"");
    assert!(none.code == 125 && none.stderr.contains("not a terminal"), "{none:?}");
}

#[test]
fn devices_are_given_with_the_access_that_is_named() {
    if !can_run(Wall::Native) {
        return;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        skip("needs /dev/net/tun, a device that can be opened without more and that containers do not have");
        return;
    }
    let home = Home::new();
    let script = "ls -l /dev/own | cut -c1; (: </dev/own) && echo read; (: >>/dev/own) && echo written";
    for (access, seen) in [("r", "c\nread\n"), ("w", "c\nwritten\n"), ("rw", "c\nread\nwritten\n")] {
        let device = format!("--device=/dev/net/tun:/dev/own:{access}");
        assert_eq!(home.shell(Wall::Native, &[&device], script).stdout, seen, "{access}");
    }
    let same = home.shell(
        Wall::Native,
        &["--device=/dev/net/tun"],
        "test -c /dev/net/tun && : </dev/net/tun && echo yes",
    );
    assert_eq!(same.ok(), "yes\n");
    let refused = home.shell(Wall::Native, &["--device=/dev/net/tun:/dev/own:x"], "true");
    assert!(refused.code == 125 && refused.stderr.contains("rwm"), "{refused:?}");
}

#[test]
fn signals_of_the_client_are_the_containers() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    for (signal, script, code) in [
        (Signal::SIGTERM, "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done", 5),
        (Signal::SIGINT, "trap 'exit 6' INT; echo ready; while :; do sleep 0.1; done", 6),
    ] {
        let arguments = ["run", "--rm", "--name=one", "--network=none", IMAGE, "sh", "-c", script];
        let client =
            home.command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("rvmm");
        while home.run(&["logs", "one"]).stdout.is_empty() {
            std::thread::sleep(Duration::from_millis(20));
        }
        kill(Pid::from_raw(client.id() as i32), signal).expect("a signal");
        assert_eq!(finish(client, b"", &arguments).code, code);
    }
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn what_does_not_end_in_time_is_killed() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    home.start(Wall::Native, "deaf", &[], "trap '' TERM; echo ready; while :; do sleep 0.1; done");
    home.await_log("deaf", "ready");
    home.run(&["stop", "-t", "1", "deaf"]).ok();
    assert_eq!(home.inspect("deaf")["State"]["ExitCode"], 137);
    home.start(
        Wall::Native,
        "own",
        &["--stop-signal=USR2"],
        "trap 'exit 8' USR2; echo ready; while :; do sleep 0.1; done",
    );
    home.await_log("own", "ready");
    home.run(&["stop", "own"]).ok();
    assert_eq!(home.inspect("own")["State"]["ExitCode"], 8);
    home.run(&["restart", "own"]).ok();
    assert_eq!(home.inspect("own")["State"]["Running"], true);
    home.run(&["rm", "-f", "own", "deaf"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn restarts_are_as_the_policy_says() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    home.start(Wall::Native, "twice", &["--restart=on-failure:2"], "echo run; exit 3");
    home.start(Wall::Native, "good", &["--restart=on-failure"], "echo run");
    home.start(Wall::Native, "ever", &["--restart=always"], "echo run");
    let end = home.await_state("twice", |found| found["State"]["Status"] == "exited");
    assert_eq!((&end["RestartCount"], &end["State"]["ExitCode"]), (&json!(2), &json!(3)));
    assert_eq!(home.run(&["logs", "twice"]).ok(), "run\nrun\nrun\n");
    let end = home.await_state("good", |found| found["State"]["Status"] == "exited");
    assert_eq!(end["RestartCount"], 0);
    home.await_state("ever", |found| found["RestartCount"].as_u64() >= Some(3));
    home.run(&["stop", "ever"]).ok();
    let end = home.inspect("ever");
    assert_eq!(end["State"]["Status"], "exited");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(home.inspect("ever")["RestartCount"], end["RestartCount"]);
}

#[test]
fn health_is_what_the_checks_say() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    let options = ["--health-cmd", "cat /tmp/well", "--health-interval", "200ms", "--health-retries", "2"];
    home.start(Wall::Native, "one", &options, "touch /tmp/well; sleep 1000");
    home.await_state("one", |found| found["State"]["Health"]["Status"] == "healthy");
    assert!(home.run(&["ps"]).ok().contains("(healthy)"));
    home.run(&["exec", "one", "rm", "/tmp/well"]).ok();
    let found = home.await_state("one", |found| found["State"]["Health"]["Status"] == "unhealthy");
    assert!(found["State"]["Health"]["FailingStreak"].as_u64() >= Some(2));
    let log = found["State"]["Health"]["Log"].as_array().expect("a log").last().expect("a check").clone();
    assert!(
        log["ExitCode"] == 1 && log["Output"].as_str().is_some_and(|text| text.contains("/tmp/well")),
        "{log}"
    );
    home.run(&["exec", "one", "touch", "/tmp/well"]).ok();
    home.await_state("one", |found| found["State"]["Health"]["Status"] == "healthy");
}

#[test]
fn memory_that_was_too_much_is_told() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    home.start(Wall::Native, "one", &["--memory=32M", "--memory-swap=32M"], "exec tail /dev/zero");
    let end = home.await_state("one", |found| found["State"]["Status"] == "exited");
    assert_eq!((&end["State"]["OOMKilled"], &end["State"]["ExitCode"]), (&json!(true), &json!(137)));
}

#[test]
fn logs_are_followed_to_the_end() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    home.start(Wall::Native, "one", &[], "for i in 1 2 3 4 5; do echo $i; sleep 0.2; done");
    assert_eq!(home.run(&["logs", "-f", "one"]).ok(), "1\n2\n3\n4\n5\n");
    let ran = home.run_with(&["start", "-a", "one"], b"");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "1\n2\n3\n4\n5\n"));
}

#[test]
fn the_file_for_the_id_must_be_new() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    let path = home.path("id");
    let path = path.to_str().expect("a path");
    let id = home.run(&["create", "--cidfile", path, IMAGE]).ok();
    assert_eq!(std::fs::read_to_string(path).expect("a file"), id.trim());
    let again = home.run(&["create", "--cidfile", path, IMAGE]);
    assert!(again.code == 125 && again.stderr.contains(path), "{again:?}");
    assert_eq!(home.run(&["ps", "-aq"]).ok().lines().count(), 1);
}
