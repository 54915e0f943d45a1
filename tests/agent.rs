//! The agent of a microVM: containers in real guests, through the client that the runtime uses.
//!
//! Where the guest's kernel runs at full speed each topic has a guest of its own. Elsewhere one guest meets a part of them.

mod files;
mod life;
mod limits;
mod processes;
mod rig;
mod security;
mod streams;

use rvmm::kvm::kind::Kind;

use crate::support::{has_fast_kvm, has_tool, kvm_kind};
use rig::Sandbox;

/// Something that is looked at in a guest.
type Check = fn(&mut Sandbox);

/// What is looked at where a process takes a second: one guest for all of it.
const ON_SLOW_KERNELS: [(&str, Check); 11] = [
    ("exit codes", processes::exit_codes_come_back),
    ("programs that cannot be run", processes::programs_that_cannot_be_run_are_told_apart),
    ("environment, user and directory", processes::process_has_its_environment_user_and_directory),
    ("standard input", streams::input_reaches_its_end),
    ("output", streams::output_comes_whole_before_the_exit),
    ("terminal", streams::terminal_has_its_size_and_hangs_up),
    ("exec", processes::exec_runs_beside_the_first_process),
    ("layers", files::layers_hide_what_is_below),
    ("walls", security::walls_stand),
    ("pause", life::paused_container_stands_still),
    ("connections", life::lost_connection_loses_no_event),
];

#[test]
fn containers_on_a_slow_kernel() {
    match kvm_kind() {
        Some(Kind::Pvm) => {}
        _ => return crate::support::skip("is for PVM hosts; elsewhere each topic has a test of its own"),
    }
    let Some(mut sandbox) = Sandbox::boot() else { return };
    for (name, check) in ON_SLOW_KERNELS {
        sandbox.section(name);
        check(&mut sandbox);
    }
    sandbox.power_off();
}

/// A test of its own for each list of checks, in a guest of its own.
fn in_a_guest(checks: &[Check]) {
    if !has_fast_kvm() {
        return;
    }
    let Some(mut sandbox) = Sandbox::boot() else { return };
    for check in checks {
        check(&mut sandbox);
    }
    sandbox.power_off();
}

#[test]
fn processes_of_containers() {
    in_a_guest(&[
        processes::exit_codes_come_back,
        processes::signals_end_processes,
        processes::programs_that_cannot_be_run_are_told_apart,
        processes::users_are_looked_up,
        processes::process_has_its_environment_user_and_directory,
        processes::exec_runs_beside_the_first_process,
        processes::reaper_is_process_one,
        processes::processes_are_listed,
    ]);
}

#[test]
fn streams_of_processes() {
    in_a_guest(&[
        streams::input_reaches_its_end,
        streams::output_comes_whole_before_the_exit,
        streams::reader_that_waits_holds_the_process_up,
        streams::reader_that_leaves_is_a_closed_pipe,
        streams::terminal_has_its_size_and_hangs_up,
        streams::late_reader_misses_nothing,
    ]);
}

#[test]
fn file_systems_of_containers() {
    in_a_guest(&[
        files::layers_hide_what_is_below,
        files::hundred_layers_are_one_root,
        files::disk_keeps_what_is_written,
        files::mounts_of_every_kind,
        files::archives_go_in_and_out,
    ]);
}

#[test]
fn security_of_containers() {
    in_a_guest(&[
        security::walls_stand,
        security::filter_blocks_a_call,
        security::capabilities_are_what_was_given,
        security::images_cannot_lead_out,
        security::devices_are_filtered,
        security::containers_cannot_call_the_agent,
    ]);
}

#[test]
fn limits_of_containers() {
    in_a_guest(&[
        limits::memory_limit_kills_and_is_told,
        limits::process_limit_holds,
        limits::usage_is_counted,
    ]);
}

#[test]
fn life_of_containers() {
    in_a_guest(&[
        life::two_containers_share_a_sandbox,
        life::paused_container_stands_still,
        life::lost_connection_loses_no_event,
        life::container_that_runs_is_removed_by_force,
        life::states_are_respected,
        life::sandbox_is_configured,
    ]);
}

#[test]
fn networks_of_sandboxes() {
    if !has_fast_kvm() || !has_tool("ip") {
        return;
    }
    let tap = |name: &str, last: u8| format!("tap={name},mac=02:00:00:00:00:0{last}");
    let arguments = ["--net", &tap("rvmmagent0", 7), "--net", &tap("rvmmagent1", 8)];
    let Some(mut sandbox) = Sandbox::boot_with(&arguments) else { return };
    life::networks_are_set_up(&mut sandbox);
    sandbox.power_off();
}

/// What a container costs the host's processor, step by step.
#[test]
#[ignore = "prints figures"]
fn cost_of_a_container() {
    let Some(mut sandbox) = Sandbox::boot() else { return };
    for round in ["first", "second", "third"] {
        life::cost_of_steps(&mut sandbox, round);
    }
    sandbox.power_off();
}
