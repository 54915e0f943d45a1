//! A system call filter as the kernel takes it: a program of classic BPF.
//!
//! libseccomp writes the program, as for runc and crun. In front of it stand a few instructions of our own, for calls that
//! are newer than the profile and the library: a profile that says "not permitted" by default would say so for them, too,
//! and libraries that try the newest call first only go on to an older one if they hear "no such call".

use std::fs;
use std::io::{Read, Seek};
use std::path::Path;

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use sha2::{Digest, Sha256};

/// Most instructions that a program may have (`BPF_MAXINSNS`).
const INSTRUCTIONS_MAX: usize = 4096;
/// Changes when this file makes another program of the same profile.
const CACHE_VERSION: u32 = 1;
/// Bytes of one: code, two jumps, a value.
const INSTRUCTION_BYTES: usize = 8;

/// Why a filter cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// libseccomp does not take it.
    #[error("libseccomp cannot {what}")]
    Library {
        /// What it was to do.
        what: String,
        /// What it said.
        #[source]
        source: libseccomp::error::SeccompError,
    },
    /// The program cannot be had from libseccomp.
    #[error("cannot read the filter's program")]
    Export(#[source] std::io::Error),
    /// It is longer than the kernel takes.
    #[error("the filter has {0} instructions, and the kernel takes {INSTRUCTIONS_MAX}")]
    TooLong(usize),
    /// What is asked for has no place here.
    #[error("{0} is not supported in a filter")]
    Unsupported(String),
}

/// The flags that a filter is to be loaded with, as bits of seccomp(2).
pub fn load_flags(seccomp: &LinuxSeccomp) -> u32 {
    let bit = |flag: &LinuxSeccompFilterFlag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // Only of meaning with notification.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    };
    seccomp.flags().iter().flatten().map(|flag| bit(flag) as u32).fold(0, |flags, bit| flags | bit)
}

/// The program: instructions of 8 bytes, in the order and byte order in which seccomp(2) takes them.
pub fn compile_seccomp(seccomp: &LinuxSeccomp) -> Result<Vec<u8>, FilterError> {
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let library = |what: &str| {
        let what = what.to_owned();
        move |source| FilterError::Library { what, source }
    };
    let mut context = ScmpFilterContext::new(default).map_err(library("make a filter"))?;
    // A tree instead of a list: a call meets 10 instructions and not 300.
    let _ = context.set_ctl_optimize(2);
    for arch in seccomp.architectures().iter().flatten() {
        context.add_arch(architecture(*arch)).map_err(library("add an architecture"))?;
    }
    for rule in seccomp.syscalls().iter().flatten() {
        let effect = action(rule.action(), rule.errno_ret())?;
        if effect == default {
            continue;
        }
        for name in rule.names() {
            // One that the library does not know is left to the default, or to the instructions in front.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            for comparisons in conditions(rule.args().as_deref().unwrap_or_default()) {
                let add = context.add_rule_conditional(effect, call, &comparisons);
                add.map_err(library(&format!("add a rule for {name}")))?;
            }
        }
    }
    let program = export(&context)?;
    let mut whole = newer_calls(seccomp)?;
    whole.extend(program);
    let instructions = whole.len() / INSTRUCTION_BYTES;
    if instructions > INSTRUCTIONS_MAX {
        return Err(FilterError::TooLong(instructions));
    }
    Ok(whole)
}

/// The same, from a directory where programs are kept by what they were made from.
///
/// libseccomp takes longer for Docker's profile than everything else that a container's start takes together. The
/// directory belongs to this user alone, since what is in it is believed. Where it cannot be used, the program is made.
pub fn compile_seccomp_cached(seccomp: &LinuxSeccomp, cache: &Path) -> Result<Vec<u8>, FilterError> {
    let Some(path) = cache_name(seccomp).map(|name| cache.join(name)) else {
        return compile_seccomp(seccomp);
    };
    if let Ok(program) = fs::read(&path)
        && !program.is_empty()
        && program.len() % INSTRUCTION_BYTES == 0
        && program.len() / INSTRUCTION_BYTES <= INSTRUCTIONS_MAX
    {
        return Ok(program);
    }
    let program = compile_seccomp(seccomp)?;
    if let Err(error) = keep(&program, cache, &path) {
        tracing::debug!("the filter is not kept in {}: {error}", cache.display());
    }
    Ok(program)
}

/// Of everything that the program depends on.
fn cache_name(seccomp: &LinuxSeccomp) -> Option<String> {
    let library = libseccomp::ScmpVersion::current().ok()?;
    let mut hash = Sha256::new();
    hash.update(format!("{CACHE_VERSION} {library:?} "));
    hash.update(serde_json::to_vec(seccomp).ok()?);
    let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{digits}.bpf"))
}

fn keep(program: &[u8], cache: &Path, path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(cache)?;
    let temporary = tempfile::NamedTempFile::new_in(cache)?;
    fs::write(temporary.path(), program)?;
    temporary.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Comparisons that hold together; those of one argument with several values hold one by one.
fn conditions(args: &[LinuxSeccompArg]) -> Vec<Vec<ScmpArgCompare>> {
    let comparisons: Vec<ScmpArgCompare> = args.iter().map(comparison).collect();
    let mut indices: Vec<usize> = args.iter().map(|arg| arg.index()).collect();
    indices.sort_unstable();
    if indices.windows(2).any(|pair| pair[0] == pair[1]) {
        comparisons.into_iter().map(|one| vec![one]).collect()
    } else {
        vec![comparisons]
    }
}

fn comparison(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let operator = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        // `value` is the mask and `valueTwo` what must be left under it.
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            let mask = ScmpCompareOp::MaskedEqual(arg.value());
            return ScmpArgCompare::new(index(arg), mask, arg.value_two().unwrap_or(0));
        }
    };
    ScmpArgCompare::new(index(arg), operator, arg.value())
}

/// Arguments have numbers up to 5; a larger one is for the library to refuse.
fn index(arg: &LinuxSeccompArg) -> u32 {
    u32::try_from(arg.index()).unwrap_or(u32::MAX)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, FilterError> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    // 12 bits are what the kernel keeps of it.
    let errno = i32::try_from(errno).ok().filter(|errno| *errno < 4096);
    let errno = errno.ok_or_else(|| FilterError::Unsupported("an error number above 4095".into()));
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno?),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno? as u16),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(FilterError::Unsupported("SCMP_ACT_NOTIFY".into()));
        }
    })
}

fn architecture(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// The library writes to a descriptor.
fn export(context: &ScmpFilterContext) -> Result<Vec<u8>, FilterError> {
    let memory = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|errno| FilterError::Export(errno.into()))?;
    let what = "write the filter's program".to_owned();
    context.export_bpf(&memory).map_err(|source| FilterError::Library { what, source })?;
    let mut file = std::fs::File::from(memory);
    let mut program = vec![];
    file.rewind().and_then(|()| file.read_to_end(&mut program)).map_err(FilterError::Export)?;
    Ok(program)
}

/// Numbers of calls of the two older ways into an x86 kernel have their highest bits apart from those of the newest.
const X32_BIT: u32 = 0x4000_0000;
/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` of linux/audit.h.
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_I386: u32 = 0x4000_0003;

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;
/// `SECCOMP_RET_ERRNO` with ENOSYS.
const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS as u32;

fn instruction(code: u16, if_true: u8, if_false: u8, value: u32) -> [u8; INSTRUCTION_BYTES] {
    let mut bytes = [0; INSTRUCTION_BYTES];
    bytes[..2].copy_from_slice(&code.to_ne_bytes());
    bytes[2] = if_true;
    bytes[3] = if_false;
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    bytes
}

/// Instructions that say "no such call" for numbers above all that the profile knows, and else fall through.
fn newer_calls(seccomp: &LinuxSeccomp) -> Result<Vec<u8>, FilterError> {
    let refuses = matches!(
        seccomp.default_action(),
        LinuxSeccompAction::ScmpActErrno
            | LinuxSeccompAction::ScmpActKill
            | LinuxSeccompAction::ScmpActKillThread
            | LinuxSeccompAction::ScmpActKillProcess
    );
    if !refuses || seccomp.default_errno_ret() == Some(libc::ENOSYS as u32) {
        return Ok(vec![]);
    }
    let last = |arch| {
        let names = seccomp.syscalls().iter().flatten().flat_map(|rule| rule.names());
        let numbers = names.filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok());
        numbers.map(ScmpSyscall::as_raw_syscall).filter(|number| *number >= 0).max()
    };
    let (Some(last_64), Some(last_32)) = (last(ScmpArch::X8664), last(ScmpArch::X86)) else {
        return Ok(vec![]);
    };
    // `struct seccomp_data`: number at 0, architecture at 4.
    let program = [
        instruction(LOAD, 0, 0, 4),
        instruction(JUMP_EQUAL, 0, 3, AUDIT_X86_64),
        instruction(LOAD, 0, 0, 0),
        instruction(JUMP_GREATER_OR_EQUAL, 5, 0, X32_BIT),
        instruction(JUMP_GREATER, 3, 4, last_64.unsigned_abs()),
        instruction(JUMP_EQUAL, 0, 3, AUDIT_I386),
        instruction(LOAD, 0, 0, 0),
        instruction(JUMP_GREATER, 0, 1, last_32.unsigned_abs()),
        instruction(RETURN, 0, 0, NO_SUCH_CALL),
    ];
    Ok(program.concat())
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
