//! Services of Debian's packages, pulled from a registry: each answers through a published port, under load, ends in good
//! order, and finds its data again in a new container, also behind the other wall.

mod client;
mod kinds;

use std::time::Instant;

use self::kinds::{FASTAPI, NGINX, POSTGRES, REDIS, Service, Size};
use crate::container::home::{Home, Wall, can_run};
use crate::container::network::can_connect;
use crate::image::server::Registry;
use crate::support::{announce, has_fast_kvm, has_tool, kvm_kind, project, skip};

/// How long a service has to end by itself, in seconds: on the slowest host, and not a time that is met.
const STOP_TIMEOUT: &str = "--stop-timeout=240";

/// A service's image, brought by a registry.
fn pull(home: &Home, service: &Service) -> Option<String> {
    let archive = project("target/images").join(format!("{}.tar", service.name));
    if !archive.is_file() {
        skip("needs the image: scripts/build-images");
        return None;
    }
    let registry = Registry::start(None)?;
    let (loaded, name) =
        (format!("{}:latest", service.name), registry.name(&format!("debian/{}:1", service.name)));
    home.run(&["load", "-q", "-i", archive.to_str().expect("a path")]).ok();
    let id = |name: &str| home.run(&["image", "inspect", name]).ok();
    let before = id(&loaded);
    home.run(&["tag", &loaded, &name]).ok();
    home.run(&["push", &name]).ok();
    home.run(&["rmi", &loaded, &name]).ok();
    home.run(&["run", "--rm", "--network=none", &name.replace(":1", ":2"), "true"]).fails();
    home.run(&["pull", "-q", &name]).ok();
    let identity =
        |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON")[0]["Id"].clone();
    assert_eq!(identity(&before), identity(&id(&name)));
    Some(name)
}

/// One container of a service, from its start to its end in good order.
fn serve(home: &Home, service: &Service, image: &str, wall: Wall, volume: &str, work: impl FnOnce(&str)) {
    let name = format!("{}-{}", service.name, wall.flag().trim_start_matches("--isolation="));
    let (port, mount) =
        (format!("{}:{}", service.host_port, service.port), format!("{volume}:{}", service.data));
    let mut arguments =
        vec!["run", "-d", wall.flag(), "--name", &name, "-p", &port, "-v", &mount, STOP_TIMEOUT];
    // A check is a process every few seconds, and some guests take as long for one.
    let health: &[&str] = if wall == Wall::Native && !is_slow(wall) {
        &["--health-interval=300ms"]
    } else {
        &["--no-healthcheck"]
    };
    arguments.extend(health);
    arguments.push(image);
    arguments.extend(service.command);
    let begun = Instant::now();
    home.run(&arguments).ok();
    service.await_answer(home, &name);
    announce(&format!("figure: {name} answers {:.1} s after `rvmm run`", begun.elapsed().as_secs_f64()));
    work(&name);
    if wall == Wall::Native && !is_slow(wall) {
        home.await_state(&name, |found| found["State"]["Health"]["Status"] == "healthy");
    }
    home.run(&["stop", &name]).ok();
    let end = home.inspect(&name)["State"].clone();
    let log = home.run(&["logs", &name]);
    let log = log.stdout + &log.stderr;
    assert!(end["Status"] == "exited" && end["ExitCode"] == 0 && end["OOMKilled"] == false, "{end}\n{log}");
    let mut rest = log.as_str();
    for words in service.farewell {
        let at =
            rest.find(words).unwrap_or_else(|| panic!("{name} did not say {words:?} at its end:\n{log}"));
        rest = &rest[at..];
    }
    client::refused(service.host_port);
    home.run(&["rm", &name]).ok();
}

/// Emulated user code, or an emulated kernel below the service.
fn is_slow(wall: Wall) -> bool {
    std::env::var_os("RVMM_NESTED_HOST").is_some() || wall == Wall::Microvm
}

/// A service in a container, and its data in another one; once for each pair.
fn data_stays(service: &Service, pairs: &[(Wall, Wall)]) {
    let all = pairs.iter().flat_map(|(first, second)| [first, second]).copied();
    if !all.clone().all(can_run)
        || !service.tools.iter().all(|tool| has_tool(tool))
        || !can_connect(Wall::Native)
    {
        return;
    }
    let home = Home::new();
    let Some(image) = pull(&home, service) else { return };
    for (first, second) in pairs {
        serve(&home, service, &image, *first, "kept", |name| {
            (service.write)(&home, name, service.host_port);
            let size = if is_slow(*first) { Size::Small } else { Size::Full };
            let figure = (service.load)(&home, &image, service.host_port, size);
            announce(&format!("figure: {name}: {figure}"));
        });
        serve(&home, service, &image, *second, "kept", |name| {
            (service.read)(&home, name, service.host_port);
        });
        home.run(&["volume", "rm", "kept"]).ok();
    }
    assert_eq!(home.left(), [] as [String; 0]);
}

const NATIVE: &[(Wall, Wall)] = &[(Wall::Native, Wall::Native)];
const BOTH: &[(Wall, Wall)] = &[(Wall::Native, Wall::Microvm), (Wall::Microvm, Wall::Native)];

#[test]
fn nginx_serves_natively() {
    data_stays(&NGINX, NATIVE);
}

#[test]
fn redis_serves_natively() {
    data_stays(&REDIS, NATIVE);
}

#[test]
fn postgres_serves_natively() {
    data_stays(&POSTGRES, NATIVE);
}

#[test]
fn fastapi_serves_natively() {
    data_stays(&FASTAPI, NATIVE);
}

#[test]
#[ignore = "long: guests, minutes where KVM emulates"]
fn nginx_has_its_data_behind_either_wall() {
    if kvm_kind().is_some() {
        data_stays(&NGINX, BOTH);
    }
}

#[test]
#[ignore = "long: guests, minutes where KVM emulates"]
fn redis_has_its_data_behind_either_wall() {
    if kvm_kind().is_some() {
        data_stays(&REDIS, BOTH);
    }
}

#[test]
#[ignore = "long: guests, and too many page faults for those whose kernel is emulated"]
fn postgres_has_its_data_behind_either_wall() {
    if has_fast_kvm() {
        data_stays(&POSTGRES, BOTH);
    }
}

#[test]
#[ignore = "long: guests, and too many page faults for those whose kernel is emulated"]
fn fastapi_has_its_data_behind_either_wall() {
    if has_fast_kvm() {
        data_stays(&FASTAPI, BOTH);
    }
}
