//! Firecracker's lines of JSON: counters hold what was added since the line before.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::{API_FAULTS, API_REQUESTS, Device, EXITS, Moment, mmds, registry};

/// A line with what was added since the one before.
pub fn line() -> String {
    let registry = registry();
    line_of(&registry.devices, &registry.timeline, registry.lines_failed)
}

pub(super) fn line_of(devices: &[Arc<Device>], timeline: &[Moment], lines_failed: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
    let start = timeline.iter().find(|(name, ..)| name == "first KVM_RUN");
    let [port_in, port_out, mmio_read, mmio_write, ..] = &EXITS;
    let [get, put, patch, _] = &API_REQUESTS;
    let [get_faults, put_faults, patch_faults, _] = &API_FAULTS;
    let mut line = Map::new();
    let mut set = |name: &str, value: Value| line.insert(name.to_owned(), value);
    set("utc_timestamp_ms", now.into());
    set(
        "api_server",
        json!({
            "process_startup_time_us": start.map_or(0, |(_, wall, _)| *wall),
            "process_startup_time_cpu_us": start.and_then(|(_, _, cpu)| *cpu).unwrap_or(0),
        }),
    );
    set("get_api_requests", json!({"count": get.since_told(), "fails": get_faults.since_told()}));
    set("put_api_requests", json!({"count": put.since_told(), "fails": put_faults.since_told()}));
    set("patch_api_requests", json!({"count": patch.since_told(), "fails": patch_faults.since_told()}));
    set("logger", json!({"missed_metrics_count": lines_failed, "metrics_fails": lines_failed}));
    set(
        "vcpu",
        json!({
            "exit_io_in": port_in.since_told(),
            "exit_io_out": port_out.since_told(),
            "exit_mmio_read": mmio_read.since_told(),
            "exit_mmio_write": mmio_write.since_told(),
            "failures": EXITS.get(7).map_or(0, super::Counter::since_told),
        }),
    );
    set(
        "mmds",
        json!({
            "rx_count": mmds::RECEIVED.since_told(),
            "rx_bad_eth": mmds::LOST.since_told(),
            "rx_invalid_token": mmds::INVALID_TOKENS.since_told(),
            "rx_no_token": mmds::NO_TOKENS.since_told(),
            "tx_count": mmds::SENT.since_told(),
            "connections_destroyed": mmds::CONNECTIONS.since_told(),
        }),
    );
    for kind in ["block", "net", "vsock", "entropy", "balloon", "fs", "console"] {
        let of_kind: Vec<_> = devices.iter().filter(|device| name_of(device) == kind).collect();
        if of_kind.is_empty() {
            continue;
        }
        let mut sum = Map::new();
        for device in of_kind {
            let values = values(device);
            for (name, value) in &values {
                add(&mut sum, name, value);
            }
            if !device.id.is_empty() {
                set(&format!("{kind}_{}", device.id), values.into());
            }
        }
        set(kind, sum.into());
    }
    let mut line = Value::Object(line).to_string();
    line.push('\n');
    line
}

/// Firecracker's name of a kind of device.
fn name_of(device: &Device) -> &'static str {
    if device.kind == "rng" { "entropy" } else { device.kind }
}

fn add(sum: &mut Map<String, Value>, name: &str, value: &Value) {
    let before = sum.get(name).and_then(Value::as_u64).unwrap_or(0);
    if let Some(value) = value.as_u64() {
        sum.insert(name.to_owned(), before.saturating_add(value).into());
    }
}

fn values(device: &Device) -> Map<String, Value> {
    let mut values = Map::new();
    let mut set = |name: &str, value: u64| values.insert(name.to_owned(), value.into());
    set("queue_event_count", device.notifications.since_told());
    set("event_fails", device.failures.since_told());
    set("interrupt_count", device.interrupts.since_told());
    set("rate_limiter_throttled_events", device.limiter_waits.since_told());
    match name_of(device) {
        "entropy" => {
            set("entropy_event_count", device.chains.since_told());
            set("entropy_bytes", device.written_bytes.since_told());
        }
        _ => {
            set("chain_count", device.chains.since_told());
            set("chain_bytes_written", device.written_bytes.since_told());
        }
    }
    if let Some(block) = device.block() {
        for (name, counter) in
            ["read_count", "write_count", "flush_count", "discard_count"].iter().zip(&block.operations)
        {
            set(name, counter.since_told());
        }
        set("read_bytes", block.read_bytes.since_told());
        set("write_bytes", block.written_bytes.since_told());
        set("execute_fails", block.errors.since_told());
        for (name, histogram) in ["read_agg", "write_agg"].iter().zip(&block.latency) {
            let sum_us = histogram.sum_ns.since_told() / 1000;
            values.insert((*name).to_owned(), json!({"sum_us": sum_us}));
        }
    } else if let Some(net) = device.net() {
        set("rx_packets_count", net.received_packets.since_told());
        set("rx_bytes_count", net.received_bytes.since_told());
        set("rx_fails", net.lost_packets.since_told());
        set("tx_packets_count", net.sent_packets.since_told());
        set("tx_bytes_count", net.sent_bytes.since_told());
        set("tx_fails", net.refused_packets.since_told());
    }
    values
}
