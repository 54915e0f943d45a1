//! The 25 claims, and which measurements speak for or against each.

use super::{Info, Side, Test};

use Side::{AnyVm, Container, FullVm, Microvm, Process, Restored};
use Test::{Better, Beyond, Fact, Figure, NoProbe, PerMinute, Ran, Same, Within};

const MINUTE: f64 = 60.0;
const MIB: f64 = 1024.0 * 1024.0;
const GIB: f64 = 1024.0 * MIB;

/// Words that a fact begins with where an attempt did not reach the host.
const STOPPED: &[&str] =
    &["stopped", "refused", "its own", "reaches its own", "limited", "itself", "no ", "none"];
/// Words that a fact begins with where it did.
const REACHED: &[&str] = &["reaches the host", "reached the host", "the host", "not stopped", "done"];
/// Words that a fact begins with where it ends with the instance.
const OWN: &[&str] = &["itself", "its own"];
const YES: &[&str] = &["yes", "kept", "all", "shared"];
const NO: &[&str] = &["no", "lost", "none", "not"];

/// Claims in their order. A row reads: what is said; what is a matter of definition in it, if that is the answer; what is
/// measured, in the words of [`Test`].
pub(super) const CLAIMS: [Info; 25] = [
    Info {
        claim: "A container shares the host's kernel; a VM brings its own operating system and kernel",
        definition: None,
        tests: &[
            Fact("isolation", "kernel", Container, &["the host"], &["its own"]),
            Fact("isolation", "kernel", AnyVm, &["its own"], &["the host"]),
        ],
    },
    Info {
        claim: "Containers start in seconds (some say milliseconds), VMs in minutes",
        definition: None,
        tests: &[
            Within("start", "first_output", Container, 0.0, 10.0),
            Within("start", "first_output", Microvm, MINUTE, f64::INFINITY),
            Within("start", "first_output", Restored, MINUTE, f64::INFINITY),
            Within("start", "first_output", FullVm, MINUTE, f64::INFINITY),
            Better("start", "first_output", Container, Microvm),
            Figure("start", "first_http", Container),
            Figure("start", "first_http", AnyVm),
        ],
    },
    Info {
        claim: "Containers use less RAM and CPU; each VM duplicates an operating system",
        definition: None,
        tests: &[
            Better("memory", "pss", Container, Microvm),
            Better("memory", "pss", Container, FullVm),
            Better("memory", "cgroup", Container, Microvm),
            Better("memory", "system", Container, Microvm),
            Better("memory", "idle_cpu", Container, Microvm),
            Figure("memory", "guest", AnyVm),
            Figure("memory", "monitor", AnyVm),
        ],
    },
    Info {
        claim: "Containers are megabytes, VMs gigabytes",
        definition: None,
        tests: &[
            Within("size", "image", Container, 0.0, GIB),
            Within("size", "instance", Container, 0.0, GIB),
            Within("size", "image", Microvm, GIB, f64::INFINITY),
            Within("size", "instance", Microvm, GIB, f64::INFINITY),
            Within("size", "image", FullVm, GIB, f64::INFINITY),
            Within("size", "instance", FullVm, GIB, f64::INFINITY),
        ],
    },
    Info {
        claim: "Container isolation is partial (shared kernel), VM isolation complete",
        definition: None,
        tests: &[
            Better("isolation", "syscalls_allowed", Microvm, Container),
            Within("isolation", "syscalls_allowed", Container, 1.0, f64::INFINITY),
            Within("isolation", "syscalls_allowed", AnyVm, 0.0, 0.5),
            // What is complete leaves nothing: neither to the work nor to its monitor.
            Within("isolation", "monitor_syscalls", AnyVm, 0.0, 0.5),
            Better("isolation", "symbols", Microvm, Container),
            Fact("isolation", "escape_mount", AnyVm, STOPPED, REACHED),
            Fact("isolation", "escape_ptrace", AnyVm, STOPPED, REACHED),
            Fact("isolation", "escape_module", AnyVm, STOPPED, REACHED),
            Fact("isolation", "escape_proc_sys", AnyVm, STOPPED, REACHED),
            Fact("isolation", "escape_device", AnyVm, STOPPED, REACHED),
            Figure("isolation", "syscalls_used", Container),
            Figure("isolation", "syscalls_used", AnyVm),
        ],
    },
    Info {
        claim: "A kernel exploit in a container reaches the host; in a VM the damage stays inside",
        definition: None,
        tests: &[
            Fact("isolation", "crash", Container, &["the host"], OWN),
            Fact("isolation", "crash", AnyVm, OWN, &["the host"]),
            Fact("isolation", "escape_memory", AnyVm, STOPPED, REACHED),
            Fact("isolation", "escape_processes", AnyVm, STOPPED, REACHED),
        ],
    },
    Info {
        claim: "The hypervisor is itself an attack surface, a larger one",
        definition: None,
        tests: &[
            Within("isolation", "monitor_syscalls", AnyVm, 1.0, f64::INFINITY),
            Beyond("isolation", ("monitor_syscalls", AnyVm), ("syscalls_allowed", Container)),
        ],
    },
    Info {
        claim: "Namespaces isolate pid, network, mounts, host name, IPC, users",
        definition: None,
        tests: &[
            Within("isolation", "host_processes", Container, 0.0, 0.5),
            Better("isolation", "processes", Container, Process),
            Better("isolation", "mounts", Container, Process),
            Better("isolation", "devices", Container, Process),
            Fact("isolation", "hostname", Container, &["its own"], &["the host"]),
            Fact("isolation", "escape_ptrace", Container, STOPPED, REACHED),
        ],
    },
    Info {
        claim: "cgroups guarantee and limit CPU, memory, disk, network",
        definition: None,
        tests: &[
            Fact("isolation", "escape_memory", Container, STOPPED, REACHED),
            Fact("isolation", "escape_processes", Container, STOPPED, REACHED),
            Fact("isolation", "escape_disk", Container, STOPPED, REACHED),
            Within("neighbour", "integer", Container, 0.0, 1.5),
            Figure("neighbour", "integer", Process),
            Figure("neighbour", "integer", AnyVm),
        ],
    },
    Info {
        claim: "Union file systems share layers without copying",
        definition: None,
        tests: &[
            Fact("size", "shared", Container, YES, NO),
            Better("size", "instance", Container, FullVm),
            Fact("size", "shared", Microvm, YES, NO),
            Figure("size", "instance", Container),
            Figure("size", "unpacked", Container),
            Figure("memory", "page_cache", Container),
            Figure("memory", "page_cache", AnyVm),
        ],
    },
    Info {
        claim: "Containers are highly portable, VMs depend on hypervisor and disk format (VMDK, QCOW2)",
        definition: None,
        tests: &[
            Ran(Container, true),
            Ran(Microvm, false),
            Better("size", "convert", Container, Microvm),
            Figure("size", "format", Container),
            Figure("size", "format", AnyVm),
        ],
    },
    Info {
        claim: "Scaling out is easy and fast with containers, complex and slow with VMs",
        definition: None,
        tests: &[
            Better("start", "parallel_10", Container, Microvm),
            Better("start", "parallel_50", Container, Microvm),
            Better("density", "instances", Container, Microvm),
            Within("start", "parallel_10", Microvm, MINUTE, f64::INFINITY),
            Within("start", "parallel_50", Microvm, MINUTE, f64::INFINITY),
        ],
    },
    Info {
        claim: "VMs perform worse because of the extra layer",
        definition: None,
        tests: &[
            Better("cpu", "integer", Container, Microvm),
            Better("cpu", "float", Container, Microvm),
            Better("cpu", "bandwidth", Container, Microvm),
            Better("cpu", "random", Container, Microvm),
            Better("syscall", "getppid", Container, Microvm),
            Better("fault", "anonymous", Container, Microvm),
            Better("fork", "fork", Container, Microvm),
            Better("fork", "exec", Container, Microvm),
            Better("switch", "pipe", Container, Microvm),
            Better("disk", "root_random_read", Container, Microvm),
            Better("disk", "root_random_write", Container, Microvm),
            Better("network", "host_throughput", Container, Microvm),
            Better("network", "host_latency", Container, Microvm),
            Better("service", "fastapi_requests", Container, Microvm),
            Better("service", "nginx_requests", Container, Microvm),
            Better("service", "redis_requests", Container, Microvm),
        ],
    },
    Info {
        claim: "A type 2 hypervisor is slower and hungrier than type 1, but easier to install and use",
        definition: Some(
            "KVM is neither: the host's kernel is the hypervisor, and the monitor is a process of its own beside it. No type 1 \
             hypervisor can be measured on the same host at the same time; what the layer costs is claim 13.",
        ),
        tests: &[
            Same("cpu", "integer", Process, Microvm),
            Figure("effort", "commands", Microvm),
            Figure("exits", "idle", Microvm),
            Figure("exits", "boot", Microvm),
        ],
    },
    Info {
        claim: "Container data is volatile, VM disks persist",
        definition: None,
        tests: &[
            Fact("persistence", "root_stop", Container, NO, YES),
            Fact("persistence", "root_kill", Container, NO, YES),
            Fact("persistence", "root_remove", Container, NO, YES),
            Fact("persistence", "volume_remove", Container, NO, YES),
            Fact("persistence", "root_stop", AnyVm, YES, NO),
            Fact("persistence", "root_kill", AnyVm, YES, NO),
            Fact("persistence", "root_remove", AnyVm, YES, NO),
        ],
    },
    Info {
        claim: "Containers communicate through virtual networks (bridge, host, overlay, macvlan), VMs through virtual interfaces",
        definition: Some(
            "Both are virtual interfaces on a bridge of the host: a veth pair for a container, a tap for a VM. What can be \
             measured is what each costs.",
        ),
        tests: &[
            Better("network", "host_throughput", Container, Microvm),
            Better("network", "host_latency", Container, Microvm),
            Better("network", "peer_throughput", Container, Microvm),
            Better("network", "peer_latency", Container, Microvm),
            Better("network", "peer_connections", Container, Microvm),
        ],
    },
    Info {
        claim: "Containers find each other by name; VMs need DNS or discovery set up",
        definition: None,
        tests: &[
            Fact("network", "names", Container, YES, NO),
            Fact("network", "names", Microvm, NO, YES),
            Fact("network", "names", FullVm, NO, YES),
        ],
    },
    Info {
        claim: "Published ports make a container reachable; VMs need addresses and firewall rules",
        definition: None,
        tests: &[
            Within("network", "published_connections", Container, f64::MIN_POSITIVE, f64::INFINITY),
            Within("network", "published_connections", Microvm, 0.0, f64::MIN_POSITIVE),
            Better("network", "published_connections", Container, Microvm),
        ],
    },
    Info {
        claim: "VMs carry traditional security tools and full control of the operating system",
        definition: None,
        tests: &[
            Fact(
                "isolation",
                "escape_module",
                FullVm,
                &["reaches its own", "its own"],
                &["stopped", "refused"],
            ),
            Fact(
                "isolation",
                "escape_proc_sys",
                FullVm,
                &["reaches its own", "its own"],
                &["stopped", "refused"],
            ),
            Fact(
                "isolation",
                "escape_module",
                Microvm,
                &["reaches its own", "its own"],
                &["stopped", "refused"],
            ),
            Fact(
                "isolation",
                "escape_proc_sys",
                Microvm,
                &["reaches its own", "its own"],
                &["stopped", "refused"],
            ),
            Fact(
                "isolation",
                "escape_module",
                Container,
                &["stopped", "refused"],
                &["reaches", "its own", "the host"],
            ),
            Fact(
                "isolation",
                "escape_proc_sys",
                Container,
                &["stopped", "refused"],
                &["reaches", "its own", "the host"],
            ),
        ],
    },
    Info {
        claim: "Fewer components in a container mean a smaller surface, faster updates",
        definition: None,
        tests: &[
            Better("size", "image", Container, FullVm),
            Better("isolation", "processes", Container, FullVm),
            NoProbe("packages and programs in the running instance"),
            NoProbe("time from a changed file to the running new version"),
        ],
    },
    Info {
        claim: "Pre-built images are plentiful for containers, rare for VMs",
        definition: None,
        tests: &[Ran(Container, true), Ran(Microvm, false)],
    },
    Info {
        claim: "VMs can be moved to another host as they are; containers are destroyed and re-created",
        definition: None,
        tests: &[
            NoProbe("what was in memory, over stop and start"),
            Figure("start", "first_output", Restored),
            Figure("start", "stop", Container),
            Figure("start", "first_output", Container),
            NoProbe("size of a snapshot, and the time to make it"),
        ],
    },
    Info {
        claim: "Whole environments start with one command (Compose); VMs are installed and configured by hand",
        definition: None,
        tests: &[
            Better("effort", "commands", Container, Microvm),
            Better("effort", "commands", Container, FullVm),
            Better("effort", "files", Container, FullVm),
            Better("effort", "fetched", Container, FullVm),
            Better("effort", "first_answer", Container, Microvm),
            Better("effort", "first_answer", Container, FullVm),
        ],
    },
    Info {
        claim: "CI/CD suits containers; provisioning VMs is slow",
        definition: None,
        tests: &[
            Better("start", "whole", Container, Microvm),
            Better("start", "whole", Container, FullVm),
            Better("start", "first_output", Container, FullVm),
            PerMinute("start", "whole", Container),
            PerMinute("start", "whole", Microvm),
            PerMinute("start", "whole", FullVm),
        ],
    },
    Info {
        claim: "Both combine: containers inside VMs",
        definition: None,
        tests: &[
            Ran(Microvm, true),
            Fact("isolation", "kernel", Microvm, &["its own"], &["the host"]),
            Fact("isolation", "escape_mount", Microvm, STOPPED, REACHED),
            Figure("start", "first_output", Microvm),
            Figure("memory", "pss", Microvm),
            Figure("size", "instance", Microvm),
        ],
    },
];
