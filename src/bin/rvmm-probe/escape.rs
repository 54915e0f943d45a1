//! Harmless attempts to get out, and which wall stops each.
//!
//! An attempt that succeeds changes nothing: what is written is what was there, what is mounted is empty, what is traced is
//! let go. Who asks for them compares with what the same attempts do as a process of the host.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;
use serde_json::{Map, Value, json};

use crate::{Failure, say, system};

/// Makes all attempts, and says what came of each: `null` where it succeeded, or the error and its likely wall.
pub fn run() -> Result<(), Failure> {
    let mut found = Map::new();
    let mut note = |name: &str, result: io::Result<()>| {
        found.insert(name.to_owned(), result.map_or_else(|error| wall(name, &error), |()| Value::Null));
    };
    note("mount", mount());
    note("ptrace", trace_neighbour());
    note("raw_socket", raw_socket());
    note("keyring", system::add_key());
    note("proc_sys", write_parameter());
    note("module", load_module());
    note("device", open_host_disk());
    say(&json!({ "escape": found }));
    Ok(())
}

/// What stopped an attempt, as far as it can be told from inside.
fn wall(name: &str, error: &io::Error) -> Value {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let filtered = status.lines().any(|line| line.starts_with("Seccomp:") && line.ends_with('2'));
    let capabilities = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let needs = match name {
        "mount" | "keyring" => Some(21),
        "module" => Some(16),
        "raw_socket" => Some(13),
        "device" => Some(27),
        "ptrace" => Some(19),
        _ => None,
    };
    let has = needs.is_none_or(|bit| capabilities & (1 << bit) != 0);
    let by = match (error.raw_os_error(), name) {
        (Some(libc::EROFS), _) => "a read-only mount",
        (Some(libc::ENOSYS), _) if filtered => "the system call filter",
        (Some(libc::ENOSYS), _) => "its absence from the kernel",
        (Some(libc::ESRCH) | Some(libc::ENOENT), "ptrace") => "namespaces: there is no neighbour to be seen",
        (Some(libc::ENOENT | libc::ENXIO | libc::ENODEV), _) => "absence: there is no such thing here",
        (Some(libc::EPERM | libc::EACCES), _) if !has => "a missing capability",
        (Some(libc::EPERM), "device") => "the device control group",
        (Some(libc::EPERM | libc::EACCES), _) if filtered => "the system call filter",
        (Some(libc::EPERM | libc::EACCES), _) => "the kernel's permissions",
        _ => "the kernel",
    };
    let errno = error
        .raw_os_error()
        .map_or_else(|| error.to_string(), |number| Errno::from_raw_os_error(number).to_string());
    json!({ "by": by, "error": errno, "number": error.raw_os_error() })
}

fn mount() -> io::Result<()> {
    use rustix::mount::{MountFlags, UnmountFlags};
    let target = "/tmp/rvmm-probe-mount";
    fs::create_dir_all(target)?;
    let result = rustix::mount::mount("none", target, "tmpfs", MountFlags::empty(), c"size=4k");
    if result.is_ok() {
        let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
    }
    let _ = fs::remove_dir(target);
    Ok(result?)
}

/// A process that is neither this one nor of this one's making.
fn trace_neighbour() -> io::Result<()> {
    let own = std::process::id();
    let mut neighbours = vec![];
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A kernel's own threads have no memory, and cannot be traced by anybody.
        let is_program = fs::read_link(format!("/proc/{pid}/exe")).is_ok();
        if pid != own && pid != 1 && is_program {
            neighbours.push(pid);
        }
    }
    let pid = neighbours.pop().ok_or(Errno::SRCH)?;
    system::trace(i32::try_from(pid).map_err(io::Error::other)?)
}

fn raw_socket() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketType, ipproto, socket};
    socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
    Ok(())
}

/// Writes to a parameter of the whole kernel what it is already.
fn write_parameter() -> io::Result<()> {
    let path = "/proc/sys/kernel/panic_on_oops";
    let value = fs::read(path)?;
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    file.write_all(&value)
}

/// An empty file is no module: with the right to load one, the kernel says that it is none.
fn load_module() -> io::Result<()> {
    let file = File::open("/proc/self/exe")?;
    // A program is no module either; it is refused for its format, after the caller's rights have been looked at.
    match system::load_nothing(file.as_fd()) {
        Err(error) if [Some(libc::ENOEXEC), Some(libc::EINVAL)].contains(&error.raw_os_error()) => Ok(()),
        other => other,
    }
}

/// Makes a device file for the first disk that the kernel names, and opens it for reading.
fn open_host_disk() -> io::Result<()> {
    let partitions = fs::read_to_string("/proc/partitions")?;
    let numbers = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = (words.next()?.parse::<u32>().ok()?, words.next()?.parse::<u32>().ok()?);
        let name = words.nth(1)?;
        (!name.starts_with("loop") && !name.starts_with("ram") && !name.starts_with("zram"))
            .then_some((major, minor))
    };
    let (major, minor) = partitions.lines().find_map(numbers).ok_or(Errno::NODEV)?;
    let path = "/tmp/rvmm-probe-disk";
    let _ = fs::remove_file(path);
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(rustix::fs::CWD, path, FileType::BlockDevice, Mode::RUSR, device)?;
    let opened = File::open(path);
    let _ = fs::remove_file(path);
    opened.map(drop)
}

/// Crashes the kernel, if it is another one than that whose boot has the name given.
pub fn crash(host: &str) -> Result<(), Failure> {
    let own = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    if own.trim() == host || host.is_empty() {
        return Err("this is the host's kernel, which is not crashed".into());
    }
    // Whatever this may do by default, a crash is among it from now on.
    let _ = fs::write("/proc/sys/kernel/sysrq", "1");
    let mut trigger = fs::OpenOptions::new().write(true).open("/proc/sysrq-trigger")?;
    say(&json!({ "crash": "now" }));
    // What was said is to get out first.
    std::thread::sleep(std::time::Duration::from_millis(300));
    trigger.write_all(b"c")?;
    Ok(())
}

/// Takes memory until it has so many bytes, and says so; who asks knows that it must not get that far.
pub fn grow(bytes: usize) -> Result<(), Failure> {
    let mut held: Vec<Vec<u8>> = vec![];
    say(&json!({ "grow": "begins" }));
    while held.len() << 20 < bytes {
        let mut piece = Vec::new();
        piece.try_reserve_exact(1 << 20)?;
        piece.resize(1 << 20, 1);
        held.push(piece);
    }
    say(&json!({ "grown": held.len() << 20 }));
    Ok(())
}

/// Makes so many processes at once, and says how many there were when it was stopped.
pub fn multiply(count: usize) -> Result<(), Failure> {
    let mut children = vec![];
    let mut stopped = None;
    while children.len() < count {
        let child = system::fork(|| {
            std::thread::sleep(std::time::Duration::from_secs(60));
            0
        });
        match child {
            Ok(pid) => children.push(pid),
            Err(error) => {
                stopped = Some(error.to_string());
                break;
            }
        }
    }
    for pid in &children {
        system::kill(*pid);
    }
    for pid in &children {
        system::wait_for(*pid)?;
    }
    say(&json!({ "multiplied": children.len(), "stopped": stopped }));
    Ok(())
}
