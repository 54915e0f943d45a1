//! Metrics against what programs in the guest say that they did, read by Prometheus' own parser.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::net::{Made, Server, has_network};
use crate::support::guest::linux_for_tests;
use crate::support::{Outcome, Script, directory, has_fast_kvm, has_tool, image, skip, tool};

/// What the loads take on top of a boot.
const WORK: Duration = Duration::from_secs(200);
/// Bytes of a datagram that iperf3 sends.
const DATAGRAM: f64 = 1400.0;
/// Bytes of Ethernet's, IPv4's and UDP's header, and of TCP's with time stamps.
const HEADERS: f64 = 42.0;
const HEADERS_TCP: f64 = 66.0;

/// Reads a page with the client library for Python and writes its samples as JSON, by name and labels.
const PARSER: &str = r#"
import json, sys
from prometheus_client.parser import text_string_to_metric_families
samples = {}
for family in text_string_to_metric_families(open(sys.argv[1]).read()):
    assert family.documentation and family.type in ("gauge", "counter", "histogram"), family
    for sample in family.samples:
        labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
        assert (key := f"{sample.name}{{{labels}}}") not in samples, key
        samples[key] = sample.value
print(json.dumps(samples))
"#;

/// Whether Prometheus' client library for Python is here; says so if not.
fn has_parser() -> bool {
    let there = has_tool("/usr/bin/python3")
        && Command::new("/usr/bin/python3")
            .args(["-c", "import prometheus_client.parser"])
            .output()
            .is_ok_and(|output| output.status.success());
    if !there {
        skip("needs python3 with prometheus_client (Debian: python3-prometheus-client)");
    }
    there
}

/// The samples of a page.
fn parse(page: &Path) -> BTreeMap<String, f64> {
    let samples = tool("/usr/bin/python3", &["-c", PARSER, page.to_str().expect("a path of ASCII")]);
    serde_json::from_str(&samples).expect("numbers")
}

/// The sum of a counter over all lines of JSON.
fn sum(lines: &Path, pointer: &str) -> f64 {
    let text = std::fs::read_to_string(lines).expect("lines");
    let number = |line: &str| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        line.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {pointer} in {line}"))
    };
    text.lines().map(number).sum()
}

fn told(outcome: &Outcome, name: &str) -> f64 {
    outcome.value(name).parse().unwrap_or_else(|_| panic!("{name}: {}", outcome.value(name)))
}

fn close(outcome: &Outcome, what: &str, counted: f64, told: f64) {
    let fair = told > 0.0 && (counted / told - 1.0).abs() <= 0.01;
    outcome.check(fair, &format!("{what}: {counted} were counted, and the guest did {told}"));
}

#[test]
fn counters_match_what_fio_and_iperf3_did() {
    if !has_fast_kvm() || !has_network() || !has_tool("iperf3") || !has_parser() {
        return;
    }
    let Some(linux) = linux_for_tests() else { return };
    let _tap = Made::tap("rvmetric", "10.77.9.1/24", "");
    let _iperf = Server::start("iperf3 -s -B 10.77.9.1");
    let directory = directory();
    let path = |name: &str| directory.path().join(name);
    image(&path("disk"), 64 << 20);
    let script = Script::new(
        r#"
ip link set eth0 up; ip addr add 10.77.9.2/24 dev eth0
number() { sed -n "/\"$1\"/,/}/s/.*\"$2\"[^0-9]*\([0-9]*\).*/\1/p" $3 | head -n 1; }
fio --name=m --filename=/dev/vdc --size=48m --io_size=8m --rw=randrw --bs=4k --ioengine=psync --direct=1 \
    --output-format=json >/tmp/fio
report read-bytes $(number read io_bytes /tmp/fio); report read-count $(number read total_ios /tmp/fio)
report write-bytes $(number write io_bytes /tmp/fio); report write-count $(number write total_ios /tmp/fio)
last() { sed -n "/\"sum\"/,/}/s/.*\"$1\"[^0-9]*\([0-9]*\).*/\1/p" $2 | tail -n 1; }
iperf3 --connect-timeout 20000 -c 10.77.9.1 -u -b 4M -l 1400 -n 3M -J >/tmp/up; report datagrams $(last packets /tmp/up)
iperf3 --connect-timeout 20000 -c 10.77.9.1 -n 8M -R -J >/tmp/down; report down $(number sum_received bytes /tmp/down)
cd /sys/class/net/eth0/statistics
for name in tx_bytes rx_bytes tx_packets rx_packets; do report $name $(cat $name); done"#,
    );
    let disk = format!("{},id=load", path("disk").display());
    let monitor = script.on(linux.monitor_with_memory("256M")).args(["--disk", &disk]);
    let monitor = monitor.args(["--net", "tap=rvmetric,vhost=off,id=eth0", "--metrics"]).arg(path("page"));
    let outcome =
        monitor.arg("--metrics-path").arg(path("lines")).run_within(crate::support::LINUX_PATIENCE + WORK);
    outcome.exits(0);
    let samples = parse(&path("page"));
    let sample =
        |name: &str| *samples.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", samples.keys()));

    for kind in ["read", "write"] {
        let bytes = sample(&format!("rvmm_block_bytes_total{{id=load,kind={kind}}}"));
        let count = sample(&format!("rvmm_block_operations_total{{id=load,kind={kind}}}"));
        close(&outcome, &format!("{kind} bytes"), bytes, told(&outcome, &format!("{kind}-bytes")));
        close(&outcome, &format!("{kind} requests"), count, told(&outcome, &format!("{kind}-count")));
        assert_eq!(sum(&path("lines"), &format!("/block_load/{kind}_bytes")), bytes);
        assert_eq!(sum(&path("lines"), &format!("/block_load/{kind}_count")), count);
        // Each request has a place in the histogram.
        let latency = sample(&format!("rvmm_block_latency_seconds_count{{id=load,kind={kind}}}"));
        assert_eq!(latency, count);
        let all = sample(&format!("rvmm_block_latency_seconds_bucket{{id=load,kind={kind},le=+Inf}}"));
        assert_eq!(all, count);
    }
    // Up as UDP and down as TCP: what iperf3 says of these is exact. Packets of the other kind acknowledge, or are what it says to
    // its server besides.
    let datagrams = told(&outcome, "datagrams");
    for (direction, name, datagrams, payload) in
        [("sent", "tx", datagrams, datagrams * DATAGRAM), ("received", "rx", 0.0, told(&outcome, "down"))]
    {
        let bytes = sample(&format!("rvmm_net_bytes_total{{direction={direction},id=eth0}}"));
        let packets = sample(&format!("rvmm_net_packets_total{{direction={direction},id=eth0}}"));
        close(&outcome, &format!("{direction} bytes"), bytes, told(&outcome, &format!("{name}_bytes")));
        close(&outcome, &format!("{direction} packets"), packets, told(&outcome, &format!("{name}_packets")));
        let headers = HEADERS * datagrams + HEADERS_TCP * (packets - datagrams);
        close(&outcome, &format!("payload {direction}"), bytes - headers, payload);
        assert_eq!(sum(&path("lines"), &format!("/net_eth0/{name}_bytes_count")), bytes);
        assert_eq!(sum(&path("lines"), &format!("/net_eth0/{name}_packets_count")), packets);
    }
    assert_eq!(sample("rvmm_block_errors_total{id=load}"), 0.0);
    assert!(sample("rvmm_vcpu_exits_total{reason=mmio_write}") > 0.0);
}
