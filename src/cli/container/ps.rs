//! `rvmm ps`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use serde_json::json;

use super::format::{Format, table};
use crate::container::config::{Isolation, Port};
use crate::container::records::{Record, Records, short};
use crate::container::state::{HealthStatus, State, Status, now_ns};
use crate::container::time;

/// Longest command that is shown.
const COMMAND_CHARS: usize = 20;

/// List containers
#[derive(clap::Args)]
pub struct PsArguments {
    /// Also those that do not run
    #[arg(short, long)]
    all: bool,
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    /// Whole ids and commands
    #[arg(long)]
    no_trunc: bool,
    /// The newest N, running or not
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,
    /// Only those with name=TEXT, id=TEXT, status=STATUS, label=NAME[=VALUE], ancestor=IMAGE, isolation=WALL or health=STATE
    #[arg(short, long, value_name = "FILTER")]
    filter: Vec<String>,
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
}

/// Lists containers.
pub fn run(arguments: &PsArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let mut found = vec![];
    for record in records.all()? {
        let by_status = arguments.filter.iter().any(|filter| filter.starts_with("status="));
        let wanted = arguments.all || arguments.last.is_some() || by_status || record.state.status.is_live();
        if wanted && matches(&record, &arguments.filter)? {
            found.push(record);
        }
    }
    // What nothing is known of but that it is there, and can be removed.
    let damaged = match arguments.filter.is_empty() && arguments.last.is_none() {
        true => records.damaged()?,
        false => vec![],
    };
    found.truncate(arguments.last.unwrap_or(usize::MAX));
    let id = |record: &Record| match arguments.no_trunc {
        true => record.config.id.clone(),
        false => short(&record.config.id).to_owned(),
    };
    if arguments.quiet {
        found.iter().for_each(|record| println!("{}", id(record)));
        for (id, _) in &damaged {
            println!("{}", if arguments.no_trunc { id } else { short(id) });
        }
        return Ok(ExitCode::SUCCESS);
    }
    let now = now_ns();
    let mut rows = vec![];
    for record in &found {
        let config = &record.config;
        let mut command = format!("\"{}\"", config.process.args.join(" "));
        if !arguments.no_trunc && command.chars().count() > COMMAND_CHARS {
            command = command.chars().take(COMMAND_CHARS - 2).collect::<String>() + "…\"";
        }
        let row = [
            id(record),
            config.image.clone(),
            command,
            format!("{} ago", time::words(Duration::from_nanos(now.saturating_sub(config.created_ns)))),
            status(&record.state, now),
            wall(config.isolation).into(),
            ports(&record.state.ports),
            config.name.clone(),
        ];
        if arguments.format == Format::Json {
            let [id, image, command, running_for, status, isolation, ports, names] = row;
            let created = time::rfc3339(config.created_ns);
            println!(
                "{}",
                json!({"ID": id, "Image": image, "Command": command, "CreatedAt": created, "RunningFor": running_for,
                    "Status": status, "State": record.state.status, "Isolation": isolation, "Ports": ports,
                    "Names": names, "Labels": config.labels})
            );
        } else {
            rows.push(row.to_vec());
        }
    }
    for (id, _) in &damaged {
        let id = if arguments.no_trunc { id } else { short(id) };
        if arguments.format == Format::Json {
            println!("{}", json!({"ID": id, "Status": "Damaged", "State": "damaged"}));
        } else {
            let mut row = vec![String::new(); 8];
            row[0] = id.to_owned();
            row[4] = "Damaged".into();
            rows.push(row);
        }
    }
    if arguments.format == Format::Table {
        const HEADER: [&str; 8] =
            ["CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "ISOLATION", "PORTS", "NAMES"];
        print!("{}", table(&HEADER, &rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn wall(isolation: Isolation) -> &'static str {
    match isolation {
        Isolation::Native => "native",
        Isolation::Microvm => "microvm",
    }
}

fn matches(record: &Record, filters: &[String]) -> anyhow::Result<bool> {
    for filter in filters {
        let Some((key, value)) = filter.split_once('=') else { bail!("{filter:?} is not NAME=VALUE") };
        let config = &record.config;
        let matched = match key {
            "name" => config.name.contains(value),
            "id" => config.id.starts_with(value),
            "status" => serde_json::to_value(record.state.status)? == value,
            "ancestor" => config.image == value || config.image_id.contains(value),
            "isolation" => wall(config.isolation) == value,
            "label" => match value.split_once('=') {
                Some((name, value)) => config.labels.get(name).is_some_and(|found| found == value),
                None => config.labels.contains_key(value),
            },
            "health" => match &record.state.health {
                Some(health) => serde_json::to_value(health.status)? == value,
                None => value == "none",
            },
            _ => bail!("there is no filter {key:?}"),
        };
        if !matched {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A status in words.
fn status(state: &State, now: u64) -> String {
    let since = |ns: Option<u64>| time::words(Duration::from_nanos(now.saturating_sub(ns.unwrap_or(now))));
    let code = state.exit_code.unwrap_or(0);
    match state.status {
        Status::Created => "Created".into(),
        Status::Exited => format!("Exited ({code}) {} ago", since(state.finished_ns)),
        Status::Restarting => format!("Restarting ({code}) {} ago", since(state.finished_ns)),
        Status::Paused => format!("Up {} (Paused)", since(state.started_ns)),
        Status::Running => {
            let health = match state.health.as_ref().map(|health| health.status) {
                Some(HealthStatus::Starting) => " (health: starting)",
                Some(HealthStatus::Healthy) => " (healthy)",
                Some(HealthStatus::Unhealthy) => " (unhealthy)",
                None => "",
            };
            format!("Up {}{health}", since(state.started_ns))
        }
    }
}

/// Published ports in words.
fn ports(ports: &[Port]) -> String {
    let one = |port: &Port| {
        let ip = port.host_ip.map_or("0.0.0.0".into(), |ip| ip.to_string());
        format!("{ip}:{}->{}/{}", port.host, port.container, port.protocol)
    };
    ports.iter().map(one).collect::<Vec<_>>().join(", ")
}
