//! MicroVMs that start from templates: that they are whole, that no two are alike, and what becomes of templates that are
//! damaged, outdated or half made.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::container::home::{Home, Wall, can_run};
use crate::container::network::can_connect;
use crate::support::{self, LINUX_PATIENCE};

const RESTORED: [&str; 1] = ["--template=require"];

/// How the VM of a container was started, while it runs.
fn started(home: &Home, name: &str) -> Value {
    let id = home.inspect(name)["Id"].as_str().expect("an id").to_owned();
    let note = home.path("run/sandboxes").join(&id[..24]).join("started.json");
    serde_json::from_slice(&fs::read(note).expect("a note")).expect("JSON")
}

/// Directories of templates.
fn templates(home: &Home) -> Vec<PathBuf> {
    let entries = fs::read_dir(home.path("data/templates")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn restored_containers_have_disks_volumes_networks_and_names_of_their_own() {
    if !can_connect(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    home.run(&["network", "create", "--subnet=10.199.7.0/24", "both"]).ok();
    let options = |name: &'static str| {
        ["--template=require", "--network=both", "-v", "kept:/kept", "-h", name, "--memory=96M", "--cpus=1"]
    };
    let serve =
        "echo $(hostname) >> /kept/names; echo own > /only-here; mkdir /www; hostname > /www/index.html;
        httpd -h /www; trap 'exit 7' TERM; while :; do sleep 0.1; done";
    home.start(Wall::Microvm, "one", &options("one"), serve);
    home.start(Wall::Microvm, "two", &options("two"), serve);
    let template = started(&home, "one")["template"].clone();
    assert!(template.is_string());
    assert_eq!(started(&home, "two")["template"], template);
    assert_eq!(templates(&home).len(), 1);

    let exec = |name: &str, script: &str| home.run(&["exec", name, "sh", "-c", script]).ok();
    let facts =
        "cat /etc/hostname; hostname; cat /sys/class/net/eth0/address; ip -4 addr show eth0 | grep inet;
        cat /proc/sys/kernel/random/boot_id; date +%s; cat /only-here; grep -c . /proc/partitions";
    let mut both = vec![];
    for name in ["one", "two"] {
        let found = exec(name, facts);
        let lines: Vec<String> = found.lines().map(|line| line.trim().to_owned()).collect();
        assert_eq!(lines[..2], [name, name], "{found}");
        let network = &home.inspect(name)["NetworkSettings"]["Networks"]["both"];
        assert_eq!(network["MacAddress"], lines[2].as_str());
        assert!(lines[3].contains(network["IPAddress"].as_str().expect("an address")), "{found}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a time");
        let behind = now.as_secs().abs_diff(lines[5].parse().expect("seconds"));
        // The command's own time on a slow host; a clock that was saved would be off by the boot at least.
        assert!(behind <= LINUX_PATIENCE.as_secs(), "{behind} seconds off");
        assert_eq!(lines[6], "own");
        both.push(lines);
    }
    for at in [2, 3, 4] {
        assert_ne!(both[0][at], both[1][at]);
    }
    // By name, and through the wire.
    assert_eq!(exec("one", "wget -qO- http://two/"), "two\n");
    assert_eq!(exec("two", "wget -qO- http://one/"), "one\n");
    assert_eq!(exec("two", "cat /kept/names"), "one\ntwo\n");
    home.run(&["stop", "one"]).ok();
    assert_eq!(home.inspect("one")["State"]["ExitCode"], 7);
    // Its second VM goes on from the template too, with the disk that the first has written.
    home.run(&["start", "one"]).ok();
    assert!(started(&home, "one")["template"].is_string());
    assert_eq!(exec("one", "cat /only-here"), "own\n");
    home.run(&["rm", "-f", "one", "two"]).ok();
    home.run(&["network", "rm", "both"]).ok();
    assert!(home.left().is_empty(), "{:?}", home.left());
}

/// Starts so many containers of one template and compares what must differ.
fn clones_differ(count: usize) {
    let home = Home::new();
    let script = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id; cat /etc/machine-id 2>/dev/null;
        head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; head -c 16 /dev/random | od -An -tx1 | tr -d ' \\n'; echo;
        mktemp -u XXXXXXXXXXXX; tr '\\0' '\\n' < /proc/self/auxv > /dev/null; od -An -tx1 /proc/self/auxv | md5sum; hostname";
    let mut seen = BTreeSet::new();
    let mut lines = 0;
    for number in 0..count {
        let found = home.shell(Wall::Microvm, &RESTORED, script).ok();
        for line in found.lines().filter(|line| !line.trim().is_empty()) {
            lines += 1;
            assert!(
                seen.insert(line.to_owned()),
                "{line:?} of VM {number} was another one's already: {found}"
            );
        }
    }
    assert!(lines >= 6 * count, "{lines} values of {count} VMs");
    assert_eq!(templates(&home).len(), 1);
}

#[test]
#[ignore = "long where a guest's kernel is emulated, and elsewhere there are twenty"]
fn three_clones_share_no_random_value() {
    if can_run(Wall::Microvm) {
        clones_differ(3);
    }
}

#[test]
fn twenty_clones_share_no_random_value() {
    if can_run(Wall::Microvm) && support::has_fast_kvm() {
        clones_differ(20);
    }
}

#[test]
fn a_damaged_template_makes_the_guest_boot_and_is_made_again() {
    if !can_run(Wall::Microvm) || !support::has_fast_kvm() {
        return;
    }
    let home = Home::new();
    home.shell(Wall::Microvm, &RESTORED, "true").ok();
    let made = templates(&home);
    let [template] = &made[..] else { panic!("{made:?}") };
    let state = template.join("state");
    let mut bytes = fs::read(&state).expect("a state");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).expect("a file");

    home.start(Wall::Microvm, "one", &["--template=auto"], "sleep 1000");
    assert_eq!(started(&home, "one")["template"], Value::Null);
    let id = home.inspect("one")["Id"].as_str().expect("an id").to_owned();
    let log = home.path("run/containers").join(&id[..24]).join("supervisor.log");
    let log = fs::read_to_string(log).expect("a log");
    assert!(log.contains("the guest boots") && log.contains("altered"), "{log}");
    assert!(!template.exists());
    home.run(&["rm", "-f", "one"]).ok();

    home.start(Wall::Microvm, "two", &["--template=auto"], "sleep 1000");
    assert!(started(&home, "two")["template"].is_string());
    home.run(&["rm", "-f", "two"]).ok();
    // Nobody has asked for one.
    home.start(Wall::Microvm, "three", &["--template=never"], "sleep 1000");
    assert_eq!(started(&home, "three")["template"], Value::Null);
    home.run(&["rm", "-f", "three"]).ok();
    assert!(home.left().is_empty(), "{:?}", home.left());
}

/// Programs and guest files in a directory, which a test may change.
struct Copy {
    directory: tempfile::TempDir,
}

impl Copy {
    fn new() -> Copy {
        let directory = support::directory();
        let (bin, guest) = (directory.path().join("bin"), directory.path().join("guest"));
        fs::create_dir(&bin).expect("a directory");
        fs::create_dir(&guest).expect("a directory");
        for program in ["rvmm", "rvmm-engine"] {
            symlink(support::binary().with_file_name(program), bin.join(program)).expect("a link");
        }
        let from = support::project("target/guest");
        for kernel in ["vmlinux", "vmlinux-pvm"] {
            symlink(from.join(kernel), guest.join(kernel)).expect("a link");
        }
        let copy = Copy { directory };
        copy.renew_agent();
        copy
    }

    fn bin(&self) -> PathBuf {
        self.directory.path().join("bin")
    }

    fn renew_agent(&self) {
        let agent = self.directory.path().join("guest/agent.cpio");
        let new = agent.with_extension("new");
        fs::copy(support::project("target/guest/agent.cpio"), &new).expect("a copy");
        fs::rename(new, agent).expect("a file");
    }
}

#[test]
fn a_template_is_made_anew_when_the_agent_is_another_one() {
    if !can_run(Wall::Microvm) || !support::has_fast_kvm() {
        return;
    }
    let (home, copy) = (Home::new(), Copy::new());
    let rvmm = |arguments: &[&str]| {
        let mut command = home.command(arguments);
        command.env("RVMM_PROGRAM_DIRECTORY", copy.bin()).stdout(Stdio::piped()).stderr(Stdio::piped());
        crate::container::home::finish(command.spawn().expect("rvmm"), b"", arguments).ok()
    };
    let build = ["template", "build", "--memory=64M", "--cpus=1", "--networks=0"];
    let first = rvmm(&build);
    let again = Instant::now();
    assert_eq!(rvmm(&build), first);
    let again = again.elapsed();
    let listed = |name: &str| -> Value {
        let all = rvmm(&["template", "ls", "--format=json"]);
        let all: Vec<Value> = all.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0]["Name"], name.trim());
        all[0].clone()
    };
    let entry = listed(&first);
    assert_eq!((entry["Memory"].as_u64(), entry["Cpus"].as_u64()), (Some(128 << 20), Some(1)));
    assert_eq!(entry["Current"], true);

    copy.renew_agent();
    assert_eq!(listed(&first)["Current"], false);
    let anew = Instant::now();
    let second = rvmm(&build);
    assert_ne!(second, first);
    assert!(anew.elapsed() > again, "a boot took less than a look at a directory");
    assert_eq!(listed(&second)["Current"], true);
    assert_eq!(rvmm(&["template", "rm", "128m"]), second);
    assert!(templates(&home).is_empty());
}

#[test]
fn a_killed_builder_leaves_nothing() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    let build = ["template", "build", "--memory=64M", "--cpus=1", "--networks=1"];
    let mut builder = home.command(&build).stdout(Stdio::null()).spawn().expect("rvmm");
    let run = home.path("run/templates/128m-1c-n1500");
    await_file(&run.join("vsock.sock"));
    kill(Pid::from_raw(builder.id() as i32), Signal::SIGKILL).expect("a kill");
    builder.wait().expect("a child");
    assert!(run.exists());
    // Any command that looks at containers.
    home.run(&["ps"]).ok();
    assert!(!run.exists());
    assert!(templates(&home).is_empty(), "{:?}", templates(&home));
    assert!(home.left().is_empty(), "{:?}", home.left());
    assert!(!names(&home.path("run/templates")).iter().any(|name| name.ends_with("n1500")));
}

fn await_file(path: &Path) {
    let deadline = Instant::now() + LINUX_PATIENCE;
    while !path.exists() {
        assert!(Instant::now() < deadline, "{path:?} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
