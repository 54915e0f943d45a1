//! From flags and an image's configuration to a container's.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use oci_spec::image::Config as ImageConfig;

use super::names;
use super::options::ContainerOptions;
use super::values::{DeviceRate, EnvVariable, ports};
use crate::container::config::{
    ContainerConfig, Health, IoLimit, Limits, Mount, MountSource, Network, NetworkJoin, NetworkMode, Process,
    Seccomp, Security,
};
use crate::container::records::Records;
use crate::container::{signal, state};
use crate::image::manifest::HealthCheck;

/// Seconds that `stop` waits, as Docker does.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
const HEALTH_TIME: Duration = Duration::from_secs(30);
const HEALTH_RETRIES: u32 = 3;

/// What an image says, as far as a container takes it over.
pub struct ImageFacts<'a> {
    /// The name by which the user called it.
    pub name: &'a str,
    /// Digest of its configuration.
    pub id: &'a str,
    /// The OCI part of its configuration.
    pub config: Option<&'a ImageConfig>,
    /// Its health check, which only Docker's form has.
    pub health: Option<Health>,
}

/// Makes the configuration of a container.
pub fn configure(
    options: &ContainerOptions,
    image: &ImageFacts<'_>,
    records: &Records,
) -> anyhow::Result<ContainerConfig> {
    let empty = ImageConfig::default();
    let of_image = image.config.unwrap_or(&empty);
    let id = names::new_id()?;
    let stop_signal =
        options.stop_signal.clone().or_else(|| of_image.stop_signal().clone()).unwrap_or("SIGTERM".into());
    if signal::number(&stop_signal).is_none() {
        bail!("there is no signal {stop_signal:?}");
    }
    if options.rm && options.restart != crate::container::config::Restart::No {
        bail!("--rm and --restart exclude each other");
    }
    let mut mounts: Vec<Mount> =
        options.volume.iter().chain(&options.mount).chain(&options.tmpfs).cloned().collect();
    for target in of_image.volumes().iter().flatten() {
        if !mounts.iter().any(|mount| mount.target == Path::new(target)) {
            let source = MountSource::Volume { name: String::new(), copy: true };
            mounts.push(Mount { source, target: target.into(), read_only: false });
        }
    }
    for mount in &mut mounts {
        if let MountSource::Volume { name, .. } = &mut mount.source
            && name.is_empty()
        {
            *name = names::new_id()?;
        }
    }
    let mut targets = std::collections::BTreeSet::new();
    if let Some(mount) = mounts.iter().find(|mount| !targets.insert(&mount.target)) {
        bail!("two mounts have the target {:?}", mount.target);
    }
    check_sources(options)?;
    let labels = of_image.labels().iter().flatten().map(|(name, value)| (name.clone(), value.clone()));
    let own = options.label.iter().map(|label| {
        let (name, value) = label.split_once('=').unwrap_or((label, ""));
        (name.to_owned(), value.to_owned())
    });
    Ok(ContainerConfig {
        name: match &options.name {
            Some(name) => name.clone(),
            None => names::free_name(records)?,
        },
        id,
        created_ns: state::now_ns(),
        isolation: options.isolation.into(),
        image: image.name.into(),
        image_id: image.id.into(),
        process: process(options, of_image)?,
        hostname: options.hostname.clone(),
        limits: limits(options)?,
        mounts,
        read_only: options.read_only,
        devices: options.device.clone(),
        security: security(options)?,
        network: network(options, of_image, records)?,
        sysctls: options.sysctl.iter().map(|pair| (pair.0.clone(), pair.1.clone())).collect(),
        restart: options.restart,
        auto_remove: options.rm,
        stop_signal,
        stop_timeout: options.stop_timeout.map_or(STOP_TIMEOUT, Duration::from_secs),
        health: health(options, image.health.clone()),
        labels: labels.chain(own).collect(),
        secrets: options.secret.clone(),
        template: options.template.into(),
    })
}

/// As Docker has it: `--volume` makes a directory of the host that is not there, `--mount` and `--secret` do not.
fn check_sources(options: &ContainerOptions) -> anyhow::Result<()> {
    let bind = |mount: &Mount| match &mount.source {
        MountSource::Bind { path, .. } => Some(path.clone()),
        _ => None,
    };
    for path in options.mount.iter().filter_map(bind) {
        std::fs::metadata(&path).with_context(|| format!("cannot find the source {path:?} of a mount"))?;
    }
    for secret in &options.secret {
        let path = &secret.source;
        std::fs::metadata(path).with_context(|| format!("cannot find the file {path:?} of a secret"))?;
    }
    for path in options.volume.iter().filter_map(bind).filter(|path| std::fs::symlink_metadata(path).is_err())
    {
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make the directory {path:?}"))?;
    }
    Ok(())
}

fn process(options: &ContainerOptions, image: &ImageConfig) -> anyhow::Result<Process> {
    let of_image = |list: &Option<Vec<String>>| list.clone().unwrap_or_default();
    // An entrypoint of one's own drops the image's command with the image's entrypoint.
    let (mut args, cmd) = match &options.entrypoint {
        Some(own) if own.is_empty() => (vec![], vec![]),
        Some(own) => (vec![own.clone()], vec![]),
        None => (of_image(image.entrypoint()), of_image(image.cmd())),
    };
    args.extend(if options.command().is_empty() { cmd } else { options.command().to_vec() });
    if args.is_empty() {
        bail!("the image names no command, and none was given");
    }
    if let Some(bad) = args.iter().find(|arg| arg.contains('\0')) {
        bail!("the argument {bad:?} contains a zero byte");
    }
    let mut env = of_image(image.env());
    for path in &options.env_file {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path:?}"))?;
        let lines =
            text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines {
            let variable: EnvVariable = line.parse().map_err(|error| anyhow::anyhow!("{path:?}: {error}"))?;
            set(&mut env, &variable);
        }
    }
    options.env.iter().for_each(|variable| set(&mut env, variable));
    let cwd = options.workdir.clone().or_else(|| image.working_dir().clone()).filter(|cwd| !cwd.is_empty());
    let cwd = cwd.unwrap_or("/".into());
    if !cwd.starts_with('/') {
        bail!("the working directory {cwd:?} is not an absolute path");
    }
    Ok(Process {
        args,
        env,
        cwd,
        user: options.user.clone().or_else(|| image.user().clone()).unwrap_or_default(),
        groups: options.group_add.clone(),
        terminal: options.tty,
        stdin: options.interactive,
        init: options.init,
        rlimits: options.ulimit.clone(),
    })
}

/// Sets a variable; one without a value here and none in our own environment is taken away.
pub fn set(env: &mut Vec<String>, EnvVariable(name, value): &EnvVariable) {
    let value = value.clone().or_else(|| std::env::var(name).ok());
    env.retain(|entry| entry.split('=').next() != Some(name));
    env.extend(value.map(|value| format!("{name}={value}")));
}

fn limits(options: &ContainerOptions) -> anyhow::Result<Limits> {
    let unlimited = |bytes: super::values::Bytes| Some(bytes.0).filter(|bytes| *bytes != u64::MAX);
    let memory = options.memory.and_then(unlimited);
    if memory.is_some_and(|bytes| bytes < 6 << 20) {
        bail!("a memory limit is at least 6 MiB");
    }
    let swap = options.memory_swap.map(|bytes| bytes.0);
    if let (Some(swap), Some(memory)) = (swap, memory)
        && swap < memory
    {
        bail!("--memory-swap is memory and swap together, so not less than --memory");
    }
    if swap.is_some() && memory.is_none() {
        bail!("--memory-swap needs --memory");
    }
    let mut disk_bytes = None;
    for pair in &options.storage_opt {
        match (pair.0.as_str(), pair.1.parse::<super::values::Bytes>()) {
            ("size", Ok(bytes)) => disk_bytes = Some(bytes.0),
            _ => bail!("--storage-opt {}={}: there is size=SIZE", pair.0, pair.1),
        }
    }
    let mut io: BTreeMap<&Path, IoLimit> = BTreeMap::new();
    type Set = fn(&mut IoLimit) -> &mut Option<u64>;
    let rates: [(&[DeviceRate], Set); 4] = [
        (&options.device_read_bps, |limit| &mut limit.read_bps),
        (&options.device_write_bps, |limit| &mut limit.write_bps),
        (&options.device_read_iops, |limit| &mut limit.read_iops),
        (&options.device_write_iops, |limit| &mut limit.write_iops),
    ];
    for (rates, of) in rates {
        for DeviceRate(device, rate) in rates {
            let limit = io.entry(device).or_insert_with(|| IoLimit {
                device: device.clone(),
                read_bps: None,
                write_bps: None,
                read_iops: None,
                write_iops: None,
            });
            *of(limit) = Some(*rate);
        }
    }
    Ok(Limits {
        memory_bytes: memory,
        memory_swap_bytes: swap,
        memory_reservation_bytes: options.memory_reservation.and_then(unlimited),
        cpu_millis: options.cpus.map(|cpus| cpus.0),
        cpu_shares: options.cpu_shares,
        cpuset: options.cpuset_cpus.clone(),
        pids: options.pids_limit.and_then(|pids| u64::try_from(pids).ok()).filter(|pids| *pids > 0),
        io_weight: options.blkio_weight,
        io: io.into_values().collect(),
        shm_bytes: options.shm_size.map(|bytes| bytes.0),
        disk_bytes,
    })
}

fn security(options: &ContainerOptions) -> anyhow::Result<Security> {
    let mut security = Security {
        privileged: options.privileged,
        cap_add: options.cap_add.clone(),
        cap_drop: options.cap_drop.clone(),
        ..Security::default()
    };
    for option in &options.security_opt {
        match option.split_once(['=', ':']).unwrap_or((option, "")) {
            ("seccomp", "unconfined") => security.seccomp = Seccomp::Unconfined,
            ("seccomp", path) if !path.is_empty() => {
                let path = std::path::absolute(path).with_context(|| format!("bad path {path:?}"))?;
                security.seccomp = Seccomp::File(path);
            }
            ("no-new-privileges", "" | "true") => security.no_new_privileges = true,
            ("no-new-privileges", "false") => security.no_new_privileges = false,
            ("systempaths", "unconfined") => security.unmask = true,
            // There is no such wall here to take down.
            ("apparmor" | "label", _) => {}
            _ => bail!(
                "unknown security option {option:?}: there are seccomp=unconfined, seccomp=FILE, no-new-privileges and \
                 systempaths=unconfined"
            ),
        }
    }
    Ok(security)
}

fn network(options: &ContainerOptions, image: &ImageConfig, records: &Records) -> anyhow::Result<Network> {
    let mut published: Vec<_> = options.ports().cloned().collect();
    if options.publish_all {
        for exposed in image.exposed_ports().iter().flatten() {
            let ports = ports(exposed).map_err(|error| anyhow::anyhow!("the image exposes {error}"))?;
            for port in ports.0 {
                // One that was published by itself has its place already.
                let is_there = published
                    .iter()
                    .any(|other| (other.container, &other.protocol) == (port.container, &port.protocol));
                if !is_there {
                    published.push(port);
                }
            }
        }
    }
    let named = |name: &str, first: bool| NetworkJoin {
        network: name.into(),
        ip: options.ip.filter(|_| first),
        mac: options.mac_address.clone().filter(|_| first),
        aliases: options.network_alias.clone(),
    };
    let mode = match &options.network[..] {
        [] => NetworkMode::Networks(vec![named("bridge", true)]),
        [one] if one == "none" => NetworkMode::None,
        [one] if one == "host" => NetworkMode::Host,
        [one] if one.starts_with("container:") => {
            NetworkMode::Container(records.find(&one["container:".len()..])?)
        }
        names => {
            if let Some(bad) = names
                .iter()
                .find(|name| ["none", "host"].contains(&name.as_str()) || name.starts_with("container:"))
            {
                bail!("the network {bad} excludes others");
            }
            let names = names.iter().enumerate();
            NetworkMode::Networks(
                names
                    .map(|(at, name)| named(if name == "default" { "bridge" } else { name }, at == 0))
                    .collect(),
            )
        }
    };
    if !matches!(mode, NetworkMode::Networks(_)) {
        let what = [
            (!options.publish.is_empty(), "--publish"),
            (options.ip.is_some(), "--ip"),
            (options.mac_address.is_some(), "--mac-address"),
            (!options.network_alias.is_empty(), "--network-alias"),
        ];
        if let Some((_, flag)) = what.iter().find(|(given, _)| *given) {
            bail!(
                "{flag} needs a network of the container's own, and --network {} is none",
                options.network[0]
            );
        }
        if options.hostname.is_some() && matches!(mode, NetworkMode::Container(_)) {
            bail!("--hostname is the other container's with --network container:…");
        }
    }
    Ok(Network {
        mode,
        ports: published,
        dns: options.dns.clone(),
        dns_search: options.dns_search.clone(),
        dns_options: options.dns_option.clone(),
        hosts: options.add_host.clone(),
    })
}

fn health(options: &ContainerOptions, image: Option<Health>) -> Option<Health> {
    if options.no_healthcheck {
        return None;
    }
    let mut health = match &options.health_cmd {
        Some(command) if command == "none" => return None,
        Some(command) => Health {
            test: vec!["CMD-SHELL".into(), command.clone()],
            interval: HEALTH_TIME,
            timeout: HEALTH_TIME,
            start_period: Duration::ZERO,
            retries: HEALTH_RETRIES,
        },
        None => image?,
    };
    if health.test.first().is_none_or(|kind| kind == "NONE") {
        return None;
    }
    let positive = |time: Duration, usual| if time.is_zero() { usual } else { time };
    health.interval = positive(options.health_interval.map_or(health.interval, |time| time.0), HEALTH_TIME);
    health.timeout = positive(options.health_timeout.map_or(health.timeout, |time| time.0), HEALTH_TIME);
    health.start_period = options.health_start_period.map_or(health.start_period, |time| time.0);
    health.retries = options.health_retries.unwrap_or(health.retries).max(1);
    Some(health)
}

/// An image's health check as a container's. What is 0 there is the default.
pub fn health_of_image(check: &HealthCheck) -> Health {
    let time = |ns: u64, usual| if ns == 0 { usual } else { Duration::from_nanos(ns) };
    Health {
        test: check.test.clone(),
        interval: time(check.interval, HEALTH_TIME),
        timeout: time(check.timeout, HEALTH_TIME),
        start_period: Duration::from_nanos(check.start_period),
        retries: if check.retries == 0 { HEALTH_RETRIES } else { check.retries },
    }
}
