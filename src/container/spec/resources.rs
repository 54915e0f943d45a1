//! Limits, as runtimes understand them, and kernel parameters.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxBlockIoBuilder, LinuxCpu, LinuxCpuBuilder, LinuxMemory, LinuxMemoryBuilder, LinuxPids,
    LinuxPidsBuilder, LinuxResources, LinuxThrottleDevice, LinuxThrottleDeviceBuilder,
};

use super::devices::block_device;
use super::{Error, Inputs, NetworkNamespace};
use crate::container::config::{IoLimit, Limits};

/// Length of the period of a processor quota: a tenth of a second, as Docker has it.
const PERIOD_US: u64 = 100_000;
/// Least memory that a container can be given.
const MEMORY_BYTES_MIN: u64 = 6 << 20;
/// Least quota in a period that the kernel takes.
const QUOTA_US_MIN: u64 = 1000;
/// Parameters that belong to an IPC namespace; those of System V and POSIX queues.
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Limits without devices.
pub fn of_container(limits: &Limits) -> Result<LinuxResources, Error> {
    let mut resources = LinuxResources::default();
    resources.set_memory(memory(limits)?);
    resources.set_cpu(cpu(limits)?);
    resources.set_pids(pids(limits)?);
    resources.set_block_io(block_io(limits)?);
    Ok(resources)
}

fn wrong(limit: &'static str, why: impl Into<String>) -> Error {
    Error::Limit { limit, why: why.into() }
}

/// OCI has signed numbers.
fn signed(limit: &'static str, value: u64) -> Result<i64, Error> {
    i64::try_from(value).map_err(|_| wrong(limit, format!("{value} is too large")))
}

fn memory(limits: &Limits) -> Result<Option<LinuxMemory>, Error> {
    if let Some(bytes) = limits.memory_bytes.filter(|bytes| *bytes < MEMORY_BYTES_MIN) {
        return Err(wrong(
            "memory",
            format!("{bytes} bytes are less than 6 MiB, the least that there can be"),
        ));
    }
    let swap = match (limits.memory_bytes, limits.memory_swap_bytes) {
        (None, Some(_)) => {
            return Err(wrong("memory and swap", "there is no limit of memory that it goes with"));
        }
        (Some(memory), Some(both)) if both < memory => {
            return Err(wrong(
                "memory and swap",
                format!("{both} bytes are less than the {memory} of memory alone"),
            ));
        }
        // Docker's: as much swap as memory.
        (Some(memory), None) => {
            Some(memory.checked_mul(2).ok_or_else(|| wrong("memory", "it is too large"))?)
        }
        (_, swap) => swap,
    };
    if let (Some(memory), Some(reservation)) = (limits.memory_bytes, limits.memory_reservation_bytes)
        && reservation > memory
    {
        return Err(wrong(
            "reserved memory",
            format!("{reservation} bytes are more than the {memory} of memory"),
        ));
    }
    if limits.memory_bytes.is_none() && limits.memory_reservation_bytes.is_none() {
        return Ok(None);
    }
    let mut builder = LinuxMemoryBuilder::default();
    if let Some(bytes) = limits.memory_bytes {
        builder = builder.limit(signed("memory", bytes)?);
    }
    if let Some(bytes) = swap {
        builder = builder.swap(signed("memory and swap", bytes)?);
    }
    if let Some(bytes) = limits.memory_reservation_bytes {
        builder = builder.reservation(signed("reserved memory", bytes)?);
    }
    builder.build().map(Some).map_err(Error::Oci)
}

fn cpu(limits: &Limits) -> Result<Option<LinuxCpu>, Error> {
    if limits.cpu_millis.is_none() && limits.cpu_shares.is_none() && limits.cpuset.is_none() {
        return Ok(None);
    }
    let mut builder = LinuxCpuBuilder::default();
    if let Some(millis) = limits.cpu_millis {
        let quota = millis.checked_mul(PERIOD_US / 1000).filter(|quota| *quota >= QUOTA_US_MIN);
        let quota =
            quota.ok_or_else(|| wrong("processors", format!("{millis} thousandths cannot be had")))?;
        builder = builder.quota(signed("processors", quota)?).period(PERIOD_US);
    }
    if let Some(shares) = limits.cpu_shares {
        if !(2..=262_144).contains(&shares) {
            return Err(wrong("processor weight", format!("{shares} is not between 2 and 262144")));
        }
        builder = builder.shares(shares);
    }
    if let Some(cpus) = &limits.cpuset {
        if cpus.is_empty() || !cpus.chars().all(|c| c.is_ascii_digit() || c == ',' || c == '-') {
            return Err(wrong("set of processors", format!("{cpus:?} is no list such as 0-2,4")));
        }
        builder = builder.cpus(cpus.clone());
    }
    builder.build().map(Some).map_err(Error::Oci)
}

fn pids(limits: &Limits) -> Result<Option<LinuxPids>, Error> {
    let Some(count) = limits.pids else { return Ok(None) };
    if count == 0 {
        return Err(wrong("processes", "0 would leave no room for the first"));
    }
    LinuxPidsBuilder::default().limit(signed("processes", count)?).build().map(Some).map_err(Error::Oci)
}

fn block_io(limits: &Limits) -> Result<Option<LinuxBlockIo>, Error> {
    if limits.io_weight.is_none() && limits.io.is_empty() {
        return Ok(None);
    }
    let mut builder = LinuxBlockIoBuilder::default();
    if let Some(weight) = limits.io_weight {
        if !(10..=1000).contains(&weight) {
            return Err(wrong("disk weight", format!("{weight} is not between 10 and 1000")));
        }
        builder = builder.weight(weight);
    }
    let list = |rate: fn(&IoLimit) -> Option<u64>| -> Result<Vec<LinuxThrottleDevice>, Error> {
        let mut list = vec![];
        for limit in &limits.io {
            if let Some(rate) = rate(limit) {
                let (major, minor) = block_device(&limit.device)?;
                let device = LinuxThrottleDeviceBuilder::default().major(major).minor(minor).rate(rate);
                list.push(device.build().map_err(Error::Oci)?);
            }
        }
        Ok(list)
    };
    builder
        .throttle_read_bps_device(list(|limit| limit.read_bps)?)
        .throttle_write_bps_device(list(|limit| limit.write_bps)?)
        .throttle_read_iops_device(list(|limit| limit.read_iops)?)
        .throttle_write_iops_device(list(|limit| limit.write_iops)?)
        .build()
        .map(Some)
        .map_err(Error::Oci)
}

/// Kernel parameters, only those that belong to a namespace of the container.
pub fn sysctls(inputs: &Inputs) -> Result<HashMap<String, String>, Error> {
    let mut parameters = HashMap::new();
    if !matches!(inputs.network, NetworkNamespace::Host) {
        // As Docker: low ports and ping need no capability in a network of one's own.
        parameters.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
        parameters.insert("net.ipv4.ping_group_range".into(), "0 2147483647".into());
    }
    for (name, value) in &inputs.config.sysctls {
        // Some interfaces have dots in their names, and sysctl(8) then has slashes between the parts.
        let slashes = name.find('/').is_some_and(|slash| name.find('.').is_none_or(|dot| slash < dot));
        let dotted = if slashes { name.replace('/', ".") } else { name.clone() };
        let well_formed = !dotted.contains("..") && !name.contains('\0') && !value.contains('\0');
        let refuse = |why| Err(Error::Sysctl { name: name.clone(), why });
        if dotted.starts_with("net.") && well_formed {
            if matches!(inputs.network, NetworkNamespace::Host) {
                return refuse("the container has the host's network");
            }
        } else if !(IPC_SYSCTLS.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue."))
            || !well_formed
        {
            return refuse("it is not one of a container's namespaces");
        }
        parameters.insert(name.clone(), value.clone());
    }
    Ok(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limits_are_no_resources() {
        assert_eq!(of_container(&Limits::default()).unwrap(), LinuxResources::default());
    }

    #[test]
    fn memory_has_as_much_swap_unless_it_is_said() {
        let of = |memory, swap| {
            let limits = Limits { memory_bytes: memory, memory_swap_bytes: swap, ..Limits::default() };
            of_container(&limits).map(|resources| resources.memory().and_then(|memory| memory.swap()))
        };
        assert_eq!(of(Some(64 << 20), None).unwrap(), Some(128 << 20));
        assert_eq!(of(Some(64 << 20), Some(64 << 20)).unwrap(), Some(64 << 20));
        assert!(of(Some(64 << 20), Some(1)).is_err());
        assert!(of(None, Some(1 << 30)).is_err());
        assert!(of(Some(1 << 20), None).is_err());
        assert!(of(Some(u64::MAX), None).is_err());
    }

    #[test]
    fn processors_become_a_quota() {
        let limits = Limits { cpu_millis: Some(1500), ..Limits::default() };
        let cpu = of_container(&limits).unwrap().cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(150_000), Some(100_000)));
        for wrong in [
            Limits { cpu_millis: Some(1), ..Limits::default() },
            Limits { cpu_millis: Some(u64::MAX), ..Limits::default() },
            Limits { cpu_shares: Some(1), ..Limits::default() },
            Limits { cpuset: Some("all".into()), ..Limits::default() },
            Limits { pids: Some(0), ..Limits::default() },
            Limits { io_weight: Some(5), ..Limits::default() },
        ] {
            assert!(matches!(of_container(&wrong), Err(Error::Limit { .. })), "{wrong:?}");
        }
    }
}
