//! Filters are run here, by an interpreter of the few instructions that they have.

use super::*;
use crate::container::spec::{CapabilitySet, Profile};

const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const X86_64: u32 = AUDIT_X86_64;

/// What a program says to a call (linux/filter.h, seccomp(2)).
fn run(program: &[u8], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = vec![];
    data.extend(number.to_ne_bytes());
    data.extend(arch.to_ne_bytes());
    data.extend(0u64.to_ne_bytes());
    args.iter().for_each(|arg| data.extend(arg.to_ne_bytes()));
    let word = |at: usize| u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
    let (mut at, mut accumulator) = (0, 0u32);
    let mut memory = [0u32; 16];
    loop {
        let one = &program[at * 8..at * 8 + 8];
        let code = u16::from_ne_bytes([one[0], one[1]]);
        let value = u32::from_ne_bytes(one[4..].try_into().unwrap());
        at += 1;
        let mut jump = |condition: bool| at += usize::from(if condition { one[2] } else { one[3] });
        match code {
            LOAD => accumulator = word(value as usize),
            JUMP_EQUAL => jump(accumulator == value),
            JUMP_GREATER => jump(accumulator > value),
            JUMP_GREATER_OR_EQUAL => jump(accumulator >= value),
            0x45 => jump(accumulator & value != 0),
            0x54 => accumulator &= value,
            0x02 => memory[value as usize] = accumulator,
            0x60 => accumulator = memory[value as usize],
            0x05 => at += value as usize,
            RETURN => return value,
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn default_for(capabilities: u64) -> Vec<u8> {
    let profile = Profile::default_of_docker().unwrap();
    compile_seccomp(&profile.apply(CapabilitySet(capabilities), (6, 1)).unwrap()).unwrap()
}

fn number(name: &str) -> u32 {
    ScmpSyscall::from_name_by_arch(name, ScmpArch::X8664).unwrap().as_raw_syscall().unsigned_abs()
}

#[test]
fn default_filter_allows_refuses_and_does_not_know() {
    let program = default_for(0xa804_25fb);
    let say = |name: &str, first: u64| run(&program, X86_64, number(name), [first, 0, 0, 0, 0, 0]);
    for name in ["read", "write", "openat", "execve", "futex", "exit_group", "chroot", "ptrace", "statx"] {
        assert_eq!(say(name, 0), ALLOW, "{name}");
    }
    for name in ["mount", "keyctl", "bpf", "unshare", "reboot", "kexec_load", "init_module", "io_uring_setup"]
    {
        assert_eq!(say(name, 0), ERRNO | 1, "{name}");
    }
    assert_eq!(say("clone3", 0), ERRNO | 38);
    assert_eq!(say("clone", libc::SIGCHLD as u64), ALLOW);
    assert_eq!(say("clone", libc::CLONE_NEWUSER as u64), ERRNO | 1);
    assert_eq!(say("personality", 0), ALLOW);
    assert_eq!(say("personality", 0x0040_0000), ERRNO | 1);
    assert_eq!(say("socket", libc::AF_INET as u64), ALLOW);
    assert_eq!(say("socket", libc::AF_PACKET as u64), ALLOW);
    assert_eq!(say("socket", libc::AF_VSOCK as u64), ERRNO | 1);
    assert_eq!(say("socket", libc::AF_ALG as u64), ERRNO | 1);
}

#[test]
fn capabilities_open_what_belongs_to_them() {
    let program = default_for(1 << 21);
    let say = |name: &str| run(&program, X86_64, number(name), [u64::MAX; 6]);
    assert_eq!((say("mount"), say("clone"), say("clone3")), (ALLOW, ALLOW, ALLOW));
    assert_eq!(say("chroot"), ERRNO | 1);
}

#[test]
fn calls_newer_than_the_profile_are_unknown_and_not_forbidden() {
    let program = default_for(0);
    assert_eq!(run(&program, X86_64, 4000, [0; 6]), ERRNO | 38);
    assert_eq!(run(&program, AUDIT_I386, 4000, [0; 6]), ERRNO | 38);
    // The other old way in, and an architecture that is none.
    assert_eq!(run(&program, X86_64, X32_BIT, [0; 6]), ALLOW);
    assert_ne!(run(&program, X86_64, X32_BIT | 4000, [0; 6]), ALLOW);
    assert_ne!(run(&program, 0x1234, 0, [0; 6]), ALLOW);
    // 32 bits: read is 3, and mount 21.
    assert_eq!(run(&program, AUDIT_I386, 3, [0; 6]), ALLOW);
    assert_eq!(run(&program, AUDIT_I386, 21, [0; 6]), ERRNO | 1);
}

#[test]
fn profile_that_allows_by_default_has_nothing_in_front() {
    let text = br#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
        "syscalls":[{"names":["mkdir","no_such_call"],"action":"SCMP_ACT_ERRNO","errnoRet":12},
                    {"names":["dup2"],"action":"SCMP_ACT_ERRNO",
                     "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":2,"op":"SCMP_CMP_EQ"}]}]}"#;
    let seccomp = Profile::parse(text).unwrap().apply(CapabilitySet(0), (6, 1)).unwrap();
    let program = compile_seccomp(&seccomp).unwrap();
    assert_eq!(run(&program, X86_64, number("mkdir"), [0; 6]), ERRNO | 12);
    assert_eq!(run(&program, X86_64, 4000, [0; 6]), ALLOW);
    let dup2 = |first| run(&program, X86_64, number("dup2"), [first, 0, 0, 0, 0, 0]);
    assert_eq!((dup2(0), dup2(1), dup2(2)), (ALLOW, ERRNO | 1, ERRNO | 1));
}

#[test]
fn impossible_rules_are_errors() {
    let compile = |text: &str| {
        compile_seccomp(&Profile::parse(text.as_bytes()).unwrap().apply(CapabilitySet(0), (6, 1)).unwrap())
    };
    let index = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
        "args":[{"index":99999999999,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#;
    assert!(matches!(compile(index), Err(FilterError::Library { .. })));
    let errno = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_ERRNO",
        "errnoRet":70000}]}"#;
    assert!(matches!(compile(errno), Err(FilterError::Unsupported(_))));
}

#[test]
fn flags_are_the_bits_of_the_system_call() {
    let text = br#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_LOG"],"syscalls":[]}"#;
    let seccomp = Profile::parse(text).unwrap().apply(CapabilitySet(0), (6, 1)).unwrap();
    assert_eq!(load_flags(&seccomp), 2);
}

#[test]
fn programs_are_kept_and_broken_ones_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("filters");
    let seccomp = |capabilities| {
        Profile::default_of_docker().unwrap().apply(CapabilitySet(capabilities), (6, 1)).unwrap()
    };
    let first = compile_seccomp_cached(&seccomp(0), &cache).unwrap();
    assert_eq!(first, compile_seccomp(&seccomp(0)).unwrap());
    let files = || fs::read_dir(&cache).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    assert_eq!(files().len(), 1);
    // What is kept is what is used.
    fs::write(&files()[0], &first[..first.len() - 8]).unwrap();
    assert_eq!(compile_seccomp_cached(&seccomp(0), &cache).unwrap().len(), first.len() - 8);
    for broken in [&b""[..], b"1234567", &vec![0; (INSTRUCTIONS_MAX + 1) * 8]] {
        fs::write(&files()[0], broken).unwrap();
        assert_eq!(compile_seccomp_cached(&seccomp(0), &cache).unwrap(), first);
    }
    compile_seccomp_cached(&seccomp(1 << 21), &cache).unwrap();
    assert_eq!(files().len(), 2);
    // Where nothing can be kept it is made all the same.
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert_eq!(compile_seccomp_cached(&seccomp(0), &file).unwrap(), first);
}
