//! What became of a container: `state.json` beside its configuration.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::config::Port;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Made and never started.
    #[default]
    Created,
    /// Its process runs. To be believed only while its supervisor lives.
    Running,
    /// Its processes are stopped as they are.
    Paused,
    /// It has ended and will be started again.
    Restarting,
    /// It has ended.
    Exited,
}

impl Status {
    /// Whether there is a supervisor.
    pub fn is_live(self) -> bool {
        matches!(self, Status::Running | Status::Paused | Status::Restarting)
    }
}

/// What is known of a container's health.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Health {
    /// The verdict.
    pub status: HealthStatus,
    /// Failures in a row.
    pub failing_streak: u32,
    /// The last checks, the newest last.
    pub log: Vec<HealthCheck>,
}

/// The verdict on a container's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthStatus {
    /// Not known yet.
    Starting,
    /// The last check succeeded.
    Healthy,
    /// Too many have failed.
    Unhealthy,
}

/// One health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HealthCheck {
    /// Start, in nanoseconds since 1970.
    pub started_ns: u64,
    /// End.
    pub ended_ns: u64,
    /// Exit code; -1 if it took too long.
    pub exit_code: i32,
    /// The beginning of what it printed.
    pub output: String,
}

/// A container's place on a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Endpoint {
    /// The network's name.
    pub network: String,
    /// The interface inside.
    pub interface: String,
    /// Its hardware address.
    pub mac: String,
    /// Its addresses, with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Where packets for elsewhere go.
    pub gateway: Option<IpAddr>,
}

/// What became of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct State {
    /// Where it is in its life.
    pub status: Status,
    /// Its process on the host: the container's own, or the monitor's.
    pub pid: Option<u32>,
    /// The process that looks after it.
    pub supervisor: Option<u32>,
    /// Last start, in nanoseconds since 1970.
    pub started_ns: Option<u64>,
    /// Last end.
    pub finished_ns: Option<u64>,
    /// How it ended.
    pub exit_code: Option<u8>,
    /// Whether its memory was used up.
    pub oom_killed: bool,
    /// Why it did not start, or ended against its will.
    pub error: Option<String>,
    /// How often it was started again.
    pub restarts: u32,
    /// Whether the user has stopped it.
    pub stopped: bool,
    /// Its health.
    pub health: Option<Health>,
    /// Its places on networks.
    pub endpoints: Vec<Endpoint>,
    /// Its published ports, none of them 0.
    pub ports: Vec<Port>,
}

/// Now, in nanoseconds since 1970.
pub fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
