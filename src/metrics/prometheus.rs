//! The text form of Prometheus, version 0.0.4.

use std::fmt::{Display, Write};
use std::sync::Arc;

use super::{
    API_FAULTS, API_METHODS, API_REQUESTS, BLOCK_KINDS, BUCKETS, Counter, Device, EXIT_REASONS, EXITS,
    Histogram, Moment, mmds, registry,
};

/// All metrics as they are now.
pub fn text() -> String {
    let registry = registry();
    text_of(&registry.devices, &registry.timeline)
}

/// Labels of a sample: names and values.
type Labels<'a> = &'a [(&'a str, &'a str)];

struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) {
        self.0.push_str(name);
        if !labels.is_empty() {
            self.0.push('{');
            for (index, (label, value)) in labels.iter().enumerate() {
                let comma = if index == 0 { "" } else { "," };
                let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                let _ = write!(self.0, "{comma}{label}=\"{value}\"");
            }
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn histogram(&mut self, name: &str, labels: Labels<'_>, histogram: &Histogram) {
        let mut sum = 0;
        let bucket = format!("{name}_bucket");
        let buckets: Vec<u64> = histogram.buckets.iter().map(Counter::get).collect();
        for (index, count) in buckets.iter().enumerate() {
            sum += count;
            let bound = match index {
                last if last == BUCKETS - 1 => "+Inf".to_owned(),
                _ => format!("{}", f64::from(1u32 << index) / 1e6),
            };
            let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.sample(&bucket, &labels, sum);
        }
        self.sample(&format!("{name}_sum"), labels, histogram.sum_ns.get() as f64 / 1e9);
        self.sample(&format!("{name}_count"), labels, sum);
    }
}

/// A counter that every device has.
type OfDevice = (&'static str, &'static str, fn(&Device) -> &Counter);

pub(super) fn text_of(devices: &[Arc<Device>], timeline: &[Moment]) -> String {
    let mut page = Page(String::with_capacity(8 << 10));
    page.family("rvmm_info", "gauge", "The version of rvmm.");
    page.sample("rvmm_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.family(
        "rvmm_boot_seconds",
        "gauge",
        "Wall-clock time from the start of the process to a moment of the boot.",
    );
    for (name, wall_us, _) in timeline {
        page.sample("rvmm_boot_seconds", &[("moment", name)], *wall_us as f64 / 1e6);
    }
    page.family(
        "rvmm_boot_cpu_seconds",
        "gauge",
        "Processor time of the process up to a moment of the boot.",
    );
    for (name, _, cpu_us) in timeline {
        if let Some(cpu_us) = cpu_us {
            page.sample("rvmm_boot_cpu_seconds", &[("moment", name)], *cpu_us as f64 / 1e6);
        }
    }
    page.family("rvmm_vcpu_exits_total", "counter", "Returns of vCPUs from the guest to rvmm.");
    for (reason, counter) in EXIT_REASONS.iter().zip(&EXITS) {
        page.sample("rvmm_vcpu_exits_total", &[("reason", reason)], counter.get());
    }
    for (name, help, counters) in [
        ("rvmm_api_requests_total", "Requests to the control socket.", &API_REQUESTS),
        ("rvmm_api_faults_total", "Requests to the control socket that were refused.", &API_FAULTS),
    ] {
        page.family(name, "counter", help);
        for (method, counter) in API_METHODS.iter().zip(counters) {
            page.sample(name, &[("method", method)], counter.get());
        }
    }
    let all: [OfDevice; 6] = [
        ("notifications", "Times that a device was told of new chains.", |device| &device.notifications),
        ("interrupts", "Times that a driver was interrupted.", |device| &device.interrupts),
        ("chains", "Descriptor chains that went back to the driver.", |device| &device.chains),
        ("written_bytes", "Bytes that were written to chains.", |device| &device.written_bytes),
        ("failures", "Times that a device could not go on.", |device| &device.failures),
        ("limiter_waits", "Times that a rate limit made a device wait.", |device| &device.limiter_waits),
    ];
    for (name, help, counter) in all {
        let name = format!("rvmm_virtio_{name}_total");
        page.family(&name, "counter", help);
        for device in devices {
            page.sample(&name, &[("device", device.kind), ("id", &device.id)], counter(device).get());
        }
    }
    for (name, help, counter) in mmds::ALL {
        let name = format!("rvmm_mmds_{name}_total");
        page.family(&name, "counter", help);
        page.sample(&name, &[], counter.get());
    }
    block(&mut page, devices);
    net(&mut page, devices);
    page.0
}

fn block(page: &mut Page, devices: &[Arc<Device>]) {
    let disks = || devices.iter().filter_map(|device| Some((device.id.as_str(), device.block()?)));
    let name = "rvmm_block_operations_total";
    page.family(name, "counter", "Requests of a disk that are done.");
    for (id, disk) in disks() {
        for (kind, counter) in BLOCK_KINDS.iter().zip(&disk.operations) {
            page.sample(name, &[("id", id), ("kind", kind)], counter.get());
        }
    }
    let name = "rvmm_block_bytes_total";
    page.family(name, "counter", "Bytes that a guest has read from a disk, or written to it.");
    for (id, disk) in disks() {
        page.sample(name, &[("id", id), ("kind", "read")], disk.read_bytes.get());
        page.sample(name, &[("id", id), ("kind", "write")], disk.written_bytes.get());
    }
    let name = "rvmm_block_errors_total";
    page.family(name, "counter", "Requests of a disk that the host failed.");
    for (id, disk) in disks() {
        page.sample(name, &[("id", id)], disk.errors.get());
    }
    let name = "rvmm_block_latency_seconds";
    page.family(name, "histogram", "How long requests of a disk took.");
    for (id, disk) in disks() {
        for (kind, histogram) in BLOCK_KINDS.iter().zip(&disk.latency) {
            page.histogram(name, &[("id", id), ("kind", kind)], histogram);
        }
    }
}

fn net(page: &mut Page, devices: &[Arc<Device>]) {
    let nets = || devices.iter().filter_map(|device| Some((device.id.as_str(), device.net()?)));
    let name = "rvmm_net_packets_total";
    page.family(
        name,
        "counter",
        "Packets to and from a guest; lost had no room in it, refused none on the host.",
    );
    for (id, net) in nets() {
        for (direction, counter) in [
            ("received", &net.received_packets),
            ("lost", &net.lost_packets),
            ("sent", &net.sent_packets),
            ("refused", &net.refused_packets),
        ] {
            page.sample(name, &[("id", id), ("direction", direction)], counter.get());
        }
    }
    let name = "rvmm_net_bytes_total";
    page.family(name, "counter", "Bytes of packets to and from a guest.");
    for (id, net) in nets() {
        page.sample(name, &[("id", id), ("direction", "received")], net.received_bytes.get());
        page.sample(name, &[("id", id), ("direction", "sent")], net.sent_bytes.get());
    }
}
