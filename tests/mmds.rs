//! The metadata service, asked by guests with what they have at hand: wget and nc of busybox.

use std::io::Write;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::api::Api;
use crate::support::guest::More;
use crate::support::{Monitor, PATIENCE, Script, directory, has_kvm, kvm_kind, linux, tiny};
use rvmm::boot::testing::Program;
use rvmm::kvm::kind::Kind;

use crate::net::{Made, has_network};

/// An address that the host has too, so that a frame that went past the service would be answered all the same.
const ADDRESS: &str = "169.254.170.2";

/// What guests' scripts find: `get PATH [HEADER]` is what a path leads to, or the status line of a refusal.
const GET: &str = r#"
ip link set eth0 up; ip addr add 10.77.8.2/24 dev eth0; ip route add 169.254.170.2 dev eth0
get() {
    wget -q -O /tmp/got ${2:+--header "$2"} http://169.254.170.2$1 2>/tmp/failed && cat /tmp/got ||
        sed -n 's/.*\(HTTP.1.1 [0-9]*\).*/\1/p' /tmp/failed
}
"#;

/// A token for a minute.
const TOKEN: &str = r#"
token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n\r\n' |
    nc 169.254.170.2 80 | tail -n 1)
report token ${#token}
"#;

/// Answers everyone who comes to the service's address on the host, and counts them.
fn host_in_its_place() -> Arc<AtomicU32> {
    let listener = TcpListener::bind((ADDRESS, 80)).expect("an address of the tap's");
    let count: Arc<AtomicU32> = Arc::default();
    let counted = Arc::clone(&count);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhost");
        }
    });
    count
}

fn with_metadata(monitor: Monitor, metadata: &std::path::Path, version: &str) -> Monitor {
    let mmds = format!("net=net0,version={version},address={ADDRESS}");
    monitor.args(["--net", "tap=rvmmds", "--mmds", &mmds, "--metadata"]).arg(metadata)
}

#[test]
fn guests_fetch_metadata_and_the_tap_sees_nothing_of_it() {
    if !has_kvm() || !has_network() {
        return;
    }
    let Some(linux) = linux() else { return };
    let _tap = Made::tap("rvmmds", "10.77.8.1/24", "");
    crate::support::tool("ip", &["addr", "add", "169.254.170.2/32", "dev", "rvmmds"]);
    let leaked = host_in_its_place();
    let directory = directory();
    let metadata = directory.path().join("metadata.json");
    let long = "0123456789".repeat(4000);
    std::fs::write(
        &metadata,
        format!(r#"{{"latest": {{"meta-data": {{"id": "i-1", "tags": {{}}}}, "n": 7}}, "long": "{long}"}}"#),
    )
    .expect("a file");

    // Processes are slow there.
    if kvm_kind() == Some(Kind::Pvm) {
        let smoke = Script::new(&format!(
            r#"{GET}
report bare "$(get /latest/meta-data/id)"{TOKEN}
report id "$(get /latest/meta-data/id "X-metadata-token: $token")""#
        ));
        let outcome = smoke.run(with_metadata(linux.monitor(), &metadata, "V2"));
        outcome.exits(0).reports("bare", "HTTP/1.1 401").reports("token", "64").reports("id", "i-1");
        assert_eq!(leaked.load(Ordering::SeqCst), 0);
        return;
    }

    let first = Script::new(&format!(
        r#"{GET}
report id $(get /latest/meta-data/id)
report names "$(echo $(get /latest/meta-data))"
report json "$(get /latest/meta-data 'Accept: application/json')"
report missing "$(get /nothing)"
report number "$(get /latest/n)"
get /long >/tmp/long; report long $(wc -c </tmp/long)
ping -c 1 -W 20 10.77.8.1 >/dev/null; report ping $?"#
    ));
    let outcome = first.run(with_metadata(linux.monitor(), &metadata, "V1"));
    outcome.exits(0).reports("id", "i-1").reports("names", "id tags/");
    outcome.reports("json", r#"{"id":"i-1","tags":{}}"#).reports("missing", "HTTP/1.1 404");
    outcome.reports("number", "HTTP/1.1 501").reports("long", "40000").reports("ping", "0");
    assert_eq!(leaked.load(Ordering::SeqCst), 0);

    // A client of the control socket changes what the guest is about to see.
    let second = Script::new(&format!(
        r#"{GET}
report bare "$(get /latest/meta-data/id)"{TOKEN}
report wrong "$(get /latest/meta-data/id "X-metadata-token: x$token")"
n=0
until [ "$(get /new "X-metadata-token: $token")" = value ] || [ $n = 1000 ]; do n=$((n + 1)); done
report new "$(get /new "X-aws-ec2-metadata-token: $token")""#
    ));
    let api = Api::new(&directory.path().join("api"));
    let patched = std::thread::spawn({
        let api = Api::new(&api.path);
        move || {
            api.wait_until("the VM", |api| api.get("/")["state"] == "Running");
            api.change("PATCH", "/mmds", r#"{"new": "value", "long": null}"#);
            api.get("/mmds")
        }
    });
    let monitor = with_metadata(linux.monitor(), &metadata, "V2").arg("--api-socket").arg(&api.path);
    let outcome = second.run(monitor);
    outcome.exits(0).reports("bare", "HTTP/1.1 401").reports("token", "64");
    outcome.reports("wrong", "HTTP/1.1 401").reports("new", "value");
    let told = patched.join().expect("the client is content");
    assert_eq!((&told["new"], told.get("long")), (&"value".into(), None));
    assert_eq!(leaked.load(Ordering::SeqCst), 0);

    // The same address without the service is the host's.
    let third = Script::new(&format!("{GET}\nreport host \"$(get /latest)\""));
    third.run(linux.monitor().args(["--net", "tap=rvmmds"])).exits(0).reports("host", "host");
    assert_eq!(leaked.load(Ordering::SeqCst), 1);
}

#[test]
fn snapshot_keeps_the_service_and_not_its_metadata() {
    if !has_kvm() || !has_network() {
        return;
    }
    let guest = tiny(&Program::new().listen().print("ready\n").echo_until(b'q').power_off());
    let (metadata, place) = (guest.path("metadata"), guest.path("snapshot"));
    std::fs::write(&metadata, r#"{"secret": "of the first"}"#).expect("a file");
    let api = Api::new(&guest.path("first"));
    let mmds = format!("net=eth0,version=V2,address={ADDRESS},imds-compat");
    let monitor = guest.monitor().args(["--net", "tap=rvmmsnap,id=eth0", "--mmds", &mmds, "--metadata"]);
    let mut first = monitor.arg(&metadata).arg("--api-socket").arg(&api.path).start_with_input();
    first.expect("ready");
    assert_eq!(api.get("/mmds"), serde_json::json!({"secret": "of the first"}));
    let config = api.get("/vm/config")["mmds-config"].clone();
    assert_eq!(
        config,
        serde_json::json!({"version": "V2", "network_interfaces": ["eth0"], "ipv4_address": ADDRESS, "imds_compat": true})
    );
    Monitor::new().arg("snapshot").arg(&api.path).arg(&place).run().exits(0);
    first.send("q");
    first.wait(PATIENCE).exits(0);

    let api = Api::new(&guest.path("second"));
    let mut second =
        Monitor::new().arg("restore").arg(&place).arg("--api-socket").arg(&api.path).start_with_input();
    assert_eq!(api.get("/vm/config")["mmds-config"], config);
    assert_eq!(api.get("/mmds"), serde_json::json!({}));
    api.refuses("PATCH", "/mmds", "{}", 400, "not initialized");
    second.send("q");
    second.wait(PATIENCE).exits(0);
    let bytes = std::fs::read(place.join("state")).expect("a state file");
    assert!(!bytes.windows(12).any(|part| part == b"of the first"), "metadata are in the snapshot");
}
