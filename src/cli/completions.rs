//! `rvmm completions`.

use std::process::ExitCode;

use clap_complete::Shell;

/// Print a completion script for a shell
#[derive(clap::Args)]
#[command(after_help = "Example:\n  rvmm completions bash > /etc/bash_completion.d/rvmm")]
pub struct CompletionsArguments {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub fn run(arguments: &CompletionsArguments) -> anyhow::Result<ExitCode> {
    clap_complete::generate(arguments.shell, &mut super::command(), "rvmm", &mut std::io::stdout());
    Ok(ExitCode::SUCCESS)
}
