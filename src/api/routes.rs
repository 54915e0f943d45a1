//! From requests to commands, and from what comes of them to answers.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::bodies::{
    self, Action, ActionType, Balloon, BalloonStatsUpdate, BalloonUpdate, FullVmConfiguration, InstanceInfo,
    MachineConfiguration, PartialDrive, PartialNetworkInterface, SnapshotCreate, SnapshotLoad, Version, Vm,
    VmState,
};
use super::setup::{Drive, MachineConfig, NetworkInterface, Part};
use crate::metrics;
use crate::mmds::{Store, StoreError};
use crate::vm::config::{Size, VmConfig};
use crate::vm::control::{self, Command, Load, Reply};

const JSON: &str = "application/json";
const OK: u16 = 200;
pub(super) const NO_CONTENT: u16 = 204;
const BAD_REQUEST: u16 = 400;
const REQUEST_TIMEOUT: u16 = 408;
const PAYLOAD_TOO_LARGE: u16 = 413;
const INTERNAL_SERVER_ERROR: u16 = 500;
const SERVICE_UNAVAILABLE: u16 = 503;

/// What a client gets.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// JSON, text, or nothing.
    pub body: String,
    pub content_type: &'static str,
}

impl Answer {
    pub fn nothing() -> Self {
        Self { status: NO_CONTENT, body: String::new(), content_type: JSON }
    }

    /// In the form that Prometheus reads.
    fn text(body: String) -> Self {
        Self { status: OK, body, content_type: "text/plain; version=0.0.4; charset=utf-8" }
    }

    /// What a VM tells that has not started.
    pub fn of_setup(command: &Command, shape: Shape, config: &VmConfig, id: &str) -> Result<Self, Fault> {
        match (command, shape) {
            (Command::State, _) => Ok(Self::json(OK, &InstanceInfo::new(None, id))),
            (Command::Config, _) => answer(Reply::Config(Box::new(config.clone())), shape, id),
            _ => Err(before_start()),
        }
    }

    fn json(status: u16, body: &impl Serialize) -> Self {
        match serde_json::to_string(body) {
            Ok(body) => Self { status, body, content_type: JSON },
            // Only a path that is no text cannot be said in JSON.
            Err(error) => Fault { status: INTERNAL_SERVER_ERROR, message: error.to_string() }.answer(),
        }
    }
}

/// Why a client does not get what it asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    status: u16,
    message: String,
}

#[derive(Serialize)]
struct FaultBody<'a> {
    fault_message: &'a str,
}

impl Fault {
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { status: BAD_REQUEST, message: message.into() }
    }

    pub fn too_large(limit: usize) -> Self {
        Self { status: PAYLOAD_TOO_LARGE, message: format!("a request's body has at most {limit} bytes") }
    }

    pub fn timed_out() -> Self {
        Self { status: REQUEST_TIMEOUT, message: "the request's body did not come in time".into() }
    }

    pub fn answer(self) -> Answer {
        Answer::json(self.status, &FaultBody { fault_message: &self.message })
    }
}

impl From<control::Error> for Fault {
    fn from(error: control::Error) -> Self {
        let status = match error {
            control::Error::Ended | control::Error::Busy => SERVICE_UNAVAILABLE,
            control::Error::Pause(_) => INTERNAL_SERVER_ERROR,
            control::Error::Save(_)
            | control::Error::NoBalloon
            | control::Error::NoStatistics
            | control::Error::BalloonTooLarge { .. }
            | control::Error::NoDisk(_)
            | control::Error::NoNet(_)
            | control::Error::Image(_)
            | control::Error::Disk(_) => BAD_REQUEST,
        };
        Self { status, message: crate::error_chain(&error) }
    }
}

/// What of a reply a client wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Nothing,
    Instance,
    FullConfig,
    MachineConfig,
    Balloon,
    BalloonStatistics,
}

/// What a request comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// An answer that needs no command.
    Answer(Answer),
    /// A command, and how its reply is shown.
    Command(Command, Shape),
    /// A part of a VM that has not started.
    Part(Part),
    /// Metadata, which there are before the start and after.
    Metadata(Metadata),
    /// The start.
    Start,
    /// The start from a snapshot.
    Load(Box<Load>),
}

/// What is to become of metadata.
#[derive(Debug, PartialEq, Eq)]
pub enum Metadata {
    Get,
    Put(Value),
    Patch(Value),
}

impl Metadata {
    /// Shows or changes them.
    pub fn carry_out(self, store: &Store) -> Result<Answer, Fault> {
        let changed = match self {
            Metadata::Get => {
                let value = store.value().filter(|value| !value.is_null());
                return Ok(Answer::json(OK, &value.unwrap_or_else(|| Value::Object(Map::new()))));
            }
            Metadata::Put(value) => store.put(value),
            Metadata::Patch(value) => store.patch(value),
        };
        changed.map(|()| Answer::nothing()).map_err(|error| {
            let status = match error {
                StoreError::TooLarge => PAYLOAD_TOO_LARGE,
                StoreError::Empty => BAD_REQUEST,
            };
            Fault { status, message: error.to_string() }
        })
    }
}

/// Finds out what a request asks for.
pub fn route(method: &str, path: &str, body: &[u8]) -> Result<Route, Fault> {
    let unknown = || Fault::bad_request(format!("Invalid request method and/or path: {method} {path}."));
    let place: Vec<&str> = path.trim_start_matches('/').split_terminator('/').collect();
    match (method, body.is_empty()) {
        ("GET", false) => return Err(Fault::bad_request("GET request cannot have a body.")),
        ("PUT" | "PATCH", true) => return Err(Fault::bad_request(format!("Empty {method} request."))),
        ("GET" | "PUT" | "PATCH", _) => {}
        _ => return Err(unknown()),
    }
    let command = match (method, place.as_slice()) {
        ("GET", []) => Route::Command(Command::State, Shape::Instance),
        ("GET", ["version"]) => Route::Answer(Answer::json(OK, &Version::new())),
        ("GET", ["vm", "config"]) => Route::Command(Command::Config, Shape::FullConfig),
        ("GET", ["machine-config"]) => Route::Command(Command::Config, Shape::MachineConfig),
        ("GET", ["balloon"]) => Route::Command(Command::Config, Shape::Balloon),
        ("GET", ["balloon", "statistics"]) => Route::Command(Command::Balloon, Shape::BalloonStatistics),
        ("PATCH", ["vm"]) => done(match parse::<Vm>(body)?.state {
            VmState::Paused => Command::Pause,
            VmState::Resumed => Command::Resume,
        }),
        ("PATCH", ["balloon"]) => {
            done(Command::SetBalloon(Size(u64::from(parse::<BalloonUpdate>(body)?.amount_mib) << 20)))
        }
        ("PATCH", ["balloon", "statistics"]) => {
            let seconds = parse::<BalloonStatsUpdate>(body)?.stats_polling_interval_s;
            done(Command::SetStatsInterval(Duration::from_secs(seconds.into())))
        }
        ("PATCH", ["drives", id]) => patch_drive(id, parse(body)?)?,
        ("PATCH", ["network-interfaces", id]) => patch_network_interface(id, parse(body)?)?,
        ("PUT", ["actions"]) => put_action(parse::<Action>(body)?.action_type)?,
        ("GET", ["metrics", "prometheus"]) => Route::Answer(Answer::text(metrics::text())),
        ("PUT", ["boot-source"]) => Route::Part(Part::Boot(parse(body)?)),
        ("PUT", ["drives", id]) => {
            let drive: Box<Drive> = parse(body)?;
            check_id(id, &drive.drive_id)?;
            Route::Part(Part::Drive(drive))
        }
        ("PUT", ["network-interfaces", id]) => {
            let interface: Box<NetworkInterface> = parse(body)?;
            check_id(id, &interface.iface_id)?;
            Route::Part(Part::Net(interface))
        }
        ("PUT", ["vsock"]) => Route::Part(Part::Vsock(parse(body)?)),
        ("PUT", ["balloon"]) => Route::Part(Part::Balloon(parse(body)?)),
        ("PUT", ["entropy"]) => Route::Part(Part::Entropy(parse(body)?)),
        ("PUT", ["machine-config"]) => {
            let machine: MachineConfig = parse(body)?;
            machine.check_whole().map_err(|field| {
                Fault::bad_request(format!(
                    "An error occurred when deserializing the json body of a request: missing field `{field}`."
                ))
            })?;
            Route::Part(Part::Machine(machine))
        }
        ("PATCH", ["machine-config"]) => {
            let machine: MachineConfig = parse(body)?;
            if machine == MachineConfig::default() {
                return Err(Fault::bad_request("Empty PATCH request."));
            }
            Route::Part(Part::Machine(machine))
        }
        ("PUT", ["cpu-config"]) => Route::Part(Part::Cpu(parse(body)?)),
        ("PUT", ["logger"]) => Route::Part(Part::Logger(parse(body)?)),
        ("PUT", ["metrics"]) => Route::Part(Part::Metrics(parse(body)?)),
        ("PUT", ["serial"]) => Route::Part(Part::Serial(parse(body)?)),
        ("PUT", ["snapshot", "create"]) => done(parse::<SnapshotCreate>(body)?.command()),
        ("PUT", ["snapshot", "load"]) => {
            Route::Load(Box::new(parse::<SnapshotLoad>(body)?.load().map_err(Fault::bad_request)?))
        }
        ("PUT", ["mmds", "config"]) => Route::Part(Part::Mmds(parse(body)?)),
        ("GET", ["mmds"]) => Route::Metadata(Metadata::Get),
        ("PUT", ["mmds"]) => Route::Metadata(Metadata::Put(parse(body)?)),
        ("PATCH", ["mmds"]) => Route::Metadata(Metadata::Patch(parse(body)?)),
        ("PUT" | "PATCH", ["pmem", _]) | ("PUT" | "PATCH", ["hotplug", "memory"]) => {
            return Err(not_yet("Such a device"));
        }
        _ => return Err(unknown()),
    };
    Ok(command)
}

fn not_yet(what: &str) -> Fault {
    let are = if what.ends_with('s') { "are" } else { "is" };
    Fault::bad_request(format!("{what} {are} not supported yet."))
}

fn done(command: Command) -> Route {
    Route::Command(command, Shape::Nothing)
}

/// What cannot be done any more.
pub fn after_start() -> Fault {
    Fault::bad_request("The requested operation is not supported after starting the microVM.")
}

/// What cannot be done yet.
pub fn before_start() -> Fault {
    Fault::bad_request("The requested operation is not supported before starting the microVM.")
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| {
        Fault::bad_request(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}

fn check_id(path: &str, body: &str) -> Result<(), Fault> {
    match path == body {
        true => Ok(()),
        false => Err(Fault::bad_request(format!("the id is {path:?} in the path and {body:?} in the body"))),
    }
}

fn patch_drive(id: &str, drive: PartialDrive) -> Result<Route, Fault> {
    check_id(id, &drive.drive_id)?;
    if drive.path_on_host.is_none() && drive.rate_limiter.is_none() {
        return Err(Fault::bad_request("there is nothing to change"));
    }
    let limits = drive.rate_limiter.unwrap_or_default().change();
    Ok(done(Command::ChangeDisk { disk: drive.drive_id, path: drive.path_on_host, limits }))
}

fn patch_network_interface(id: &str, interface: PartialNetworkInterface) -> Result<Route, Fault> {
    check_id(id, &interface.iface_id)?;
    if interface.rx_rate_limiter.is_none() && interface.tx_rate_limiter.is_none() {
        return Err(Fault::bad_request("there is nothing to change"));
    }
    let receive = interface.rx_rate_limiter.unwrap_or_default().change();
    let transmit = interface.tx_rate_limiter.unwrap_or_default().change();
    Ok(done(Command::ChangeNet { net: interface.iface_id, receive, transmit }))
}

fn put_action(action: ActionType) -> Result<Route, Fault> {
    match action {
        ActionType::SendCtrlAltDel => Ok(done(Command::PressPower)),
        ActionType::FlushMetrics => Ok(done(Command::FlushMetrics)),
        ActionType::InstanceStart => Ok(Route::Start),
    }
}

/// Shows a reply.
pub fn answer(reply: Reply, shape: Shape, id: &str) -> Result<Answer, Fault> {
    Ok(match (reply, shape) {
        (Reply::State(state), Shape::Instance) => Answer::json(OK, &InstanceInfo::new(Some(state), id)),
        (Reply::Config(config), Shape::FullConfig) => Answer::json(OK, &FullVmConfiguration::new(&config)),
        (Reply::Config(config), Shape::MachineConfig) => {
            Answer::json(OK, &MachineConfiguration::new(&config))
        }
        (Reply::Config(config), Shape::Balloon) => {
            Answer::json(OK, &Balloon::new(config.balloon.as_ref().ok_or(control::Error::NoBalloon)?))
        }
        (Reply::Balloon(report), Shape::BalloonStatistics) => {
            Answer::json(OK, &bodies::balloon_statistics(&report).ok_or(control::Error::NoStatistics)?)
        }
        _ => Answer::nothing(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::vm::control::{Bucket, LimitsChange};
    use crate::vm::snapshot::Place;

    fn fault(method: &str, path: &str, body: &str) -> String {
        match route(method, path, body.as_bytes()) {
            Err(fault) => {
                assert_eq!(fault.status, BAD_REQUEST);
                let body = fault.answer().body;
                let value: serde_json::Value = serde_json::from_str(&body).unwrap();
                value.get("fault_message").and_then(|message| message.as_str()).unwrap().to_owned()
            }
            Ok(route) => panic!("{method} {path} {body}: {route:?}"),
        }
    }

    fn command(method: &str, path: &str, body: &str) -> Command {
        match route(method, path, body.as_bytes()) {
            Ok(Route::Command(command, _)) => command,
            other => panic!("{method} {path} {body}: {other:?}"),
        }
    }

    #[test]
    fn requests_become_commands() {
        assert_eq!(command("GET", "/", ""), Command::State);
        assert_eq!(command("GET", "", ""), Command::State);
        assert_eq!(command("GET", "/vm/config", ""), Command::Config);
        assert_eq!(command("PATCH", "/vm", r#"{"state":"Paused"}"#), Command::Pause);
        assert_eq!(command("PATCH", "/vm/", r#" { "state" : "Resumed" } "#), Command::Resume);
        assert_eq!(command("PATCH", "/balloon", r#"{"amount_mib":64}"#), Command::SetBalloon(Size(64 << 20)));
        assert_eq!(
            command("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":2}"#),
            Command::SetStatsInterval(Duration::from_secs(2))
        );
        assert_eq!(command("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#), Command::PressPower);
        assert_eq!(
            command("PATCH", "/drives/d", r#"{"drive_id":"d","path_on_host":"/x"}"#),
            Command::ChangeDisk {
                disk: "d".into(),
                path: Some("/x".into()),
                limits: LimitsChange::default()
            }
        );
        let body =
            r#"{"iface_id":"e","rx_rate_limiter":{"ops":{"size":5,"refill_time":100}},"tx_rate_limiter":{}}"#;
        let bucket = Bucket { size: 5, one_time_burst: 0, refill_time: 100 };
        assert_eq!(
            command("PATCH", "/network-interfaces/e", body),
            Command::ChangeNet {
                net: "e".into(),
                receive: LimitsChange { operations: Some(bucket), bandwidth: None },
                transmit: LimitsChange::default(),
            }
        );
        assert_eq!(command("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#), Command::FlushMetrics);
        assert_eq!(route("PUT", "/actions", br#"{"action_type":"InstanceStart"}"#), Ok(Route::Start));
        let place = |memory: Option<&str>| Place { state: "s".into(), memory: memory.map(Into::into) };
        let body = r#"{"snapshot_type":"Full","snapshot_path":"s","mem_file_path":"m"}"#;
        assert_eq!(command("PUT", "/snapshot/create", body), Command::Save(place(Some("m"))));
        let body = r#"{"snapshot_type":"Diff","snapshot_path":"s"}"#;
        assert_eq!(command("PUT", "/snapshot/create", body), Command::SaveChanges(place(None)));
        let body = r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"},
            "resume_vm":true,"track_dirty_pages":true,"network_overrides":[{"iface_id":"e","host_dev_name":"t"}],
            "vsock_override":{"uds_path":"v"}}"#;
        let Ok(Route::Load(load)) = route("PUT", "/snapshot/load", body.as_bytes()) else {
            panic!("not a load")
        };
        assert_eq!((load.place, load.resume), (place(Some("m")), true));
        assert!(load.overrides.track_dirty_pages);
        assert_eq!((load.overrides.nets[0].tap.as_str(), load.overrides.vsock), ("t", Some("v".into())));
    }

    #[test]
    fn wrong_requests_are_faults() {
        for (method, path, body, says) in [
            ("GET", "/nothing", "", "Invalid request method and/or path: GET /nothing."),
            ("GET", "/vm", "", "Invalid request"),
            ("DELETE", "/vm", "", "Invalid request"),
            ("POST", "/actions", "{}", "Invalid request"),
            ("GET", "/", "{}", "GET request cannot have a body."),
            ("PATCH", "/vm", "", "Empty PATCH request."),
            ("PUT", "/actions", "", "Empty PUT request."),
            ("PATCH", "/vm", "{", "deserializing the json body"),
            ("PATCH", "/vm", "{}", "missing field `state`"),
            ("PATCH", "/vm", r#"{"state":"Stopped"}"#, "unknown variant `Stopped`"),
            ("PATCH", "/vm", r#"{"state":"Paused","x":1}"#, "unknown field `x`"),
            ("PATCH", "/vm", r#"{"state":"Paused","state":"Resumed"}"#, "duplicate field"),
            ("PATCH", "/vm", r#"{"state":"Paused"}{"#, "trailing characters"),
            ("PATCH", "/balloon", r#"{"amount_mib":-1}"#, "invalid value"),
            ("PATCH", "/balloon", r#"{"amount_mib":99999999999}"#, "invalid value"),
            ("PATCH", "/balloon", r#"{"amount_mib":"64"}"#, "invalid type"),
            ("PATCH", "/drives/a", r#"{"drive_id":"b","path_on_host":"/x"}"#, "\"a\" in the path"),
            ("PATCH", "/drives/a", r#"{"drive_id":"a"}"#, "nothing to change"),
            ("PATCH", "/drives/", r#"{"drive_id":"a"}"#, "Invalid request"),
            ("PATCH", "/network-interfaces/e", r#"{"iface_id":"e"}"#, "nothing to change"),
            ("PUT", "/machine-config", r#"{"vcpu_count":2}"#, "missing field `mem_size_mib`"),
            ("PATCH", "/machine-config", "{}", "Empty PATCH request."),
            ("PUT", "/drives/x", "nonsense", "deserializing"),
            (
                "PUT",
                "/drives/x",
                r#"{"drive_id":"y","is_root_device":true,"path_on_host":"/x"}"#,
                "\"x\" in the path",
            ),
            ("PUT", "/mmds", "{", "deserializing"),
            ("PUT", "/mmds/config", "{}", "missing field `network_interfaces`"),
            ("PUT", "/mmds/config", r#"{"network_interfaces":[],"version":"V3"}"#, "unknown variant `V3`"),
            ("PUT", "/mmds/config", r#"{"network_interfaces":[],"ipv4_address":""}"#, "invalid IPv4"),
            ("GET", "/mmds/config", "", "Invalid request"),
            ("PUT", "/snapshot/create", "{}", "missing field `snapshot_path`"),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"s","x":1}"#, "unknown field `x`"),
            (
                "PUT",
                "/snapshot/load",
                r#"{"snapshot_path":"s","mem_backend":{"backend_type":"Uffd","backend_path":"m"}}"#,
                "Uffd",
            ),
        ] {
            let message = fault(method, path, body);
            assert!(message.contains(says), "{method} {path} {body}: {message}");
        }
        let deep = "[".repeat(50_000);
        assert!(fault("PATCH", "/vm", &deep).contains("deserializing"));
        assert!(matches!(route("PATCH", "/vm", &[0xff; 100]), Err(Fault { status: BAD_REQUEST, .. })));
    }

    /// Methods and paths of `docs/openapi.yaml`.
    fn documented() -> Vec<(String, String)> {
        let mut path = String::new();
        let mut found = vec![];
        let text = include_str!("../../docs/openapi.yaml");
        let paths = text.split("\npaths:\n").nth(1).unwrap().split("\ncomponents:").next().unwrap();
        for line in paths.lines() {
            match line.strip_suffix(':').map(|line| (line.len() - line.trim_start().len(), line.trim())) {
                Some((2, name)) => path = name.to_owned(),
                Some((4, method)) if method != "parameters" => {
                    found.push((method.to_uppercase(), path.clone()));
                }
                _ => {}
            }
        }
        found
    }

    #[test]
    fn documentation_has_the_routes_that_there_are() {
        let documented = documented();
        assert!(documented.len() > 25, "{documented:?}");
        let paths: std::collections::BTreeSet<_> = documented.iter().map(|(_, path)| path.clone()).collect();
        for path in &paths {
            for method in ["GET", "PUT", "PATCH"] {
                let place = path.replace("{drive_id}", "x").replace("{iface_id}", "x");
                let body = if method == "GET" { "" } else { "[]" };
                let there = match route(method, &place, body.as_bytes()) {
                    Ok(_) => true,
                    Err(fault) => !fault.message.contains("Invalid request method and/or path"),
                };
                let told = documented.contains(&(method.to_owned(), path.clone()));
                assert_eq!(there, told, "{method} {path}");
            }
        }
    }

    #[test]
    fn replies_have_the_names_that_clients_know() {
        use crate::vm::config::{Disk, VmConfig};
        let config = VmConfig {
            kernel: Some("vmlinux".into()),
            cmdline: Some("quiet".into()),
            cpus: 2,
            rootfs: Some(Disk { readonly: true, ..Disk::new("root.img") }),
            disks: vec![Disk { id: Some("data".into()), ..Disk::new("data.img") }],
            balloon: Some("size=64M,stats-interval=3".parse().unwrap()),
            vsock: Some("cid=7,socket=v.sock".parse().unwrap()),
            ..VmConfig::default()
        };
        let show = |reply, shape| -> serde_json::Value {
            let answer = answer(reply, shape, "anonymous-instance").unwrap();
            assert_eq!(answer.status, OK);
            serde_json::from_str(&answer.body).unwrap()
        };
        let value = show(Reply::Config(Box::new(config.clone())), Shape::FullConfig);
        let at = |path: &str| value.pointer(path).unwrap_or_else(|| panic!("{path} in {value}")).clone();
        assert_eq!(at("/machine-config/vcpu_count"), 2);
        assert_eq!(at("/machine-config/mem_size_mib"), 256);
        assert_eq!(at("/boot-source/kernel_image_path"), "vmlinux");
        assert_eq!(at("/boot-source/boot_args"), "quiet");
        assert_eq!(at("/drives/0/drive_id"), "disk0");
        assert_eq!(at("/drives/0/is_root_device"), true);
        assert_eq!(at("/drives/0/is_read_only"), true);
        assert_eq!(at("/drives/1/drive_id"), "data");
        assert_eq!(at("/drives/1/cache_type"), "Writeback");
        assert_eq!(at("/balloon/amount_mib"), 64);
        assert_eq!((at("/vsock/guest_cid"), at("/vsock/uds_path")), (7.into(), "v.sock".into()));
        let balloon = show(Reply::Config(Box::new(config.clone())), Shape::Balloon);
        assert_eq!(balloon.get("stats_polling_interval_s").unwrap(), 3);
        let none = VmConfig { balloon: None, ..config };
        assert!(answer(Reply::Config(Box::new(none)), Shape::Balloon, "x").is_err());

        let mut statistics = [None; 16];
        (statistics[4], statistics[15]) = (Some(1 << 40), Some(7));
        let report =
            control::BalloonReport { target_pages: 512, actual_pages: 256, statistics: Some(statistics) };
        let value = show(Reply::Balloon(Box::new(report.clone())), Shape::BalloonStatistics);
        let expected = serde_json::json!({
            "target_pages": 512, "actual_pages": 256, "target_mib": 2, "actual_mib": 1,
            "free_memory": 1u64 << 40, "direct_reclaim": 7,
        });
        assert_eq!(value, expected);
        let silent = control::BalloonReport { statistics: None, ..report };
        assert!(answer(Reply::Balloon(Box::new(silent)), Shape::BalloonStatistics, "x").is_err());
        let state = show(Reply::State(control::State::Paused), Shape::Instance);
        assert_eq!(state.get("state").unwrap(), "Paused");
        assert_eq!(answer(Reply::Done, Shape::Nothing, "x"), Ok(Answer::nothing()));
    }
}
