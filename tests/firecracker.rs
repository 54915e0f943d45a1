//! A client that knows only Firecracker's interface, and a program of that name.

use std::os::unix::fs::symlink;
use std::process::Command;

use rvmm::boot::testing::Program;

use crate::support::api::Api;
use crate::support::guest::{More, Tiny};
use crate::support::{self, Monitor, PATIENCE, has_kvm, image, tiny, tool};

fn echo() -> Program {
    Program::new().listen().print("ready\n").echo_until(b'q').power_off()
}

/// The monitor under the name by which clients start it.
fn firecracker(guest: &Tiny) -> Monitor {
    let link = guest.path("firecracker");
    if !link.exists() {
        symlink(support::binary(), &link).unwrap();
    }
    Monitor::from_command(Command::new(link))
}

fn put(api: &Api, path: &str, body: &str) {
    api.change("PUT", path, body);
}

#[test]
fn client_puts_a_machine_together_and_starts_it() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&echo());
    let (disk, other, metrics) = (guest.path("disk"), guest.path("other"), guest.path("metrics"));
    image(&disk, 1 << 20);
    image(&other, 2 << 20);
    let api = Api::new(&guest.path("api"));
    let mut running = firecracker(&guest)
        .arg("--api-sock")
        .arg(&api.path)
        .args(["--id", "vm-1", "--level", "Info", "--log-path"])
        .arg(guest.path("log"))
        .arg("--boot-timer")
        .start_with_input();
    let state = |api: &Api| api.get("/")["state"].as_str().unwrap().to_owned();
    assert_eq!(state(&api), "Not started");
    assert_eq!(api.get("/")["id"], "vm-1");
    // In the wrong order, with wrong bodies.
    let start = "{\"action_type\":\"InstanceStart\"}";
    api.refuses("PUT", "/actions", start, 400, "without kernel configuration");
    api.refuses("PATCH", "/vm", "{\"state\":\"Paused\"}", 400, "not supported before starting");
    api.refuses("PUT", "/actions", "{\"action_type\":\"SendCtrlAltDel\"}", 400, "before starting");
    api.refuses("PUT", "/machine-config", "{\"vcpu_count\":0,\"mem_size_mib\":16}", 400, "vCPU");
    api.refuses("PUT", "/machine-config", "{\"vcpu_count\":1}", 400, "missing field `mem_size_mib`");
    api.refuses(
        "PUT",
        "/boot-source",
        "{\"kernel_image_path\":\"/no/such\"}",
        400,
        "kernel file cannot be opened",
    );
    api.refuses("PUT", "/boot-source", "{\"kernel\":\"x\"}", 400, "unknown field `kernel`");
    api.refuses("PUT", "/vsock", "{\"guest_cid\":1,\"uds_path\":\"v\"}", 400, "vsock address");
    api.refuses("PUT", "/drives/a", &"x".repeat(1 << 20), 413, "bytes");
    let unknown = "{\"network_interfaces\":[\"eth0\"]}";
    api.refuses("PUT", "/mmds/config", unknown, 400, "does not correspond to any existing network interface");
    api.refuses("PUT", "/mmds/config", "{\"network_interfaces\":[]}", 400, "MMDS requests is empty");
    api.refuses("PATCH", "/mmds", "{\"a\":1}", 400, "The MMDS data store is not initialized.");
    assert_eq!(api.get("/mmds"), serde_json::json!({}));
    // In the right one.
    put(&api, "/machine-config", "{\"vcpu_count\":1,\"mem_size_mib\":16}");
    api.change("PATCH", "/machine-config", "{\"mem_size_mib\":24}");
    assert_eq!(api.number("/machine-config", "mem_size_mib"), 24);
    put(&api, "/boot-source", &format!("{{\"kernel_image_path\":{:?},\"boot_args\":\"a=b\"}}", guest.kernel));
    let drive = |path: &std::path::Path| {
        format!(
            "{{\"drive_id\":\"data\",\"is_root_device\":false,\"path_on_host\":{path:?},\"is_read_only\":false}}"
        )
    };
    put(&api, "/drives/data", &drive(&disk));
    put(&api, "/balloon", "{\"amount_mib\":1,\"deflate_on_oom\":true}");
    put(&api, "/entropy", "{}");
    put(&api, "/metrics", &format!("{{\"metrics_path\":{metrics:?}}}"));
    put(&api, "/cpu-config", "{\"cpuid_modifiers\":[],\"msr_modifiers\":[]}");
    put(&api, "/actions", start);
    running.expect("ready");
    assert_eq!(state(&api), "Running");
    let config = api.get("/vm/config");
    assert_eq!(config.pointer("/boot-source/boot_args").unwrap(), "a=b");
    assert_eq!(config.pointer("/drives/0/drive_id").unwrap(), "data");
    api.refuses("PUT", "/actions", start, 400, "after starting");
    api.refuses("PUT", "/mmds/config", unknown, 400, "after starting");
    // Metadata may change whenever there is a client.
    put(&api, "/mmds", "{\"a\":{\"b\":1},\"c\":2}");
    api.change("PATCH", "/mmds", "{\"a\":{\"d\":[3]},\"c\":null}");
    assert_eq!(api.get("/mmds"), serde_json::json!({"a": {"b": 1, "d": [3]}}));
    let large = format!("\"{}\"", "x".repeat(51_199));
    api.refuses("PUT", "/mmds", &large, 413, "bytes");
    api.refuses("PATCH", "/mmds", &format!("{{\"e\":\"{}\"}}", "x".repeat(51_180)), 413, "doesn't fit");
    api.refuses("PUT", "/drives/data", &drive(&disk), 400, "after starting");
    api.set_state("Paused");
    assert_eq!(state(&api), "Paused");
    api.change("PATCH", "/drives/data", &format!("{{\"drive_id\":\"data\",\"path_on_host\":{other:?}}}"));
    api.refuses(
        "PATCH",
        "/drives/data",
        "{\"drive_id\":\"data\",\"path_on_host\":\"/no\"}",
        400,
        "does not exist",
    );
    api.refuses(
        "PATCH",
        "/drives/data",
        "{\"drive_id\":\"data\",\"path_on_host\":\"/dev/null\"}",
        400,
        "character device",
    );
    api.set_state("Resumed");
    put(&api, "/actions", "{\"action_type\":\"SendCtrlAltDel\"}");
    put(&api, "/actions", "{\"action_type\":\"FlushMetrics\"}");
    let text = std::fs::read_to_string(&metrics).unwrap();
    let line: serde_json::Value = serde_json::from_str(text.lines().next().expect("a line")).unwrap();
    assert!(line.pointer("/put_api_requests/count").unwrap().as_u64() > Some(9), "{line}");
    assert!(line.pointer("/put_api_requests/fails").unwrap().as_u64() > Some(5), "{line}");
    assert!(line.pointer("/vcpu/exit_io_out").unwrap().as_u64() > Some(0), "{line}");
    assert!(line.pointer("/block_data/read_count").is_some(), "{line}");
    let page = api.request("GET", "/metrics/prometheus", "");
    assert_eq!(page.status, 200);
    assert!(page.body.contains("rvmm_vcpu_exits_total{reason=\"port_write\"}"), "{}", page.body);
    assert!(page.body.contains("rvmm_boot_seconds{moment=\"first KVM_RUN\"}"), "{}", page.body);
    running.send("q");
    let outcome = running.wait(PATIENCE);
    outcome.exits(0).says("boot timeline");
    assert!(std::fs::read_to_string(guest.path("log")).unwrap().contains("the guest powered off"));
    assert!(!api.path.exists());
}

#[test]
fn configuration_file_needs_no_client() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&Program::new().print("up\n").power_off());
    let file = guest.path("vm.json");
    let text = format!(
        "{{\"boot-source\":{{\"kernel_image_path\":{:?}}},\"machine-config\":{{\"vcpu_count\":1,\"mem_size_mib\":16}},\
         \"drives\":[]}}",
        guest.kernel
    );
    std::fs::write(&file, text).unwrap();
    let page = guest.path("page");
    let outcome = firecracker(&guest)
        .args(["--no-api", "--config-file"])
        .arg(&file)
        .arg("--metrics")
        .arg(&page)
        .args(["--cpu", "baseline"])
        .run();
    outcome.exits(0).shows("up");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("rvmm_vcpu_exits_total{reason=\"port_write\"} "), "{page}");
    std::fs::write(&file, "{\"boot-sauce\":{}}").unwrap();
    let outcome = firecracker(&guest).args(["--no-api", "--config-file"]).arg(&file).run();
    outcome.fails_with(&["unknown field `boot-sauce`"]);
    assert!(tool(guest.path("firecracker").to_str().unwrap(), &["--version"]).starts_with("Firecracker v"));
}

#[test]
fn failed_start_is_told_and_can_be_tried_again() {
    if !has_kvm() {
        return;
    }
    let guest = tiny(&echo());
    let wrong = guest.path("wrong");
    std::fs::write(&wrong, "no kernel").unwrap();
    let api = Api::new(&guest.path("api"));
    let mut running = firecracker(&guest).arg("--api-sock").arg(&api.path).start_with_input();
    let boot = |kernel: &std::path::Path| format!("{{\"kernel_image_path\":{kernel:?}}}");
    put(&api, "/boot-source", &boot(&wrong));
    put(&api, "/machine-config", "{\"vcpu_count\":1,\"mem_size_mib\":16}");
    let start = "{\"action_type\":\"InstanceStart\"}";
    api.refuses("PUT", "/actions", start, 400, "kernel");
    assert_eq!(api.get("/")["state"], "Not started");
    put(&api, "/boot-source", &boot(&guest.kernel));
    // A client that stalls keeps nobody from it.
    let stalled: Vec<_> = (0..100).map(|_| api.connect()).collect();
    put(&api, "/actions", start);
    running.expect("ready");
    drop(stalled);
    running.send("q");
    running.wait(PATIENCE).exits(0);
}
