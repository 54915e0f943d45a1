//! `rvmm template`: snapshots of booted guests, from which microVMs start.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::container::format::decimal_size;
use super::container::values::{Bytes, Cpus};
use super::listing::{self, Format};
use crate::container::config::Limits;
use crate::container::microvm::Class;
use crate::container::microvm::template::{Entry, Templates};
use crate::container::roots::Roots;
use crate::container::time::rfc3339;

/// MTU of a network device, unless another one is said: that of most networks.
const MTU: u16 = 1500;

/// Make, list and remove templates, from which microVMs start instead of booting
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// Make the template for containers with these limits, if it is not there; its name is printed
    Build(BuildArguments),
    /// List templates
    #[command(visible_alias = "list")]
    Ls(LsArguments),
    /// Remove templates; microVMs that run are not touched, and the next one that needs a template makes it
    #[command(visible_alias = "remove")]
    Rm(RmArguments),
}

/// Arguments of `template build`.
#[derive(Debug, Args)]
pub struct BuildArguments {
    /// Memory of the containers, as with `run` [default: as without a limit]
    #[arg(short, long, value_name = "BYTES")]
    memory: Option<Bytes>,
    /// Processors of the containers, as with `run` [default: as without a limit]
    #[arg(long, value_name = "N")]
    cpus: Option<Cpus>,
    /// Networks that the containers are on
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=8))]
    networks: u8,
    /// The MTU of these networks
    #[arg(long, value_name = "BYTES", default_value_t = MTU)]
    mtu: u16,
}

/// Arguments of `template ls`.
#[derive(Debug, Args)]
pub struct LsArguments {
    /// Only names
    #[arg(short, long)]
    quiet: bool,
    /// How they are printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Arguments of `template rm`.
#[derive(Debug, Args)]
pub struct RmArguments {
    /// Names, or how they begin
    #[arg(value_name = "NAME", required_unless_present = "all")]
    name: Vec<String>,
    /// All templates
    #[arg(short, long, conflicts_with = "name")]
    all: bool,
}

/// Does it.
pub fn run(command: &TemplateCommand, roots: &Roots) -> anyhow::Result<ExitCode> {
    let templates = Templates::new(roots);
    templates.sweep()?;
    match command {
        TemplateCommand::Build(arguments) => {
            let memory_bytes = arguments.memory.as_ref().map(|bytes| bytes.0);
            let cpu_millis = arguments.cpus.as_ref().map(|cpus| cpus.0);
            let limits = Limits { memory_bytes, cpu_millis, ..Limits::default() };
            let class = Class::of(&limits, vec![arguments.mtu; arguments.networks.into()]);
            println!("{}", templates.get(&class, true)?.name());
        }
        TemplateCommand::Ls(arguments) => ls(&templates.list()?, arguments),
        TemplateCommand::Rm(arguments) => {
            let all = [String::new()];
            for name in if arguments.all { &all[..] } else { &arguments.name } {
                let removed = templates.remove(name)?;
                if removed.is_empty() && !arguments.all {
                    anyhow::bail!("there is no template {name:?}");
                }
                removed.iter().for_each(|name| println!("{name}"));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn ls(entries: &[Entry], arguments: &LsArguments) {
    match (arguments.quiet, arguments.format) {
        (true, _) => entries.iter().for_each(|entry| println!("{}", entry.name)),
        (false, Format::Json) => {
            for Entry { name, class, made_ns, bytes, current } in entries {
                let object = json!({
                    "Name": name, "Memory": class.memory_bytes, "Cpus": class.cpus, "Mtus": class.mtus,
                    "Created": rfc3339(*made_ns), "Size": bytes, "Current": current,
                });
                println!("{object}");
            }
        }
        (false, Format::Table) => {
            let mut rows =
                vec![["NAME", "MEMORY", "CPUS", "NETWORKS", "SIZE", "FITS"].map(String::from).to_vec()];
            rows.extend(entries.iter().map(|entry| {
                vec![
                    entry.name.clone(),
                    format!("{}M", entry.class.memory_bytes >> 20),
                    entry.class.cpus.to_string(),
                    entry.class.mtus.len().to_string(),
                    decimal_size(entry.bytes),
                    if entry.current { "yes" } else { "no" }.into(),
                ]
            }));
            print!("{}", listing::columns(&rows));
        }
    }
}
