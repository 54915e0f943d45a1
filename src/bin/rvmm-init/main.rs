//! Process 1 of a microVM and its agent: makes containers and runs their processes, as the host says over vsock.
//!
//! One process and one thread. It keeps system calls few, since on some hosts the guest's kernel is slow, and makes a
//! child in its own memory for each process that a container gets. docs/agent.md describes it.

mod agent;
mod archive;
mod boot;
mod cgroup;
mod child;
mod container;
mod control;
mod disks;
mod failure;
mod inside;
mod netlink;
mod observe;
mod path;
mod plan;
mod power;
mod prepare;
mod reaper;
mod requests;
mod root;
mod sandbox;
mod share;
mod stream;
mod system;
mod users;

use std::process::ExitCode;

use agent::Agent;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if arguments.next().is_some_and(|name| name == prepare::REAPER) {
        return ExitCode::from(reaper::run(arguments) as u8);
    }
    if std::process::id() != 1 {
        eprintln!("rvmm-init: this is the first process of a microVM, and nothing to be started by hand");
        return ExitCode::FAILURE;
    }
    boot::mark_start();
    if let Err(error) = serve() {
        eprintln!("rvmm-init: {error}");
    }
    rustix::fs::sync();
    boot::power_off()
}

fn serve() -> Result<(), String> {
    let signals = boot::signals().map_err(|error| format!("cannot wait for signals: {error}"))?;
    boot::prepare().map_err(|boot::Error(doing, error)| format!("cannot {doing}: {error}"))?;
    Agent::new(signals).map_err(|failure| failure.to_string())?.run();
    Ok(())
}
