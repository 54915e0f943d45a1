//! What a container sees of the host's kernel: natively all of it that a name reaches, in a microVM nothing.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Stdio};

use rvmm::kvm::kind::Kind;

use super::home::{Home, IMAGE, Wall, can_run};
use crate::support::{announce, kvm_kind};

/// Prints what can be seen: lines with their file's name, and then the kernel's log. Two processes, since some guests take
/// long for one.
const PROBE: &str = "cd /proc; grep -Hs '' sys/kernel/osrelease version sys/kernel/random/boot_id cmdline self/mountinfo \
    partitions devices misc modules net/dev net/unix net/tcp net/tcp6 meminfo [0-9]*/cmdline /sys/class/net/*/address; dmesg";
/// The symbols' addresses and names, which take long to print for a kernel that is emulated.
const SYMBOLS: &str = "; sed 's/^/symbol:/' /proc/kallsyms";

/// What a probe has found in a file, or behind the word that its lines begin with.
fn part(seen: &str, name: &str) -> String {
    let begin = format!("{name}:");
    seen.lines().filter_map(|line| line.strip_prefix(&begin)).map(|line| format!("{line}\n")).collect()
}

fn host(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// What of the host's is looked for: a word that only the host has, by the part of the probe where it would be seen.
struct Marks {
    word: String,
    port: u16,
    _sockets: (UnixListener, TcpListener),
    process: std::process::Child,
}

impl Marks {
    fn new() -> Marks {
        let word = format!("rvmm-mark-{}", std::process::id());
        let name = SocketAddr::from_abstract_name(word.as_bytes()).expect("a name");
        let sockets = (
            UnixListener::bind_addr(&name).expect("a socket"),
            TcpListener::bind("127.0.0.1:0").expect("a socket"),
        );
        let port = sockets.1.local_addr().expect("an address").port();
        let process = Command::new("sleep").arg("98765.4321").stdout(Stdio::null()).spawn().expect("sleep");
        if let Ok(mut log) = fs::OpenOptions::new().write(true).open("/dev/kmsg") {
            let _ = log.write_all(format!("{word}\n").as_bytes());
        }
        Marks { word, port, _sockets: sockets, process }
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn microvm_shows_nothing_of_the_hosts_kernel() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    let marks = Marks::new();
    let bind = home.file("bind/file", "x");
    let bind = format!("{}:/bind", bind.trim_end_matches("/file"));
    // As much as a container can be given.
    let options = ["--privileged", "--security-opt=systempaths=unconfined", "-v", &bind];
    let fast = matches!(kvm_kind(), Some(Kind::Hardware | Kind::Nested));
    let script = if fast { format!("{PROBE}{SYMBOLS}") } else { PROBE.into() };
    let probe = |wall: Wall, more: &[&str]| {
        let mut arguments = vec!["run", "--rm", wall.flag()];
        arguments.extend(more);
        arguments.extend(options);
        arguments.extend([IMAGE, "sh", "-c", &script]);
        let ran = home.run(&arguments);
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.stdout
    };
    // The host's own, by the same means, so that it is known what they show.
    let native = probe(Wall::Native, &["--network=host"]);
    let guest = probe(Wall::Microvm, &["--network=none"]);
    let boot_id = host("/proc/sys/kernel/random/boot_id");
    let port = format!(":{:04X} ", marks.port);

    assert_eq!(part(&native, "sys/kernel/random/boot_id"), boot_id);
    assert_ne!(part(&guest, "sys/kernel/random/boot_id"), boot_id);
    assert_eq!(part(&native, "version"), host("/proc/version"));
    assert!(part(&guest, "version").contains("rvmm"), "{}", part(&guest, "version"));
    assert_ne!(part(&guest, "version"), host("/proc/version"));
    assert_ne!(part(&guest, "sys/kernel/osrelease"), part(&native, "sys/kernel/osrelease"));
    assert_ne!(part(&guest, "cmdline"), part(&native, "cmdline"));
    if fast {
        let (native, guest) = (part(&native, "symbol"), part(&guest, "symbol"));
        assert!(native.lines().count() > 10_000 && guest.lines().count() > 10_000);
        assert!(native != guest);
    }
    assert_eq!(part(&guest, "modules"), "", "the guest's kernel has none");

    let sockets = |seen: &str| part(seen, "net/unix") + &part(seen, "net/tcp");
    assert!(sockets(&native).contains(&marks.word) && sockets(&native).contains(&port));
    assert!(
        !sockets(&guest).contains(&marks.word) && !sockets(&guest).contains(&port),
        "{}",
        sockets(&guest)
    );
    assert!(!guest.contains("98765.4321"), "another's process");

    // Neither the host's places, nor where they lie.
    let root = home.path("");
    let root = root.to_str().expect("a path").trim_end_matches('/');
    assert!(part(&native, "self/mountinfo").contains("overlay"));
    let mounts = part(&guest, "self/mountinfo");
    assert!(!mounts.contains(root) && mounts.contains(" /bind "), "{mounts}");
    // Its disks are its own: the layers' and the writable one.
    let disks: Vec<String> = part(&guest, "partitions")
        .lines()
        .skip(2)
        .filter_map(|line| line.split_whitespace().nth(3).map(str::to_owned))
        .collect();
    assert!(!disks.is_empty() && disks.iter().all(|disk| disk.starts_with("vd")), "{disks:?}");
    let has_kvm =
        |seen: &str| part(seen, "misc").lines().any(|line| line.split_whitespace().nth(1) == Some("kvm"));
    assert!(has_kvm(&native) && !has_kvm(&guest));
    let own = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.starts_with("/sys/class/net/"));
        let addresses = lines.filter_map(|line| line.split_once("address:")).map(|(_, address)| address);
        addresses.filter(|address| *address != "00:00:00:00:00:00").map(str::to_owned).collect()
    };
    let hosts = own(&native);
    assert!(own(&guest).iter().all(|address| !hosts.contains(address)));
    let memory =
        |seen: &str| part(seen, "meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    assert!(memory(&guest) < Some(512 << 10) && memory(&guest) != memory(&native));

    assert!(!guest.contains(&marks.word), "the host's kernel log");
    if native.contains(&format!("{}\n", marks.word)) {
        announce("the host's kernel log is seen natively by the privileged, and not in a microVM");
    }
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn microvm_has_no_way_to_the_hosts_sockets() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let path = home.path("bind/socket");
    fs::create_dir_all(home.path("bind")).expect("a directory");
    let _socket = UnixListener::bind(&path).expect("a socket");
    let bind = format!("{}:/bind", home.path("bind").display());
    let port = listener.local_addr().expect("an address").port().to_string();
    // Its file can be seen in a shared directory, but nobody of this kernel listens there.
    let script = format!(
        "test -S /bind/socket && echo there; nc -w 5 127.0.0.1 {port} </dev/null || echo refused; nc local:/bind/socket </dev/null || echo refused"
    );
    let ran = home.shell(Wall::Microvm, &["--privileged", "-v", &bind], &script);
    assert_eq!(ran.stdout, "there\nrefused\nrefused\n", "{ran:?}");
    listener.set_nonblocking(true).expect("a socket");
    assert!(listener.accept().is_err());
}
