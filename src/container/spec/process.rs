//! The process: user, environment, working directory, capabilities, resource limits.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    LinuxCapabilities, LinuxCapabilitiesBuilder, PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process,
    ProcessBuilder, User, UserBuilder,
};

use super::{CapabilitySet, Error, Identity, Users};
use crate::container::config;

/// Where programs are looked for unless the image says otherwise.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a process is made from; the container's own, or one of `exec`.
pub struct ProcessInputs<'a> {
    /// What is run.
    pub process: &'a config::Process,
    /// Its capabilities if it were root's.
    pub capabilities: CapabilitySet,
    /// Whether set-user-id programs have no effect.
    pub no_new_privileges: bool,
    /// The container's host name.
    pub hostname: &'a str,
    /// Users of the root file system.
    pub users: &'a Users,
}

/// A process as runtimes understand it.
pub fn build(inputs: &ProcessInputs) -> Result<Process, Error> {
    let process = inputs.process;
    if process.args.first().is_none_or(String::is_empty) {
        return Err(Error::NoCommand);
    }
    let strings = process.args.iter().chain(&process.env).chain([&process.cwd, &process.user]);
    if strings.into_iter().any(|string| string.contains('\0')) {
        return Err(Error::Nul);
    }
    let identity = inputs.users.resolve(&process.user, &process.groups)?;
    let mut built = ProcessBuilder::default()
        .terminal(process.terminal)
        .user(user(&identity)?)
        .args(process.args.clone())
        .env(environment(process, &identity, inputs.hostname))
        .cwd(working_directory(&process.cwd)?)
        .no_new_privileges(inputs.no_new_privileges)
        .rlimits(process.rlimits.iter().map(rlimit).collect::<Result<Vec<_>, _>>()?)
        .build()
        .map_err(Error::Oci)?;
    built.set_capabilities(Some(capabilities(inputs.capabilities, &identity)?));
    Ok(built)
}

fn user(identity: &Identity) -> Result<User, Error> {
    let user = UserBuilder::default().uid(identity.uid).gid(identity.gid);
    user.additional_gids(identity.groups.clone()).build().map_err(Error::Oci)
}

/// Root has the set; another user has none of it, and programs that carry capabilities can give it those of the set.
fn capabilities(set: CapabilitySet, identity: &Identity) -> Result<LinuxCapabilities, Error> {
    let own = if identity.uid == 0 { set } else { CapabilitySet::default() };
    LinuxCapabilitiesBuilder::default()
        .bounding(set.to_oci())
        .effective(own.to_oci())
        .permitted(own.to_oci())
        .inheritable(CapabilitySet::default().to_oci())
        .ambient(CapabilitySet::default().to_oci())
        .build()
        .map_err(Error::Oci)
}

/// Docker's variables, replaced and followed by those of image and user. `NAME` without a value takes one away.
fn environment(process: &config::Process, identity: &Identity, hostname: &str) -> Vec<String> {
    let mut env = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if process.terminal {
        env.push("TERM=xterm".into());
    }
    let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
    for variable in &process.env {
        let place = env.iter().position(|earlier| name(earlier) == name(variable));
        match (place, variable.contains('=')) {
            (Some(place), true) => env[place] = variable.clone(),
            (Some(place), false) => drop(env.remove(place)),
            (None, true) => env.push(variable.clone()),
            (None, false) => {}
        }
    }
    if !env.iter().any(|variable| name(variable) == "HOME") {
        env.push(format!("HOME={}", identity.home));
    }
    env
}

fn working_directory(cwd: &str) -> Result<PathBuf, Error> {
    if cwd.is_empty() {
        return Ok("/".into());
    }
    let path = Path::new(cwd);
    if !path.is_absolute() {
        return Err(Error::WorkingDirectory { path: path.into() });
    }
    Ok(path.components().filter(|component| *component != Component::CurDir).collect())
}

fn rlimit(limit: &config::Rlimit) -> Result<PosixRlimit, Error> {
    let kind = match limit.name.to_ascii_uppercase().as_str() {
        "AS" => PosixRlimitType::RlimitAs,
        "CORE" => PosixRlimitType::RlimitCore,
        "CPU" => PosixRlimitType::RlimitCpu,
        "DATA" => PosixRlimitType::RlimitData,
        "FSIZE" => PosixRlimitType::RlimitFsize,
        "LOCKS" => PosixRlimitType::RlimitLocks,
        "MEMLOCK" => PosixRlimitType::RlimitMemlock,
        "MSGQUEUE" => PosixRlimitType::RlimitMsgqueue,
        "NICE" => PosixRlimitType::RlimitNice,
        "NOFILE" => PosixRlimitType::RlimitNofile,
        "NPROC" => PosixRlimitType::RlimitNproc,
        "RSS" => PosixRlimitType::RlimitRss,
        "RTPRIO" => PosixRlimitType::RlimitRtprio,
        "RTTIME" => PosixRlimitType::RlimitRttime,
        "SIGPENDING" => PosixRlimitType::RlimitSigpending,
        "STACK" => PosixRlimitType::RlimitStack,
        _ => return Err(Error::Rlimit { name: limit.name.clone() }),
    };
    if limit.soft > limit.hard {
        return Err(Error::RlimitOrder { name: limit.name.clone(), soft: limit.soft, hard: limit.hard });
    }
    PosixRlimitBuilder::default().typ(kind).soft(limit.soft).hard(limit.hard).build().map_err(Error::Oci)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(process: config::Process) -> Result<Process, Error> {
        let process = config::Process { args: vec!["true".into()], ..process };
        let users = Users::parse(b"ann:x:1000:100::/home/ann:\n", b"");
        build(&ProcessInputs {
            process: &process,
            capabilities: CapabilitySet(0b11),
            no_new_privileges: false,
            hostname: "box",
            users: &users,
        })
    }

    fn env(process: config::Process) -> Vec<String> {
        built(process).unwrap().env().clone().unwrap()
    }

    #[test]
    fn environment_is_that_of_docker() {
        let plain = env(config::Process::default());
        assert_eq!(plain, [DEFAULT_PATH, "HOSTNAME=box", "HOME=/"]);
        let process = config::Process {
            user: "ann".into(),
            terminal: true,
            env: vec!["PATH=/bin".into(), "A=b=c".into(), "HOSTNAME".into(), "NONE".into(), "A=d".into()],
            ..config::Process::default()
        };
        assert_eq!(env(process), ["PATH=/bin", "TERM=xterm", "A=d", "HOME=/home/ann"]);
    }

    #[test]
    fn only_root_has_capabilities_and_all_have_the_bounding_set() {
        let sets = |user: &str| {
            let process = config::Process { user: user.into(), ..config::Process::default() };
            let capabilities = built(process).unwrap().capabilities().clone().unwrap();
            let count = |set: &Option<oci_spec::runtime::Capabilities>| set.as_ref().unwrap().len();
            (count(capabilities.bounding()), count(capabilities.effective()), count(capabilities.permitted()))
        };
        assert_eq!(sets(""), (2, 2, 2));
        assert_eq!(sets("ann"), (2, 0, 0));
    }

    #[test]
    fn impossible_processes_are_errors() {
        let with = |change: fn(&mut config::Process)| {
            let mut process = config::Process::default();
            change(&mut process);
            built(process).unwrap_err()
        };
        assert!(matches!(with(|p| p.cwd = "work".into()), Error::WorkingDirectory { .. }));
        assert!(matches!(with(|p| p.env = vec!["A=\0".into()]), Error::Nul));
        let rlimit = |name: &str, soft| config::Rlimit { name: name.into(), soft, hard: 5 };
        let limited = |limit| built(config::Process { rlimits: vec![limit], ..config::Process::default() });
        assert!(matches!(limited(rlimit("FUN", 1)), Err(Error::Rlimit { .. })));
        assert!(matches!(limited(rlimit("CORE", 6)), Err(Error::RlimitOrder { .. })));
        assert_eq!(limited(rlimit("core", 1)).unwrap().rlimits().as_ref().unwrap()[0].soft(), 1);
    }
}
