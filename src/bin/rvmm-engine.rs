//! The part of rvmm that knows images, containers and hosts; `rvmm` runs it.

use std::process::ExitCode;

fn main() -> ExitCode {
    rvmm::cli::engine()
}
