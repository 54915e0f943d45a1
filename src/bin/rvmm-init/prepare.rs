//! From what the host says to a plan that a child can follow.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::MountFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rvmm::guest::protocol::Failure;
use rvmm::guest::spec::{ContainerSpec, Device, Mount, ProcessSpec, Source, Stdio, Volume};
use rvmm::guest::user::Identity;

use crate::disks::Disks;
use crate::failure::Doing;
use crate::inside::READ_ONLY;
use crate::plan::{DevicePlan, MountPlan, MountWhat, Outcome, Plan, RootPlan, StdioPlan};
use crate::root::c_string;
use crate::share::{self, Share};
use crate::system::{Strings, set_mount_attributes};

/// What a new mount takes of `MS_*`.
const NEW_FLAGS: u64 = libc::MS_RDONLY
    | libc::MS_NOSUID
    | libc::MS_NODEV
    | libc::MS_NOEXEC
    | libc::MS_SYNCHRONOUS
    | libc::MS_DIRSYNC
    | libc::MS_NOSYMFOLLOW
    | libc::MS_NOATIME
    | libc::MS_NODIRATIME
    | libc::MS_RELATIME
    | libc::MS_STRICTATIME
    | libc::MS_LAZYTIME;

/// What of `MS_*` a bound mount has as `MOUNT_ATTR_*`.
const ATTRIBUTES: [(u64, u64); 8] = [
    (libc::MS_RDONLY, READ_ONLY),
    (libc::MS_NOSUID, 2),
    (libc::MS_NODEV, 4),
    (libc::MS_NOEXEC, 8),
    (libc::MS_NOATIME, 0x10),
    (libc::MS_STRICTATIME, 0x20),
    (libc::MS_NODIRATIME, 0x80),
    (libc::MS_NOSYMFOLLOW, 0x20_0000),
];

/// Where programs are looked for if the environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How the agent's program is told that it is a container's reaper.
pub const REAPER: &str = "rvmm-reaper";

/// The agent's ends of a process's streams.
pub struct Ends {
    /// Standard input's, to write to.
    pub stdin: Option<OwnedFd>,
    /// Standard output's, to read from.
    pub stdout: Option<OwnedFd>,
    /// Standard error's.
    pub stderr: Option<OwnedFd>,
}

/// A plan for a process, without anything that its container adds.
pub fn process(
    spec: &ProcessSpec,
    identity: Identity,
    last_capability: u32,
) -> Result<(Plan, Ends), Failure> {
    let program = spec.args.first().ok_or_else(|| Failure::Invalid("no command specified".into()))?;
    if program.is_empty() {
        return Err(Failure::NotFound { program: program.clone() });
    }
    let mut environment = c_strings(&spec.env)?;
    if !spec.env.iter().any(|variable| variable.starts_with("HOME=")) {
        environment.push(c_string(&format!("HOME={}", identity.home))?);
    }
    let (stdio, ends) = standard_streams(&spec.stdio)?;
    if let Some(seccomp) = &spec.seccomp
        && (seccomp.program.is_empty() || seccomp.program.len() % 8 != 0)
    {
        return Err(Failure::Invalid("a system call filter that is none".into()));
    }
    let cwd = if spec.cwd.is_empty() { "/" } else { &spec.cwd };
    if !cwd.starts_with('/') {
        return Err(Failure::Invalid(format!("the working directory {cwd:?} is not absolute")));
    }
    let plan = Plan {
        joins: Vec::new(),
        own_cgroup: false,
        hostname: None,
        domainname: None,
        loopback: None,
        oom_score_adj: spec.oom_score_adj.map(|value| value.to_string().into_bytes()),
        root: None,
        stdio,
        rlimits: spec.rlimits.clone(),
        umask: spec.umask.unwrap_or(0o22) & 0o777,
        cwd: c_string(cwd)?,
        make_cwd: false,
        uid: Uid::from_raw(identity.uid),
        gid: Gid::from_raw(identity.gid),
        groups: identity.groups.into_iter().map(Gid::from_raw).collect(),
        capabilities: spec.capabilities,
        last_capability,
        no_new_privileges: spec.no_new_privileges,
        seccomp: spec.seccomp.as_ref().map(|filter| (filter.program.clone(), filter.flags)),
        candidates: candidates(program, &spec.env)?,
        reaper: None,
        arguments: Strings::new(c_strings(&spec.args)?),
        environment: Strings::new(environment),
        outcome: Outcome::default(),
    };
    Ok((plan, ends))
}

/// Puts a small init before the program of a plan.
pub fn with_reaper(plan: &mut Plan, spec: &ProcessSpec) -> Result<(), Failure> {
    let open = || rustix::fs::open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let program = open().doing(|| "open the agent's own program".to_owned())?;
    let arguments = plan.candidates.iter().map(|candidate| {
        let mut arguments = vec![c_string(REAPER)?, candidate.clone()];
        arguments.extend(c_strings(&spec.args)?);
        Ok(Strings::new(arguments))
    });
    plan.reaper = Some((program, arguments.collect::<Result<_, Failure>>()?));
    Ok(())
}

fn c_strings(strings: &[String]) -> Result<Vec<CString>, Failure> {
    strings.iter().map(|string| c_string(string)).collect()
}

/// Where a program may be, as a shell looks for it. Directories that are not absolute do not count.
fn candidates(program: &str, environment: &[String]) -> Result<Vec<CString>, Failure> {
    if program.contains('/') {
        return Ok(vec![c_string(program)?]);
    }
    let path = environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(PATH);
    let directories = path.split(':').filter(|directory| directory.starts_with('/'));
    directories.map(|directory| c_string(&format!("{directory}/{program}"))).collect()
}

fn standard_streams(stdio: &Stdio) -> Result<(StdioPlan, Ends), Failure> {
    let mut ends = Ends { stdin: None, stdout: None, stderr: None };
    match stdio {
        Stdio::Terminal { size, .. } => {
            Ok((StdioPlan::Terminal { size: (size.rows, size.columns), console: false }, ends))
        }
        Stdio::Streams { stdin, stdout, stderr } => {
            let make = || -> rustix::io::Result<_> {
                let stdin = side(stdin.is_some(), true, &mut ends.stdin)?;
                let stdout = side(stdout.is_some(), false, &mut ends.stdout)?;
                Ok([stdin, stdout, side(stderr.is_some(), false, &mut ends.stderr)?])
            };
            let mut make = make;
            let files = make().doing(|| "make the standard streams".to_owned())?;
            Ok((StdioPlan::Files(files), ends))
        }
    }
}

/// A process's side of a stream: a pipe whose other end goes to `end`, or `/dev/null`.
fn side(is_pipe: bool, is_input: bool, end: &mut Option<OwnedFd>) -> rustix::io::Result<(OwnedFd, bool)> {
    if !is_pipe {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        return Ok((null, false));
    }
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (its, ours) = if is_input { (reader, writer) } else { (writer, reader) };
    rustix::io::ioctl_fionbio(&ours, true)?;
    *end = Some(ours);
    Ok((its, true))
}

/// A plan for the file system of a container, whose root is mounted at `root`. Small files are put into `directory`.
pub fn file_system(
    spec: &ContainerSpec,
    root: &Path,
    disks: &mut Disks,
    share: &Share,
) -> Result<RootPlan, Failure> {
    let mut mounts = Vec::with_capacity(spec.mounts.len());
    for (index, mount) in spec.mounts.iter().enumerate() {
        mounts.push(plan_mount(mount, index, root, disks, share)?);
    }
    let devices = spec.devices.iter().map(plan_device).collect::<Result<_, _>>()?;
    let links = spec.links.iter().map(|(path, target)| Ok((c_string(path)?, c_string(target)?)));
    let sysctls = spec
        .sysctls
        .iter()
        .map(|(name, value)| Ok((c_string(&sysctl_path(name)?)?, value.clone().into_bytes())));
    Ok(RootPlan {
        path: c_string(&root.to_string_lossy())?,
        mounts,
        devices,
        links: links.collect::<Result<_, Failure>>()?,
        sysctls: sysctls.collect::<Result<_, Failure>>()?,
        masked: c_strings(&spec.masked_paths)?,
        read_only: c_strings(&spec.read_only_paths)?,
        is_read_only: spec.read_only,
        propagation: spec.propagation,
    })
}

/// The file of a kernel parameter.
pub fn sysctl_path(name: &str) -> Result<String, Failure> {
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    let is_plain = !path.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    if is_plain {
        Ok(format!("/proc/sys/{path}"))
    } else {
        Err(Failure::Invalid(format!("{name:?} is no kernel parameter")))
    }
}

fn plan_mount(
    mount: &Mount,
    index: usize,
    root: &Path,
    disks: &mut Disks,
    share: &Share,
) -> Result<MountPlan, Failure> {
    if !mount.target.starts_with('/') {
        return Err(Failure::Invalid(format!("mount destination {:?} not absolute", mount.target)));
    }
    let recursive = mount.flags & libc::MS_REC != 0;
    let attributes = ATTRIBUTES
        .iter()
        .filter(|(flag, _)| mount.flags & flag != 0)
        .fold(0, |all, (_, attribute)| all | attribute);
    let tree = |tree: OwnedFd, is_directory: bool| {
        if attributes != 0 {
            set_mount_attributes(&tree, recursive, attributes)
                .doing(|| format!("set the flags of the mount at {}", mount.target))?;
        }
        Ok(MountWhat::Tree(tree, is_directory))
    };
    let what = match &mount.source {
        Source::New { kind, data } => {
            let flags = MountFlags::from_bits_retain((mount.flags & NEW_FLAGS) as u32);
            MountWhat::New(c_string(kind)?, flags, c_string(data)?)
        }
        Source::Share { path } => {
            let (found, is_directory) = share.tree(path, recursive)?;
            tree(found, is_directory)?
        }
        Source::Inside { path } => MountWhat::Inside(c_string(path)?, recursive, attributes),
        Source::File { contents, mode, uid, gid } => {
            let path = root.with_file_name(format!("f{index}"));
            let file = write_file(&path, contents, *mode, *uid, *gid)
                .doing(|| format!("write the file for {}", mount.target))?;
            tree(file, false)?
        }
        Source::Memory { name, data } => {
            check_id(name)?;
            tree(share::memory(name, data)?, true)?
        }
        Source::Volume(volume) => tree(mount_volume(volume, mount.flags, disks)?, true)?,
    };
    Ok(MountPlan { what, target: c_string(&mount.target)?, propagation: mount.propagation })
}

/// A file system of a disk, mounted nowhere yet.
fn mount_volume(volume: &Volume, flags: u64, disks: &mut Disks) -> Result<OwnedFd, Failure> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    };
    let device = disks.find(volume)?;
    let mount = || -> rustix::io::Result<OwnedFd> {
        let context = fsopen(volume.kind.as_str(), FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), "source", &device)?;
        if flags & libc::MS_RDONLY != 0 {
            fsconfig_set_flag(context.as_fd(), "ro")?;
        }
        for option in volume.data.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value)?,
                None => fsconfig_set_flag(context.as_fd(), option)?,
            }
        }
        fsconfig_create(context.as_fd())?;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    mount().doing(|| {
        format!("mount partition {} of disk {:?} as {}", volume.partition, volume.disk, volume.kind)
    })
}

/// A file in memory, as a mount without a place.
fn write_file(path: &Path, contents: &[u8], mode: u32, uid: u32, gid: u32) -> std::io::Result<OwnedFd> {
    // One that an earlier start has left is bound somewhere, perhaps.
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path)?.write_all(contents)?;
    chown(path, Some(uid), Some(gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))?;
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok(share::copy_of(found, false)?.0)
}

fn plan_device(device: &Device) -> Result<DevicePlan, Failure> {
    let kind = FileType::from_raw_mode(device.mode);
    if !matches!(kind, FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo) {
        return Err(Failure::Invalid(format!("{} is to be no device", device.path)));
    }
    let owner = (device.uid, device.gid) != (0, 0);
    Ok(DevicePlan {
        path: c_string(&device.path)?,
        kind,
        mode: device.mode & 0o7777,
        number: rustix::fs::makedev(device.major, device.minor),
        owner: owner.then(|| (Uid::from_raw(device.uid), Gid::from_raw(device.gid))),
    })
}

/// Names that become names of directories.
pub fn check_id(id: &str) -> Result<(), Failure> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let is_right = !id.is_empty()
        && id.len() <= ContainerSpec::ID_BYTES_MAX
        && id.bytes().all(is_plain)
        && !id.starts_with(['.', '-']);
    if is_right { Ok(()) } else { Err(Failure::Invalid(format!("{id:?} is no name"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(program: &str, environment: &[&str]) -> Vec<String> {
        let environment: Vec<_> = environment.iter().map(|variable| (*variable).to_owned()).collect();
        let found = candidates(program, &environment).unwrap();
        found.into_iter().map(|path| path.into_string().unwrap()).collect()
    }

    #[test]
    fn program_is_looked_for_in_the_environments_path() {
        assert_eq!(paths("sh", &["PATH=/a:/b"]), ["/a/sh", "/b/sh"]);
        assert_eq!(paths("sh", &["PATH=.::bin:/b"]), ["/b/sh"]);
        assert_eq!(paths("sh", &[]).last().unwrap(), "/bin/sh");
        assert_eq!(paths("./sh", &["PATH=/a"]), ["./sh"]);
        assert!(paths("sh", &["PATH="]).is_empty());
    }

    #[test]
    fn kernel_parameters_cannot_lead_elsewhere() {
        assert_eq!(sysctl_path("net.ipv4.ip_forward").unwrap(), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/mtu").unwrap(), "/proc/sys/net/ipv4/conf/eth0.1/mtu");
        for name in ["", "../x", "a..b", "/etc/passwd", "a/./b"] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }

    #[test]
    fn ids_are_plain_names() {
        for id in ["a", "b-c_d.e", "0123456789abcdef"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "-a", "a b", &"a".repeat(129)] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
