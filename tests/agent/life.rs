//! Containers of a sandbox, from their making to their end.

use std::time::Duration;

use rvmm::guest::protocol::*;
use rvmm::guest::spec::*;

use super::rig::{Sandbox, failure};
use crate::support::tool;

pub fn two_containers_share_a_sandbox(sandbox: &mut Sandbox) {
    let first = sandbox.idle();
    let names = sandbox.client.containers().unwrap();
    assert_eq!(names, [ContainerInfo { id: first.clone(), state: State::Running }]);
    // One in all of the other's namespaces, one in none.
    let script = "hostname; cat /proc/1/comm; kill -0 1 && echo seen";
    let of_first = || Namespace::Container(first.clone());
    let ended = sandbox.run_shell(script, |spec| {
        spec.namespaces = Namespaces {
            pid: of_first(),
            uts: of_first(),
            ipc: of_first(),
            network: of_first(),
            cgroup: Namespace::Own,
        };
        spec.hostname = Some("ignored".into());
    });
    assert_eq!(ended.output(), "box\nsleep\nseen");
    let ended =
        sandbox.run_shell("hostname; cat /proc/1/comm; true", |spec| spec.hostname = Some("other".into()));
    assert_eq!(ended.output(), "other\nsh");
    // The sandbox's own.
    let ended = sandbox.run_shell("hostname; [ $$ -gt 1 ] && cat /proc/1/comm", |spec| {
        spec.namespaces.uts = Namespace::Sandbox;
        spec.namespaces.pid = Namespace::Sandbox;
    });
    assert_eq!(ended.output(), "rvmm\ninit");
    sandbox.remove(&first);
    let gone = failure(sandbox.client.stats(&first));
    assert_eq!(gone, Failure::NoContainer(first));
}

pub fn paused_container_stands_still(sandbox: &mut Sandbox) {
    let id = sandbox.idle();
    sandbox.client.pause(&id).unwrap();
    assert!(matches!(failure(sandbox.client.pause(&id)), Failure::State { state: State::Paused, .. }));
    let process = sandbox.program(&["true"]);
    assert!(matches!(failure(sandbox.client.exec(&id, 1, process)), Failure::State { .. }));
    sandbox.client.resume(&id).unwrap();
    let process = sandbox.program(&["true"]);
    assert_eq!(sandbox.exec(&id, 1, process).status, ExitStatus::Code(0));
    // One that is paused can be killed.
    sandbox.client.pause(&id).unwrap();
    sandbox.remove(&id);
}

pub fn lost_connection_loses_no_event(sandbox: &mut Sandbox) {
    let process = sandbox.shell("sleep 2; exit 6");
    let spec = sandbox.container(process);
    let streams = sandbox.start(&spec);
    // The connection goes, and the end comes while there is none.
    let other = sandbox.connect();
    drop(std::mem::replace(&mut sandbox.client, other));
    let ended = sandbox.finish(&spec.id, FIRST_PROCESS, streams);
    assert_eq!(ended.status, ExitStatus::Code(6));
    let mut third = sandbox.connect();
    let again = third.wait_event().unwrap();
    assert!(
        matches!(&again, Event::Exited { container, status: ExitStatus::Code(6), .. } if *container == spec.id),
        "{again:?}"
    );
    let stopped = ContainerInfo { id: spec.id.clone(), state: State::Stopped(ExitStatus::Code(6)) };
    assert_eq!(third.containers().unwrap(), [stopped]);
    sandbox.client.delete(&spec.id, false).unwrap();
}

pub fn container_that_runs_is_removed_by_force(sandbox: &mut Sandbox) {
    for pid in [Namespace::Own, Namespace::Sandbox] {
        let process = sandbox.shell("sleep 100000 & sleep 99999");
        let mut spec = sandbox.container(process);
        spec.namespaces.pid = pid;
        sandbox.start(&spec);
        std::thread::sleep(Duration::from_millis(300));
        assert!(matches!(failure(sandbox.client.delete(&spec.id, false)), Failure::State { .. }));
        sandbox.client.delete(&spec.id, true).unwrap();
        assert_eq!(sandbox.wait_exit(&spec.id, FIRST_PROCESS).0, ExitStatus::Signal(9));
        assert_eq!(sandbox.client.containers().unwrap(), []);
    }
}

pub fn states_are_respected(sandbox: &mut Sandbox) {
    let process = sandbox.shell("true");
    let spec = sandbox.container(process);
    sandbox.client.create(spec.clone()).unwrap();
    assert_eq!(failure(sandbox.client.create(spec.clone())), Failure::Exists(spec.id.clone()));
    assert!(matches!(failure(sandbox.client.pause(&spec.id)), Failure::State { state: State::Created, .. }));
    assert!(matches!(
        failure(sandbox.client.signal(&spec.id, Target::Process(FIRST_PROCESS), 9)),
        Failure::NoProcess { .. }
    ));
    sandbox.client.start(&spec.id).unwrap();
    sandbox.wait_exit(&spec.id, FIRST_PROCESS);
    assert!(matches!(
        failure(sandbox.client.start(&spec.id)),
        Failure::State { state: State::Stopped(_), .. }
    ));
    sandbox.client.delete(&spec.id, false).unwrap();
    let mut bad = spec;
    bad.id = "../x".into();
    assert!(matches!(failure(sandbox.client.create(bad)), Failure::Invalid(_)));
}

pub fn sandbox_is_configured(sandbox: &mut Sandbox) {
    let info = sandbox.client.info().clone();
    assert!(
        info.kernel.starts_with("6.1") && info.memory_bytes > 64 << 20 && info.controllers.contains("memory"),
        "{info:?}"
    );
    let configuration = Configuration {
        hostname: Some("sandbox".into()),
        clock_ns: Some(2_000_000_000_000_000_000),
        entropy: vec![1; 64],
        interfaces: vec![],
        sysctls: vec![("net.core.somaxconn".into(), "1234".into())],
    };
    sandbox.client.configure(configuration).unwrap();
    let ended = sandbox.run_shell(
        "hostname; date +%Y; cat /proc/sys/net/core/somaxconn; ping -c1 127.0.0.1 >/dev/null && echo up",
        |spec| {
            spec.namespaces.uts = Namespace::Sandbox;
            spec.namespaces.network = Namespace::Sandbox;
        },
    );
    assert_eq!(ended.output(), "sandbox\n2033\n1234\nup");
    let missing = Interface {
        mac: [2, 0, 0, 0, 0, 9],
        found_by: None,
        name: "eth0".into(),
        mtu: None,
        addresses: vec![],
        routes: vec![],
    };
    let refused = failure(
        sandbox.client.configure(Configuration { interfaces: vec![missing], ..Configuration::default() }),
    );
    assert_eq!(refused.to_string(), "no network device with the address 02:00:00:00:00:09");
}

pub fn networks_are_set_up(sandbox: &mut Sandbox) {
    tool("ip", &["address", "add", "10.77.0.1/24", "dev", "rvmmagent0"]);
    tool("ip", &["link", "set", "rvmmagent0", "up"]);
    let address = |text: &str| text.parse().unwrap();
    let route = |destination: &str, prefix, gateway: Option<&str>| Route {
        destination: (address(destination), prefix),
        gateway: gateway.map(address),
        metric: None,
    };
    // Names that the devices have, the other way round.
    let interfaces = vec![
        Interface {
            mac: [2, 0, 0, 0, 0, 7],
            found_by: None,
            name: "eth1".into(),
            mtu: Some(1400),
            addresses: vec![(address("10.77.0.2"), 24), (address("fd00:77::2"), 64)],
            routes: vec![route("0.0.0.0", 0, Some("10.77.0.1")), route("192.0.2.0", 24, None)],
        },
        Interface {
            mac: [2, 0, 0, 0, 0, 8],
            found_by: None,
            name: "eth0".into(),
            mtu: None,
            addresses: vec![(address("10.78.0.2"), 16)],
            routes: vec![route("2001:db8::", 32, Some("fd00:77::1"))],
        },
    ];
    // The gateway is another device's.
    let refused = sandbox
        .client
        .configure(Configuration { interfaces: interfaces.clone(), ..Configuration::default() });
    assert_eq!(failure(refused).to_string(), "cannot set up the network device eth0: no route to host");
    let mut interfaces = interfaces;
    interfaces[1].routes.clear();
    // What was done already is no obstacle.
    sandbox.client.configure(Configuration { interfaces, ..Configuration::default() }).unwrap();
    let script = "ping -c1 -W60 10.77.0.1 >/dev/null && echo reached; cat /sys/class/net/eth1/mtu /sys/class/net/eth1/address; \
                  ip -o -4 address show | cut -d' ' -f2,7; ip -o -6 address show dev eth1 scope global | cut -d' ' -f7; ip route";
    let ended = sandbox.run_shell(script, |spec| {
        spec.namespaces.network = Namespace::Sandbox;
        let sysfs = Source::New { kind: "sysfs".into(), data: String::new() };
        spec.mounts.push(Mount {
            source: sysfs,
            target: "/sys".into(),
            flags: libc::MS_RDONLY,
            propagation: 0,
        });
    });
    assert_eq!(
        ended.output().replace(" \n", "\n"),
        "reached\n1400\n02:00:00:00:00:07\nlo 127.0.0.1/8\neth1 10.77.0.2/24\neth0 10.78.0.2/16\nfd00:77::2/64\n\
         default via 10.77.0.1 dev eth1 \n10.77.0.0/24 dev eth1 scope link  src 10.77.0.2 \n\
         10.78.0.0/16 dev eth0 scope link  src 10.78.0.2 \n192.0.2.0/24 dev eth1 scope link"
            .replace(" \n", "\n")
    );
}

/// Makes a container that does nothing, and tells what each step took of the monitor's processor time.
pub fn cost_of_steps(sandbox: &mut Sandbox, round: &str) {
    let mut process = sandbox.program(&["/bin/true"]);
    process.stdio = Stdio::default();
    let spec = sandbox.container(process);
    let mut figures = vec![];
    let mut before = sandbox.processor_time();
    let mut step = |sandbox: &Sandbox, name: &str| {
        let now = sandbox.processor_time();
        figures.push(format!("{name} {} ms", (now - before).as_millis()));
        before = now;
    };
    sandbox.client.containers().unwrap();
    step(sandbox, "question");
    sandbox.client.create(spec.clone()).unwrap();
    step(sandbox, "create");
    sandbox.client.start(&spec.id).unwrap();
    step(sandbox, "start");
    sandbox.wait_exit(&spec.id, FIRST_PROCESS);
    step(sandbox, "run");
    sandbox.client.delete(&spec.id, false).unwrap();
    step(sandbox, "delete");
    crate::support::announce(&format!("figure: agent, {round} container: {}", figures.join(", ")));
}
