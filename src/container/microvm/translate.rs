//! From an OCI specification to what the agent applies: numbers, flags and bytes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType,
    LinuxResources, Mount, PosixRlimitType, Process, Spec,
};

use crate::container::backend::Error;
use crate::container::spec::{compile_seccomp, load_flags};
use crate::guest::devices::{DeviceKind, DeviceRule, device_filter};
use crate::guest::spec::{
    self as agent, Capabilities, ContainerSpec, Limits, Namespace, Namespaces, ProcessSpec, Rlimit, Seccomp,
    Source, Stdio, User,
};

/// Mount options and the `MS_*` flags that they set or clear.
const FLAGS: [(&str, bool, u64); 23] = [
    ("ro", true, libc::MS_RDONLY),
    ("rw", false, libc::MS_RDONLY),
    ("nosuid", true, libc::MS_NOSUID),
    ("suid", false, libc::MS_NOSUID),
    ("nodev", true, libc::MS_NODEV),
    ("dev", false, libc::MS_NODEV),
    ("noexec", true, libc::MS_NOEXEC),
    ("exec", false, libc::MS_NOEXEC),
    ("sync", true, libc::MS_SYNCHRONOUS),
    ("async", false, libc::MS_SYNCHRONOUS),
    ("dirsync", true, libc::MS_DIRSYNC),
    ("mand", true, libc::MS_MANDLOCK),
    ("nomand", false, libc::MS_MANDLOCK),
    ("noatime", true, libc::MS_NOATIME),
    ("atime", false, libc::MS_NOATIME),
    ("nodiratime", true, libc::MS_NODIRATIME),
    ("diratime", false, libc::MS_NODIRATIME),
    ("relatime", true, libc::MS_RELATIME),
    ("norelatime", false, libc::MS_RELATIME),
    ("strictatime", true, libc::MS_STRICTATIME),
    ("nostrictatime", false, libc::MS_STRICTATIME),
    ("bind", true, libc::MS_BIND),
    ("rbind", true, libc::MS_BIND | libc::MS_REC),
];

/// Mount options that set a propagation.
const PROPAGATION: [(&str, u64); 8] = [
    ("private", libc::MS_PRIVATE),
    ("rprivate", libc::MS_PRIVATE | libc::MS_REC),
    ("shared", libc::MS_SHARED),
    ("rshared", libc::MS_SHARED | libc::MS_REC),
    ("slave", libc::MS_SLAVE),
    ("rslave", libc::MS_SLAVE | libc::MS_REC),
    ("unbindable", libc::MS_UNBINDABLE),
    ("runbindable", libc::MS_UNBINDABLE | libc::MS_REC),
];

/// Longest file that is handed over by its contents rather than shared.
const FILE_BYTES_MAX: u64 = 256 << 10;

/// Flags, propagation and what is left of mount options.
fn options(options: &[String]) -> (u64, u64, String) {
    let (mut flags, mut propagation, mut data) = (0, 0, vec![]);
    for option in options {
        if let Some((_, set, bits)) = FLAGS.iter().find(|(name, ..)| name == option) {
            flags = if *set { flags | bits } else { flags & !bits };
        } else if let Some((_, bits)) = PROPAGATION.iter().find(|(name, _)| name == option) {
            propagation = *bits;
        } else {
            data.push(option.as_str());
        }
    }
    (flags, propagation, data.join(","))
}

/// A path of the host that the guest is to see, and where it will be in the sandbox's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// On the host.
    pub path: PathBuf,
    /// In the share.
    pub name: String,
}

/// What the agent gets, and what has to be shared with the guest for it.
#[derive(Debug)]
pub struct Translation {
    /// The container, with no root and no streams yet.
    pub spec: ContainerSpec,
    /// Paths to be shared.
    pub shared: Vec<Shared>,
}

/// Translates the container `id`. Files in `files`, which rvmm has written, are handed over by their contents.
pub fn container(id: &str, spec: &Spec, files: &Path, reaper: bool) -> Result<Translation, Error> {
    let linux = spec.linux().clone().unwrap_or_default();
    let process = spec.process().as_ref().ok_or_else(|| unsupported("a container without a process"))?;
    let mut shared = vec![];
    let mounts = spec.mounts().iter().flatten();
    let mounts =
        mounts.map(|asked| mount(id, asked, files, &mut shared)).collect::<Result<Vec<_>, Error>>()?;
    let mut devices = agent::default_devices();
    for device in linux.devices().iter().flatten() {
        devices.push(self::device(device)?);
    }
    let root = spec.root().as_ref();
    let strings = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    let spec = ContainerSpec {
        id: id.into(),
        root: agent::Root::default(),
        read_only: root.and_then(|root| root.readonly()).unwrap_or(false),
        propagation: 0,
        mounts,
        devices,
        links: agent::default_links(),
        device_filter: linux.resources().as_ref().map(device_rules).unwrap_or_default(),
        process: self::process(process, &linux)?,
        namespaces: namespaces(&linux),
        hostname: spec.hostname().clone(),
        domainname: spec.domainname().clone(),
        masked_paths: strings(linux.masked_paths()),
        read_only_paths: strings(linux.readonly_paths()),
        sysctls: sorted(linux.sysctl()),
        limits: linux.resources().as_ref().map(limits).unwrap_or_default(),
        reaper,
    };
    Ok(Translation { spec, shared })
}

fn sorted(map: &Option<HashMap<String, String>>) -> Vec<(String, String)> {
    let mut list: Vec<_> = map.iter().flatten().map(|(name, value)| (name.clone(), value.clone())).collect();
    list.sort();
    list
}

fn mount(id: &str, asked: &Mount, files: &Path, shared: &mut Vec<Shared>) -> Result<agent::Mount, Error> {
    let target = text(asked.destination())?;
    let (mut flags, propagation, data) = options(asked.options().as_deref().unwrap_or_default());
    let kind = asked.typ().as_deref().unwrap_or_default();
    let source = match (kind, asked.source()) {
        ("bind" | "none" | "", Some(path)) => {
            flags |= libc::MS_BIND;
            match written_file(path, files)? {
                Some(file) => file,
                None => {
                    let name = format!("{}/{}", id, shared.len());
                    shared.push(Shared { path: path.clone(), name: name.clone() });
                    Source::Share { path: name }
                }
            }
        }
        // A guest has version 2 only.
        ("cgroup" | "cgroup2", _) => Source::New { kind: "cgroup2".into(), data: String::new() },
        ("proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue", _) => Source::New { kind: kind.into(), data },
        _ => return Err(unsupported(&format!("a mount of type {kind:?} in a microVM"))),
    };
    Ok(agent::Mount { source, target, flags, propagation })
}

/// A file below `files`, by its contents.
fn written_file(path: &Path, files: &Path) -> Result<Option<Source>, Error> {
    let failed = |source: std::io::Error| Error::failed(format!("read {path:?}"), source);
    if !path.starts_with(files) {
        return Ok(None);
    }
    let metadata = path.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > FILE_BYTES_MAX {
        return Ok(None);
    }
    let contents = std::fs::read(path).map_err(failed)?;
    Ok(Some(Source::File { contents, mode: 0o644, uid: 0, gid: 0 }))
}

fn device(device: &oci_spec::runtime::LinuxDevice) -> Result<agent::Device, Error> {
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => libc::S_IFCHR,
        LinuxDeviceType::B => libc::S_IFBLK,
        LinuxDeviceType::P => libc::S_IFIFO,
        LinuxDeviceType::A => return Err(unsupported("a device of any type")),
    };
    let number = |number: i64| u32::try_from(number).map_err(|_| unsupported("a device with such a number"));
    Ok(agent::Device {
        path: text(device.path())?,
        mode: kind | device.file_mode().unwrap_or(0o666),
        major: number(device.major())?,
        minor: number(device.minor())?,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

/// Which devices may be opened and made, as a program; empty where nothing is said.
fn device_rules(resources: &LinuxResources) -> Vec<u8> {
    let rules: Vec<DeviceRule> = resources.devices().iter().flatten().map(device_rule).collect();
    if rules.is_empty() { vec![] } else { device_filter(&rules) }
}

fn device_rule(rule: &LinuxDeviceCgroup) -> DeviceRule {
    // A negative number means any.
    let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
    let letters = rule.access().as_deref().unwrap_or("rwm");
    let bit = |letter, bit| if letters.contains(letter) { bit } else { 0 };
    DeviceRule {
        allow: rule.allow(),
        kind: match rule.typ() {
            Some(LinuxDeviceType::B) => DeviceKind::Block,
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => DeviceKind::Character,
            _ => DeviceKind::Any,
        },
        major: number(rule.major()),
        minor: number(rule.minor()),
        access: bit('m', DeviceRule::MAKE) | bit('r', DeviceRule::READ) | bit('w', DeviceRule::WRITE),
    }
}

/// Translates a process; its streams are set by the caller.
pub fn process(process: &Process, linux: &Linux) -> Result<ProcessSpec, Error> {
    let user = process.user();
    let capabilities = process.capabilities().as_ref().map(capabilities).unwrap_or_default();
    let seccomp = linux.seccomp().as_ref().map(|filter| -> Result<Seccomp, Error> {
        let program = compile_seccomp(filter).map_err(|error| Error::failed("compile a filter", error))?;
        Ok(Seccomp { program, flags: load_flags(filter) })
    });
    Ok(ProcessSpec {
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: text(process.cwd())?,
        user: User::Ids {
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
        },
        umask: user.umask(),
        stdio: Stdio::default(),
        rlimits: process
            .rlimits()
            .iter()
            .flatten()
            .map(|limit| Rlimit { resource: resource(limit.typ()), soft: limit.soft(), hard: limit.hard() })
            .collect(),
        capabilities,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        seccomp: seccomp.transpose()?,
        oom_score_adj: process.oom_score_adj(),
    })
}

fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

fn capabilities(sets: &LinuxCapabilities) -> Capabilities {
    let mask = |set: &Option<std::collections::HashSet<Capability>>| {
        set.iter().flatten().fold(0, |mask, capability| mask | 1 << number(*capability))
    };
    Capabilities {
        bounding: mask(sets.bounding()),
        effective: mask(sets.effective()),
        inheritable: mask(sets.inheritable()),
        permitted: mask(sets.permitted()),
        ambient: mask(sets.ambient()),
    }
}

/// Number of a capability, as capabilities(7) and the kernel's `linux/capability.h` count them.
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

fn namespaces(linux: &Linux) -> Namespaces {
    let of = |kind: LinuxNamespaceType| {
        let own = linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == kind);
        if own { Namespace::Own } else { Namespace::Sandbox }
    };
    Namespaces {
        pid: of(LinuxNamespaceType::Pid),
        uts: of(LinuxNamespaceType::Uts),
        ipc: of(LinuxNamespaceType::Ipc),
        // The VM's devices are the container's.
        network: Namespace::Sandbox,
        cgroup: of(LinuxNamespaceType::Cgroup),
    }
}

/// Limits inside the guest, in the terms of control group v2.
fn limits(resources: &LinuxResources) -> Limits {
    let positive = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).filter(|v| *v > 0);
    let mut limits = Limits::default();
    if let Some(memory) = resources.memory() {
        limits.memory_bytes = positive(memory.limit());
        limits.memory_low_bytes = positive(memory.reservation());
        // Version 1 counts memory and swap together.
        limits.swap_bytes = memory
            .swap()
            .and_then(|both| u64::try_from(both).ok())
            .zip(limits.memory_bytes)
            .map(|(both, memory)| both.saturating_sub(memory));
    }
    if let Some(cpu) = resources.cpu() {
        limits.cpu_quota = positive(cpu.quota()).map(|quota| (quota, cpu.period().unwrap_or(100_000)));
        // The same scale as runc's: 2 to 262144 shares are 1 to 10000 of weight.
        limits.cpu_weight = cpu
            .shares()
            .filter(|shares| *shares >= 2)
            .map(|shares| 1 + (shares.min(262_144) - 2) * 9999 / 262_142);
    }
    limits.pids = resources.pids().as_ref().and_then(|pids| positive(Some(pids.limit())));
    limits
}

fn text(path: &Path) -> Result<String, Error> {
    path.to_str().map(Into::into).ok_or_else(|| unsupported(&format!("the path {path:?}, which is no UTF-8")))
}

fn unsupported(what: &str) -> Error {
    Error::Unsupported { what: format!("microVMs do not support {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_become_flags_propagation_and_data() {
        let list = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let (flags, propagation, data) = options(&list("nosuid,ro,rw,mode=755,rprivate,size=64k"));
        assert_eq!(flags, libc::MS_NOSUID);
        assert_eq!(propagation, libc::MS_PRIVATE | libc::MS_REC);
        assert_eq!(data, "mode=755,size=64k");
    }

    #[test]
    fn capabilities_are_numbered_as_the_kernel_does() {
        let header: &[(Capability, u32)] =
            &[(Capability::Chown, 0), (Capability::SysAdmin, 21), (Capability::CheckpointRestore, 40)];
        for (capability, expected) in header {
            assert_eq!(number(*capability), *expected);
        }
    }
}
