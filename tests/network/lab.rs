//! A host of the test's own: a network namespace in which it is the only one, with the world behind it in another one.
#![allow(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};
use rvmm::container::config::{Network, NetworkJoin, NetworkMode, Port};
use rvmm::container::network::{Attachment, Error, Networks, Request, netns};
use rvmm::tap::{self, Piece, Tap};

use crate::support::{PATIENCE, directory, has_tool, is_root, skip, tool};

/// The world's address, and the host's towards it: from a range for examples.
pub const WORLD: &str = "203.0.113.1";
pub const HOST: &str = "203.0.113.2";

pub struct Lab {
    pub networks: Networks,
    directory: tempfile::TempDir,
}

/// A host of its own for this test's thread and all that it starts; says so if there can be none.
pub fn lab() -> Option<Lab> {
    if !is_root() || !["ip", "nft", "iptables-save", "nsenter"].iter().all(|name| has_tool(name)) {
        return None;
    }
    if !["netavark", "aardvark-dns"].iter().all(|name| Path::new("/usr/lib/podman").join(name).is_file()) {
        skip("needs netavark and aardvark-dns");
        return None;
    }
    if unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).is_err() {
        skip("cannot make a network namespace");
        return None;
    }
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .expect("a mount namespace");
    ip("link set lo up");
    let directory = directory();
    Some(Lab {
        networks: Networks::new(&directory.path().join("data"), &directory.path().join("run")),
        directory,
    })
}

/// A container's namespace, and what goes with it.
pub struct Container {
    pub id: String,
    pub name: String,
    pub netns: PathBuf,
}

impl Lab {
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A namespace, connected to nothing.
    pub fn namespace(&self, name: &str) -> PathBuf {
        let path = self.path(&format!("netns-{name}"));
        netns::create(&path).expect("a namespace");
        path
    }

    pub fn container(&self, name: &str) -> Container {
        Container { id: id(name), name: name.into(), netns: self.namespace(name) }
    }

    pub fn connect(&self, container: &Container, network: &Network) -> Result<Attachment, Error> {
        let Container { id, name, netns } = container;
        self.networks.setup(&Request { id, name, netns, network, guest: false })
    }

    /// A container on these networks.
    pub fn connected(&self, name: &str, networks: &[&str]) -> (Container, Attachment) {
        let container = self.container(name);
        let attachment = self.connect(&container, &on(networks)).expect("a network");
        (container, attachment)
    }

    pub fn disconnect(&self, container: &Container) {
        self.networks.teardown(&container.id).expect("taking it away");
        netns::delete(&container.netns).expect("taking it away");
    }

    /// A namespace behind a wire, which is the host's way to everywhere.
    pub fn world(&self) -> PathBuf {
        let world = self.namespace("world");
        ip("link add up0 mtu 1400 type veth peer name world0");
        ip(&format!("link set world0 netns {}", world.display()));
        ip(&format!("addr add {HOST}/24 dev up0"));
        ip("link set up0 up");
        ip(&format!("route add default via {WORLD}"));
        inside(&world, &format!("ip addr add {WORLD}/24 dev world0"));
        inside(&world, "ip link set world0 mtu 1400 up");
        world
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A name server that is left would keep the whole host.
        let _ = self.networks.repair(|_| false);
        for entry in std::fs::read_dir(self.directory.path()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("netns-") {
                let _ = netns::delete(&entry.path());
            }
        }
    }
}

/// An id, of 64 digits, from a name.
pub fn id(name: &str) -> String {
    let digits: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{digits:0<64}")
}

/// Networks by name, and nothing else.
pub fn on(networks: &[&str]) -> Network {
    let join = |name: &&str| NetworkJoin { network: name.to_string(), ..NetworkJoin::default() };
    Network {
        mode: NetworkMode::Networks(networks.iter().map(join).collect()),
        ports: vec![],
        dns: vec![],
        dns_search: vec![],
        dns_options: vec![],
        hosts: vec![],
    }
}

pub fn port(host: u16, container: u16, protocol: &str) -> Port {
    Port { host_ip: None, host, container, protocol: protocol.into() }
}

/// Runs `ip`, with the words of one line.
pub fn ip(line: &str) -> String {
    tool("ip", &line.split_whitespace().collect::<Vec<_>>())
}

/// Runs a program in a namespace, with the words of one line.
pub fn inside(namespace: &Path, line: &str) -> String {
    let namespace = format!("--net={}", namespace.display());
    let words: Vec<&str> = [namespace.as_str()].into_iter().chain(line.split_whitespace()).collect();
    tool("nsenter", &words)
}

/// What the host has of networks: to be the same before and after.
pub fn footprint() -> String {
    let rules = |program: &str| {
        let saved = tool(program, &[]);
        // Empty tables of the built-in chains are no rules.
        let lines = saved
            .lines()
            .filter(|line| !line.starts_with('#') && !line.starts_with('*') && *line != "COMMIT");
        lines
            .filter(|line| !line.starts_with(':') || line.contains("NETAVARK"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let ruleset = tool("nft", &["list", "ruleset"]);
    let chains: Vec<&str> =
        ruleset.lines().filter(|line| line.contains("NETAVARK") || line.contains("jump")).collect();
    let links = tool("ip", &["-o", "link"]);
    let names: Vec<&str> = links.lines().filter_map(|line| line.split(": ").nth(1)).collect();
    format!(
        "{}\n{}\n{}\n{}\n{}",
        rules("iptables-save"),
        rules("ip6tables-save"),
        chains.join("\n"),
        names.join("\n"),
        ip("route").replace(" linkdown", "")
    )
}

/// Answers every connection with the peer's address and what came, in the namespace.
pub fn echo(namespace: &Path, port: u16) {
    let listener = within(namespace, move || TcpListener::bind(("0.0.0.0", port)));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr().map(|peer| peer.ip().to_string()).unwrap_or_default();
                let mut bytes = vec![];
                let _ = stream.write_all(format!("{peer}\n").as_bytes());
                let _ = stream.read_to_end(&mut bytes);
                let _ = stream.write_all(&bytes);
            });
        }
    });
}

/// Answers each line with the peer's address and the line, and leaves the end to the peer.
pub fn echo_lines(namespace: &Path, port: u16) {
    let listener = within(namespace, move || TcpListener::bind(("0.0.0.0", port)));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let Ok(peer) = stream.peer_addr() else { return };
                let Ok(lines) = stream.try_clone() else { return };
                for line in BufReader::new(lines).lines().map_while(Result::ok) {
                    let _ = stream.write_all(format!("{} {line}\n", peer.ip()).as_bytes());
                }
            });
        }
    });
}

/// Sends a line to [`echo_lines`], and returns whom the server sees.
pub fn talk_in_lines(namespace: &Path, to: (&str, u16), line: &str) -> Option<String> {
    let address = SocketAddr::new(to.0.parse::<IpAddr>().expect("an address"), to.1);
    let stream = netns::within(namespace, || TcpStream::connect_timeout(&address, Duration::from_secs(3)));
    let mut stream = stream.ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(format!("{line}\n").as_bytes()).ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    let (peer, back) = answer.trim_end().split_once(' ')?;
    assert!(back == line, "what came back is not what was sent");
    Some(peer.to_owned())
}

/// The same for datagrams.
pub fn echo_datagrams(namespace: &Path, port: u16) {
    let socket = within(namespace, move || UdpSocket::bind(("0.0.0.0", port)));
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((len, peer)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..len], peer);
        }
    });
}

/// Makes something in a namespace, which stays there.
pub fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> T {
    netns::within(namespace, work).expect("work in a namespace")
}

/// Talks to [`echo`]: whom the server sees. `None` if nobody answers.
pub fn talk(namespace: Option<&Path>, to: (&str, u16), bytes: &[u8]) -> Option<String> {
    let address = SocketAddr::new(to.0.parse::<IpAddr>().expect("an address"), to.1);
    let work = move || {
        // A connection of the namespace's own, which goes on when the thread has left it.
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(bytes)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut answer = vec![];
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = match namespace {
        Some(namespace) => netns::within(namespace, work).ok()?,
        None => work().ok()?,
    };
    let end = answer.iter().position(|byte| *byte == b'\n')?;
    assert!(&answer[end + 1..] == bytes, "what came back is not what was sent");
    Some(String::from_utf8_lossy(&answer[..end]).into_owned())
}

/// Asks a name server for the address of a name; `None` if there is none or no answer.
pub fn look_up(namespace: &Path, server: IpAddr, name: &str) -> Option<String> {
    let mut query = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let socket = within(namespace, || UdpSocket::bind("0.0.0.0:0"));
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket");
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        // The server may only just be starting.
        if socket.send_to(&query, (server, 53)).is_err() {
            continue;
        }
        let mut answer = [0; 512];
        match socket.recv(&mut answer) {
            Ok(len) if answer[..2] == query[..2] => {
                let found = answer[3] & 15 == 0 && answer[7] > 0 && len > query.len();
                let address: [u8; 4] = answer[len.checked_sub(4)?..len].try_into().expect("four bytes");
                return found.then(|| IpAddr::from(address).to_string());
            }
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    None
}

/// A machine that is plugged into a tap: the stack of a namespace, with a tap of its own, and frames are carried between the
/// two with their offloads, as a monitor does.
pub struct Machine {
    pub namespace: PathBuf,
    stop: Arc<AtomicBool>,
    pump: Option<std::thread::JoinHandle<()>>,
}

impl Machine {
    pub fn new(
        lab: &Lab,
        name: &str,
        plug: (&Path, &str),
        mac: &str,
        address: &str,
        gateway: &str,
    ) -> Machine {
        let namespace = lab.namespace(name);
        let open = |netns: &Path, name: &str| {
            let options =
                tap::Options { name: name.into(), netns: Some(netns.into()), ..tap::Options::default() };
            let tap = tap::open(&options).expect("a tap");
            let all = tap::offload::CSUM | tap::offload::TSO4 | tap::offload::TSO6 | tap::offload::TSO_ECN;
            tap.set_offloads(all).expect("offloads");
            tap
        };
        let wire = open(plug.0, plug.1);
        let card = open(&namespace, "vm0");
        inside(&namespace, &format!("ip link set vm0 mtu {} address {mac} up", wire.mtu()));
        inside(&namespace, &format!("ip addr add {address} dev vm0"));
        inside(&namespace, &format!("ip route add default via {gateway}"));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let pump = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                carry(&wire, &card);
                carry(&card, &wire);
                wait(&[&wire, &card]);
            }
        });
        Machine { namespace, stop, pump: Some(pump) }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(pump) = self.pump.take() {
            let _ = pump.join();
        }
    }
}

/// Carries what waits from one tap to another.
fn carry(from: &Tap, to: &Tap) {
    let mut bytes = vec![0u8; 66 << 10];
    for _ in 0..64 {
        // SAFETY: the bytes outlive the pieces, and nobody refers to them until the calls have returned.
        let piece = unsafe { Piece::new(bytes.as_mut_ptr(), bytes.len()) };
        let Ok(len) = from.read(0, &[piece]) else { return };
        // SAFETY: as above, and so many bytes are there.
        let piece = unsafe { Piece::new(bytes.as_mut_ptr(), len) };
        let _ = to.write(0, &[piece]);
    }
}

fn wait(taps: &[&Tap]) {
    let fds = taps.iter().filter_map(|tap| tap.fd(0));
    // SAFETY: the taps are borrowed, and so are open, for the length of the call.
    let borrowed: Vec<BorrowedFd> = fds.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) }).collect();
    let mut polled: Vec<PollFd> = borrowed.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let _ = poll(&mut polled, PollTimeout::from(50u8));
}

/// Processes of this name that were started in this test's namespace.
pub fn processes(name: &str) -> usize {
    let here = std::fs::read_link("/proc/thread-self/ns/net").expect("a namespace");
    let output = Command::new("pgrep").args(["-x", name]).stdin(Stdio::null()).output().expect("pgrep");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_here =
        |pid: &&str| std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|there| there == here);
    text.lines().filter(is_here).count()
}
