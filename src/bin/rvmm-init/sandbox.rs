//! The sandbox as a whole: names, networks, clock, kernel parameters.

use std::fs::{self, File};
use std::path::Path;
use std::thread::available_parallelism;

use rustix::time::{ClockId, Timespec, clock_settime};
use rvmm::guest::protocol::{AgentInfo, Configuration, Failure, VERSION};

use crate::cgroup::Controllers;
use crate::failure::Doing;
use crate::prepare::sysctl_path;
use crate::{cgroup, netlink, system};

/// Random bytes that are taken at once at most.
const ENTROPY_BYTES_MAX: usize = 4096;

/// Sets the sandbox up. What was not said stays as it is.
pub fn configure(configuration: &Configuration) -> Result<(), Failure> {
    if !configuration.entropy.is_empty() {
        let bytes = configuration.entropy.get(..ENTROPY_BYTES_MAX).unwrap_or(&configuration.entropy);
        let doing = || "add random bytes".to_owned();
        let random = File::options().write(true).open("/dev/random").doing(doing)?;
        system::add_entropy(&random, bytes).doing(doing)?;
        // The kernel takes them into its generator in its own time otherwise, and two VMs of one snapshot have the same one.
        system::reseed(&random).doing(doing)?;
    }
    if let Some(name) = &configuration.hostname {
        rustix::system::sethostname(name.as_bytes()).doing(|| format!("set the host name {name:?}"))?;
    }
    if let Some(ns) = configuration.clock_ns {
        set_clock(ns)?;
    }
    // Before networks are set up: some parameters are defaults for new devices and addresses.
    for (name, value) in &configuration.sysctls {
        cgroup::write(Path::new(&sysctl_path(name)?), value).doing(|| format!("set {name} to {value:?}"))?;
    }
    netlink::configure(&configuration.interfaces)
}

/// Sets the clock, to nanoseconds since 1970.
pub fn set_clock(ns: u64) -> Result<(), Failure> {
    let time = Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
    clock_settime(ClockId::Realtime, time).doing(|| "set the clock".to_owned())
}

/// What the kernel and the machine are.
pub fn info(controllers: &Controllers) -> AgentInfo {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    AgentInfo {
        version: VERSION,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        processors: available_parallelism().map_or(1, |count| count.get() as u32),
        memory_bytes: total.unwrap_or(0u64) << 10,
        controllers: controllers.names(),
    }
}
