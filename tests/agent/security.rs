//! What a container cannot do.

use rvmm::guest::devices::{DeviceKind, DeviceRule, device_filter};
use rvmm::guest::protocol::ExitStatus;
use rvmm::guest::spec::*;

use super::rig::{DEFAULT_CAPABILITIES, Sandbox};

/// `CAP_*` numbers.
const NET_BIND_SERVICE: u64 = 1 << 10;
const SYS_ADMIN: u64 = 1 << 21;

pub fn walls_stand(sandbox: &mut Sandbox) {
    let script = "touch /etc/x 2>/dev/null || echo root; cat /proc/version | wc -c; ls /proc/tty 2>/dev/null | wc -l; \
                  echo 1 2>/dev/null >/proc/sys/kernel/panic || echo sys; cat /proc/sys/net/ipv4/ip_forward; \
                  ls /c /dev/vda 2>/dev/null; grep -c . /proc/self/mountinfo; touch /dev/shm/x 2>/dev/null && echo shm; \
                  cat /proc/net/dev | grep -c :; ls -1 /proc | grep -c '^[0-9]'";
    let ended = sandbox.run_shell(script, |spec| {
        spec.namespaces.network = Namespace::Own;
        spec.read_only = true;
        spec.masked_paths = ["/proc/version", "/proc/tty", "/proc/nothing"].map(String::from).into();
        spec.read_only_paths = ["/proc/sys", "/proc/nothing"].map(String::from).into();
        spec.sysctls = vec![("net.ipv4.ip_forward".into(), "1".into())];
        let shm = Source::New { kind: "tmpfs".into(), data: "size=1m".into() };
        spec.mounts.push(Mount { source: shm, target: "/dev/shm".into(), flags: 0, propagation: 0 });
    });
    // Its own processes only: shell, ls, grep, and a shell of the pipe at times.
    let (walls, processes) = ended.output().rsplit_once('\n').unwrap();
    assert_eq!(walls, "root\n0\n0\nsys\n1\n8\nshm\n1");
    assert!(processes.parse::<u32>().unwrap() <= 4, "{processes}");
}

/// A filter that has `call` fail with `errno`.
fn filter(call: i64, errno: u32) -> Seccomp {
    let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
        let mut bytes = vec![];
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&[jt, jf]);
        bytes.extend_from_slice(&k.to_ne_bytes());
        bytes
    };
    let program = [
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, call as u32),
        instruction(0x06, 0, 0, 0x0005_0000 | errno),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ];
    Seccomp { program: program.concat(), flags: 0 }
}

pub fn filter_blocks_a_call(sandbox: &mut Sandbox) {
    for no_new_privileges in [false, true] {
        let ended =
            sandbox.run_shell("mkdir /tmp/x || echo blocked; grep Seccomp: /proc/self/status", |spec| {
                spec.process.seccomp = Some(filter(libc::SYS_mkdir, libc::ENOTNAM as u32));
                spec.process.no_new_privileges = no_new_privileges;
                spec.process.user = User::Ids { uid: 1000, gid: 1000, groups: vec![] };
            });
        assert_eq!(ended.output(), "blocked\nSeccomp:\t2", "{no_new_privileges}");
    }
    let process = sandbox.program(&["true"]);
    let mut spec = sandbox.container(process);
    spec.process.seccomp = Some(Seccomp { program: vec![0xff; 8], flags: 0 });
    let refused = sandbox.start_fails(&spec).to_string();
    assert_eq!(refused, "cannot set the system call filter: invalid argument");
}

pub fn capabilities_are_what_was_given(sandbox: &mut Sandbox) {
    let mut sets = |change: fn(&mut ProcessSpec)| {
        let script = "grep -E '^(Cap|NoNew)' /proc/self/status | cut -f2";
        let ended = sandbox.run_shell(script, |spec| change(&mut spec.process));
        ended.output().lines().map(|line| u64::from_str_radix(line, 16).unwrap()).collect::<Vec<_>>()
    };
    // Inheritable, permitted, effective, bounding, ambient; no new privileges.
    let root = sets(|_| {});
    assert_eq!(root, [0, DEFAULT_CAPABILITIES, DEFAULT_CAPABILITIES, DEFAULT_CAPABILITIES, 0, 0]);
    let user = sets(|process| {
        process.user = User::Ids { uid: 7, gid: 7, groups: vec![] };
        process.no_new_privileges = true;
    });
    assert_eq!(user, [0, 0, 0, DEFAULT_CAPABILITIES, 0, 1]);
    let ambient = sets(|process| {
        process.user = User::Ids { uid: 7, gid: 7, groups: vec![] };
        let some = NET_BIND_SERVICE;
        process.capabilities = Capabilities {
            bounding: some | SYS_ADMIN,
            effective: some,
            inheritable: some,
            permitted: some,
            ambient: some,
        };
    });
    let some = NET_BIND_SERVICE;
    assert_eq!(ambient, [some, some, some, some | SYS_ADMIN, some, 0]);
    let none = sets(|process| process.capabilities = Capabilities::default());
    assert_eq!(none, [0, 0, 0, 0, 0, 0]);
}

pub fn images_cannot_lead_out(sandbox: &mut Sandbox) {
    // A link of the image's as a mount's target, and as the working directory.
    let file = Source::File { contents: b"bound\n".into(), mode: 0o644, uid: 0, gid: 0 };
    let ended = sandbox.run_shell("cat /up/file; cat /m/file; pwd", |spec| {
        spec.mounts.push(Mount { source: file, target: "/up/file".into(), flags: 0, propagation: 0 });
        spec.process.cwd = "/up".into();
    });
    assert_eq!(ended.status, ExitStatus::Code(0), "{ended:?}");
    assert_eq!(ended.stdout, "bound\nbound\n/m\n");
    // A descriptor of the agent's as the working directory.
    for fd in 3..10 {
        let process = sandbox.program(&["true"]);
        let mut spec = sandbox.container(process);
        spec.process.cwd = format!("/proc/self/fd/{fd}");
        let refused = sandbox.start_fails(&spec).to_string();
        assert!(refused.starts_with("chdir to cwd"), "{refused}");
    }
}

pub fn devices_are_filtered(sandbox: &mut Sandbox) {
    let allow = |kind, major, access| DeviceRule { allow: true, kind, major, minor: None, access };
    let rules = [
        allow(DeviceKind::Any, None, DeviceRule::MAKE),
        allow(DeviceKind::Character, Some(1), DeviceRule::READ | DeviceRule::WRITE),
    ];
    let script =
        "(mknod /tmp/vda b 254 0 && dd if=/tmp/vda of=/dev/null count=1) 2>/dev/null || echo refused";
    let filtered = |spec: &mut ContainerSpec| spec.device_filter = device_filter(&rules);
    assert_eq!(sandbox.run_shell(script, filtered).output(), "refused");
    let script = "echo x >/dev/null && head -c1 /dev/zero | wc -c; true </dev/tty || echo refused";
    assert_eq!(sandbox.run_shell(script, filtered).stdout, "1\nrefused\n");
    let script = "mknod /tmp/vda b 254 0 && dd if=/tmp/vda of=/dev/null count=1 2>/dev/null";
    assert_eq!(sandbox.run_shell(script, |_| {}).output(), "");
}

/// Calls the agent's port at its own machine and greets; what it hears is told.
const CALLER: &str = r#"
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void)
{
	unsigned cids[] = { VMADDR_CID_LOCAL, 3 };
	for (int i = 0; i < 2; i++) {
		struct sockaddr_vm to = { .svm_family = AF_VSOCK, .svm_cid = cids[i], .svm_port = 1024 };
		char greeting[16] = "rvmm\1\0\1\0", answer[64], hello[] = { 4, 0, 0, 0, 1, 0, 1, 1 };
		int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
		if (connect(fd, (void *)&to, sizeof to) < 0) {
			puts("refused");
			continue;
		}
		send(fd, greeting, 16, MSG_NOSIGNAL);
		send(fd, hello, sizeof hello, MSG_NOSIGNAL);
		puts(recv(fd, answer, sizeof answer, 0) > 0 ? "heard" : "refused");
	}
	return 0;
}
"#;

pub fn containers_cannot_call_the_agent(sandbox: &mut Sandbox) {
    if !crate::support::has_tool("gcc") {
        return;
    }
    let directory = crate::support::directory();
    let (source, program) = (directory.path().join("caller.c"), directory.path().join("caller"));
    std::fs::write(&source, CALLER).unwrap();
    crate::support::tool(
        "gcc",
        &["-static", "-s", "-o", program.to_str().unwrap(), source.to_str().unwrap()],
    );
    let contents = std::fs::read(program).unwrap();
    let ended = sandbox.run_shell("/caller", |spec| {
        let file = Source::File { contents, mode: 0o755, uid: 0, gid: 0 };
        spec.mounts.push(Mount { source: file, target: "/caller".into(), flags: 0, propagation: 0 });
    });
    assert_eq!(ended.output(), "refused\nrefused");
}
