//! `rvmm inspect` and `rvmm port`.

use std::process::ExitCode;

use serde_json::{Value, json};

use crate::container::config::{ContainerConfig, Isolation, MountSource, NetworkMode, Restart};
use crate::container::records::{self, Record, Records};
use crate::container::state::Status;
use crate::container::time;
use crate::image::store::Store;

/// Show all that is known of containers and images, as JSON
#[derive(clap::Args)]
pub struct InspectArguments {
    /// Only containers, or only images
    #[arg(long = "type", value_name = "WHAT", value_parser = ["container", "image"])]
    kind: Option<String>,
    /// Names or ids
    #[arg(required = true)]
    names: Vec<String>,
}

/// Show published ports
#[derive(clap::Args)]
pub struct PortArguments {
    /// The container
    container: String,
    /// Only this port: 80, 53/udp
    port: Option<String>,
}

/// Shows containers and images.
pub fn run(arguments: &InspectArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let (mut found, mut code) = (vec![], ExitCode::SUCCESS);
    for name in &arguments.names {
        match one(arguments.kind.as_deref(), name, records) {
            Ok(value) => found.push(value),
            Err(error) => {
                crate::cli::report(&error, false);
                code = ExitCode::FAILURE;
            }
        }
    }
    println!("{}", serde_json::to_string_pretty(&found)?);
    Ok(code)
}

fn one(kind: Option<&str>, name: &str, records: &Records) -> anyhow::Result<Value> {
    if kind != Some("image") {
        match records.find(name) {
            Ok(id) => return Ok(container(&records.read(&id)?, records)),
            Err(records::Error::Unknown(_)) if kind.is_none() => {}
            Err(error) => return Err(error.into()),
        }
    }
    let store = Store::open(&records.roots().images())?;
    match super::run::find(&store, name)? {
        Some(image) => Ok(crate::cli::image::describe(&store, &image)?),
        None if kind.is_none() => anyhow::bail!("there is no container or image {name:?}"),
        None => anyhow::bail!("there is no image {name:?}"),
    }
}

/// A container in Docker's form. Secrets have a name here and nothing else.
fn container(record: &Record, records: &Records) -> Value {
    let Record { config, state } = record;
    let when = |ns: Option<u64>| ns.map_or("0001-01-01T00:00:00Z".into(), time::rfc3339);
    let networks: serde_json::Map<String, Value> = state
        .endpoints
        .iter()
        .map(|endpoint| {
            let address = endpoint.addresses.first();
            let value = json!({
                "IPAddress": address.map(|(ip, _)| ip.to_string()).unwrap_or_default(),
                "IPPrefixLen": address.map_or(0, |(_, len)| *len),
                "Gateway": endpoint.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
                "MacAddress": endpoint.mac,
                "Interface": endpoint.interface,
            });
            (endpoint.network.clone(), value)
        })
        .collect();
    json!({
        "Id": config.id,
        "Name": config.name,
        "Created": time::rfc3339(config.created_ns),
        "Path": config.process.args.first(),
        "Args": config.process.args.get(1..),
        "Isolation": config.isolation,
        "State": {
            "Status": state.status,
            "Running": matches!(state.status, Status::Running | Status::Paused),
            "Paused": state.status == Status::Paused,
            "Restarting": state.status == Status::Restarting,
            "OOMKilled": state.oom_killed,
            "Pid": state.pid.unwrap_or(0),
            "SupervisorPid": state.supervisor.unwrap_or(0),
            "ExitCode": state.exit_code.unwrap_or(0),
            "Error": state.error.clone().unwrap_or_default(),
            "StartedAt": when(state.started_ns),
            "FinishedAt": when(state.finished_ns),
            "Health": state.health.as_ref().map(|health| json!({
                "Status": health.status,
                "FailingStreak": health.failing_streak,
                "Log": health.log.iter().map(|check| json!({
                    "Start": time::rfc3339(check.started_ns),
                    "End": time::rfc3339(check.ended_ns),
                    "ExitCode": check.exit_code,
                    "Output": check.output,
                })).collect::<Vec<_>>(),
            })),
        },
        "Image": config.image_id,
        "RestartCount": state.restarts,
        "LogPath": records.roots().container(&config.id).join("log"),
        "Config": {
            "Hostname": config.hostname.as_deref().unwrap_or_else(|| records::short(&config.id)),
            "User": config.process.user,
            "Tty": config.process.terminal,
            "OpenStdin": config.process.stdin,
            "Env": config.process.env,
            "Cmd": config.process.args,
            "Image": config.image,
            "WorkingDir": config.process.cwd,
            "Labels": config.labels,
            "StopSignal": config.stop_signal,
            "StopTimeout": config.stop_timeout.as_secs(),
            "Healthcheck": config.health.as_ref().map(|health| json!({
                "Test": health.test,
                "Interval": health.interval.as_nanos() as u64,
                "Timeout": health.timeout.as_nanos() as u64,
                "StartPeriod": health.start_period.as_nanos() as u64,
                "Retries": health.retries,
            })),
        },
        "HostConfig": host_config(config),
        "Mounts": config.mounts.iter().map(|mount| {
            let (kind, name, source) = match &mount.source {
                MountSource::Bind { path, .. } => ("bind", None, path.display().to_string()),
                MountSource::Volume { name, .. } => {
                    ("volume", Some(name), records.roots().data.join("volumes").join(name).join("_data").display().to_string())
                }
                MountSource::Tmpfs { .. } => ("tmpfs", None, String::new()),
            };
            json!({"Type": kind, "Name": name, "Source": source, "Destination": mount.target, "RW": !mount.read_only})
        }).collect::<Vec<_>>(),
        "NetworkSettings": {
            "Networks": networks,
            "Ports": ports(record),
        },
    })
}

fn host_config(config: &ContainerConfig) -> Value {
    let limits = &config.limits;
    json!({
        "Isolation": match config.isolation { Isolation::Native => "native", Isolation::Microvm => "microvm" },
        "AutoRemove": config.auto_remove,
        "Privileged": config.security.privileged,
        "CapAdd": config.security.cap_add,
        "CapDrop": config.security.cap_drop,
        "ReadonlyRootfs": config.read_only,
        "Init": config.process.init,
        "Memory": limits.memory_bytes.unwrap_or(0),
        "MemorySwap": limits.memory_swap_bytes.unwrap_or(0),
        "MemoryReservation": limits.memory_reservation_bytes.unwrap_or(0),
        "NanoCpus": limits.cpu_millis.unwrap_or(0).saturating_mul(1_000_000),
        "CpuShares": limits.cpu_shares.unwrap_or(0),
        "CpusetCpus": limits.cpuset.clone().unwrap_or_default(),
        "PidsLimit": limits.pids,
        "BlkioWeight": limits.io_weight.unwrap_or(0),
        "ShmSize": limits.shm_bytes.unwrap_or(64 << 20),
        "NetworkMode": match &config.network.mode {
            NetworkMode::None => "none".into(),
            NetworkMode::Host => "host".into(),
            NetworkMode::Container(id) => format!("container:{id}"),
            NetworkMode::Networks(joins) => joins.first().map_or_else(String::new, |join| join.network.clone()),
        },
        "RestartPolicy": match config.restart {
            Restart::No => json!({"Name": "no", "MaximumRetryCount": 0}),
            Restart::OnFailure(most) => json!({"Name": "on-failure", "MaximumRetryCount": most}),
            Restart::Always => json!({"Name": "always", "MaximumRetryCount": 0}),
            Restart::UnlessStopped => json!({"Name": "unless-stopped", "MaximumRetryCount": 0}),
        },
        "Sysctls": config.sysctls,
        "Dns": config.network.dns,
        "ExtraHosts": config.network.hosts.iter().map(|(name, ip)| format!("{name}:{ip}")).collect::<Vec<_>>(),
        "Secrets": config.secrets.iter().map(|secret| &secret.name).collect::<Vec<_>>(),
    })
}

fn ports(record: &Record) -> Value {
    let mut map = serde_json::Map::new();
    for port in &record.state.ports {
        let key = format!("{}/{}", port.container, port.protocol);
        let ip = port.host_ip.map_or("0.0.0.0".into(), |ip| ip.to_string());
        let entry = map.entry(key).or_insert_with(|| json!([]));
        if let Value::Array(list) = entry {
            list.push(json!({"HostIp": ip, "HostPort": port.host.to_string()}));
        }
    }
    map.into()
}

/// Shows published ports.
pub fn port(arguments: &PortArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let record = records.read(&records.find(&arguments.container)?)?;
    let mut shown = false;
    for port in &record.state.ports {
        let inside = format!("{}/{}", port.container, port.protocol);
        let outside = format!("{}:{}", port.host_ip.map_or("0.0.0.0".into(), |ip| ip.to_string()), port.host);
        match &arguments.port {
            None => println!("{inside} -> {outside}"),
            Some(wanted) if *wanted == inside || format!("{wanted}/tcp") == inside => println!("{outside}"),
            Some(_) => continue,
        }
        shown = true;
    }
    match &arguments.port {
        Some(port) if !shown => anyhow::bail!("port {port} of {} is not published", arguments.container),
        _ => Ok(ExitCode::SUCCESS),
    }
}
