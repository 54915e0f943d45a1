//! `rvmm snapshot`: save a running VM.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use crate::api::client;
use crate::vm::snapshot::Place;

/// Saves a running VM into a directory, in place of the snapshot that is there. It rests as long as that takes, and goes
/// on.
#[derive(Args, Debug)]
pub struct SnapshotArguments {
    /// The VM: its API socket
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// Directory for the snapshot; it is made if it is not there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Write only the memory that has changed since the VM was saved or restored last
    ///
    /// The earlier snapshot's memory file is needed from then on. Without `--track-dirty-pages`, a restored VM is compared
    /// with the snapshot that it came from, and one that was booted is saved whole.
    #[arg(long)]
    diff: bool,
}

/// Saves a VM.
pub fn run(arguments: &SnapshotArguments) -> anyhow::Result<ExitCode> {
    // The VM may have another working directory.
    let place = Place::directory(&std::path::absolute(&arguments.directory)?);
    let body = json!({ "snapshot_type": if arguments.diff { "Diff" } else { "Full" }, "snapshot_path": place.state }).to_string();
    client::put(&arguments.socket, "/snapshot/create", &body)?;
    Ok(ExitCode::SUCCESS)
}
