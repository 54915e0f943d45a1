//! The `rvmm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    rvmm::cli::main(rvmm::vm::Timeline::start())
}
