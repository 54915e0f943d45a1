//! Limits, and what is counted.

use rvmm::guest::protocol::{Event, ExitStatus, FIRST_PROCESS};
use rvmm::guest::spec::*;

use super::rig::Sandbox;

pub fn memory_limit_kills_and_is_told(sandbox: &mut Sandbox) {
    let process = sandbox.shell("tail /dev/zero; echo $?; exec tail /dev/zero");
    let mut spec = sandbox.container(process);
    spec.limits.memory_bytes = Some(8 << 20);
    let streams = sandbox.start(&spec);
    let ended = sandbox.finish(&spec.id, FIRST_PROCESS, streams);
    assert_eq!((ended.status, ended.out_of_memory), (ExitStatus::Signal(9), true), "{ended:?}");
    assert_eq!(ended.stdout, "137\n");
    assert!(sandbox.has_seen(&Event::OutOfMemory { container: spec.id.clone() }));
    sandbox.client.delete(&spec.id, false).unwrap();
}

pub fn process_limit_holds(sandbox: &mut Sandbox) {
    let script = "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done 2>/tmp/errors; grep -c -i fork /tmp/errors";
    let ended = sandbox.run_shell(script, |spec| spec.limits.pids = Some(4));
    assert_ne!(ended.stdout.trim(), "0", "{ended:?}");
    let id = sandbox.idle();
    sandbox.client.update(&id, Limits { pids: Some(1), ..Limits::default() }).unwrap();
    let refused = super::rig::failure(sandbox.client.exec(&id, 1, sandbox.program(&["true"])));
    assert_eq!(refused.to_string(), "cannot make a process: resource temporarily unavailable");
    sandbox.client.update(&id, Limits { pids: Some(10), ..Limits::default() }).unwrap();
    let process = sandbox.program(&["true"]);
    assert_eq!(sandbox.exec(&id, 1, process).status, ExitStatus::Code(0));
    sandbox.remove(&id);
}

pub fn usage_is_counted(sandbox: &mut Sandbox) {
    let process = sandbox.shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 100000");
    let mut spec = sandbox.container(process);
    spec.limits = Limits {
        memory_bytes: Some(32 << 20),
        pids: Some(20),
        cpu_quota: Some((90_000, 100_000)),
        cpu_weight: Some(50),
        io: vec![IoLimit { disk: "layers".into(), read_bps: Some(1 << 30), ..IoLimit::default() }],
        ..Limits::default()
    };
    let _streams = sandbox.start(&spec);
    loop {
        let listed = sandbox.client.processes(&spec.id).unwrap();
        if listed.iter().any(|process| process.command.starts_with("sleep")) {
            break;
        }
    }
    let stats = sandbox.client.stats(&spec.id).unwrap();
    assert!(stats.cpu_us > 0 && stats.memory_bytes > 0, "{stats:?}");
    assert_eq!((stats.pids, stats.pids_limit, stats.memory_limit_bytes), (1, Some(20), Some(32 << 20)));
    let listed = sandbox.client.processes(&spec.id).unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].cpu_ms > 0 && listed[0].memory_bytes > 0, "{listed:?}");
    sandbox.remove(&spec.id);
}
