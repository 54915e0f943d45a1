//! What is known about this machine, and what that means for figures from it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value as Json;

use super::executor::find;
use super::process::{Invocation, Spawner};
use super::results::{Cpu, Host, Program, Warning};

/// Programs whose versions are noted, and how each is asked.
const TOOLS: [(&str, &str); 5] = [
    ("fio", "--version"),
    ("iperf3", "--version"),
    ("strace", "--version"),
    ("wrk", "--version"),
    ("redis-benchmark", "--version"),
];

/// A load average above this share of the processors is worth a warning.
const MUCH_LOAD: f64 = 0.25;

/// Describes the machine. The executors are filled in by whoever has looked for them.
pub fn describe(spawner: &Spawner, rvmm: &Path) -> Host {
    let program = rvmm.to_string_lossy().into_owned();
    let ask = |argv: &[&str]| {
        spawner.output(&Invocation::new(argv.iter().copied()), Duration::from_secs(60)).unwrap_or_default()
    };
    let first = |text: &str| text.lines().next().unwrap_or_default().trim().to_owned();
    let doctor = ask(&[&program, "doctor", "--json"]);
    let doctor: Json =
        doctor.find('{').and_then(|at| serde_json::from_str(&doctor[at..]).ok()).unwrap_or_default();
    let tools = TOOLS.iter().filter_map(|(name, flag)| {
        let path = find(name)?;
        // Some say it on standard error, and some fail while they say it.
        let said = spawner
            .spawn(&Invocation::new([&path.to_string_lossy(), *flag]))
            .ok()?
            .finish(Duration::from_secs(10));
        Some(Program { name: (*name).into(), version: first(&said.ok()?.output) })
    });
    let mut host = Host {
        date: date(),
        cpu: cpu(),
        memory_bytes: field("/proc/meminfo", "MemTotal:")
            .and_then(|kib| kib.parse::<u64>().ok())
            .unwrap_or(0)
            << 10,
        kernel: read("/proc/sys/kernel/osrelease"),
        os: os_name(&read("/etc/os-release")),
        kvm: doctor.get("kvm_kind").and_then(Json::as_str).unwrap_or("none").to_owned(),
        virtualisation: virtualisation(),
        cgroups: cgroups(&read("/proc/mounts")).into(),
        rvmm: Program { name: "rvmm".into(), version: first(&ask(&[&program, "--version"])) },
        commit: commit(rvmm, &ask),
        executors: vec![],
        tools: tools.collect(),
        load: load(&read("/proc/loadavg")),
        warnings: vec![],
    };
    host.warnings = warnings(&host);
    host
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn field(path: &str, name: &str) -> Option<String> {
    let text = read(path);
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(rest.split_whitespace().next()?.to_owned())
}

/// Now, by RFC 3339.
pub fn date() -> String {
    let format =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map(|time| time.tv_sec()).unwrap_or(0);
    chrono::DateTime::from_timestamp(format, 0)
        .map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true))
        .unwrap_or_default()
}

fn cpu() -> Cpu {
    let text = read("/proc/cpuinfo");
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    Cpu {
        model: value("model name").unwrap_or_default(),
        count: text.lines().filter(|line| line.starts_with("processor")).count() as u32,
        mhz: value("cpu MHz").and_then(|mhz| mhz.parse().ok()),
        governor: (!governor.is_empty()).then_some(governor),
    }
}

fn os_name(release: &str) -> String {
    let line = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    line.unwrap_or("unknown").trim_matches('"').to_owned()
}

fn virtualisation() -> Option<String> {
    let flags = read("/proc/cpuinfo");
    let flags = flags.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().any(|flag| flag == "hypervisor").then(|| {
        let vendor = read("/sys/class/dmi/id/sys_vendor");
        if vendor.is_empty() { "a hypervisor that does not say its name".into() } else { vendor }
    })
}

fn cgroups(mounts: &str) -> &'static str {
    let of = |kind: &str| mounts.lines().any(|line| line.split_whitespace().nth(2) == Some(kind));
    match (of("cgroup"), of("cgroup2")) {
        (true, true) => "hybrid",
        (true, false) => "v1",
        (false, true) => "v2",
        (false, false) => "none",
    }
}

/// Of rvmm's source tree, if the program lies in one.
fn commit(rvmm: &Path, ask: &impl Fn(&[&str]) -> String) -> Option<String> {
    let tree = rvmm.parent()?.parent()?.parent()?;
    tree.join("Cargo.toml").exists().then_some(())?;
    let said = ask(&["git", "-C", &tree.to_string_lossy(), "describe", "--always", "--dirty", "--abbrev=12"]);
    Some(said.lines().next()?.trim().to_owned()).filter(|commit| !commit.is_empty())
}

fn load(text: &str) -> [f64; 3] {
    let mut numbers = text.split_whitespace().map(|word| word.parse().unwrap_or(0.0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0.0))
}

fn warnings(host: &Host) -> Vec<Warning> {
    let mut found = vec![];
    let mut warn = |code: &str, text: String, probes: &[&str], executors: &[&str]| {
        let strings = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect();
        found.push(Warning {
            code: code.into(),
            text,
            probes: strings(probes),
            executors: strings(executors),
        });
    };
    const VMS: [&str; 6] =
        ["rvmm-microvm", "rvmm-restored", "qemu-microvm", "firecracker", "full-vm-rvmm", "full-vm-qemu"];
    match host.kvm.as_str() {
        "pvm" => warn(
            "pvm",
            "This host's KVM (PVM) emulates the instructions of a guest's kernel: a guest's user code runs at full speed, its kernel \
             code hundreds of times slower. Start times, system calls, faults, processes, disk and network of virtual machines say \
             nothing about hosts with hardware virtualisation; sizes, memory and isolation do."
                .into(),
            &["start", "timeline", "syscall", "fault", "fork", "switch", "disk", "network", "service"],
            &VMS,
        ),
        "nested" => warn(
            "nested",
            "This host is a virtual machine itself: exits of its guests cost several times what they cost on hardware.".into(),
            &["start", "timeline", "disk", "network", "service"],
            &VMS,
        ),
        "none" => warn("kvm", "This host has no usable KVM: virtual machines are not measured.".into(), &[], &VMS),
        _ => {}
    }
    if ["TCG", "QEMU"].iter().any(|name| host.cpu.model.contains(name)) {
        warn(
            "emulated",
            "This host's processor is emulated: all times are those of the emulator, and only sizes, memory and isolation mean \
             anything elsewhere."
                .into(),
            &[],
            &[],
        );
    }
    if let Some(governor) = host.cpu.governor.as_deref().filter(|governor| *governor != "performance") {
        let text =
            format!("The frequency governor is {governor}: short measurements may run at a low frequency.");
        warn("governor", text, &["start", "cpu", "syscall", "fault", "fork", "switch"], &[]);
    }
    if host.load[0] > MUCH_LOAD * f64::from(host.cpu.count.max(1)) {
        let text =
            format!("The load average was {} before the run: something else was at work.", host.load[0]);
        warn("load", text, &[], &[]);
    }
    if cfg!(debug_assertions) {
        let own = ["rvmm-native", "rvmm-microvm", "rvmm-restored", "full-vm-rvmm"];
        warn("debug", "rvmm-engine was built without optimisation.".into(), &["start", "memory"], &own);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_groups_are_told_by_their_mounts() {
        let v1 = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n";
        let v2 = "none /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroups(v1), "v1");
        assert_eq!(cgroups(v2), "v2");
        assert_eq!(cgroups(&format!("{v1}{v2}")), "hybrid");
    }

    #[test]
    fn pvm_is_warned_of() {
        let mut host = crate::bench::testing::results(1).host;
        host.kvm = "pvm".into();
        host.load = [9.0, 0.0, 0.0];
        let codes: Vec<String> = warnings(&host).into_iter().map(|warning| warning.code).collect();
        assert!(codes.contains(&"pvm".to_owned()) && codes.contains(&"load".to_owned()), "{codes:?}");
    }

    #[test]
    fn release_file_and_load_are_read() {
        assert_eq!(os_name("A=1\nPRETTY_NAME=\"Debian 12\"\n"), "Debian 12");
        assert_eq!(load("0.50 0.25 0.125 1/100 77"), [0.5, 0.25, 0.125]);
        assert!(date().ends_with('Z'));
    }
}
