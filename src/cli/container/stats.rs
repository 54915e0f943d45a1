//! `rvmm stats` and `rvmm top`.

use std::io::{IsTerminal, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;

use super::format::{Format, binary_size, decimal_size, table};
use crate::container::backend::Stats;
use crate::container::prepare;
use crate::container::records::{Record, Records, short};

/// Between two looks at the counters.
const INTERVAL: Duration = Duration::from_secs(1);

/// Show what running containers use
#[derive(clap::Args)]
pub struct StatsArguments {
    /// Once, and not again and again
    #[arg(long)]
    no_stream: bool,
    /// How to print
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: Format,
    /// The containers [default: all that run]
    containers: Vec<String>,
}

/// Show the processes of a container
#[derive(clap::Args)]
pub struct TopArguments {
    /// The container
    container: String,
}

struct Sample {
    record: Record,
    stats: Stats,
    at: Instant,
}

/// Shows what containers use.
pub fn stats(arguments: &StatsArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let mut earlier = samples(arguments, records)?;
    loop {
        std::thread::sleep(INTERVAL);
        let samples = samples(arguments, records)?;
        let rows: Vec<Vec<String>> = samples.iter().map(|sample| row(sample, &earlier)).collect();
        if arguments.format == Format::Json {
            for row in &rows {
                println!(
                    "{}",
                    json!({"ID": row[0], "Name": row[1], "CPUPerc": row[2], "MemUsage": row[3], "MemPerc": row[4],
                        "NetIO": row[5], "BlockIO": row[6], "PIDs": row[7]})
                );
            }
        } else {
            const HEADER: [&str; 8] = [
                "CONTAINER ID",
                "NAME",
                "CPU %",
                "MEM USAGE / LIMIT",
                "MEM %",
                "NET I/O",
                "BLOCK I/O",
                "PIDS",
            ];
            if !arguments.no_stream && stdout().is_terminal() {
                // Home, and clear what is below.
                print!("\x1b[H\x1b[J");
            }
            print!("{}", table(&HEADER, &rows));
        }
        if arguments.no_stream {
            return Ok(ExitCode::SUCCESS);
        }
        earlier = samples;
    }
}

fn samples(arguments: &StatsArguments, records: &Records) -> anyhow::Result<Vec<Sample>> {
    let ids = match &arguments.containers[..] {
        [] => records.all()?.into_iter().map(|record| record.config.id).collect(),
        names => names.iter().map(|name| records.find(name)).collect::<Result<Vec<_>, _>>()?,
    };
    let mut samples = vec![];
    for id in ids {
        let Ok(record) = records.read(&id) else { continue };
        if !record.state.status.is_live() {
            continue;
        }
        // It may end at any moment.
        if let Ok(stats) = prepare::open(records, &record).and_then(|mut backend| Ok(backend.stats()?)) {
            samples.push(Sample { record, stats, at: Instant::now() });
        }
    }
    Ok(samples)
}

fn row(sample: &Sample, earlier: &[Sample]) -> Vec<String> {
    let Sample { record, stats, at } = sample;
    let before = earlier.iter().find(|before| before.record.config.id == record.config.id);
    let cpu = before.and_then(|before| {
        let used = stats.cpu_ns?.checked_sub(before.stats.cpu_ns?)?;
        Some(100.0 * used as f64 / at.duration_since(before.at).as_nanos().max(1) as f64)
    });
    let limit = stats.memory_limit_bytes;
    let unknown = || "--".to_owned();
    let percent =
        stats.memory_bytes.zip(limit).map(|(used, limit)| 100.0 * used as f64 / limit.max(1) as f64);
    let sum =
        |of: fn(&crate::container::backend::InterfaceStats) -> u64| stats.interfaces.iter().map(of).sum();
    vec![
        short(&record.config.id).into(),
        record.config.name.clone(),
        cpu.map_or_else(unknown, |cpu| format!("{cpu:.2}%")),
        format!(
            "{} / {}",
            stats.memory_bytes.map_or_else(unknown, binary_size),
            limit.map_or_else(|| "no limit".into(), binary_size)
        ),
        percent.map_or_else(unknown, |percent| format!("{percent:.2}%")),
        format!(
            "{} / {}",
            decimal_size(sum(|interface| interface.rx_bytes)),
            decimal_size(sum(|interface| interface.tx_bytes))
        ),
        format!(
            "{} / {}",
            stats.block_read_bytes.map_or_else(unknown, decimal_size),
            stats.block_write_bytes.map_or_else(unknown, decimal_size)
        ),
        stats.pids.map_or_else(unknown, |pids| pids.to_string()),
    ]
}

/// Shows a container's processes.
pub fn top(arguments: &TopArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let record = records.read(&records.find(&arguments.container)?)?;
    if !record.state.status.is_live() {
        anyhow::bail!("container {} is not running", arguments.container);
    }
    let processes = prepare::open(records, &record)?.processes()?;
    let rows: Vec<Vec<String>> = processes
        .into_iter()
        .map(|process| {
            let seconds = process.cpu_ms / 1000;
            vec![
                process.uid.to_string(),
                process.pid.to_string(),
                process.parent.to_string(),
                process.state.to_string(),
                format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
                process.command,
            ]
        })
        .collect();
    print!("{}", table(&["UID", "PID", "PPID", "STAT", "TIME", "CMD"], &rows));
    Ok(ExitCode::SUCCESS)
}
