//! Twenty containers at once: started together, all answering, and afterwards without a trace.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use super::home::{Home, IMAGE, Wall, can_run};
use super::network::can_connect;
use crate::support::{LINUX_PATIENCE, announce, kvm_kind, tool};

/// Their ports on the host begin here.
const FIRST_PORT: u16 = 21000;

/// Runs several commands of rvmm side by side; each must succeed. Returns what they print.
fn together(home: &Home, commands: &[Vec<String>]) -> Vec<String> {
    let start = |arguments: &Vec<String>| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = home.command(&arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("rvmm")
    };
    let children: Vec<_> = commands.iter().map(start).collect();
    // Without a limit of the test's own: on a slow and busy host twenty boots take as long as they take.
    let end = |(child, arguments): (Child, &Vec<String>)| {
        let output = child.wait_with_output().expect("rvmm");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    children.into_iter().zip(commands).map(end).collect()
}

fn answer(port: u16) -> String {
    let deadline = Instant::now() + LINUX_PATIENCE;
    let mut text = String::new();
    while text.is_empty() && Instant::now() < deadline {
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(60)));
            let _ = stream.write_all(b"x\n").and_then(|()| stream.read_to_string(&mut text));
        } else {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    text
}

/// What containers have on a host beside what [`Home::left`] looks for: devices and rules of networks, and what names them.
fn network_traces(home: &Home) -> Vec<String> {
    let links = tool("ip", &["-o", "link"]);
    let links = links.lines().filter_map(|line| line.split(": ").nth(1)).filter(|name| *name != "lo");
    // The kernel makes these with every namespace.
    let of_kernel =
        ["sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0"];
    let links = links.filter(|name| !of_kernel.iter().any(|of_kernel| name.starts_with(of_kernel)));
    let mut traces: Vec<String> = links.map(|name| format!("device {name}")).collect();
    let rules = tool("nft", &["list", "ruleset"]);
    traces.extend(rules.lines().filter(|line| line.contains("NETAVARK")).map(|line| format!("rule {line}")));
    for place in ["run/networks/attached", "run/networks/aardvark-dns", "data/images/users"] {
        traces.extend(files(&home.path(place)).into_iter().map(|path| format!("file {path}")));
    }
    traces
}

/// All files below a directory.
fn files(directory: &std::path::Path) -> Vec<String> {
    let mut found = vec![];
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found
}

fn at_once(wall: Wall, count: u16) {
    if !can_run(wall) || !can_connect(wall) {
        return;
    }
    let home = Home::new();
    let begun = Instant::now();
    let start = |number: u16| {
        let (name, port) = (format!("c{number}"), format!("{}:80", FIRST_PORT + number));
        let serve = format!("echo ready; exec nc -ll -p 80 -e echo hello from {number}");
        let mut arguments =
            vec!["run", "-d", wall.flag(), "--name", &name, "-p", &port, "-v", "shared:/shared"];
        // The least that a guest's kernel lives with.
        if wall == Wall::Microvm {
            arguments.extend(["--memory=32M", "--cpus=1"]);
        }
        arguments.extend([IMAGE, "sh", "-c", &serve]);
        arguments.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let ids = together(&home, &(1..=count).map(start).collect::<Vec<_>>());
    let started = begun.elapsed();
    for number in 1..=count {
        assert_eq!(answer(FIRST_PORT + number), format!("hello from {number}\n"));
    }
    announce(&format!(
        "figure: {count} containers at once, {wall:?}: started in {:.1} s, all have answered after {:.1} s",
        started.as_secs_f64(),
        begun.elapsed().as_secs_f64()
    ));
    assert_eq!(home.run(&["ps", "-q"]).ok().lines().count(), usize::from(count));
    // By name, from the first to the last.
    let last = format!("echo x | nc -w 60 c{count} 80");
    let named = home.run(&["exec", "c1", "sh", "-c", &last]).ok();
    assert_eq!(named, format!("hello from {count}\n"));
    let remove = |number: u16| ["rm", "-f", &format!("c{number}")].map(str::to_owned).to_vec();
    together(&home, &(1..=count).map(remove).collect::<Vec<_>>());
    assert_eq!(home.run(&["ps", "-aq"]).ok(), "");
    home.run(&["volume", "rm", "shared"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
    assert_eq!(network_traces(&home), [] as [String; 0]);
    assert_eq!(Home::cgroups(&ids), [] as [std::path::PathBuf; 0]);
}

#[test]
fn twenty_native_containers_at_once_answer_and_leave_no_trace() {
    at_once(Wall::Native, 20);
}

#[test]
fn some_microvms_at_once_answer_and_leave_no_trace() {
    at_once(
        Wall::Microvm,
        if kvm_kind().is_some_and(|kind| kind == rvmm::kvm::kind::Kind::Pvm) { 2 } else { 5 },
    );
}

#[test]
#[ignore = "long: twenty boots at once"]
fn twenty_microvms_at_once_answer_and_leave_no_trace() {
    if kvm_kind().is_some() {
        at_once(Wall::Microvm, 20);
    }
}
