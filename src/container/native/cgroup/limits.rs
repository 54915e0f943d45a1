//! Limits of an OCI `Spec`, written where the host has them.

use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::{Cgroup, Part, Version, devices, write};
use crate::container::backend::Error;
use crate::container::native::is_user_namespace;

/// Default period of a processor quota, in microseconds.
const PERIOD_US: u64 = 100_000;

/// Says to a user without root how control groups are come by.
pub(super) fn with_way_out(what: String) -> String {
    if !is_user_namespace() {
        return what;
    }
    format!(
        "{what}. Without root it takes a part of the version 2 tree that is yours: start rvmm by `systemd-run --user --scope \
         -p Delegate=yes`, or use --isolation microvm"
    )
}

impl Cgroup {
    /// Writes all limits. One whose controller is not there is refused.
    pub(in super::super) fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        if let Some(memory) = resources.memory() {
            self.memory(memory)?;
        }
        if let Some(cpu) = resources.cpu() {
            self.cpu(cpu)?;
        }
        if let Some(pids) = resources.pids() {
            let value = if pids.limit() > 0 { pids.limit().to_string() } else { "max".into() };
            self.set("processes", "pids", &[("pids.max", "pids.max", value)])?;
        }
        if let Some(block_io) = resources.block_io() {
            self.block_io(block_io)?;
        }
        Ok(())
    }

    /// Writes the rules for devices; `required` says that the container may not be without.
    pub(in super::super) fn limit_devices(
        &self,
        resources: &LinuxResources,
        required: bool,
    ) -> Result<(), Error> {
        let rules = resources.devices().as_deref().unwrap_or_default();
        if rules.is_empty() {
            return Ok(());
        }
        if let Some(part) = self.part("devices") {
            return devices::write_rules(&part.directory, rules)
                .map_err(|source| Error::failed("cannot limit the container's devices", source));
        }
        let attached = match self.open_v2() {
            Some(directory) => devices::attach(&directory, rules),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match attached {
            Err(source) if required => {
                let what = "cannot keep the container from the host's devices: this host has neither a devices \
                            controller nor a control group that takes a program for it";
                Err(Error::failed(what, source))
            }
            _ => Ok(()),
        }
    }

    fn needs(&self, limit: &str, controller: &str) -> Result<&Part, Error> {
        self.part(controller).ok_or_else(|| {
            let what =
                format!("cannot limit {limit}: this host has no {controller} controller for the container");
            Error::Unsupported { what: with_way_out(what) }
        })
    }

    /// Writes values by the names of their files in versions 1 and 2.
    fn set(&self, limit: &str, controller: &str, files: &[(&str, &str, String)]) -> Result<(), Error> {
        let part = self.needs(limit, controller)?;
        for (v1, v2, value) in files {
            let file = if part.version == Version::V1 { v1 } else { v2 };
            put(limit, &part.directory.join(file), value)?;
        }
        Ok(())
    }

    fn memory(&self, memory: &LinuxMemory) -> Result<(), Error> {
        let (limit, swap) = (memory.limit().filter(|limit| *limit > 0), memory.swap());
        if let Some(limit) = limit {
            self.set("memory", "memory", &[("memory.limit_in_bytes", "memory.max", limit.to_string())])?;
        }
        if let (Some(limit), Some(both)) = (limit, swap) {
            let part = self.needs("memory and swap", "memory")?;
            let (file, value) = match part.version {
                Version::V1 => ("memory.memsw.limit_in_bytes", both),
                Version::V2 => ("memory.swap.max", both.saturating_sub(limit)),
            };
            let path = part.directory.join(file);
            // Twice the memory is what comes without being asked for: a host that does not count swap is no reason to
            // refuse that.
            if path.exists() || Some(both) != limit.checked_mul(2) {
                put("memory and swap", &path, &value.to_string())?;
            }
        }
        if let Some(bytes) = memory.reservation().filter(|bytes| *bytes > 0) {
            let files = [("memory.soft_limit_in_bytes", "memory.low", bytes.to_string())];
            self.set("reserved memory", "memory", &files)?;
        }
        Ok(())
    }

    fn cpu(&self, cpu: &LinuxCpu) -> Result<(), Error> {
        if let Some(quota) = cpu.quota().filter(|quota| *quota > 0) {
            let period = cpu.period().unwrap_or(PERIOD_US);
            let part = self.needs("processors", "cpu")?;
            match part.version {
                Version::V1 => {
                    put("processors", &part.directory.join("cpu.cfs_period_us"), &period.to_string())?;
                    put("processors", &part.directory.join("cpu.cfs_quota_us"), &quota.to_string())?;
                }
                Version::V2 => {
                    put("processors", &part.directory.join("cpu.max"), &format!("{quota} {period}"))?
                }
            }
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            let part = self.needs("processor weight", "cpu")?;
            match part.version {
                Version::V1 => {
                    put("processor weight", &part.directory.join("cpu.shares"), &shares.to_string())?
                }
                Version::V2 => {
                    let weight = scale(shares, (2, 262_144), (1, 10_000));
                    put("processor weight", &part.directory.join("cpu.weight"), &weight.to_string())?;
                }
            }
        }
        if let Some(cpus) = cpu.cpus() {
            self.set("set of processors", "cpuset", &[("cpuset.cpus", "cpuset.cpus", cpus.clone())])?;
        }
        if let Some(nodes) = cpu.mems() {
            self.set("set of memory nodes", "cpuset", &[("cpuset.mems", "cpuset.mems", nodes.clone())])?;
        }
        Ok(())
    }

    fn block_io(&self, block_io: &LinuxBlockIo) -> Result<(), Error> {
        // Version 1 calls it blkio.
        let controller = if self.part("blkio").is_some() { "blkio" } else { "io" };
        if let Some(weight) = block_io.weight() {
            self.io_weight(controller, weight.into())?;
        }
        let lists: [(&Option<Vec<LinuxThrottleDevice>>, &str, &str); 4] = [
            (block_io.throttle_read_bps_device(), "blkio.throttle.read_bps_device", "rbps"),
            (block_io.throttle_write_bps_device(), "blkio.throttle.write_bps_device", "wbps"),
            (block_io.throttle_read_iops_device(), "blkio.throttle.read_iops_device", "riops"),
            (block_io.throttle_write_iops_device(), "blkio.throttle.write_iops_device", "wiops"),
        ];
        for (list, v1, v2) in lists {
            for device in list.iter().flatten() {
                let part = self.needs("disk", controller)?;
                let number = format!("{}:{}", device.major(), device.minor());
                match part.version {
                    Version::V1 => {
                        put("disk", &part.directory.join(v1), &format!("{number} {}", device.rate()))?
                    }
                    Version::V2 => {
                        let line = format!("{number} {v2}={}", device.rate());
                        put("disk", &part.directory.join("io.max"), &line)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn io_weight(&self, controller: &str, weight: u64) -> Result<(), Error> {
        let limit = "disk weight";
        let part = self.needs(limit, controller)?;
        // The scheduler's own file where it has one, and it takes the number as it is.
        let (scheduler, other, value) = match part.version {
            Version::V1 => ("blkio.bfq.weight", "blkio.weight", weight.to_string()),
            Version::V2 => {
                ("io.bfq.weight", "io.weight", format!("default {}", scale(weight, (10, 1000), (1, 10_000))))
            }
        };
        let own = part.directory.join(scheduler);
        if own.exists() {
            return put(limit, &own, &weight.to_string());
        }
        let other = part.directory.join(other);
        if !other.exists() {
            let what = "cannot limit disk weight: the host's kernel weighs no block device's requests".into();
            return Err(Error::Unsupported { what });
        }
        put(limit, &other, &value)
    }
}

/// A number of one range in another.
fn scale(value: u64, from: (u64, u64), to: (u64, u64)) -> u64 {
    let value = value.clamp(from.0, from.1);
    to.0 + (value - from.0) * (to.1 - to.0) / (from.1 - from.0)
}

fn put(limit: &str, path: &Path, value: &str) -> Result<(), Error> {
    write(path, value)
        .map_err(|source| Error::failed(format!("cannot limit {limit} to {value:?} in {path:?}"), source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_version_1_are_in_the_range_of_version_2() {
        let cpu = |shares| scale(shares, (2, 262_144), (1, 10_000));
        assert_eq!((cpu(2), cpu(1024), cpu(262_144), cpu(u64::MAX)), (1, 39, 10_000, 10_000));
        let io = |weight| scale(weight, (10, 1000), (1, 10_000));
        assert_eq!((io(10), io(1000)), (1, 10_000));
    }
}
