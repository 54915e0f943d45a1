//! What can be measured: the probes and their metrics, in the order in which they are shown.

use super::results::{Better, Metric, Unit};

use Better::{Higher, Lower};
use Unit::{Bytes, BytesPerSecond, Count, PerSecond, Seconds, Share, Text};

/// A probe: its name, its title, and its metrics.
pub struct ProbeInfo {
    /// As in `--probe`.
    pub name: &'static str,
    /// For people.
    pub title: &'static str,
    /// In the order in which they are shown.
    pub metrics: &'static [MetricInfo],
}

/// A metric: name, title, unit, which way is better, and whether it is counted and not sampled.
pub struct MetricInfo(pub &'static str, pub &'static str, pub Unit, pub Better, pub bool);

/// Every probe. `docs/probes/NAME.md` says what each measures and what it does not.
pub const PROBES: &[ProbeInfo] = &[
    ProbeInfo {
        name: "start",
        title: "Starting and stopping",
        metrics: &[
            MetricInfo("first_instruction", "command typed to first instruction", Seconds, Lower, false),
            MetricInfo("first_output", "command typed to first output", Seconds, Lower, false),
            MetricInfo("first_http", "command typed to first HTTP answer", Seconds, Lower, false),
            MetricInfo("whole", "the whole command, for a program that ends at once", Seconds, Lower, false),
            MetricInfo("stop", "stop to gone", Seconds, Lower, false),
            MetricInfo("parallel_10", "10 at once, until all have answered", Seconds, Lower, false),
            MetricInfo("parallel_50", "50 at once, until all have answered", Seconds, Lower, false),
        ],
    },
    ProbeInfo { name: "timeline", title: "Where a microVM's start goes", metrics: &[] },
    ProbeInfo {
        name: "exits",
        title: "How often a guest leaves to its monitor",
        metrics: &[
            MetricInfo("boot", "exits of a boot of a small guest", Count, Lower, false),
            MetricInfo("idle", "exits of a resting guest", PerSecond, Lower, false),
        ],
    },
    ProbeInfo {
        name: "memory",
        title: "Memory of one more idle instance",
        metrics: &[
            MetricInfo("pss", "proportional memory of all its processes", Bytes, Lower, false),
            MetricInfo("monitor", "of it the runtime's and the monitor's", Bytes, Lower, false),
            MetricInfo("guest", "of it the guest's memory", Bytes, Lower, false),
            MetricInfo("workload", "of it the workload's own", Bytes, Lower, false),
            MetricInfo("cgroup", "what its control group counts", Bytes, Lower, false),
            MetricInfo("system", "difference of the host's available memory", Bytes, Lower, false),
            MetricInfo("page_cache", "difference of the host's page cache", Bytes, Lower, false),
            MetricInfo("idle_cpu", "processors that it takes while idle", Share, Lower, false),
        ],
    },
    ProbeInfo {
        name: "density",
        title: "How many fit",
        metrics: &[MetricInfo("instances", "instances in the memory given", Count, Higher, false)],
    },
    ProbeInfo {
        name: "cpu",
        title: "Processor and memory",
        metrics: &[
            MetricInfo("integer", "integer work, a step", Seconds, Lower, false),
            MetricInfo("float", "floating point work, a step", Seconds, Lower, false),
            MetricInfo("bandwidth", "memory copied", BytesPerSecond, Higher, false),
            MetricInfo("random", "memory read at random, a read", Seconds, Lower, false),
        ],
    },
    ProbeInfo {
        name: "syscall",
        title: "System calls",
        metrics: &[
            MetricInfo("getppid", "the least system call", Seconds, Lower, false),
            MetricInfo("read", "a byte from /dev/zero", Seconds, Lower, false),
            MetricInfo("stat", "attributes of a file", Seconds, Lower, false),
        ],
    },
    ProbeInfo {
        name: "fault",
        title: "Page faults",
        metrics: &[
            MetricInfo("anonymous", "first touch of a page", Seconds, Lower, false),
            MetricInfo("file", "first touch of a cached page of a file", Seconds, Lower, false),
        ],
    },
    ProbeInfo {
        name: "fork",
        title: "New processes",
        metrics: &[
            MetricInfo("fork", "fork, exit and wait", Seconds, Lower, false),
            MetricInfo("exec", "fork, exec, exit and wait", Seconds, Lower, false),
        ],
    },
    ProbeInfo {
        name: "switch",
        title: "Context switches",
        metrics: &[MetricInfo("pipe", "a byte to another process and back", Seconds, Lower, false)],
    },
    ProbeInfo {
        name: "disk",
        title: "Disk",
        metrics: &[
            MetricInfo("root_read", "sequential reads, root file system", BytesPerSecond, Higher, false),
            MetricInfo("root_write", "sequential writes, root file system", BytesPerSecond, Higher, false),
            MetricInfo("root_random_read", "random 4 KiB reads, root", PerSecond, Higher, false),
            MetricInfo("root_random_write", "random 4 KiB writes, root", PerSecond, Higher, false),
            MetricInfo("root_fsync", "4 KiB and fsync, root", Seconds, Lower, false),
            MetricInfo("volume_read", "sequential reads, volume", BytesPerSecond, Higher, false),
            MetricInfo("volume_write", "sequential writes, volume", BytesPerSecond, Higher, false),
            MetricInfo("volume_random_read", "random 4 KiB reads, volume", PerSecond, Higher, false),
            MetricInfo("volume_random_write", "random 4 KiB writes, volume", PerSecond, Higher, false),
            MetricInfo("volume_fsync", "4 KiB and fsync, volume", Seconds, Lower, false),
        ],
    },
    ProbeInfo {
        name: "network",
        title: "Network",
        metrics: &[
            MetricInfo("host_throughput", "host to instance", BytesPerSecond, Higher, false),
            MetricInfo("host_latency", "host to instance and back, a byte", Seconds, Lower, false),
            MetricInfo("host_connections", "connections made, host to instance", PerSecond, Higher, false),
            MetricInfo("published_connections", "the same by a published port", PerSecond, Higher, false),
            MetricInfo("peer_throughput", "instance to instance", BytesPerSecond, Higher, false),
            MetricInfo("peer_latency", "instance to instance and back, a byte", Seconds, Lower, false),
            MetricInfo(
                "peer_connections",
                "connections made, instance to instance",
                PerSecond,
                Higher,
                false,
            ),
            MetricInfo("names", "instances find each other by name", Text, Better::None, false),
        ],
    },
    ProbeInfo {
        name: "service",
        title: "Services under load",
        metrics: &[
            MetricInfo("fastapi_requests", "FastAPI: requests", PerSecond, Higher, false),
            MetricInfo("fastapi_p50", "FastAPI: half are answered within", Seconds, Lower, false),
            MetricInfo("fastapi_p99", "FastAPI: 99 % are answered within", Seconds, Lower, false),
            MetricInfo("fastapi_p999", "FastAPI: 99.9 % are answered within", Seconds, Lower, false),
            MetricInfo(
                "fastapi_cpu",
                "FastAPI: processor time of the host, a request",
                Seconds,
                Lower,
                false,
            ),
            MetricInfo("nginx_requests", "nginx: requests", PerSecond, Higher, false),
            MetricInfo("nginx_p50", "nginx: half are answered within", Seconds, Lower, false),
            MetricInfo("nginx_p99", "nginx: 99 % are answered within", Seconds, Lower, false),
            MetricInfo("nginx_p999", "nginx: 99.9 % are answered within", Seconds, Lower, false),
            MetricInfo("nginx_cpu", "nginx: processor time of the host, a request", Seconds, Lower, false),
            MetricInfo("redis_requests", "redis: requests", PerSecond, Higher, false),
            MetricInfo("redis_p50", "redis: half are answered within", Seconds, Lower, false),
            MetricInfo("redis_p99", "redis: 99 % are answered within", Seconds, Lower, false),
            MetricInfo("redis_p999", "redis: 99.9 % are answered within", Seconds, Lower, false),
            MetricInfo("redis_cpu", "redis: processor time of the host, a request", Seconds, Lower, false),
        ],
    },
    ProbeInfo {
        name: "size",
        title: "Size and portability",
        metrics: &[
            MetricInfo("image", "image, as it is moved", Bytes, Lower, true),
            MetricInfo("unpacked", "unpacked or converted, once for all instances", Bytes, Lower, true),
            MetricInfo("instance", "on disk for each instance", Bytes, Lower, true),
            MetricInfo("kernel", "kernel and initial programs, once for all images", Bytes, Lower, true),
            MetricInfo("shared", "instances share what is unpacked", Text, Better::None, true),
            MetricInfo("convert", "time to make the image ready, the first time", Seconds, Lower, false),
            MetricInfo("format", "what it starts from", Text, Better::None, true),
        ],
    },
    ProbeInfo {
        name: "isolation",
        title: "Isolation",
        metrics: &[
            MetricInfo("kernel", "the kernel that the work sees", Text, Better::None, true),
            MetricInfo("kernel_release", "its release", Text, Better::None, true),
            MetricInfo(
                "syscalls_allowed",
                "system calls of the host that the work can reach",
                Count,
                Lower,
                true,
            ),
            MetricInfo("syscalls_used", "different system calls that the host saw", Count, Lower, true),
            MetricInfo(
                "monitor_syscalls",
                "system calls that its monitor's filters allow",
                Count,
                Lower,
                true,
            ),
            MetricInfo("symbols", "kernel symbols with addresses to be seen", Count, Lower, true),
            MetricInfo("modules", "kernel modules to be seen", Count, Lower, true),
            MetricInfo("devices", "device files to be opened", Count, Lower, true),
            MetricInfo("mounts", "mounts to be seen", Count, Lower, true),
            MetricInfo("processes", "processes to be seen", Count, Lower, true),
            MetricInfo("host_processes", "of them processes of the host", Count, Lower, true),
            MetricInfo("hostname", "host name", Text, Better::None, true),
            MetricInfo("capabilities", "capabilities", Count, Lower, true),
            MetricInfo("escape_mount", "mount a file system", Text, Better::None, true),
            MetricInfo("escape_ptrace", "trace a neighbour's process", Text, Better::None, true),
            MetricInfo("escape_raw_socket", "open a raw socket", Text, Better::None, true),
            MetricInfo("escape_keyring", "add to the kernel's keyring", Text, Better::None, true),
            MetricInfo("escape_proc_sys", "write a kernel parameter", Text, Better::None, true),
            MetricInfo("escape_module", "load a kernel module", Text, Better::None, true),
            MetricInfo(
                "escape_device",
                "make and open the device of the host's disk",
                Text,
                Better::None,
                true,
            ),
            MetricInfo("escape_memory", "take more memory than its limit", Text, Better::None, true),
            MetricInfo("escape_processes", "make more processes than its limit", Text, Better::None, true),
            MetricInfo("escape_disk", "fill the disk", Text, Better::None, true),
            MetricInfo("crash", "what a crash of its kernel takes with it", Text, Better::None, true),
        ],
    },
    ProbeInfo {
        name: "neighbour",
        title: "Work beside a neighbour that takes all it may",
        metrics: &[
            MetricInfo("integer", "integer work, times longer than alone", Count, Lower, false),
            MetricInfo("random", "memory read at random, times longer than alone", Count, Lower, false),
        ],
    },
    ProbeInfo {
        name: "persistence",
        title: "What survives",
        metrics: &[
            MetricInfo("root_stop", "a file in the root, over stop and start", Text, Better::None, true),
            MetricInfo("root_kill", "a file in the root, over kill and start", Text, Better::None, true),
            MetricInfo("root_remove", "a file in the root, over remove and create", Text, Better::None, true),
            MetricInfo("volume_stop", "a file in a volume, over stop and start", Text, Better::None, true),
            MetricInfo("volume_kill", "a file in a volume, over kill and start", Text, Better::None, true),
            MetricInfo(
                "volume_remove",
                "a file in a volume, over remove and create",
                Text,
                Better::None,
                true,
            ),
        ],
    },
    ProbeInfo {
        name: "effort",
        title: "From nothing to the first answer",
        metrics: &[
            MetricInfo("files", "files to write", Count, Lower, true),
            MetricInfo("commands", "commands to type", Count, Lower, true),
            MetricInfo("fetched", "bytes fetched", Bytes, Lower, true),
            MetricInfo("first_answer", "time from nothing to the first answer", Seconds, Lower, false),
        ],
    },
];

/// A probe by its name.
pub fn probe(name: &str) -> Option<&'static ProbeInfo> {
    PROBES.iter().find(|probe| probe.name == name)
}

/// The metrics of a probe, as a plan has them.
pub fn metrics(probe: &ProbeInfo) -> impl Iterator<Item = Metric> + use<'_> {
    probe.metrics.iter().map(|MetricInfo(name, title, unit, better, exact)| Metric {
        probe: probe.name.into(),
        name: (*name).into(),
        title: (*title).into(),
        unit: *unit,
        better: *better,
        exact: *exact,
    })
}

/// Name, title and isolation of every executor, in the order in which they are shown.
pub const EXECUTORS: &[(&str, &str, super::results::Isolation)] = {
    use super::results::Isolation::{Container, FullVm, Microvm, None};
    &[
        ("process", "plain process", None),
        ("rvmm-native", "rvmm, native", Container),
        ("crun", "crun", Container),
        ("runc", "runc", Container),
        ("youki", "youki", Container),
        ("docker", "Docker", Container),
        ("podman", "Podman", Container),
        ("rvmm-microvm", "rvmm, microVM", Microvm),
        ("rvmm-restored", "rvmm, restored microVM", Microvm),
        ("qemu-microvm", "QEMU microvm", Microvm),
        ("firecracker", "Firecracker", Microvm),
        ("full-vm-rvmm", "full VM, rvmm", FullVm),
        ("full-vm-qemu", "full VM, QEMU q35", FullVm),
    ]
};

/// What others are set beside, as long as it is there.
pub const BASELINE: &str = "rvmm-native";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_safe_in_file_names() {
        let mut names: Vec<String> = PROBES
            .iter()
            .flat_map(|probe| probe.metrics.iter().map(move |metric| format!("{}/{}", probe.name, metric.0)))
            .chain(EXECUTORS.iter().map(|executor| executor.0.to_owned()))
            .collect();
        let safe = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-/".contains(c);
        assert!(names.iter().all(|name| name.chars().all(safe)));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
