//! Processes: how they are started, and how they end.

use rvmm::guest::protocol::{ExitStatus, FIRST_PROCESS, Failure, ProcessInfo, Target};
use rvmm::guest::spec::*;

use super::rig::{Sandbox, failure};

pub fn exit_codes_come_back(sandbox: &mut Sandbox) {
    for (commands, code) in [("true", 0), ("false", 1), ("exit 42", 42)] {
        assert_eq!(sandbox.run_shell(commands, |_| {}).status, ExitStatus::Code(code), "{commands}");
    }
}

pub fn signals_end_processes(sandbox: &mut Sandbox) {
    // Process 1 of a namespace is immune to what it has no handler for, but not to SIGKILL from outside.
    let id = sandbox.idle();
    sandbox.client.signal(&id, Target::Process(FIRST_PROCESS), libc::SIGKILL).unwrap();
    assert_eq!(sandbox.wait_exit(&id, FIRST_PROCESS).0, ExitStatus::Signal(9));
    let refused = failure(sandbox.client.signal(&id, Target::Process(FIRST_PROCESS), libc::SIGTERM));
    assert!(matches!(refused, Failure::State { .. }), "{refused}");
    sandbox.client.delete(&id, false).unwrap();

    let process = sandbox.shell("trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 1; done");
    let spec = sandbox.container(process);
    let streams = sandbox.start(&spec);
    std::thread::sleep(std::time::Duration::from_millis(500));
    sandbox.client.signal(&spec.id, Target::All, libc::SIGTERM).unwrap();
    let ended = sandbox.finish(&spec.id, FIRST_PROCESS, streams);
    assert_eq!((ended.status, ended.stdout.as_str()), (ExitStatus::Code(7), "ready\ncaught\n"));
    sandbox.client.delete(&spec.id, false).unwrap();
}

pub fn programs_that_cannot_be_run_are_told_apart(sandbox: &mut Sandbox) {
    let mut why = |args: &[&str], cwd: &str, user: &str| {
        let mut process = sandbox.program(args);
        process.cwd = cwd.into();
        process.user = User::Named { user: user.into(), groups: vec![] };
        let spec = sandbox.container(process);
        sandbox.start_fails(&spec)
    };
    let missing = why(&["frobnicate"], "/", "");
    assert_eq!(missing, Failure::NotFound { program: "frobnicate".into() });
    assert_eq!(missing.exit_code(), 127);
    assert_eq!(why(&["/bin/frobnicate"], "/", ""), Failure::NotFound { program: "/bin/frobnicate".into() });
    let plain = why(&["/etc/passwd"], "/", "");
    assert_eq!(plain, Failure::NotExecutable { program: "/etc/passwd".into(), errno: libc::EACCES });
    assert_eq!(plain.exit_code(), 126);
    let directory = why(&["/etc"], "/", "");
    assert_eq!(directory, Failure::NotExecutable { program: "/etc".into(), errno: libc::EACCES });
    assert!(matches!(why(&["true"], "/etc/passwd/x", ""), Failure::WorkingDirectory { .. }));
    assert_eq!(why(&["true"], "/", "stranger"), Failure::NoUser("stranger".into()));
    assert_eq!(why(&["true"], "/", "web:strangers"), Failure::NoGroup("strangers".into()));
    assert!(matches!(why(&[], "/", ""), Failure::Invalid(_)));
}

pub fn users_are_looked_up(sandbox: &mut Sandbox) {
    let mut id = |user: &str, groups: &[&str]| {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        let ended = sandbox.run_shell("echo $(id -u):$(id -g):$(id -G):$HOME", |spec| {
            spec.process.user = User::Named { user: user.into(), groups };
        });
        ended.output().to_owned()
    };
    assert_eq!(id("", &[]), "0:0:0:/root");
    assert_eq!(id("web", &[]), "33:34:34 90:/srv/web");
    assert_eq!(id("web:log", &[]), "33:90:90:/srv/web");
    assert_eq!(id("4000:5000", &["log", "7"]), "4000:5000:5000 7 90:/");
}

pub fn process_has_its_environment_user_and_directory(sandbox: &mut Sandbox) {
    let script = "echo $A; id -u; id -G; echo $HOME; pwd; umask; hostname; ulimit -n; cat /proc/self/oom_score_adj; \
                  ls /proc/self/fd | wc -l; echo x >/dev/stderr; cat /proc/1/comm; true";
    let ended = sandbox.run_shell(script, |spec| {
        spec.process.env.push("A=some words".into());
        spec.process.user = User::Named { user: "web".into(), groups: vec![] };
        spec.process.cwd = "/srv/new/deep".into();
        spec.process.umask = Some(0o77);
        spec.process.rlimits = vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200 }];
        spec.process.oom_score_adj = Some(77);
    });
    // Standard streams and the directory that is listed.
    assert_eq!(ended.output(), "some words\n33\n34 90\n/srv/web\n/srv/new/deep\n0077\nbox\n100\n77\n4\nsh");
    assert_eq!(ended.stderr, "x\n");
}

pub fn exec_runs_beside_the_first_process(sandbox: &mut Sandbox) {
    let id = sandbox.idle();
    let process = sandbox.shell("cat /proc/1/comm; hostname; echo $$ >/tmp/pid; exit 3");
    let ended = sandbox.exec(&id, 1, process);
    assert_eq!((ended.status, ended.stdout.as_str()), (ExitStatus::Code(3), "sleep\nbox\n"));
    // What a child in the background writes later is nobody's, and holds nobody up.
    let process = sandbox.shell("sleep 100000 & echo done");
    let ended = sandbox.exec(&id, 2, process);
    assert_eq!(ended.output(), "done");
    let mut missing = sandbox.program(&["frobnicate"]);
    assert_eq!(
        failure(sandbox.client.exec(&id, 3, missing.clone())),
        Failure::NotFound { program: "frobnicate".into() }
    );
    missing.args = vec!["true".into()];
    missing.cwd = "/no/such".into();
    let refused = failure(sandbox.client.exec(&id, 3, missing));
    assert_eq!(refused, Failure::WorkingDirectory { path: "/no/such".into(), errno: libc::ENOENT });
    let unknown = sandbox.program(&["true"]);
    assert_eq!(failure(sandbox.client.exec("nobody", 1, unknown)), Failure::NoContainer("nobody".into()));
    sandbox.remove(&id);
}

pub fn reaper_is_process_one(sandbox: &mut Sandbox) {
    let script = "cat /proc/1/comm; echo $(($$ > 1)); (sleep 0.2 & exec true); sleep 1; ps -o stat | grep -c Z; exit 9";
    let ended = sandbox.run_shell(script, |spec| spec.reaper = true);
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (ExitStatus::Code(9), "rvmm-reaper\n1\n0\n"),
        "{ended:?}"
    );
    // Signals reach the program.
    let process = sandbox.program(&["sleep", "100000"]);
    let mut spec = sandbox.container(process);
    spec.reaper = true;
    let streams = sandbox.start(&spec);
    sandbox.client.signal(&spec.id, Target::Process(FIRST_PROCESS), libc::SIGTERM).unwrap();
    assert_eq!(sandbox.finish(&spec.id, FIRST_PROCESS, streams).status, ExitStatus::Code(143));
    sandbox.client.delete(&spec.id, false).unwrap();
    // A program that is not there is known before.
    let process = sandbox.program(&["frobnicate"]);
    let mut spec = sandbox.container(process);
    spec.reaper = true;
    assert_eq!(sandbox.start_fails(&spec), Failure::NotFound { program: "frobnicate".into() });
}

pub fn processes_are_listed(sandbox: &mut Sandbox) {
    let process = sandbox.shell("sleep 99999 & exec sleep 100000");
    let mut spec = sandbox.container(process);
    spec.process.user = User::Ids { uid: 5, gid: 6, groups: vec![] };
    let _streams = sandbox.start(&spec);
    let mut listed = vec![];
    let is_sleep = |process: &ProcessInfo| process.command.starts_with("sleep");
    while listed.len() != 2 || !listed.iter().all(is_sleep) {
        listed = sandbox.client.processes(&spec.id).unwrap();
    }
    let first = listed.iter().find(|process| process.inner_pid == 1).unwrap();
    assert_eq!((first.command.as_str(), first.uid), ("sleep 100000", 5));
    let second = listed.iter().find(|process| process.inner_pid != 1).unwrap();
    assert_eq!((second.command.as_str(), second.parent), ("sleep 99999", first.pid));
    sandbox.remove(&spec.id);
}
