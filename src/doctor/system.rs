//! What the host's kernel offers beside KVM.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, ErrorKind};

use super::Check;

/// Available memory below which even small guests get into trouble.
const LOW_MEMORY_MIB: u64 = 256;

/// The processor. Only tells.
pub fn processor() -> Check {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, value)| value.trim())
    };
    let flags = field("flags");
    let shown: Vec<&str> = ["vmx", "svm", "hypervisor"]
        .into_iter()
        .filter(|flag| flags.split(' ').any(|other| other == *flag))
        .collect();
    let flags = if shown.is_empty() { "no vmx, svm, hypervisor flag".to_owned() } else { shown.join(", ") };
    Check::ok("processor", "processor", format!("{}, {} ({flags})", field("vendor_id"), field("model name")))
}

/// Memory: how much, and whether more may be mapped than there is.
pub fn memory() -> Check {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let overcommit = fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    memory_from(&info, overcommit.trim())
}

fn memory_from(info: &str, overcommit: &str) -> Check {
    let (id, title) = ("memory", "memory");
    let number = |name: &str| -> Option<u64> {
        let line = info.lines().find(|line| line.split(':').next() == Some(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let (Some(total), Some(available)) = (number("MemTotal"), number("MemAvailable")) else {
        return Check::warn(id, title, "/proc/meminfo cannot be read");
    };
    let (total, available) = (total / 1024, available / 1024);
    let huge = number("HugePages_Total").unwrap_or(0);
    let seen =
        format!("{available} of {total} MiB available, {huge} huge pages, overcommit mode {overcommit}");
    if overcommit == "2" {
        return Check::warn(id, title, format!("{seen}: every guest's memory is charged in full"))
            .with_fix("sudo sysctl vm.overcommit_memory=0");
    }
    if available < LOW_MEMORY_MIB {
        return Check::warn(id, title, seen).with_fix("free memory, or give guests less with --memory");
    }
    Check::ok(id, title, seen)
}

/// The tun driver, for network devices.
pub fn tun() -> Check {
    let (id, title, path) = ("tun", "network taps", "/dev/net/tun");
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok(id, title, format!("{path} can be opened")),
        Err(error) => Check::warn(id, title, format!("{path}: {error}")).with_fix(match error.kind() {
            ErrorKind::PermissionDenied => format!("sudo chmod 666 {path}"),
            _ => format!(
                "sudo modprobe tun && sudo mkdir -p /dev/net && [ -e {path} ] || sudo mknod {path} c 10 200"
            ),
        }),
    }
}

/// The kernel's own network back end. Not needed.
pub fn vhost_net() -> Check {
    let (id, title, path) = ("vhost-net", "vhost-net", "/dev/vhost-net");
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::ok(id, title, format!("{path} can be opened")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Check::ok(id, title, "not there, and not needed: rvmm moves packets itself")
        }
        Err(error) => Check::ok(id, title, format!("{path}: {error}; not needed: rvmm moves packets itself")),
    }
}

/// Which cgroup hierarchies are mounted, with which controllers.
pub fn cgroups() -> Check {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    cgroups_from(&mounts, &|mount_point| {
        fs::read_to_string(format!("{mount_point}/cgroup.controllers")).unwrap_or_default()
    })
}

fn cgroups_from(mountinfo: &str, controllers_at: &dyn Fn(&str) -> String) -> Check {
    let (id, title) = ("cgroups", "cgroups");
    const CONTROLLERS: [&str; 8] = ["cpu", "cpuset", "memory", "io", "blkio", "pids", "hugetlb", "freezer"];
    let mut v1 = Vec::new();
    let mut v2 = None;
    for line in mountinfo.lines() {
        let Some((mount, source)) = line.split_once(" - ") else { continue };
        let mount_point = mount.split(' ').nth(4).unwrap_or_default();
        let mut source = source.split(' ');
        match source.next() {
            Some("cgroup2") => v2 = Some(controllers_at(mount_point).trim().to_owned()),
            Some("cgroup") => {
                let options = source.nth(1).unwrap_or_default();
                v1.extend(options.split(',').filter(|option| CONTROLLERS.contains(option)));
            }
            _ => {}
        }
    }
    v1.sort_unstable();
    v1.dedup();
    let or_none = |text: &str| if text.is_empty() { "none".to_owned() } else { text.to_owned() };
    let seen = match (v1.is_empty(), &v2) {
        (true, None) => {
            return Check::warn(id, title, "no hierarchy is mounted: no limits on CPU and memory of VMs")
                .with_fix("sudo mount -t cgroup2 cgroup2 /sys/fs/cgroup");
        }
        (true, Some(v2)) => format!("v2, controllers: {}", or_none(v2)),
        (false, None) => format!("v1, controllers: {}", v1.join(" ")),
        (false, Some(v2)) => {
            format!("hybrid, v1 controllers: {}; v2 controllers: {}", v1.join(" "), or_none(v2))
        }
    };
    Check::ok(id, title, seen)
}

/// Whether this process may use io_uring.
pub fn io_uring() -> Check {
    let (id, title) = ("io-uring", "io_uring");
    match io_uring::IoUring::new(2) {
        Ok(_) => Check::ok(id, title, "usable"),
        Err(error) => {
            let check =
                Check::warn(id, title, format!("{error}; disks fall back to ordinary reads and writes"));
            match fs::read_to_string("/proc/sys/kernel/io_uring_disabled").as_deref().map(str::trim) {
                Ok("1" | "2") => check.with_fix("sudo sysctl kernel.io_uring_disabled=0"),
                _ => check,
            }
        }
    }
}

/// Whether page faults can be handled by this process.
pub fn userfaultfd() -> Check {
    let (id, title) = ("userfaultfd", "userfaultfd");
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    let open = |flags: libc::c_int| -> io::Result<()> {
        // SAFETY: the system call takes flags and no pointers.
        let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let descriptor = libc::c_int::try_from(descriptor).map_err(io::Error::other)?;
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made above, and nobody else knows it.
        unsafe { libc::close(descriptor) };
        Ok(())
    };
    if open(libc::O_CLOEXEC).is_ok() {
        return Check::ok(id, title, "usable, also for accesses of the kernel such as KVM's");
    }
    match open(libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) {
        Ok(()) => {
            Check::warn(id, title, "for accesses of user code only: memory of VMs cannot be loaded lazily")
                .with_fix("sudo sysctl vm.unprivileged_userfaultfd=1")
        }
        Err(error) => Check::warn(id, title, error.to_string())
            .with_fix("a host kernel with CONFIG_USERFAULTFD, or: sudo sysctl vm.unprivileged_userfaultfd=1"),
    }
}

/// Whether system calls can be filtered.
pub fn seccomp() -> Check {
    let (id, title) = ("seccomp", "seccomp");
    match fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) => Check::ok(id, title, format!("actions: {}", actions.trim())),
        Err(_) => Check::warn(id, title, "no filters: the monitor runs without them")
            .with_fix("a host kernel with CONFIG_SECCOMP_FILTER"),
    }
}

/// Whether users without privileges may make user namespaces.
pub fn user_namespaces() -> Check {
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    user_namespaces_from(
        number("/proc/sys/user/max_user_namespaces"),
        number("/proc/sys/kernel/unprivileged_userns_clone"),
        number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
    )
}

fn user_namespaces_from(most: Option<u64>, debian: Option<u64>, apparmor: Option<u64>) -> Check {
    let (id, title) = ("user-namespaces", "user namespaces");
    let forbidden = |seen: &str, fix: &str| {
        Check::warn(id, title, format!("{seen}: rootless use needs them")).with_fix(fix)
    };
    match (most, debian, apparmor) {
        (None, ..) => forbidden("not offered", "a host kernel with CONFIG_USER_NS"),
        (Some(0), ..) => forbidden("limited to 0", "sudo sysctl user.max_user_namespaces=15000"),
        (_, Some(0), _) => forbidden("forbidden", "sudo sysctl kernel.unprivileged_userns_clone=1"),
        (.., Some(1..)) => {
            forbidden("restricted by AppArmor", "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0")
        }
        (Some(most), ..) => Check::ok(id, title, format!("at most {most}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::kvm::kind::Names;

    #[test]
    fn processor_agrees_with_its_flags() {
        let seen = processor().seen;
        assert_eq!(
            Names::of_host().hypervisor,
            seen.contains("hypervisor)") || seen.contains("hypervisor,"),
            "{seen}"
        );
    }

    #[test]
    fn memory_is_judged() {
        let info =
            |available| format!("MemTotal: 2097152 kB\nMemAvailable: {available} kB\nHugePages_Total: 3\n");
        let check = memory_from(&info(1 << 20), "1");
        assert_eq!(check.state, State::Ok);
        assert_eq!(check.seen, "1024 of 2048 MiB available, 3 huge pages, overcommit mode 1");
        assert_eq!(memory_from(&info(1024), "0").state, State::Warn);
        assert!(memory_from(&info(1 << 20), "2").fix.unwrap().contains("overcommit_memory"));
        assert_eq!(memory_from("", "0").state, State::Warn);
    }

    #[test]
    fn cgroup_hierarchies_are_told_apart() {
        let v1 = "30 25 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct";
        let v2 = "29 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate";
        let controllers = |mount_point: &str| {
            assert_eq!(mount_point, "/sys/fs/cgroup/unified");
            "hugetlb\n".to_owned()
        };
        let seen = |text: &str| cgroups_from(text, &controllers).seen;
        assert_eq!(seen(v1), "v1, controllers: cpu memory");
        assert_eq!(seen(v2), "v2, controllers: hugetlb");
        assert_eq!(
            seen(&format!("{v1}\n{v2}")),
            "hybrid, v1 controllers: cpu memory; v2 controllers: hugetlb"
        );
        assert_eq!(cgroups_from("", &controllers).state, State::Warn);
    }

    #[test]
    fn limits_on_user_namespaces_are_found() {
        assert_eq!(user_namespaces_from(Some(100), None, None).state, State::Ok);
        assert_eq!(user_namespaces_from(Some(100), Some(1), Some(0)).state, State::Ok);
        for forbidden in
            [(None, None, None), (Some(0), None, None), (Some(9), Some(0), None), (Some(9), None, Some(1))]
        {
            assert_eq!(user_namespaces_from(forbidden.0, forbidden.1, forbidden.2).state, State::Warn);
        }
    }
}
