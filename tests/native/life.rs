//! A container's life: streams, terminals, further processes, pauses, and what is left when it is over.

use std::fs;

use rvmm::container::config::Process;
use serde_json::json;

use super::container::{Plan, can_run, groups};

fn process(args: &[&str]) -> Process {
    Process { args: args.iter().map(|word| (*word).to_owned()).collect(), ..Process::default() }
}

#[test]
fn input_reaches_the_process_and_its_end_is_seen() {
    if !can_run() {
        return;
    }
    let mut container = Plan::new(&["wc", "-c"]).with(|config| config.process.stdin = true).start();
    container.ask(json!({ "write": [0, "12345"] }));
    container.ask(json!({ "close": 0 }));
    assert_eq!(container.wait(0).stdout.trim(), "5");
    container.delete();
    assert_eq!(Plan::new(&["wc", "-c"]).run().stdout.trim(), "0", "without input it is at its end at once");
}

#[test]
fn created_container_waits_for_its_start() {
    if !can_run() {
        return;
    }
    let mut container = Plan::shell("echo run").driver();
    container.ask(json!("create"));
    assert!(container.ask(json!("pid")).as_u64().is_some());
    assert_eq!(container.ask(json!({ "output": 0 }))[0], "");
    let (text, _) = container.refused(json!({ "exec": process(&["true"]) }));
    assert!(text.contains("not running"), "{text}");
    container.ask(json!("start"));
    assert_eq!(container.wait(0).stdout, "run\n");
    container.delete();

    let mut never = Plan::shell("echo run").driver();
    never.ask(json!("create"));
    never.delete();
    never.delete();
}

#[test]
fn terminal_has_a_size_and_its_signals() {
    if !can_run() {
        return;
    }
    let shell = "stty size; tty; trap 'stty size; exit 5' WINCH; trap 'echo interrupted' INT; echo ready; \
                 while :; do sleep 0.05; done";
    let mut container = Plan::shell(shell)
        .with(|config| {
            config.process.terminal = true;
            config.process.stdin = true;
            config.process.user = "ann".into();
        })
        .driver();
    container.ask(json!("create"));
    container.ask(json!({ "resize": [0, 100, 30] }));
    container.ask(json!("start"));
    container.expect(0, "30 100\r\n/dev/pts/0\r\nready\r\n");
    container.ask(json!({ "write": [0, "\u{3}"] }));
    container.expect(0, "interrupted");
    container.ask(json!({ "resize": [0, 40, 12] }));
    let end = container.wait(0);
    assert!(end.code == 5 && end.stdout.contains("12 40"), "{end:?}");
    container.delete();
}

#[test]
fn further_processes_are_in_the_container_with_streams_of_their_own() {
    if !can_run() {
        return;
    }
    let mut container = Plan::shell("echo first; read x; exit 9")
        .with(|config| {
            config.process.stdin = true;
            config.process.env = vec!["A=1".into()];
            config.process.cwd = "/tmp".into();
            config.hostname = Some("box".into());
        })
        .start();
    container.expect(0, "first");
    let end = container
        .exec_shell("hostname; echo $A; pwd; ls /proc | grep -c '^[0-9]'; ps | grep -c 'read x'; exit 4");
    assert_eq!(end.code, 4);
    let lines: Vec<&str> = end.stdout.lines().collect();
    assert_eq!(lines[..3], ["box", "1", "/tmp"], "{end:?}");

    let ann = Process {
        user: "ann".into(),
        cwd: "/home/ann".into(),
        env: vec!["A=2".into()],
        ..process(&["sh", "-c", "id -u; pwd; echo $A"])
    };
    let number = container.exec(&ann);
    assert_eq!(container.wait(number).stdout, "1000\n/home/ann\n2\n");

    let number = container.exec(&process(&["cat"]));
    container.ask(json!({ "write": [number, "through"] }));
    container.ask(json!({ "close": number }));
    assert_eq!(container.wait(number).stdout, "through");

    let number =
        container.exec(&Process { terminal: true, ..process(&["sh", "-c", "tty; read x; echo got $x"]) });
    container.expect(number, "/dev/pts/");
    container.ask(json!({ "resize": [number, 10, 10] }));
    container.ask(json!({ "write": [number, "word\n"] }));
    assert!(container.wait(number).stdout.contains("got word"));

    let number = container.exec(&process(&["sleep", "1000"]));
    container.ask(json!({ "signal-exec": [number, 15] }));
    assert_eq!(container.wait(number).signal, Some(15));

    assert_eq!(container.refused(json!({ "exec": process(&["nowhere"]) })).1, 127);
    assert_eq!(container.refused(json!({ "exec": process(&["/etc/passwd"]) })).1, 126);
    let elsewhere = Process { cwd: "/proc/self/fd/3".into(), ..process(&["true"]) };
    assert_eq!(container.refused(json!({ "exec": elsewhere })).1, 125);

    container.ask(json!({ "write": [0, "\n"] }));
    assert_eq!(container.wait(0).code, 9);
    let (text, _) = container.refused(json!({ "exec": process(&["true"]) }));
    assert!(text.contains("not running"), "{text}");
    container.delete();
}

#[test]
fn end_of_the_first_process_ends_the_others() {
    if !can_run() {
        return;
    }
    let mut container = Plan::shell("read x").with(|config| config.process.stdin = true).start();
    let number = container.exec(&process(&["sleep", "1000"]));
    container.ask(json!({ "close": 0 }));
    assert_eq!(container.wait(0).code, 1);
    assert_eq!(container.wait(number).signal, Some(9));
    container.delete();
}

#[test]
fn small_init_reaps_hands_signals_on_and_ends_as_its_child() {
    if !can_run() {
        return;
    }
    let init = |plan: Plan| plan.with(|config| config.process.init = true);
    let end =
        init(Plan::shell("echo $$; (sleep 0.1 &) ; sleep 0.5; ps | grep -c '\\[sleep\\]'; exit 6")).run();
    assert_eq!((end.code, end.stdout.as_str()), (6, "2\n0\n"), "{end:?}");
    let mut container =
        init(Plan::shell("trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.05; done")).start();
    container.expect(0, "ready");
    container.ask(json!({ "signal": [15, false] }));
    let end = container.wait(0);
    assert!(end.code == 3 && end.stdout.contains("told"), "{end:?}");
    container.delete();
    assert_eq!(init(Plan::shell("kill -9 $$")).run().code, 137);
    assert_eq!(init(Plan::new(&["nowhere"])).fails().1, 127);

    let mut container =
        init(Plan::shell("trap 'echo once; exit 2' INT; echo ready; while :; do sleep 0.05; done"))
            .with(|config| config.process.terminal = true)
            .start();
    container.expect(0, "ready");
    container.ask(json!({ "write": [0, "\u{3}"] }));
    let end = container.wait(0);
    assert!(end.code == 2 && end.stdout.matches("once").count() == 1, "{end:?}");
    container.delete();
}

#[test]
fn pause_stops_everything_until_it_goes_on() {
    if !can_run() {
        return;
    }
    let mut container = Plan::shell("while :; do echo tick; sleep 0.02; done").start();
    container.expect(0, "tick");
    container.ask(json!("pause"));
    let states = container.ask(json!("processes"));
    assert!(!states.as_array().unwrap().is_empty());
    let (text, _) = container.refused(json!({ "exec": process(&["true"]) }));
    assert!(text.contains("paused"), "{text}");
    container.ask(json!("resume"));
    let before = container.ask(json!({ "output": 0 }))[0].as_str().unwrap().matches("tick").count();
    container.expect(0, &"tick\n".repeat(before + 20));
    container.ask(json!("pause"));
    container.ask(json!({ "signal": [9, false] }));
    assert_eq!(container.wait(0).signal, Some(9));
    container.delete();

    let mut paused = Plan::new(&["sleep", "1000"]).start();
    paused.ask(json!("pause"));
    paused.delete();
}

#[test]
fn processes_are_listed_as_the_host_sees_them() {
    if !can_run() {
        return;
    }
    let mut container =
        Plan::shell("sleep 1000 & while ! grep -q sleep /proc/$!/comm; do :; done; echo ready; wait")
            .with(|config| config.process.user = "ann".into())
            .start();
    container.expect(0, "ready");
    let list = container.ask(json!("processes"));
    let list = list.as_array().unwrap();
    let commands: Vec<&str> = list.iter().map(|one| one["command"].as_str().unwrap()).collect();
    assert!(commands.contains(&"sleep 1000") && commands.len() == 2, "{commands:?}");
    assert!(list.iter().all(|one| one["uid"] == 1000), "{list:?}");
    let pid = container.ask(json!("pid"));
    let child = list.iter().find(|one| one["command"] == "sleep 1000").unwrap();
    assert_eq!(child["parent"], pid);
    container.ask(json!({ "signal": [9, true] }));
    container.wait(0);
    container.delete();
}

#[test]
fn nothing_is_left_when_the_driver_is_killed() {
    if !can_run() {
        return;
    }
    let mut container = Plan::shell("sleep 1000 & echo ready; sleep 1000").start();
    container.expect(0, "ready");
    container.exec(&process(&["sleep", "1000"]));
    assert!(!groups(&container.id).is_empty());
    let mut second = container.kill_driver();
    second.delete();

    // One that waits for its start ends with its driver.
    let mut created = Plan::shell("true").driver();
    created.ask(json!("create"));
    let pid = created.ask(json!("pid"));
    let mut second = created.kill_driver();
    let status = format!("/proc/{pid}/status");
    let ended = || fs::read_to_string(&status).map_or(true, |text| text.contains("State:\tZ"));
    for _ in 0..600 {
        if ended() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(ended(), "it still waits");
    second.delete();

    let mut paused = Plan::new(&["sleep", "1000"]).start();
    paused.ask(json!("pause"));
    paused.kill_driver().delete();
}

#[test]
fn half_made_containers_are_cleared_away() {
    if !can_run() {
        return;
    }
    // No place for what it writes, a mount of nothing, a limit that the kernel refuses: each stops somewhere else.
    let plan = Plan::shell("true");
    fs::write(plan.path().join("rw"), "no directory").unwrap();
    let (text, code) = plan.fails();
    assert!(code == 125 && text.contains("layers"), "{text}");
    let (text, _) = Plan::shell("true").with(|config| config.limits.cpuset = Some("4000".into())).fails();
    assert!(text.contains("set of processors"), "{text}");
    let plan = Plan::shell("true").with(|config| {
        let source =
            rvmm::container::config::MountSource::Bind { path: "/not/there".into(), propagation: None };
        config.mounts =
            vec![rvmm::container::config::Mount { source, target: "/x".into(), read_only: false }];
    });
    let (text, _) = plan.fails();
    assert!(text.contains("cannot set up the container"), "{text}");
}

#[test]
fn two_containers_do_not_see_each_other() {
    if !can_run() {
        return;
    }
    let mut first = Plan::shell("echo 1 >/file; sleep 1000").start();
    let mut second = Plan::shell("ls /file; ps | wc -l; hostname").start();
    let end = second.wait(0);
    assert!(end.stderr.contains("/file: No such file"), "{end:?}");
    assert!(end.stdout.lines().next().unwrap().parse::<u32>().unwrap() <= 4, "{end:?}");
    second.delete();
    assert!(!groups(&first.id).is_empty());
    first.delete();
}

#[test]
fn engines_own_program_cannot_be_overwritten() {
    if !can_run() {
        return;
    }
    // Process 1 is the driver itself here, and the capability lets the container look at what it runs. A change of the
    // file's times is refused by the mount alone; one of its contents also while it runs, which is not what counts.
    let mut plan = Plan::shell("touch /proc/1/exe; test -r /proc/1/exe && echo readable").with(|config| {
        config.process.init = true;
        config.security.cap_add = vec!["SYS_PTRACE".into()];
    });
    plan.protect = true;
    let end = plan.run();
    assert!(end.stdout == "readable\n" && end.stderr.contains("Read-only file system"), "{end:?}");
    // Without the capability it is not even to be read.
    let end = Plan::shell("cat /proc/1/exe").with(|config| config.process.init = true).run();
    assert!(end.stderr.contains("denied"), "{end:?}");
}

#[test]
fn engines_descriptors_do_not_reach_the_container() {
    if !can_run() {
        return;
    }
    // Only the three streams are open in a new process, of the first and of a further one.
    let mut container = Plan::shell("ls /proc/self/fd | tr '\\n' ' '; read x")
        .with(|config| config.process.stdin = true)
        .start();
    container.expect(0, "0 1 2 3 ");
    let end = container.exec_shell("ls /proc/self/fd | tr '\\n' ' '");
    assert_eq!(end.stdout, "0 1 2 3 ");
    container.delete();
}
