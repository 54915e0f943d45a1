//! `rvmm volume`: directories that outlive containers.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::listing::{self, Format};
use crate::container::volume::{Error, Volume, Volumes};

/// Make, list and remove volumes
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume; its name is printed
    Create(CreateArguments),
    /// List volumes
    #[command(visible_alias = "list")]
    Ls(LsArguments),
    /// Show volumes, as JSON
    Inspect(InspectArguments),
    /// Remove volumes that no container uses, and everything in them
    #[command(visible_alias = "remove")]
    Rm(RmArguments),
    /// Remove volumes without a name of their own that no container uses
    Prune(PruneArguments),
}

/// Arguments of `volume create`.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// The volume's name [default: one that is made up]
    name: Option<String>,
    /// A label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = listing::label)]
    label: Vec<(String, String)>,
}

/// Arguments of `volume ls`.
#[derive(Debug, Args)]
pub struct LsArguments {
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    /// How they are printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Arguments of `volume inspect`.
#[derive(Debug, Args)]
pub struct InspectArguments {
    /// Names
    #[arg(required = true)]
    volume: Vec<String>,
    /// How they are printed: JSON in any case
    #[arg(long, value_parser = ["json"], hide = true)]
    format: Option<String>,
}

/// Arguments of `volume rm`.
#[derive(Debug, Args)]
pub struct RmArguments {
    /// Names
    #[arg(required = true)]
    volume: Vec<String>,
    /// No error for a volume that is not there
    #[arg(short, long)]
    force: bool,
}

/// Arguments of `volume prune`.
#[derive(Debug, Args)]
pub struct PruneArguments {
    /// Also volumes with a name
    #[arg(short, long)]
    all: bool,
    /// Do not ask
    #[arg(short, long)]
    force: bool,
}

/// Does it, with the volumes below this root.
pub fn run(command: &VolumeCommand, data_root: &Path) -> anyhow::Result<ExitCode> {
    let volumes = Volumes::new(data_root);
    match command {
        VolumeCommand::Create(arguments) => {
            let labels: BTreeMap<String, String> = arguments.label.iter().cloned().collect();
            println!("{}", volumes.create(arguments.name.as_deref(), &labels)?.name);
        }
        VolumeCommand::Ls(arguments) => ls(&volumes, arguments)?,
        VolumeCommand::Inspect(arguments) => {
            let mut found = vec![];
            for name in &arguments.volume {
                let volume = volumes.get(name)?.ok_or_else(|| Error::Missing(name.clone()))?;
                found.push(inspect(&volumes, &volume)?);
            }
            println!("{}", serde_json::to_string_pretty(&found)?);
        }
        VolumeCommand::Rm(arguments) => {
            let good = listing::each(&arguments.volume, |name| match volumes.remove(name) {
                Err(Error::Missing(_)) if arguments.force => Ok(name.to_owned()),
                other => other.map(|()| name.to_owned()),
            });
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        VolumeCommand::Prune(arguments) => {
            let which = if arguments.all { "all volumes" } else { "all volumes without a name" };
            if arguments.force
                || listing::confirm(&format!("This will remove {which} that no container uses."))?
            {
                let (names, bytes) = volumes.prune(|volume| arguments.all || volume.anonymous)?;
                if !names.is_empty() {
                    println!("Deleted Volumes:\n{}\n", names.join("\n"));
                }
                println!("Total reclaimed space: {}", decimal(bytes));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ls(volumes: &Volumes, arguments: &LsArguments) -> Result<(), Error> {
    let list = volumes.list()?;
    if arguments.quiet {
        list.iter().for_each(|volume| println!("{}", volume.name));
        return Ok(());
    }
    match arguments.format {
        Format::Json => {
            for volume in &list {
                let labels: Vec<String> =
                    volume.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                let line = json!({
                    "Name": volume.name, "Driver": "local", "Scope": "local", "Labels": labels.join(","),
                    "Mountpoint": volumes.data(&volume.name),
                });
                println!("{line}");
            }
        }
        Format::Table => {
            let header = ["DRIVER", "VOLUME NAME"].map(str::to_owned).to_vec();
            let row = |volume: &Volume| vec!["local".to_owned(), volume.name.clone()];
            let rows: Vec<Vec<String>> = [header].into_iter().chain(list.iter().map(row)).collect();
            print!("{}", listing::columns(&rows));
        }
    }
    Ok(())
}

/// A volume with the names that Docker's clients know, and who uses it.
fn inspect(volumes: &Volumes, volume: &Volume) -> Result<Value, Error> {
    Ok(json!({
        "Name": volume.name,
        "Driver": "local",
        "Scope": "local",
        "Mountpoint": volumes.data(&volume.name),
        "CreatedAt": listing::timestamp(volume.created_ns),
        "Labels": volume.labels,
        "Options": {},
        "UsedBy": volumes.users(&volume.name)?,
    }))
}

/// A size as Docker words it: powers of ten.
fn decimal(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { 1 };
    format!("{value:.digits$}{}", units.get(unit).unwrap_or(&"B"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: VolumeCommand,
    }

    #[test]
    fn volumes_are_made_shown_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let run = |line: &str| {
            let words = ["volume"].into_iter().chain(line.split(' '));
            super::run(&Line::try_parse_from(words).unwrap().command, directory.path())
        };
        let is_good = |code: ExitCode| format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS);
        for line in ["create --label a=b data", "create", "ls", "ls -q", "ls --format json", "inspect data"] {
            assert!(is_good(run(line).unwrap()), "{line}");
        }
        let volumes = Volumes::new(directory.path());
        volumes.acquire(Some("data"), "abc").unwrap();
        let shown = inspect(&volumes, &volumes.get("data").unwrap().unwrap()).unwrap();
        assert_eq!((&shown["Labels"]["a"], &shown["UsedBy"][0]), (&json!("b"), &json!("abc")));
        assert!(!is_good(run("rm data").unwrap()));
        assert!(run("inspect none-such").is_err());
        assert!(is_good(run("prune -f").unwrap()));
        assert_eq!(volumes.list().unwrap().len(), 1);
        volumes.release("abc", false).unwrap();
        assert!(is_good(run("prune --all --force").unwrap()));
        assert!(volumes.list().unwrap().is_empty());
        assert!(!is_good(run("rm data").unwrap()));
        assert!(is_good(run("rm --force data").unwrap()));
    }

    #[test]
    fn sizes_are_worded_as_dockers() {
        assert_eq!([0, 999, 1500, 20_480_000].map(decimal), ["0B", "999B", "1.5kB", "20.5MB"]);
    }
}
