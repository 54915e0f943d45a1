//! `rvmm-engine network-relay`: the process between a microVM's network and passt. The engine starts it, users do not.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::container::network::relay::{self, Options};

/// Relays the frames of a microVM; started by rvmm itself
#[derive(Args)]
pub struct RelayArguments {
    /// The network namespace
    #[arg(long)]
    netns: PathBuf,
    /// The tap to make there
    #[arg(long)]
    device: String,
    /// The tap's largest packet
    #[arg(long)]
    mtu: u16,
    /// The socket of passt
    #[arg(long)]
    socket: PathBuf,
    /// The guest's hardware address
    #[arg(long, value_parser = relay::parse_mac)]
    mac: [u8; 6],
}

/// Relays until passt has ended.
pub fn run(arguments: RelayArguments) -> anyhow::Result<ExitCode> {
    let RelayArguments { netns, device, mtu, socket, mac } = arguments;
    relay::run(&Options { netns, device, mtu, socket, mac })?;
    Ok(ExitCode::SUCCESS)
}
