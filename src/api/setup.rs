//! Requests that put a VM together before it starts, and Firecracker's configuration file, which is made of the same bodies.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::bodies::RateLimiter;
use super::templates::StaticTemplate;
use crate::mmds::{self, Store, Version};
use crate::vm::config::{
    Balloon, Cpu, CpuTemplate, Disk, DiskCache, DiskIo, Mmds, Net, SerialConfig, Size, VmConfig, Vsock,
};
use crate::vm::control::Limits;

/// The most vCPUs that Firecracker's API speaks of.
const CPUS_MAX: u32 = 32;

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    kernel_image_path: PathBuf,
    initrd_path: Option<PathBuf>,
    boot_args: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum CacheType {
    Unsafe,
    Writeback,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum IoEngine {
    Sync,
    Async,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    pub drive_id: String,
    partuuid: Option<String>,
    is_root_device: bool,
    cache_type: Option<CacheType>,
    #[serde(default)]
    is_read_only: bool,
    path_on_host: Option<PathBuf>,
    rate_limiter: Option<RateLimiter>,
    io_engine: Option<IoEngine>,
    socket: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    pub iface_id: String,
    host_dev_name: String,
    guest_mac: Option<String>,
    mtu: Option<u16>,
    rx_rate_limiter: Option<RateLimiter>,
    tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockDevice {
    guest_cid: u32,
    uds_path: PathBuf,
    #[allow(dead_code)]
    vsock_id: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonDevice {
    amount_mib: u32,
    deflate_on_oom: bool,
    #[serde(default)]
    stats_polling_interval_s: u16,
    #[serde(default)]
    free_page_hinting: bool,
    #[serde(default)]
    free_page_reporting: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyDevice {
    rate_limiter: Option<RateLimiter>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    vcpu_count: Option<u32>,
    mem_size_mib: Option<u64>,
    smt: Option<bool>,
    cpu_template: Option<StaticTemplate>,
    track_dirty_pages: Option<bool>,
    huge_pages: Option<String>,
}

impl MachineConfig {
    /// Whether what a machine must have is there; else the name of what is missing.
    pub fn check_whole(&self) -> Result<(), &'static str> {
        match (self.vcpu_count, self.mem_size_mib) {
            (None, _) => Err("vcpu_count"),
            (_, None) => Err("mem_size_mib"),
            _ => Ok(()),
        }
    }
}

/// `PUT /logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// Where the log goes.
    pub log_path: Option<PathBuf>,
    /// How much is logged.
    pub level: Option<String>,
    #[allow(missing_docs)]
    pub show_level: Option<bool>,
    #[allow(missing_docs)]
    pub show_log_origin: Option<bool>,
    #[allow(missing_docs)]
    pub module: Option<String>,
}

/// `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// Where lines of JSON go.
    pub metrics_path: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    serial_out_path: PathBuf,
}

/// `PUT /mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    #[serde(default)]
    version: Version,
    network_interfaces: Vec<String>,
    ipv4_address: Option<Ipv4Addr>,
    #[serde(default)]
    imds_compat: bool,
}

/// A part of a VM to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Boot(BootSource),
    Drive(Box<Drive>),
    Net(Box<NetworkInterface>),
    Vsock(VsockDevice),
    Balloon(BalloonDevice),
    Entropy(EntropyDevice),
    Machine(MachineConfig),
    Cpu(Box<CpuTemplate>),
    Logger(Logger),
    Metrics(Metrics),
    Serial(Serial),
    Mmds(MmdsConfig),
}

/// A VM to be.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// What it is made of.
    pub config: VmConfig,
    /// Where the log goes, if that was asked for.
    pub logger: Option<Logger>,
    /// Where metrics go, if that was asked for.
    pub metrics: Option<Metrics>,
    /// What the metadata service tells.
    pub metadata: Arc<Store>,
    cpu_template: StaticTemplate,
    /// Whether a client has begun to put it together.
    pub has_parts: bool,
}

fn not_supported(what: &str) -> String {
    format!("{what} is not supported by rvmm")
}

fn limits(limiter: Option<RateLimiter>) -> Limits {
    limiter.unwrap_or_default().change().apply(Limits::default())
}

impl Setup {
    /// Adds a part, or puts it in the place of one with the same id.
    pub fn add(&mut self, part: Part) -> Result<(), String> {
        let mut next = self.config.clone();
        let mut cpu_template = self.cpu_template;
        match part {
            Part::Boot(boot) => {
                check_file(&boot.kernel_image_path, "The kernel file cannot be opened")?;
                if let Some(initrd) = &boot.initrd_path {
                    check_file(
                        initrd,
                        "The initrd file cannot be opened due to invalid path or invalid permissions",
                    )?;
                }
                next.kernel = Some(boot.kernel_image_path);
                next.initrd = boot.initrd_path;
                next.cmdline = boot.boot_args;
            }
            Part::Drive(drive) => add_drive(&mut next, *drive)?,
            Part::Net(interface) => add_net(&mut next, *interface)?,
            Part::Vsock(vsock) => {
                next.vsock = Some(Vsock { cid: vsock.guest_cid, socket: vsock.uds_path });
            }
            Part::Balloon(balloon) => {
                if balloon.free_page_hinting {
                    return Err(not_supported("free_page_hinting"));
                }
                next.balloon = Some(Balloon {
                    size: Size(u64::from(balloon.amount_mib) << 20),
                    deflate_on_oom: balloon.deflate_on_oom,
                    free_page_reporting: balloon.free_page_reporting,
                    stats_interval: balloon.stats_polling_interval_s.into(),
                });
            }
            Part::Entropy(entropy) => {
                next.rng = true;
                next.rng_limits = limits(entropy.rate_limiter);
            }
            Part::Machine(machine) => {
                cpu_template = machine.cpu_template.unwrap_or(cpu_template);
                set_machine(&mut next, machine)?;
            }
            Part::Cpu(template) => {
                next.cpu = Cpu::Template(template);
                cpu_template = StaticTemplate::None;
            }
            Part::Mmds(mmds) => {
                next.mmds = Some(Mmds {
                    interfaces: mmds.network_interfaces,
                    version: mmds.version,
                    address: mmds.ipv4_address.unwrap_or(mmds::ADDRESS),
                    imds_compat: mmds.imds_compat,
                });
            }
            Part::Serial(serial) => next.serial = SerialConfig::File(serial.serial_out_path),
            Part::Logger(logger) => {
                self.logger = Some(logger);
                return Ok(());
            }
            Part::Metrics(metrics) => {
                if self.metrics.is_some() {
                    return Err("Cannot initialize the metrics system due to bad user input: it was configured already".into());
                }
                self.metrics = Some(metrics);
                return Ok(());
            }
        }
        // What can be known to be impossible now is refused now, and changes nothing.
        next.validate(u64::MAX).map_err(|error| error.to_string())?;
        self.config = next;
        self.cpu_template = cpu_template;
        self.has_parts = true;
        Ok(())
    }

    /// Why the VM cannot start, as far as that is known before it is built.
    pub fn check(&self) -> Result<(), String> {
        self.cpu_template.check()
    }

    /// Reads Firecracker's configuration file.
    pub fn read(text: &str) -> Result<Setup, String> {
        let file: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut setup = Setup::default();
        // It names network devices, so they come before it.
        let (last, first): (Vec<_>, Vec<_>) = file.into_iter().partition(|(name, _)| name == "mmds-config");
        for (name, value) in first.into_iter().chain(last) {
            if value.is_null() {
                continue;
            }
            let wrong = |error: serde_json::Error| format!("{name}: {error}");
            let many = || match &value {
                Value::Array(values) => Ok(values.clone()),
                _ => Err(format!("{name}: a list is wanted")),
            };
            let one = value.clone();
            let parts = match name.as_str() {
                "boot-source" => vec![Part::Boot(serde_json::from_value(one).map_err(wrong)?)],
                "drives" => many()?
                    .into_iter()
                    .map(|value| serde_json::from_value(value).map(Part::Drive).map_err(wrong))
                    .collect::<Result<_, _>>()?,
                "network-interfaces" => many()?
                    .into_iter()
                    .map(|value| serde_json::from_value(value).map(Part::Net).map_err(wrong))
                    .collect::<Result<_, _>>()?,
                "machine-config" => vec![Part::Machine(serde_json::from_value(one).map_err(wrong)?)],
                "cpu-config" => match &one {
                    Value::String(path) => match Cpu::read(path)? {
                        Cpu::Template(template) => vec![Part::Cpu(template)],
                        _ => return Err(format!("{name}: a file is wanted")),
                    },
                    _ => vec![Part::Cpu(serde_json::from_value(one).map_err(wrong)?)],
                },
                "vsock" => vec![Part::Vsock(serde_json::from_value(one).map_err(wrong)?)],
                "balloon" => vec![Part::Balloon(serde_json::from_value(one).map_err(wrong)?)],
                "entropy" => vec![Part::Entropy(serde_json::from_value(one).map_err(wrong)?)],
                "mmds-config" => vec![Part::Mmds(serde_json::from_value(one).map_err(wrong)?)],
                "logger" => vec![Part::Logger(serde_json::from_value(one).map_err(wrong)?)],
                "metrics" => vec![Part::Metrics(serde_json::from_value(one).map_err(wrong)?)],
                "serial" | "serial-config" => vec![Part::Serial(serde_json::from_value(one).map_err(wrong)?)],
                _ => return Err(format!("unknown field `{name}`")),
            };
            parts.into_iter().try_for_each(|part| setup.add(part))?;
        }
        Ok(setup)
    }
}

fn check_file(path: &std::path::Path, what: &str) -> Result<(), String> {
    std::fs::File::open(path).map(drop).map_err(|error| format!("{what}: {error}"))
}

fn add_drive(config: &mut VmConfig, drive: Drive) -> Result<(), String> {
    if drive.socket.is_some() {
        return Err(not_supported("a vhost-user drive"));
    }
    let path = drive.path_on_host.ok_or("missing field `path_on_host`")?;
    check_file(&path, "Unable to open or create the block device's backing file")?;
    let disk = Disk {
        id: Some(drive.drive_id.clone()),
        readonly: drive.is_read_only,
        cache: match drive.cache_type {
            // Firecracker's default is to ignore flushes; a guest's data is worth more.
            Some(CacheType::Unsafe) => DiskCache::Unsafe,
            Some(CacheType::Writeback) | None => DiskCache::Writeback,
        },
        io: match drive.io_engine {
            Some(IoEngine::Sync) => DiskIo::Sync,
            Some(IoEngine::Async) | None => DiskIo::Auto,
        },
        limits: limits(drive.rate_limiter),
        ..Disk::new(path)
    };
    let is = |disk: &Disk| disk.id.as_deref() == Some(&drive.drive_id);
    if drive.is_root_device {
        if config.rootfs.as_ref().is_some_and(|root| !is(root)) {
            return Err("A root block device already exists!".into());
        }
        config.disks.retain(|disk| !is(disk));
        config.rootfs = Some(disk);
        if let Some(partition) = drive.partuuid {
            let cmdline = config.cmdline.get_or_insert_default();
            cmdline.push_str(&format!(" root=PARTUUID={partition}"));
        }
        return Ok(());
    }
    if config.rootfs.as_ref().is_some_and(is) {
        config.rootfs = None;
    }
    match config.disks.iter_mut().find(|disk| is(disk)) {
        Some(place) => *place = disk,
        None => config.disks.push(disk),
    }
    Ok(())
}

fn add_net(config: &mut VmConfig, interface: NetworkInterface) -> Result<(), String> {
    let mac = interface.guest_mac.map(|mac| mac.parse()).transpose();
    let net = Net {
        id: Some(interface.iface_id.clone()),
        mac: mac.map_err(|error| format!("guest_mac: {error}"))?,
        mtu: interface.mtu,
        rx_limits: limits(interface.rx_rate_limiter),
        tx_limits: limits(interface.tx_rate_limiter),
        ..Net::new(interface.host_dev_name)
    };
    match config.nets.iter_mut().find(|net| net.id.as_deref() == Some(&interface.iface_id)) {
        Some(place) => *place = net,
        None => config.nets.push(net),
    }
    Ok(())
}

fn set_machine(config: &mut VmConfig, machine: MachineConfig) -> Result<(), String> {
    if let Some(cpus) = machine.vcpu_count {
        if !(1..=CPUS_MAX).contains(&cpus) {
            return Err(
                "The vCPU count must be greater than 0, less than 32 and must be 1 or an even number if SMT \
                        is enabled."
                    .into(),
            );
        }
        config.cpus = cpus;
    }
    if let Some(memory) = machine.mem_size_mib {
        let bytes = memory.checked_mul(1 << 20).filter(|bytes| *bytes > 0);
        config.memory = Size(
            bytes
                .ok_or("The memory size (MiB) is either 0, or not a multiple of the configured page size.")?,
        );
    }
    config.track_dirty_pages = machine.track_dirty_pages.unwrap_or(config.track_dirty_pages);
    for (wanted, what) in [
        (machine.smt == Some(true), "smt"),
        (machine.huge_pages.is_some_and(|pages| pages != "None"), "huge_pages"),
    ] {
        if wanted {
            return Err(not_supported(what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn firecrackers_file_becomes_a_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, "x").unwrap();
            path.display().to_string()
        };
        let (kernel, root, data) = (file("vmlinux"), file("root"), file("data"));
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "{kernel}", "boot_args": "quiet"}},
            "drives": [{{"drive_id": "rootfs", "is_root_device": true, "path_on_host": "{root}", "is_read_only": true,
                "partuuid": null, "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": null}},
                {{"drive_id": "d", "is_root_device": false, "path_on_host": "{data}"}}],
            "machine-config": {{"vcpu_count": 2, "mem_size_mib": 512, "smt": false, "track_dirty_pages": false}},
            "network-interfaces": [{{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01"}}],
            "vsock": {{"guest_cid": 3, "uds_path": "/tmp/v"}}, "entropy": {{}}, "metrics": null,
            "balloon": {{"amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1}},
            "cpu-config": null, "logger": {{"log_path": "/tmp/log", "level": "Info"}}}}"#
        );
        let setup = Setup::read(&text).unwrap();
        let config = &setup.config;
        assert_eq!((config.cpus, config.memory), (2, Size(512 << 20)));
        let root = config.rootfs.as_ref().unwrap();
        assert_eq!((root.readonly, root.cache, root.io), (true, DiskCache::Unsafe, DiskIo::Sync));
        assert_eq!(config.disks[0].id.as_deref(), Some("d"));
        assert_eq!(config.nets[0].tap, "tap0");
        assert!(config.rng && config.vsock.is_some() && config.balloon.is_some());
        assert_eq!(setup.logger.unwrap().level.as_deref(), Some("Info"));
        assert!(Setup::read(r#"{"boot_source": {}}"#).unwrap_err().contains("unknown field"));
        assert!(Setup::read(r#"{"drives": {}}"#).unwrap_err().contains("list"));
    }

    #[test]
    fn static_templates_are_told_at_the_start() {
        let mut setup = Setup::default();
        let machine = |text: &str| serde_json::from_str(text).map(Part::Machine);
        assert!(machine(r#"{"cpu_template": "V1N1"}"#).unwrap_err().to_string().contains("unknown variant"));
        setup.add(machine(r#"{"cpu_template": "T2"}"#).unwrap()).unwrap();
        // Whatever this host is: it is refused, or would be ignored.
        assert!(setup.check().is_err());
        setup.add(machine(r#"{"mem_size_mib": 64}"#).unwrap()).unwrap();
        assert!(setup.check().is_err());
        setup.add(machine(r#"{"cpu_template": "None"}"#).unwrap()).unwrap();
        assert_eq!(setup.check(), Ok(()));
        setup.add(machine(r#"{"cpu_template": "T2A"}"#).unwrap()).unwrap();
        setup.add(Part::Cpu(Box::default())).unwrap();
        assert_eq!(setup.check(), Ok(()));
    }

    #[test]
    fn wrong_parts_change_nothing() {
        let mut setup = Setup::default();
        let machine = |text: &str| Part::Machine(serde_json::from_str(text).unwrap());
        for wrong in [
            r#"{"vcpu_count": 0}"#,
            r#"{"vcpu_count": 33}"#,
            r#"{"mem_size_mib": 0}"#,
            r#"{"mem_size_mib": 18446744073709551615}"#,
            r#"{"smt": true}"#,
            r#"{"huge_pages": "2M"}"#,
        ] {
            assert!(setup.add(machine(wrong)).is_err(), "{wrong}");
        }
        assert_eq!(setup.config, VmConfig::default());
        let missing = r#"{"drive_id": "a", "is_root_device": true, "path_on_host": "/no/such"}"#;
        assert!(setup.add(Part::Drive(serde_json::from_str(missing).unwrap())).is_err());
        assert!(setup.add(machine(r#"{"vcpu_count": 4}"#)).is_ok());
        assert_eq!(setup.config.cpus, 4);
    }
}
