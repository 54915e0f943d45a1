//! The `rvmm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    let timeline = rvmm::vm::Timeline::start();
    rvmm::memory::own::use_one_arena();
    rvmm::cli::monitor(timeline)
}
