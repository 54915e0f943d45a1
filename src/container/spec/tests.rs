//! The whole `Spec` against what Docker makes of the same.

use std::time::Duration;

use super::*;
use crate::container::config::{
    Isolation, Limits, Mount, MountSource, Network, NetworkJoin, Process, Restart, Seccomp, Secret, Security,
    TemplateUse,
};

fn config() -> ContainerConfig {
    ContainerConfig {
        id: "0123456789abcdef".repeat(4),
        name: "test".into(),
        created_ns: 0,
        isolation: Isolation::Native,
        image: "busybox".into(),
        image_id: format!("sha256:{}", "0".repeat(64)),
        process: Process { args: vec!["sh".into()], cwd: "/work".into(), ..Process::default() },
        hostname: None,
        limits: Limits::default(),
        mounts: vec![],
        read_only: false,
        devices: vec![],
        security: Security::default(),
        network: Network {
            mode: NetworkMode::Networks(vec![NetworkJoin::default()]),
            ports: vec![],
            dns: vec![],
            dns_search: vec![],
            dns_options: vec![],
            hosts: vec![],
        },
        sysctls: BTreeMap::new(),
        restart: Restart::No,
        auto_remove: true,
        stop_signal: "TERM".into(),
        stop_timeout: Duration::from_secs(10),
        health: None,
        labels: BTreeMap::new(),
        secrets: vec![],
        template: TemplateUse::default(),
    }
}

fn build_with(config: &ContainerConfig, change: impl FnOnce(&mut Inputs)) -> Result<Spec, Error> {
    let users = Users::parse(b"root:x:0:0:root:/root:/bin/sh\n", b"root:x:0:\n");
    let volumes = BTreeMap::from([("data".to_owned(), PathBuf::from("/volumes/data/_data"))]);
    let mut inputs = Inputs {
        config,
        users: &users,
        rootfs: Path::new("/run/rootfs"),
        network: NetworkNamespace::Path("/run/netns".into()),
        resolv_conf: Some("/run/resolv.conf".into()),
        hosts: Some("/run/hosts".into()),
        hostname_file: Some("/run/hostname".into()),
        volumes: &volumes,
        secrets: Some("/run/secrets-of-it".into()),
        cgroup: "/rvmm/x".into(),
        available: CapabilitySet::all(),
        kernel: (6, 1),
    };
    change(&mut inputs);
    build(&inputs)
}

fn spec_of(config: &ContainerConfig) -> Spec {
    build_with(config, |_| {}).unwrap()
}

fn mount_lines(spec: &Spec) -> Vec<String> {
    let line = |mount: &oci_spec::runtime::Mount| {
        let options = mount.options().clone().unwrap_or_default().join(",");
        let source = mount.source().clone().unwrap_or_default();
        let kind = mount.typ().clone().unwrap_or_default();
        format!("{} {kind} {} {options}", mount.destination().display(), source.display())
    };
    spec.mounts().iter().flatten().map(line).collect()
}

#[test]
fn default_container_is_that_of_docker() {
    let spec = spec_of(&config());
    assert_eq!(
        mount_lines(&spec),
        [
            "/proc proc proc nosuid,noexec,nodev",
            "/dev tmpfs tmpfs nosuid,strictatime,mode=755,size=65536k",
            "/dev/pts devpts devpts nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5",
            "/sys sysfs sysfs nosuid,noexec,nodev,ro",
            "/sys/fs/cgroup cgroup cgroup nosuid,noexec,nodev,ro",
            "/dev/mqueue mqueue mqueue nosuid,noexec,nodev",
            "/dev/shm tmpfs shm nosuid,noexec,nodev,mode=1777,size=67108864",
            "/etc/resolv.conf bind /run/resolv.conf rbind,rprivate",
            "/etc/hostname bind /run/hostname rbind,rprivate",
            "/etc/hosts bind /run/hosts rbind,rprivate",
        ]
    );
    let process = spec.process().as_ref().unwrap();
    assert_eq!(process.args().as_deref(), Some(&["sh".to_owned()][..]));
    assert_eq!(process.cwd(), Path::new("/work"));
    assert_eq!(process.terminal(), Some(false));
    assert_eq!(process.no_new_privileges(), Some(false));
    assert_eq!(process.rlimits().as_deref(), Some(&[][..]));
    let env = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME=0123456789ab",
        "HOME=/root",
    ];
    assert_eq!(process.env().as_deref().unwrap(), env);
    let capabilities = process.capabilities().as_ref().unwrap();
    assert_eq!(CapabilitySet::of(capabilities.bounding().as_ref().unwrap()).0, 0xa804_25fb);
    assert_eq!(CapabilitySet::of(capabilities.ambient().as_ref().unwrap()).0, 0);

    assert_eq!(spec.hostname().as_deref(), Some("0123456789ab"));
    assert_eq!(spec.root().as_ref().unwrap().readonly(), Some(false));
    let linux = spec.linux().as_ref().unwrap();
    let namespaces: Vec<String> =
        linux.namespaces().iter().flatten().map(|ns| ns.typ().to_string()).collect();
    assert_eq!(namespaces, ["mnt", "uts", "pid", "ipc", "cgroup", "net"]);
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/rvmm/x")));
    assert!(linux.masked_paths().iter().flatten().any(|path| path == "/proc/kcore"));
    assert!(linux.readonly_paths().iter().flatten().any(|path| path == "/proc/sys"));
    assert!(linux.seccomp().is_some());
    assert!(linux.devices().as_ref().unwrap().is_empty());
    let sysctl = linux.sysctl().as_ref().unwrap();
    assert_eq!(sysctl.get("net.ipv4.ip_unprivileged_port_start").map(String::as_str), Some("0"));
    let resources = linux.resources().as_ref().unwrap();
    assert_eq!(resources.devices().as_ref().unwrap().len(), 12);
    assert_eq!((resources.memory(), resources.cpu(), resources.pids()), (&None, &None, &None));
}

#[test]
fn privileged_container_has_no_walls_inside() {
    let config =
        ContainerConfig { security: Security { privileged: true, ..Security::default() }, ..config() };
    let spec = spec_of(&config);
    let linux = spec.linux().as_ref().unwrap();
    assert_eq!(linux.seccomp(), &None);
    assert_eq!(linux.masked_paths().as_deref(), Some(&[][..]));
    assert!(mount_lines(&spec).iter().any(|line| line == "/sys sysfs sysfs nosuid,noexec,nodev"));
    let capabilities = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
    assert_eq!(CapabilitySet::of(capabilities.effective().as_ref().unwrap()), CapabilitySet::all());
}

#[test]
fn networks_of_host_and_nobody() {
    let namespaces = |network| {
        let spec = build_with(&config(), |inputs| inputs.network = network).unwrap();
        let linux = spec.linux().as_ref().unwrap().clone();
        let list = linux.namespaces().clone().unwrap();
        list.iter().find(|ns| ns.typ() == LinuxNamespaceType::Network).map(|ns| ns.path().clone())
    };
    assert_eq!(namespaces(NetworkNamespace::Host), None);
    assert_eq!(namespaces(NetworkNamespace::New), Some(None));
    assert_eq!(namespaces(NetworkNamespace::Path("/n".into())), Some(Some("/n".into())));
}

#[test]
fn mounts_of_the_user_come_in_order_of_depth_and_replace_others() {
    let bind = |path: &str, target: &str, read_only| Mount {
        source: MountSource::Bind { path: path.into(), propagation: None },
        target: target.into(),
        read_only,
    };
    let config = ContainerConfig {
        mounts: vec![
            bind("/deep", "/a/b/c", true),
            bind("/hosts", "/etc/hosts", false),
            bind("/shallow", "/a", false),
            Mount {
                source: MountSource::Volume { name: "data".into(), copy: true },
                target: "/data".into(),
                read_only: false,
            },
            Mount {
                source: MountSource::Tmpfs {
                    size_bytes: Some(1 << 20),
                    mode: None,
                    options: vec!["exec".into()],
                },
                target: "/dev/shm".into(),
                read_only: false,
            },
        ],
        ..config()
    };
    let lines = mount_lines(&spec_of(&config));
    assert_eq!(
        lines[lines.len() - 5..],
        [
            "/a bind /shallow rbind,rprivate",
            "/data bind /volumes/data/_data rbind,rprivate",
            "/etc/hosts bind /hosts rbind,rprivate",
            "/dev/shm tmpfs tmpfs nosuid,nodev,exec,size=1048576,mode=1777",
            "/a/b/c bind /deep rbind,rprivate,ro,rro",
        ]
    );
    assert_eq!(lines.iter().filter(|line| line.starts_with("/etc/hosts ")).count(), 1);
    assert_eq!(lines.iter().filter(|line| line.starts_with("/dev/shm ")).count(), 1);
}

#[test]
fn impossible_mounts_are_errors() {
    let with = |source, target: &str| {
        let mounts = vec![Mount { source, target: target.into(), read_only: false }];
        build_with(&ContainerConfig { mounts, ..config() }, |_| {}).unwrap_err()
    };
    let bind = |path: &str, propagation: Option<&str>| MountSource::Bind {
        path: path.into(),
        propagation: propagation.map(str::to_owned),
    };
    assert!(matches!(with(bind("/x", None), "/proc/self"), Error::Target { .. }));
    assert!(matches!(with(bind("x", None), "/x"), Error::SourceRelative { .. }));
    assert!(matches!(with(bind("/x", Some("odd")), "/x"), Error::Propagation { .. }));
    let volume = MountSource::Volume { name: "none".into(), copy: false };
    assert!(matches!(with(volume, "/x"), Error::NoVolume { .. }));
}

#[test]
fn secrets_are_a_read_only_mount_and_their_names_are_no_paths() {
    let secret = |name: &str| Secret { name: name.into(), source: "/s".into(), uid: 0, gid: 0, mode: 0o400 };
    let with = |name: &str| ContainerConfig { secrets: vec![secret(name)], ..config() };
    let lines = mount_lines(&spec_of(&with("key")));
    assert!(
        lines.contains(&"/run/secrets bind /run/secrets-of-it rbind,rprivate,ro,nosuid,nodev,noexec".into())
    );
    for bad in ["../key", "/key", "a/b", "", ".."] {
        assert!(matches!(build_with(&with(bad), |_| {}), Err(Error::SecretName { .. })), "{bad}");
    }
    let none = build_with(&with("key"), |inputs| inputs.secrets = None);
    assert!(matches!(none, Err(Error::NoSecretsDirectory)));
}

#[test]
fn sysctls_of_the_host_are_refused() {
    let with = |name: &str, network| {
        let sysctls = BTreeMap::from([(name.to_owned(), "1".to_owned())]);
        build_with(&ContainerConfig { sysctls, ..config() }, |inputs| inputs.network = network)
    };
    for good in
        ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "net/ipv4/conf/eth0.1/forwarding"]
    {
        assert!(with(good, NetworkNamespace::New).is_ok(), "{good}");
    }
    for bad in ["kernel.panic", "vm.swappiness", "net..x", "kernel.shm_rmid_forced_not", "net./../kernel/x"] {
        assert!(matches!(with(bad, NetworkNamespace::New), Err(Error::Sysctl { .. })), "{bad}");
    }
    assert!(matches!(with("net.ipv4.ip_forward", NetworkNamespace::Host), Err(Error::Sysctl { .. })));
}

#[test]
fn filter_of_a_file_and_none() {
    let with = |seccomp| {
        let security = Security { seccomp, ..Security::default() };
        build_with(&ContainerConfig { security, ..config() }, |_| {})
    };
    assert_eq!(with(Seccomp::Unconfined).unwrap().linux().as_ref().unwrap().seccomp(), &None);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[]}"#).unwrap();
    assert!(with(Seccomp::File(file.path().into())).unwrap().linux().as_ref().unwrap().seccomp().is_some());
    std::fs::write(file.path(), "no").unwrap();
    assert!(matches!(with(Seccomp::File(file.path().into())), Err(Error::Profile { .. })));
    assert!(matches!(with(Seccomp::File("/not/there".into())), Err(Error::ReadProfile { .. })));
}

#[test]
fn host_names_are_checked() {
    let with = |name: &str| build_with(&ContainerConfig { hostname: Some(name.into()), ..config() }, |_| {});
    assert_eq!(with("box-1.example").unwrap().hostname().as_deref(), Some("box-1.example"));
    for bad in ["", "a b", "a\nb", &"x".repeat(65)] {
        assert!(matches!(with(bad), Err(Error::Hostname { .. })), "{bad:?}");
    }
}

#[test]
fn exec_takes_over_what_it_does_not_say() {
    let mut config = config();
    config.process.env = vec!["A=1".into(), "B=2".into()];
    config.process.user = "0:7".into();
    let exec = Process { args: vec!["id".into()], env: vec!["B=3".into()], ..Process::default() };
    let users = Users::parse(b"root:x:0:0:root:/root:/bin/sh\n", b"");
    let build = |exec: &Process, privileged| {
        exec_process(&config, exec, privileged, &users, CapabilitySet::all()).unwrap()
    };
    let process = build(&exec, false);
    assert_eq!(process.user().gid(), 7);
    assert_eq!(process.cwd(), Path::new("/work"));
    let env = process.env().clone().unwrap();
    assert!(env.contains(&"A=1".into()) && env.contains(&"B=3".into()) && !env.contains(&"B=2".into()));
    let count = |process: &oci_spec::runtime::Process| {
        CapabilitySet::of(process.capabilities().as_ref().unwrap().effective().as_ref().unwrap()).0
    };
    assert_eq!(count(&process), 0xa804_25fb);
    let other = Process { user: "0".into(), cwd: "/tmp".into(), ..exec };
    assert_eq!(count(&build(&other, true)), CapabilitySet::all().0);
    assert_eq!(
        (build(&other, true).user().gid(), build(&other, true).cwd().as_path()),
        (0, Path::new("/tmp"))
    );
}
