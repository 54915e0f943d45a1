//! Results as a run leaves them, made up: for tests of whatever reads results.

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use super::catalogue;
use super::results::{
    Better, CommandLine, Cpu, End, ExecutorInfo, FORMAT, Host, Isolation, Metric, Noise, Plan, PlannedProbe,
    Program, Results, Sample, Unit, Value, Warning,
};

/// A source of figures around a median.
#[derive(Clone, Copy, Debug)]
pub struct Noisy {
    /// The median.
    pub median: f64,
    /// How far samples lie from it, as a share of it.
    pub spread: f64,
}

impl Noisy {
    /// One figure: as often above the median as below, and skewed to the right, as times are.
    pub fn draw(self, random: &mut impl rand::Rng) -> f64 {
        // Twelve uniform numbers have a variance of one together, and are close to normal.
        let normal = (0..12).map(|_| random.random::<f64>()).sum::<f64>() - 6.0;
        rounded(self.median * (normal * self.spread).exp())
    }
}

/// Six digits: what is written in decimal is then read back as the same number.
fn rounded(number: f64) -> f64 {
    format!("{number:.5e}").parse().unwrap_or(number)
}

/// What is made up for a metric in an executor.
enum Made {
    Number(Noisy),
    Exact(f64),
    Text(&'static str),
    Failed(&'static str),
}

use Made::{Exact, Failed, Text};

const fn near(median: f64, percent: f64) -> Made {
    Made::Number(Noisy { median, spread: percent / 100.0 })
}

const EXECUTORS: [&str; 6] = ["process", "rvmm-native", "crun", "docker", "rvmm-microvm", "full-vm-qemu"];
const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * KIB;

// They are figures, whatever constants they lie near.
#[allow(clippy::approx_constant)]
/// Figures like those of a host with hardware virtualisation, one column for each of `EXECUTORS`.
fn figures() -> Vec<(&'static str, &'static str, [Made; 6])> {
    let own = || Text("its own");
    let host = || Text("the host's");
    let lost = || Text("lost");
    let kept = || Text("kept");
    let stopped = |by| Text(by);
    vec![
        (
            "start",
            "first_instruction",
            [
                near(0.0011, 6.0),
                near(0.0142, 4.0),
                near(0.0108, 5.0),
                near(0.312, 7.0),
                near(0.148, 3.0),
                near(9.4, 3.0),
            ],
        ),
        (
            "start",
            "first_output",
            [
                near(0.0013, 6.0),
                near(0.0151, 4.0),
                near(0.0117, 5.0),
                near(0.318, 7.0),
                near(0.151, 3.0),
                near(9.5, 3.0),
            ],
        ),
        (
            "start",
            "whole",
            [
                near(0.0016, 6.0),
                near(0.0185, 4.0),
                near(0.0186, 5.0),
                near(0.451, 7.0),
                near(0.171, 3.0),
                Failed("a full VM does not end by itself"),
            ],
        ),
        (
            "start",
            "stop",
            [
                near(0.0007, 9.0),
                near(0.0082, 6.0),
                near(0.0071, 6.0),
                near(0.148, 9.0),
                near(0.021, 6.0),
                near(1.9, 8.0),
            ],
        ),
        (
            "timeline",
            "kvm_ready",
            [
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                near(0.0012, 5.0),
                Failed("no microVM of rvmm"),
            ],
        ),
        (
            "timeline",
            "first_run",
            [
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                near(0.0010, 5.0),
                Failed("no microVM of rvmm"),
            ],
        ),
        (
            "timeline",
            "agent_ready",
            [
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                Failed("no microVM of rvmm"),
                near(0.118, 3.0),
                Failed("no microVM of rvmm"),
            ],
        ),
        (
            "memory",
            "pss",
            [
                near(0.31 * MIB, 2.0),
                near(1.9 * MIB, 2.0),
                near(0.44 * MIB, 2.0),
                near(11.2 * MIB, 3.0),
                near(41.0 * MIB, 2.0),
                near(212.0 * MIB, 2.0),
            ],
        ),
        (
            "memory",
            "monitor",
            [
                near(0.0, 0.0),
                near(1.6 * MIB, 2.0),
                near(0.13 * MIB, 2.0),
                near(10.9 * MIB, 3.0),
                near(3.9 * MIB, 2.0),
                near(31.0 * MIB, 2.0),
            ],
        ),
        (
            "memory",
            "guest",
            [
                near(0.0, 0.0),
                near(0.0, 0.0),
                near(0.0, 0.0),
                near(0.0, 0.0),
                near(37.1 * MIB, 2.0),
                near(181.0 * MIB, 2.0),
            ],
        ),
        (
            "memory",
            "system",
            [
                near(0.4 * MIB, 20.0),
                near(2.6 * MIB, 12.0),
                near(1.0 * MIB, 18.0),
                near(14.1 * MIB, 9.0),
                near(44.0 * MIB, 4.0),
                near(219.0 * MIB, 4.0),
            ],
        ),
        (
            "cpu",
            "integer",
            [
                near(0.42e-9, 0.6),
                near(0.42e-9, 0.6),
                near(0.42e-9, 0.6),
                near(0.42e-9, 0.6),
                near(0.423e-9, 0.6),
                near(0.424e-9, 0.6),
            ],
        ),
        (
            "cpu",
            "bandwidth",
            [
                near(11.2e9, 1.5),
                near(11.2e9, 1.5),
                near(11.2e9, 1.5),
                near(11.1e9, 1.5),
                near(10.9e9, 1.5),
                near(10.8e9, 1.5),
            ],
        ),
        (
            "cpu",
            "random",
            [
                near(81e-9, 2.0),
                near(81e-9, 2.0),
                near(81e-9, 2.0),
                near(82e-9, 2.0),
                near(97e-9, 2.0),
                near(99e-9, 2.0),
            ],
        ),
        (
            "syscall",
            "getppid",
            [
                near(62e-9, 1.0),
                near(101e-9, 1.0),
                near(98e-9, 1.0),
                near(141e-9, 1.0),
                near(64e-9, 1.0),
                near(66e-9, 1.0),
            ],
        ),
        (
            "fault",
            "anonymous",
            [
                near(0.24e-6, 2.0),
                near(0.25e-6, 2.0),
                near(0.25e-6, 2.0),
                near(0.25e-6, 2.0),
                near(0.61e-6, 3.0),
                near(0.63e-6, 3.0),
            ],
        ),
        (
            "fork",
            "fork",
            [
                near(71e-6, 3.0),
                near(74e-6, 3.0),
                near(73e-6, 3.0),
                near(75e-6, 3.0),
                near(88e-6, 3.0),
                near(95e-6, 3.0),
            ],
        ),
        (
            "switch",
            "pipe",
            [
                near(4.9e-6, 4.0),
                near(5.1e-6, 4.0),
                near(5.0e-6, 4.0),
                near(5.2e-6, 4.0),
                near(6.0e-6, 5.0),
                near(6.1e-6, 5.0),
            ],
        ),
        (
            "network",
            "host_throughput",
            [
                near(5.1e9, 3.0),
                near(3.2e9, 3.0),
                Failed("crun makes no networks"),
                near(3.2e9, 3.0),
                near(1.4e9, 4.0),
                near(1.1e9, 4.0),
            ],
        ),
        (
            "network",
            "names",
            [
                Text("no network of its own"),
                Text("yes"),
                Text("no network of its own"),
                Text("yes"),
                Text("yes"),
                Text("no"),
            ],
        ),
        (
            "service",
            "fastapi_requests",
            [
                near(4310.0, 2.0),
                near(4180.0, 2.0),
                Failed("crun makes no networks"),
                near(4090.0, 2.0),
                near(3420.0, 3.0),
                near(3310.0, 3.0),
            ],
        ),
        (
            "service",
            "fastapi_p50",
            [
                near(0.0036, 2.0),
                near(0.0037, 2.0),
                Failed("crun makes no networks"),
                near(0.0038, 2.0),
                near(0.0046, 3.0),
                near(0.0048, 3.0),
            ],
        ),
        (
            "service",
            "fastapi_p99",
            [
                near(0.0061, 5.0),
                near(0.0064, 5.0),
                Failed("crun makes no networks"),
                near(0.0066, 5.0),
                near(0.0093, 6.0),
                near(0.0101, 6.0),
            ],
        ),
        (
            "service",
            "fastapi_p999",
            [
                near(0.0102, 9.0),
                near(0.0109, 9.0),
                Failed("crun makes no networks"),
                near(0.0113, 9.0),
                near(0.0171, 9.0),
                near(0.0190, 9.0),
            ],
        ),
        (
            "size",
            "image",
            [
                Exact(1_044_480.0),
                Exact(1_044_480.0),
                Exact(1_044_480.0),
                Exact(1_044_480.0),
                Exact(1_044_480.0),
                Exact(412.0 * MIB),
            ],
        ),
        (
            "size",
            "instance",
            [
                Exact(0.0),
                Exact(24.0 * KIB),
                Exact(8.0 * KIB),
                Exact(40.0 * KIB),
                Exact(1.2 * MIB),
                Exact(412.0 * MIB),
            ],
        ),
        ("size", "shared", [Text("yes"), Text("yes"), Text("yes"), Text("yes"), Text("yes"), Text("no")]),
        ("isolation", "kernel", [host(), host(), host(), host(), own(), own()]),
        (
            "isolation",
            "syscalls_allowed",
            [Exact(373.0), Exact(311.0), Exact(373.0), Exact(311.0), Exact(0.0), Exact(0.0)],
        ),
        (
            "isolation",
            "monitor_syscalls",
            [Exact(0.0), Exact(0.0), Exact(0.0), Exact(0.0), Exact(48.0), Exact(373.0)],
        ),
        (
            "isolation",
            "host_processes",
            [Exact(141.0), Exact(0.0), Exact(0.0), Exact(0.0), Exact(0.0), Exact(0.0)],
        ),
        (
            "isolation",
            "escape_mount",
            [
                stopped("reaches the host"),
                stopped("stopped by capabilities (EPERM)"),
                stopped("stopped by capabilities (EPERM)"),
                stopped("stopped by seccomp (EPERM)"),
                stopped("stopped by capabilities (EPERM)"),
                stopped("reaches its own kernel only"),
            ],
        ),
        (
            "isolation",
            "escape_module",
            [
                stopped("reaches the host"),
                stopped("stopped by seccomp (EPERM)"),
                stopped("stopped by capabilities (EPERM)"),
                stopped("stopped by seccomp (EPERM)"),
                stopped("stopped by seccomp (EPERM)"),
                stopped("reaches its own kernel only"),
            ],
        ),
        (
            "isolation",
            "crash",
            [
                Text("the host, with everything on it"),
                Text("the host, with everything on it"),
                Text("the host, with everything on it"),
                Text("the host, with everything on it"),
                Text("itself: the host goes on, seen to"),
                Text("itself: the host goes on, seen to"),
            ],
        ),
        ("persistence", "root_stop", [Text("no root of its own"), kept(), lost(), kept(), kept(), kept()]),
        ("persistence", "root_remove", [Text("no root of its own"), lost(), lost(), lost(), lost(), lost()]),
        ("persistence", "volume_remove", [kept(), kept(), kept(), kept(), kept(), kept()]),
        ("effort", "files", [Exact(1.0), Exact(2.0), Exact(3.0), Exact(2.0), Exact(2.0), Exact(5.0)]),
        ("effort", "commands", [Exact(3.0), Exact(2.0), Exact(9.0), Exact(2.0), Exact(2.0), Exact(14.0)]),
        (
            "effort",
            "first_answer",
            [
                near(1.1, 5.0),
                near(1.4, 5.0),
                Failed("crun makes no networks"),
                near(2.1, 5.0),
                near(1.9, 5.0),
                near(41.0, 5.0),
            ],
        ),
    ]
}

/// How many of `tries` may go wrong that each go wrong with probability `error`, so that more happen by chance with less than
/// `chance`: from the binomial distribution.
pub fn allowed_misses(tries: u32, error: f64, chance: f64) -> u32 {
    let mut probability = (1.0 - error).powi(tries as i32);
    let mut at_most = probability;
    let mut misses = 0;
    while 1.0 - at_most > chance && misses < tries {
        probability *= f64::from(tries - misses) / f64::from(misses + 1) * error / (1.0 - error);
        at_most += probability;
        misses += 1;
    }
    misses
}

/// A whole run of twelve rounds, with what real ones have: failures, an outlier, facts, warnings, executors left out.
pub fn results(seed: u64) -> Results {
    made_up(seed, 12)
}

/// The same with any number of rounds.
pub fn made_up(seed: u64, rounds: u32) -> Results {
    let figures = figures();
    let mut plan = plan(seed, rounds);
    plan.probes = catalogue::PROBES
        .iter()
        .filter(|probe| figures.iter().any(|(of, _, _)| *of == probe.name))
        .map(|probe| PlannedProbe {
            name: probe.name.into(),
            title: probe.title.into(),
            runs: rounds,
            warmups: 1,
            left_out: None,
        })
        .collect();
    plan.metrics = catalogue::PROBES.iter().flat_map(catalogue::metrics).collect();
    let stage = |name: &str, title: &str| Metric {
        probe: "timeline".into(),
        name: name.into(),
        title: title.into(),
        unit: Unit::Seconds,
        better: Better::Lower,
        exact: false,
    };
    plan.metrics.extend([
        stage("kvm_ready", "program to KVM ready"),
        stage("first_run", "to the guest's first instruction"),
        stage("agent_ready", "to the agent"),
    ]);

    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut samples: Vec<Sample> = vec![];
    for round in 0..rounds {
        for (probe, name, made) in &figures {
            let metric = plan.metric(probe, name).cloned();
            for (executor, made) in EXECUTORS.iter().zip(made) {
                let Some(metric) = &metric else { continue };
                if (metric.exact || metric.unit == Unit::Text || matches!(made, Failed(_))) && round > 0 {
                    continue;
                }
                let value = match made {
                    Made::Number(noisy) => Value::Number(noisy.draw(&mut random)),
                    Exact(number) => Value::Number(*number),
                    Text(text) => Value::Text((*text).into()),
                    Failed(why) => Value::Failed((*why).into()),
                };
                let order = samples.len() as u32;
                let noise = Noise {
                    steal: rounded(random.random_range(0.0..0.004)),
                    busy: rounded(random.random_range(0.4..0.7)),
                };
                samples.push(sample(metric, executor, round, order, value, noise));
            }
        }
    }
    if let Some(Sample { value: Value::Number(number), .. }) =
        samples.iter_mut().rfind(|sample| sample.executor == "docker" && sample.metric == "first_output")
    {
        *number = rounded(*number * 4.0);
    }
    let at = samples.last().map_or(0.0, |sample| sample.at) + 1.0;
    Results {
        host: host(),
        plan,
        samples,
        commands: commands(),
        end: Some(End { complete: true, at, why: None }),
    }
}

/// A run of two executors, `a` and `b`, of which only `start`'s `first_output` is known.
pub fn two(rounds: u32, a: Noisy, b: Noisy, seed: u64) -> Results {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut results = Results { samples: vec![], commands: vec![], ..made_up(seed, 0) };
    results.plan.executors = vec!["a".into(), "b".into()];
    results.plan.baseline = "a".into();
    let Some(metric) = results.plan.metric("start", "first_output").cloned() else { return results };
    for round in 0..rounds {
        for (executor, noisy) in [("a", a), ("b", b)] {
            let value = Value::Number(noisy.draw(&mut random));
            let order = results.samples.len() as u32;
            results.samples.push(sample(&metric, executor, round, order, value, Noise::default()));
        }
    }
    results
}

fn sample(metric: &Metric, executor: &str, round: u32, order: u32, value: Value, noise: Noise) -> Sample {
    Sample {
        probe: metric.probe.clone(),
        metric: metric.name.clone(),
        executor: executor.into(),
        round,
        order,
        at: rounded(f64::from(order) * 0.11),
        unit: metric.unit,
        better: metric.better,
        value,
        noise,
    }
}

fn plan(seed: u64, runs: u32) -> Plan {
    Plan {
        format: FORMAT,
        run: "cmp-0123abcd".into(),
        command: ["rvmm", "compare", "--runs"]
            .map(String::from)
            .into_iter()
            .chain([runs.to_string()])
            .collect(),
        kind: "custom".into(),
        image: "busybox".into(),
        image_id: Some(format!("sha256:{}", "5a".repeat(32))),
        seed,
        confidence: 0.95,
        executors: EXECUTORS.map(String::from).to_vec(),
        baseline: catalogue::BASELINE.into(),
        probes: vec![],
        metrics: vec![],
    }
}

fn host() -> Host {
    let left_out = |name: &str| match name {
        "podman" | "youki" | "firecracker" | "runc" => {
            Some(format!("there is no program {name:?} on this host"))
        }
        "rvmm-restored" => Some("this version of rvmm cannot restore VMs".into()),
        "full-vm-rvmm" | "qemu-microvm" => Some("not asked for".into()),
        _ => None,
    };
    let info = |(name, title, isolation): &(&str, &str, Isolation)| ExecutorInfo {
        name: (*name).into(),
        title: (*title).into(),
        isolation: *isolation,
        version: left_out(name).is_none().then(|| format!("{name} 1.2.3")),
        left_out: left_out(name),
    };
    Host {
        date: "2026-11-27T18:00:00Z".into(),
        cpu: Cpu {
            model: "Example 9000 8-Core Processor".into(),
            count: 8,
            mhz: Some(3600.0),
            governor: Some("powersave".into()),
        },
        memory_bytes: 32 << 30,
        kernel: "6.12.0".into(),
        os: "Debian GNU/Linux 12 (bookworm)".into(),
        kvm: "hardware".into(),
        virtualisation: None,
        cgroups: "v2".into(),
        rvmm: Program { name: "rvmm".into(), version: "rvmm 0.1.0".into() },
        commit: Some("0123456789ab".into()),
        executors: catalogue::EXECUTORS.iter().map(info).collect(),
        tools: vec![Program { name: "fio".into(), version: "fio-3.33".into() }],
        load: [0.12, 0.2, 0.3],
        warnings: vec![Warning {
            code: "governor".into(),
            text: "The frequency governor is powersave: short measurements may run at a low frequency."
                .into(),
            probes: vec!["cpu".into(), "start".into()],
            executors: vec![],
        }],
    }
}

fn commands() -> Vec<CommandLine> {
    let command = |executor: &str, line: &str| CommandLine {
        probe: "start".into(),
        executor: executor.into(),
        argv: line.split(' ').map(String::from).collect(),
    };
    vec![
        command("process", "/usr/lib/rvmm/rvmm-probe now"),
        command("rvmm-native", "rvmm run --rm --name cmp-0123abcd-1 --network none busybox /rvmm-probe now"),
        command("docker", "docker run --rm --name cmp-0123abcd-2 --network none busybox /rvmm-probe now"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_makes_the_same_results() {
        assert_eq!(results(1), results(1));
        assert_ne!(results(1).samples, results(2).samples);
    }

    /// After a change of the format: `RVMM_WRITE_FIXTURE=1 cargo test --lib bench::testing`.
    #[test]
    fn fixture_is_what_is_made_here() {
        let fixture = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/fixture");
        let results = made_up(1, 8);
        if std::env::var_os("RVMM_WRITE_FIXTURE").is_some() {
            results.save(&fixture).unwrap();
        }
        assert!(Results::open(&fixture).unwrap() == results, "write it anew, as said above");
    }

    #[test]
    fn figures_are_of_metrics_that_there_are() {
        let results = results(1);
        for (probe, metric, _) in figures() {
            assert!(
                results.samples.iter().any(|sample| sample.probe == probe && sample.metric == metric),
                "{metric}"
            );
        }
    }

    #[test]
    fn allowed_misses_are_those_of_the_binomial_distribution() {
        // 20 tries at 5 %: at most 4 with 99.7 %, at most 5 with 99.97 %.
        assert_eq!(allowed_misses(20, 0.05, 0.001), 5);
        assert_eq!(allowed_misses(20, 0.05, 0.01), 4);
        assert_eq!(allowed_misses(20, 0.0, 0.001), 0);
    }

    #[test]
    fn median_of_noise_is_the_median() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        let noisy = Noisy { median: 3.0, spread: 0.2 };
        let below = (0..10_000).filter(|_| noisy.draw(&mut random) < 3.0).count();
        assert!((4700..5300).contains(&below), "{below}");
    }
}
