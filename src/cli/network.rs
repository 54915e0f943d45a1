//! `rvmm network`: networks of containers.

use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::listing::{self, Format};
use crate::container::network::{CreateOptions, Definition, Driver, Error, Networks};

/// Make, list and remove networks of containers
#[derive(Debug, Subcommand)]
pub enum NetworkCommand {
    /// Make a network; its id is printed
    Create(CreateArguments),
    /// List networks
    #[command(visible_alias = "list")]
    Ls(LsArguments),
    /// Show networks and the containers on them, as JSON
    Inspect(InspectArguments),
    /// Remove networks that no container is on
    #[command(visible_alias = "remove")]
    Rm(RmArguments),
    /// Remove all networks that no container is on
    Prune(PruneArguments),
}

/// Arguments of `network create`.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// The network's name
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    name: String,
    /// bridge translates addresses towards the world; macvlan is in the network of one of the host's devices
    #[arg(short, long, value_enum, default_value_t = DriverName::Bridge)]
    driver: DriverName,
    /// Addresses, as 10.90.0.0/24; one of IPv4 and one of IPv6 [default: one that is free]
    #[arg(long, value_name = "CIDR")]
    subnet: Vec<IpNet>,
    /// The subnet's gateway [default: its first address]
    #[arg(long, value_name = "ADDRESS")]
    gateway: Vec<IpAddr>,
    /// Let nothing out of it, and nothing in
    #[arg(long)]
    internal: bool,
    /// IPv6 beside IPv4
    #[arg(long)]
    ipv6: bool,
    /// parent=DEVICE (macvlan), mtu=N, isolate=false (bridge: other networks may send to it)
    #[arg(short, long = "opt", value_name = "KEY=VALUE")]
    options: Vec<String>,
    /// A label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = listing::label)]
    label: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DriverName {
    Bridge,
    Macvlan,
}

/// Arguments of `network ls`.
#[derive(Debug, Args)]
pub struct LsArguments {
    /// Only ids
    #[arg(short, long)]
    quiet: bool,
    /// Whole ids
    #[arg(long)]
    no_trunc: bool,
    /// How they are printed
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// Arguments of `network inspect`.
#[derive(Debug, Args)]
pub struct InspectArguments {
    /// Names or ids
    #[arg(required = true)]
    network: Vec<String>,
    /// How they are printed: JSON in any case
    #[arg(long, value_parser = ["json"], hide = true)]
    format: Option<String>,
}

/// Arguments of `network rm`.
#[derive(Debug, Args)]
pub struct RmArguments {
    /// Names or ids
    #[arg(required = true)]
    network: Vec<String>,
    /// No error for a network that is not there
    #[arg(short, long)]
    force: bool,
}

/// Arguments of `network prune`.
#[derive(Debug, Args)]
pub struct PruneArguments {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
}

/// Does it, with the networks of these roots.
pub fn run(command: &NetworkCommand, data_root: &Path, run_root: &Path) -> anyhow::Result<ExitCode> {
    let networks = Networks::new(data_root, run_root);
    match command {
        NetworkCommand::Create(arguments) => {
            let made = networks.create(&arguments.options().map_err(anyhow::Error::msg)?)?;
            println!("{}", made.id);
        }
        NetworkCommand::Ls(arguments) => ls(&networks, arguments)?,
        NetworkCommand::Inspect(arguments) => {
            let mut found = vec![];
            for name in &arguments.network {
                found.push(inspect(&networks, &networks.get(name)?)?);
            }
            println!("{}", serde_json::to_string_pretty(&found)?);
        }
        NetworkCommand::Rm(arguments) => {
            let good = listing::each(&arguments.network, |name| match networks.remove(name) {
                Err(Error::Missing(_)) if arguments.force => Ok(name.to_owned()),
                other => other,
            });
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        NetworkCommand::Prune(arguments) => {
            let warning = "This will remove all networks that no container is on.";
            if arguments.force || listing::confirm(warning)? {
                let removed = networks.prune(|_| false)?;
                if !removed.is_empty() {
                    println!("Deleted Networks:\n{}\n", removed.join("\n"));
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl CreateArguments {
    fn options(&self) -> Result<CreateOptions, String> {
        let mut options = CreateOptions {
            name: self.name.clone(),
            driver: match self.driver {
                DriverName::Bridge => Driver::Bridge,
                DriverName::Macvlan => Driver::Macvlan,
            },
            subnets: self.subnet.clone(),
            gateways: self.gateway.clone(),
            internal: self.internal,
            ipv6: self.ipv6,
            labels: self.label.iter().cloned().collect(),
            ..CreateOptions::default()
        };
        for option in &self.options {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            let wrong = || {
                format!("network option {option:?}: there are parent=DEVICE, mtu=N and isolate=true|false")
            };
            match key {
                "parent" if !value.is_empty() => options.parent = Some(value.into()),
                "mtu" | "com.docker.network.driver.mtu" => {
                    options.mtu = Some(value.parse().map_err(|_| wrong())?);
                }
                "isolate" => options.open = !value.parse::<bool>().map_err(|_| wrong())?,
                _ => return Err(wrong()),
            }
        }
        Ok(options)
    }
}

fn ls(networks: &Networks, arguments: &LsArguments) -> Result<(), Error> {
    let list = networks.list()?;
    let id = |network: &Definition| {
        let len = if arguments.no_trunc { network.id.len() } else { 12 };
        network.id.chars().take(len).collect::<String>()
    };
    if arguments.quiet {
        list.iter().for_each(|network| println!("{}", id(network)));
        return Ok(());
    }
    match arguments.format {
        Format::Json => {
            for network in &list {
                let labels: Vec<String> =
                    network.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
                let line = json!({
                    "ID": id(network), "Name": network.name, "Driver": network.driver.name(), "Scope": "local",
                    "IPv6": network.has_ipv6().to_string(), "Internal": network.internal.to_string(),
                    "CreatedAt": listing::timestamp(network.created_ns), "Labels": labels.join(","),
                });
                println!("{line}");
            }
        }
        Format::Table => {
            let header = ["NETWORK ID", "NAME", "DRIVER", "SUBNET"].map(str::to_owned).to_vec();
            let row = |network: &Definition| {
                let subnets: Vec<String> =
                    network.subnets.iter().map(|subnet| subnet.subnet.to_string()).collect();
                vec![id(network), network.name.clone(), network.driver.name().into(), subnets.join(", ")]
            };
            let rows: Vec<Vec<String>> = [header].into_iter().chain(list.iter().map(row)).collect();
            print!("{}", listing::columns(&rows));
        }
    }
    Ok(())
}

/// A network with the names that Docker's clients know.
fn inspect(networks: &Networks, network: &Definition) -> Result<Value, Error> {
    let pools: Vec<Value> = network
        .subnets
        .iter()
        .map(|subnet| json!({ "Subnet": subnet.subnet, "Gateway": subnet.gateway }))
        .collect();
    let users = networks.users(&network.name)?.into_iter().map(|user| {
        let of = |v4| {
            let found = user.addresses.iter().find(|address| address.addr().is_ipv4() == v4);
            found.map_or_else(String::new, ToString::to_string)
        };
        let value = json!({ "Name": user.name, "IPv4Address": of(true), "IPv6Address": of(false) });
        (user.id, value)
    });
    let users: serde_json::Map<String, Value> = users.collect();
    let mut options = serde_json::Map::new();
    if let Some(mtu) = network.mtu {
        options.insert("mtu".into(), mtu.to_string().into());
    }
    if let Some(interface) = &network.interface {
        let key = if network.driver == Driver::Macvlan { "parent" } else { "bridge" };
        options.insert(key.into(), interface.clone().into());
    }
    options.insert("isolate".into(), network.isolate.to_string().into());
    Ok(json!({
        "Name": network.name,
        "Id": network.id,
        "Created": listing::timestamp(network.created_ns),
        "Scope": "local",
        "Driver": network.driver.name(),
        "EnableIPv6": network.has_ipv6(),
        "IPAM": { "Driver": "default", "Config": pools },
        "Internal": network.internal,
        "Containers": users,
        "Options": options,
        "Labels": network.labels,
    }))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: NetworkCommand,
    }

    fn create(line: &str) -> Result<CreateOptions, String> {
        let words = ["network", "create"].into_iter().chain(line.split(' '));
        match Line::try_parse_from(words).map_err(|error| error.to_string())?.command {
            NetworkCommand::Create(arguments) => arguments.options(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_are_read() {
        let options = create(
            "-d macvlan --subnet 192.168.1.0/24 --gateway 192.168.1.254 -o parent=eth0 --opt mtu=1400 --internal \
             --label a=b --label c lan",
        );
        let options = options.unwrap();
        assert_eq!((options.name.as_str(), options.driver), ("lan", Driver::Macvlan));
        assert_eq!((options.parent.as_deref(), options.mtu), (Some("eth0"), Some(1400)));
        assert!(options.internal && !options.ipv6 && !options.open);
        assert_eq!(options.labels.len(), 2);
        assert!(create("-o isolate=false -o com.docker.network.driver.mtu=1300 web").unwrap().open);
        for wrong in [
            "-o parent web",
            "-o mtu=many web",
            "-o what=1 web",
            "--subnet 10.0.0.0 web",
            "-d overlay web",
            "",
        ] {
            assert!(create(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn networks_are_made_shown_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let roots = [directory.path().join("data"), directory.path().join("run")];
        let run = |line: &str| {
            let words = ["network"].into_iter().chain(line.split(' '));
            let line = Line::try_parse_from(words).unwrap();
            super::run(&line.command, &roots[0], &roots[1])
        };
        let is_good = |code: ExitCode| format!("{code:?}") == format!("{:?}", ExitCode::SUCCESS);
        assert!(is_good(run("create --subnet 10.213.7.0/24 web").unwrap()));
        let networks = Networks::new(&roots[0], &roots[1]);
        let made = networks.get("web").unwrap();
        let shown = inspect(&networks, &made).unwrap();
        assert_eq!(shown["IPAM"]["Config"][0]["Gateway"], "10.213.7.1");
        for line in [
            "ls",
            "ls -q",
            "ls --format json --no-trunc",
            "inspect web",
            &format!("inspect {}", &made.id[..12]),
        ] {
            assert!(is_good(run(line).unwrap()), "{line}");
        }
        assert!(run("inspect none-such").is_err());
        assert!(!is_good(run("rm none-such web").unwrap()));
        assert!(networks.list().unwrap().is_empty());
        assert!(is_good(run("rm -f web").unwrap()));
        run("create --subnet 10.213.8.0/24 other").unwrap();
        assert!(is_good(run("prune -f").unwrap()));
        assert!(networks.list().unwrap().is_empty());
    }
}
