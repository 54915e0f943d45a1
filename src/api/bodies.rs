//! JSON bodies: Firecracker's names, with unknown fields refused.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::mmds;
use crate::vm::config::{self, Cpu, CpuTemplate, DiskCache, DiskIo, VmConfig};
use crate::vm::control::{BalloonReport, Bucket, Command, Limits, LimitsChange, Load, State};
use crate::vm::snapshot::{DiskOverride, NetOverride, Overrides, Place};

/// Answer to `GET /`.
#[derive(Serialize)]
pub struct InstanceInfo<'a> {
    app_name: &'static str,
    id: &'a str,
    state: &'static str,
    vmm_version: &'static str,
}

impl<'a> InstanceInfo<'a> {
    /// Of a VM that has started, or not.
    pub fn new(state: Option<State>, id: &'a str) -> Self {
        let state = match state {
            None => "Not started",
            Some(State::Running) => "Running",
            Some(State::Paused) => "Paused",
        };
        Self { app_name: "rvmm", id, state, vmm_version: env!("CARGO_PKG_VERSION") }
    }
}

/// Answer to `GET /version`.
#[derive(Serialize)]
pub struct Version {
    /// Clients look for this name.
    firecracker_version: &'static str,
}

impl Version {
    pub fn new() -> Self {
        Self { firecracker_version: env!("CARGO_PKG_VERSION") }
    }
}

/// Body of `PATCH /vm`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    pub state: VmState,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub enum VmState {
    Paused,
    Resumed,
}

/// Body of `PUT /snapshot/create`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    snapshot_type: Option<SnapshotType>,
    snapshot_path: PathBuf,
    /// Beside the state file, under a name of its own, where it is left out.
    mem_file_path: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum SnapshotType {
    Full,
    Diff,
}

impl SnapshotCreate {
    pub fn command(self) -> Command {
        let place = Place { state: self.snapshot_path, memory: self.mem_file_path };
        match self.snapshot_type {
            None | Some(SnapshotType::Full) => Command::Save(place),
            Some(SnapshotType::Diff) => Command::SaveChanges(place),
        }
    }
}

/// Body of `PUT /snapshot/load`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    snapshot_path: PathBuf,
    mem_file_path: Option<PathBuf>,
    mem_backend: Option<MemoryBackend>,
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default)]
    network_overrides: Vec<NetworkOverride>,
    #[serde(default)]
    drive_overrides: Vec<DriveOverride>,
    vsock_override: Option<VsockOverride>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryBackend {
    backend_path: PathBuf,
    backend_type: BackendType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum BackendType {
    File,
    Uffd,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkOverride {
    iface_id: String,
    host_dev_name: String,
}

/// Not Firecracker's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DriveOverride {
    drive_id: String,
    path_on_host: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VsockOverride {
    uds_path: PathBuf,
}

impl SnapshotLoad {
    pub fn load(self) -> Result<Load, &'static str> {
        let memory = match (self.mem_file_path, self.mem_backend) {
            (Some(_), Some(_)) => return Err("mem_file_path and mem_backend say the same; give one of them"),
            (_, Some(MemoryBackend { backend_type: BackendType::Uffd, .. })) => {
                return Err("the memory backend Uffd is not supported; use File");
            }
            (_, Some(MemoryBackend { backend_path, .. })) => Some(backend_path),
            (path, None) => path,
        };
        let disk = |drive: DriveOverride| DiskOverride {
            id: drive.drive_id,
            path: drive.path_on_host,
            ..DiskOverride::default()
        };
        let net = |net: NetworkOverride| NetOverride {
            id: net.iface_id,
            tap: net.host_dev_name,
            ..NetOverride::default()
        };
        let overrides = Overrides {
            disks: self.drive_overrides.into_iter().map(disk).collect(),
            nets: self.network_overrides.into_iter().map(net).collect(),
            vsock: self.vsock_override.map(|socket| socket.uds_path),
            track_dirty_pages: self.track_dirty_pages || self.enable_diff_snapshots,
            ..Overrides::default()
        };
        Ok(Load { place: Place { state: self.snapshot_path, memory }, overrides, resume: self.resume_vm })
    }
}

/// Body of `PUT /actions`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    pub action_type: ActionType,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub enum ActionType {
    FlushMetrics,
    InstanceStart,
    SendCtrlAltDel,
}

/// Body of `PATCH /balloon`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    pub amount_mib: u32,
}

/// Body of `PATCH /balloon/statistics`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    pub stats_polling_interval_s: u16,
}

/// A token bucket; one whose size or time is 0 limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    size: u64,
    one_time_burst: Option<u64>,
    /// Milliseconds.
    refill_time: u64,
}

impl TokenBucket {
    fn bucket(self) -> Bucket {
        let one_time_burst = self.one_time_burst.unwrap_or(0);
        Bucket { size: self.size, one_time_burst, refill_time: self.refill_time }
    }

    fn new(bucket: Bucket) -> Self {
        let one_time_burst = Some(bucket.one_time_burst);
        Self { size: bucket.size, one_time_burst, refill_time: bucket.refill_time }
    }
}

/// Limits, in both directions: what is not there stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    pub fn change(self) -> LimitsChange {
        LimitsChange {
            bandwidth: self.bandwidth.map(TokenBucket::bucket),
            operations: self.ops.map(TokenBucket::bucket),
        }
    }

    fn new(limits: Limits) -> Option<Self> {
        (limits != Limits::default()).then(|| Self {
            bandwidth: limits.bandwidth.map(TokenBucket::new),
            ops: limits.operations.map(TokenBucket::new),
        })
    }
}

/// Body of `PATCH /drives/{id}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    pub drive_id: String,
    pub path_on_host: Option<PathBuf>,
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /network-interfaces/{id}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    pub iface_id: String,
    pub rx_rate_limiter: Option<RateLimiter>,
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Answer to `GET /balloon`.
#[derive(Serialize)]
pub struct Balloon {
    amount_mib: u64,
    deflate_on_oom: bool,
    stats_polling_interval_s: u32,
    free_page_hinting: bool,
    free_page_reporting: bool,
}

impl Balloon {
    pub fn new(balloon: &config::Balloon) -> Self {
        Self {
            amount_mib: balloon.size.bytes() >> 20,
            deflate_on_oom: balloon.deflate_on_oom,
            stats_polling_interval_s: balloon.stats_interval,
            free_page_hinting: false,
            free_page_reporting: balloon.free_page_reporting,
        }
    }
}

/// Names of the guest's statistics, by their tag.
const STATISTICS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// Pages of the balloon in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// Answer to `GET /balloon/statistics`; `None` if there are none.
pub fn balloon_statistics(report: &BalloonReport) -> Option<serde_json::Value> {
    let statistics = report.statistics?;
    let fixed = [
        ("target_pages", report.target_pages),
        ("actual_pages", report.actual_pages),
        ("target_mib", report.target_pages / PAGES_PER_MIB),
        ("actual_mib", report.actual_pages / PAGES_PER_MIB),
    ];
    let fixed = fixed.into_iter().map(|(name, value)| (name, u64::from(value)));
    // What the guest does not tell is left out.
    let told = STATISTICS.iter().zip(statistics).filter_map(|(name, value)| Some((*name, value?)));
    Some(fixed.chain(told).map(|(name, value)| (name.to_owned(), serde_json::Value::from(value))).collect())
}

/// Answer to `GET /machine-config`.
#[derive(Serialize)]
pub struct MachineConfiguration {
    vcpu_count: u32,
    mem_size_mib: u64,
    smt: bool,
    track_dirty_pages: bool,
    huge_pages: &'static str,
}

impl MachineConfiguration {
    pub fn new(config: &VmConfig) -> Self {
        Self {
            vcpu_count: config.cpus,
            mem_size_mib: config.memory.bytes() >> 20,
            smt: false,
            track_dirty_pages: config.track_dirty_pages,
            huge_pages: "None",
        }
    }
}

#[derive(Serialize)]
struct BootSource<'a> {
    kernel_image_path: &'a Path,
    initrd_path: Option<&'a Path>,
    boot_args: Option<&'a str>,
}

#[derive(Serialize)]
struct Drive<'a> {
    drive_id: String,
    partuuid: Option<&'a str>,
    is_root_device: bool,
    cache_type: &'static str,
    is_read_only: bool,
    path_on_host: &'a Path,
    rate_limiter: Option<RateLimiter>,
    io_engine: &'static str,
    socket: Option<&'a str>,
}

#[derive(Serialize)]
struct NetworkInterface<'a> {
    iface_id: String,
    host_dev_name: &'a str,
    guest_mac: Option<String>,
    rx_rate_limiter: Option<RateLimiter>,
    tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Serialize)]
struct Vsock<'a> {
    guest_cid: u32,
    uds_path: &'a Path,
}

impl<'a> Vsock<'a> {
    fn new(vsock: &'a config::Vsock) -> Self {
        Self { guest_cid: vsock.cid, uds_path: &vsock.socket }
    }
}

#[derive(Serialize)]
struct Entropy {
    rate_limiter: Option<RateLimiter>,
}

#[derive(Serialize)]
struct MmdsConfig<'a> {
    version: mmds::Version,
    network_interfaces: &'a [String],
    ipv4_address: Ipv4Addr,
    imds_compat: bool,
}

/// Answer to `GET /vm/config`. What rvmm does not have is null.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FullVmConfiguration<'a> {
    balloon: Option<Balloon>,
    drives: Vec<Drive<'a>>,
    boot_source: BootSource<'a>,
    cpu_config: Option<CpuTemplate>,
    logger: Option<&'a str>,
    machine_config: MachineConfiguration,
    metrics: Option<&'a str>,
    mmds_config: Option<MmdsConfig<'a>>,
    network_interfaces: Vec<NetworkInterface<'a>>,
    vsock: Option<Vsock<'a>>,
    entropy: Option<Entropy>,
}

impl<'a> FullVmConfiguration<'a> {
    pub fn new(config: &'a VmConfig) -> Self {
        let drive = |(index, disk): (usize, &'a config::Disk)| Drive {
            drive_id: VmConfig::disk_id(index, disk),
            partuuid: None,
            is_root_device: index == 0 && config.rootfs.is_some(),
            cache_type: match disk.cache {
                DiskCache::Writeback => "Writeback",
                DiskCache::Unsafe => "Unsafe",
            },
            is_read_only: disk.is_read_only(),
            path_on_host: disk.file(),
            rate_limiter: RateLimiter::new(disk.limits),
            io_engine: match disk.io {
                DiskIo::Auto | DiskIo::Uring => "Async",
                DiskIo::Sync => "Sync",
            },
            socket: None,
        };
        let interface = |(index, net): (usize, &'a config::Net)| NetworkInterface {
            iface_id: net.id(index),
            host_dev_name: &net.tap,
            guest_mac: net.mac.map(|mac| mac.to_string()),
            rx_rate_limiter: RateLimiter::new(net.rx_limits),
            tx_rate_limiter: RateLimiter::new(net.tx_limits),
        };
        Self {
            balloon: config.balloon.as_ref().map(Balloon::new),
            drives: config.all_disks().enumerate().map(drive).collect(),
            boot_source: BootSource {
                kernel_image_path: config.kernel.as_deref().unwrap_or(Path::new("")),
                initrd_path: config.initrd.as_deref(),
                boot_args: config.cmdline.as_deref(),
            },
            cpu_config: match &config.cpu {
                Cpu::Template(template) => Some((**template).clone()),
                Cpu::Host | Cpu::Baseline => None,
            },
            logger: None,
            machine_config: MachineConfiguration::new(config),
            metrics: None,
            mmds_config: config.mmds.as_ref().map(|mmds| MmdsConfig {
                version: mmds.version,
                network_interfaces: &mmds.interfaces,
                ipv4_address: mmds.address,
                imds_compat: mmds.imds_compat,
            }),
            network_interfaces: config.nets.iter().enumerate().map(interface).collect(),
            vsock: config.vsock.as_ref().map(Vsock::new),
            entropy: config.rng.then(|| Entropy { rate_limiter: RateLimiter::new(config.rng_limits) }),
        }
    }
}
