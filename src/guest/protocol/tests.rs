use super::*;
use crate::guest::frame::{REQUEST_BYTES_MAX, decode, encode};
use crate::guest::spec::*;

/// A container with something in every field.
fn full_spec() -> ContainerSpec {
    let volume =
        |partition| Volume { disk: "layers".into(), partition, kind: "erofs".into(), data: String::new() };
    let mount =
        |source, target: &str| Mount { source, target: target.into(), flags: 6, propagation: 1 << 18 };
    ContainerSpec {
        id: "a1".into(),
        root: Root::Layers { lower: vec![volume(1), volume(2)], upper: Upper::Volume(volume(0)) },
        read_only: true,
        propagation: 1 << 18,
        mounts: vec![
            mount(Source::New { kind: "proc".into(), data: String::new() }, "/proc"),
            mount(Source::Share { path: "volumes/1".into() }, "/data"),
            mount(
                Source::File { contents: b"127.0.0.1 localhost\n".into(), mode: 0o644, uid: 0, gid: 1 },
                "/etc/hosts",
            ),
            mount(Source::Memory { name: "shm".into(), data: "size=64m".into() }, "/dev/shm"),
            mount(Source::Inside { path: "/a".into() }, "/b"),
            mount(Source::Volume(volume(3)), "/v"),
        ],
        devices: default_devices(),
        links: default_links(),
        device_filter: vec![0x95, 0, 0, 0, 0, 0, 0, 0],
        process: ProcessSpec {
            args: vec!["/bin/sh".into(), "-c".into(), "exit 3".into()],
            env: vec!["PATH=/bin".into()],
            cwd: "/".into(),
            user: User::Ids { uid: 1, gid: 2, groups: vec![3] },
            umask: Some(0o77),
            stdio: Stdio::Streams { stdin: None, stdout: Some(1), stderr: Some(u64::MAX) },
            rlimits: vec![Rlimit { resource: 7, soft: 1024, hard: u64::MAX }],
            capabilities: Capabilities::of(0xa804_25fb),
            no_new_privileges: true,
            seccomp: Some(Seccomp { program: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f], flags: 0 }),
            oom_score_adj: Some(-5),
        },
        namespaces: Namespaces { pid: Namespace::Container("b2".into()), ..Namespaces::default() },
        hostname: Some("box".into()),
        domainname: None,
        masked_paths: vec!["/proc/kcore".into()],
        read_only_paths: vec!["/proc/sys".into()],
        sysctls: vec![("net.ipv4.ip_forward".into(), "1".into())],
        limits: Limits {
            memory_bytes: Some(1 << 26),
            cpu_quota: Some((50_000, 100_000)),
            io: vec![IoLimit { disk: "rw".into(), read_bps: Some(1), ..IoLimit::default() }],
            files: vec![("memory.high".into(), "max".into())],
            ..Limits::default()
        },
        reaper: true,
    }
}

#[test]
fn container_comes_back_as_it_was() {
    let message = ToAgent { id: 1, request: Request::CreateContainer(Box::new(full_spec())) };
    let frame = encode(&message, REQUEST_BYTES_MAX).unwrap();
    assert_eq!(decode::<ToAgent>(&frame[4..]).unwrap(), message);
}

#[test]
fn container_cut_short_anywhere_is_an_error() {
    let message = ToAgent { id: 1, request: Request::CreateContainer(Box::new(full_spec())) };
    let frame = encode(&message, REQUEST_BYTES_MAX).unwrap().split_off(4);
    for len in 0..frame.len() {
        assert!(decode::<ToAgent>(&frame[..len]).is_err(), "{len} of {} bytes", frame.len());
    }
}

/// Every version must be able to read every version's first request and its refusal.
#[test]
fn first_request_and_its_refusal_keep_their_form() {
    let hello = ToAgent { id: 1, request: Request::Hello { version: 1, events: true } };
    assert_eq!(encode(&hello, 100).unwrap(), [4, 0, 0, 0, 1, 0, 1, 1]);
    let refusal = FromAgent::Reply(1, Err(Failure::Version { host: 2, agent: 1 }));
    assert_eq!(encode(&refusal, 100).unwrap(), [6, 0, 0, 0, 0, 1, 1, 0, 2, 1]);
}

#[test]
fn failures_read_as_docker_has_them() {
    let missing = Failure::NotFound { program: "frobnicate".into() };
    assert_eq!(missing.to_string(), "exec: \"frobnicate\": executable file not found in $PATH");
    let path = Failure::NotFound { program: "/frobnicate".into() };
    assert_eq!(path.to_string(), "exec: \"/frobnicate\": stat /frobnicate: no such file or directory");
    let refused = Failure::NotExecutable { program: "/etc/passwd".into(), errno: libc::EACCES };
    assert_eq!(refused.to_string(), "exec: \"/etc/passwd\": permission denied");
    let user = Failure::NoUser("me".into());
    assert_eq!(user.to_string(), "unable to find user me: no matching entries in passwd file");
    assert_eq!([missing.exit_code(), refused.exit_code(), user.exit_code()], [127, 126, 125]);
}

#[test]
fn exit_code_of_a_signal_is_that_of_a_shell() {
    assert_eq!(ExitStatus::Code(3).code(), 3);
    assert_eq!(ExitStatus::Signal(9).code(), 137);
}
