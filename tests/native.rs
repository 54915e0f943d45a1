//! Native containers of busybox. They need root and a statically linked busybox.

#[path = "native/container.rs"]
mod container;
#[path = "native/hosts.rs"]
mod hosts;
#[path = "native/life.rs"]
mod life;
#[path = "native/limits.rs"]
mod limits;

use std::fs;
use std::os::unix::fs::MetadataExt;

use rvmm::container::config::{Device, Mount, MountSource, NetworkMode, Rlimit, Seccomp, Secret};
use serde_json::json;

use container::{Plan, can_run};

#[test]
fn exit_codes_come_back_and_output_is_whole() {
    if !can_run() {
        return;
    }
    for code in [0, 1, 42, 255] {
        assert_eq!(Plan::shell(&format!("exit {code}")).run().code, code);
    }
    let end = Plan::shell("echo out; echo err >&2").run();
    assert_eq!((end.stdout.as_str(), end.stderr.as_str()), ("out\n", "err\n"));
    let end = Plan::shell("dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' x; echo end").run();
    assert_eq!((end.code, end.stdout.len()), (0, (1 << 20) + 4));
}

#[test]
fn death_by_signal_is_told_from_an_exit() {
    if !can_run() {
        return;
    }
    let end = Plan::shell("sh -c 'kill -9 $$'; exit $?").run();
    assert_eq!((end.code, end.signal), (137, None));
    let mut container = Plan::shell("trap '' TERM; echo ready; sleep 1000").start();
    container.expect(0, "ready");
    container.ask(json!({ "signal": [9, false] }));
    let end = container.wait(0);
    assert_eq!((end.code, end.signal), (137, Some(9)));
    container.delete();
}

#[test]
fn signals_start_with_their_default_actions() {
    if !can_run() {
        return;
    }
    // The driver ignores SIGPIPE, as all Rust programs do.
    let end = Plan::new(&["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]).run();
    assert_eq!(end.stdout, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

#[test]
fn missing_and_unfit_programs_have_codes_of_their_own() {
    if !can_run() {
        return;
    }
    let program = |name: &str| Plan::new(&[name]).fails();
    assert_eq!(program("nowhere"), ("there is no \"nowhere\" in the container".into(), 127));
    assert_eq!(program("/bin/nowhere").1, 127);
    assert_eq!(program("/etc/passwd").1, 126);
    assert_eq!(program("/etc").1, 126);
    assert_eq!(program("").1, 125);
    let plan = Plan::new(&["/script"]);
    let layer = plan.path().join("layer");
    fs::create_dir(&layer).unwrap();
    fs::write(layer.join("script"), "#!/no/interpreter\n").unwrap();
    fs::set_permissions(layer.join("script"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut plan = plan;
    plan.layers.push(layer);
    let (text, code) = plan.fails();
    assert!(code == 126 && text.contains("interpreter"), "{text}");
}

#[test]
fn environment_directory_and_host_name_are_set() {
    if !can_run() {
        return;
    }
    let end = Plan::shell("env | sort; pwd; hostname")
        .with(|config| {
            config.process.env = vec!["B=two words".into(), "A=1".into()];
            config.process.cwd = "/made/for/it".into();
            config.hostname = Some("box".into());
        })
        .run();
    let lines: Vec<&str> = end.stdout.lines().filter(|line| !line.starts_with("SHLVL")).collect();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let wanted =
        ["A=1", "B=two words", "HOME=/root", "HOSTNAME=box", path, "PWD=/made/for/it", "/made/for/it", "box"];
    assert_eq!(lines, wanted);
}

#[test]
fn user_and_groups_are_those_of_the_image() {
    if !can_run() {
        return;
    }
    let id = |user: &str, groups: &[&str]| {
        let groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        let plan = Plan::shell("id -u; id -g; id -G; echo $HOME; echo x >/dev/stdout");
        let end =
            plan.with(|config| (config.process.user, config.process.groups) = (user.into(), groups)).run();
        assert_eq!(end.stderr, "", "streams can be opened again");
        end.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(id("", &[]), ["0", "0", "0", "/root", "x"]);
    assert_eq!(id("ann", &[]), ["1000", "1000", "1000 29", "/home/ann", "x"]);
    assert_eq!(id("77:29", &["ann"]), ["77", "29", "29 1000", "/", "x"]);
    let (text, code) = Plan::shell("true").with(|config| config.process.user = "bob".into()).fails();
    assert!(code == 125 && text.contains("no user \"bob\""), "{text}");
}

#[test]
fn capabilities_are_those_asked_for() {
    if !can_run() {
        return;
    }
    let sets = |change: fn(&mut rvmm::container::config::ContainerConfig)| {
        let end = Plan::shell("grep -E 'Cap|NoNew' /proc/self/status").with(change).run();
        let value = |name: &str| {
            let line = end.stdout.lines().find(|line| line.starts_with(name)).expect(name);
            u64::from_str_radix(line.split('\t').nth(1).unwrap(), 16).unwrap()
        };
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"].map(value)
    };
    let default = 0xa804_25fb;
    assert_eq!(sets(|_| {}), [0, default, default, default, 0, 0]);
    assert_eq!(sets(|config| config.process.user = "ann".into()), [0, 0, 0, default, 0, 0]);
    assert_eq!(sets(|config| config.security.cap_drop = vec!["ALL".into()]), [0; 6]);
    let admin = default | 1 << 12;
    assert_eq!(
        sets(|config| config.security.cap_add = vec!["NET_ADMIN".into()]),
        [0, admin, admin, admin, 0, 0]
    );
    let alone = sets(|config| config.security.no_new_privileges = true);
    assert_eq!(alone, [0, default, default, default, 0, 1]);
}

#[test]
fn filter_is_in_force_for_the_first_process_and_for_exec() {
    if !can_run() {
        return;
    }
    let mut container = Plan::shell("unshare -m true; echo $?; grep Seccomp: /proc/self/status; read x")
        .with(|config| {
            config.process.stdin = true;
            // With the capability it is the filter alone that says no; the default one would allow it then.
            config.security.cap_add = vec!["NET_ADMIN".into()];
        })
        .start();
    container.expect(0, "1\nSeccomp:\t2\n");
    let end = container.exec_shell("grep Seccomp: /proc/self/status; unshare -m true");
    assert_eq!((end.code, end.stdout.as_str()), (1, "Seccomp:\t2\n"));
    container.ask(json!({ "close": 0 }));
    container.wait(0);
    container.delete();

    let unconfined = Plan::shell("grep Seccomp: /proc/self/status")
        .with(|config| config.security.seccomp = Seccomp::Unconfined)
        .run();
    assert_eq!(unconfined.stdout, "Seccomp:\t0\n");

    let plan = Plan::shell("mkdir /x; echo $?; chmod 700 /etc; echo $?");
    let profile = plan.path().join("profile.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#;
    fs::write(&profile, text).unwrap();
    let end = plan.with(|config| config.security.seccomp = Seccomp::File(profile)).run();
    assert_eq!(end.stdout, "1\n0\n");
    assert!(end.stderr.contains("Operation not permitted"), "{}", end.stderr);
}

#[test]
fn kernel_file_systems_are_masked_unless_privileged() {
    if !can_run() {
        return;
    }
    let look = "wc -c </proc/timer_list; ls /sys/firmware | wc -l; echo 1 >/proc/sys/vm/swappiness; echo $?; \
                mkdir /sys/fs/cgroup/memory/x; echo $?; echo $$ >/proc/sys/kernel/ns_last_pid; echo $?";
    let end = Plan::shell(look).run();
    assert_eq!(end.stdout, "0\n0\n1\n1\n1\n", "{}", end.stderr);
    let privileged = Plan::shell("head -c1 /proc/timer_list | wc -c; \
                                  test -w /proc/sys/kernel/hostname; echo $?; mount -t tmpfs x /tmp; echo $?; ls /dev | wc -l")
    .with(|config| config.security.privileged = true)
    .run();
    assert!(privileged.stdout.starts_with("1\n0\n0\n"), "{privileged:?}");
}

#[test]
fn root_file_system_may_be_read_only_and_writes_stay_in_the_upper_directory() {
    if !can_run() {
        return;
    }
    let end = Plan::shell("touch /x; echo $?; touch /dev/shm/x; echo $?")
        .with(|config| config.read_only = true)
        .run();
    assert_eq!(end.stdout, "1\n0\n");
    let mut container = Plan::shell("echo new >/file; rm /etc/group; mkdir /d")
        .with(|config| config.auto_remove = false)
        .start();
    container.wait(0);
    assert_eq!(fs::read_to_string(container.path().join("rw/upper/file")).unwrap(), "new\n");
    container.delete();
    assert!(container.path().join("rw/upper/d").is_dir());
}

#[test]
fn many_layers_are_stacked() {
    if !can_run() {
        return;
    }
    let mut plan = Plan::shell("cat /top /level-100; ls / | grep -c level");
    for level in 0..200 {
        // Long names, as digests are.
        let layer = plan.path().join(format!("{level:0>120}"));
        fs::create_dir(&layer).unwrap();
        fs::write(layer.join("top"), format!("{level}\n")).unwrap();
        fs::write(layer.join(format!("level-{level}")), format!("level {level}\n")).unwrap();
        plan.layers.push(layer);
    }
    let end = plan.run();
    assert_eq!((end.code, end.stdout.as_str()), (0, "199\nlevel 100\n200\n"));
}

#[test]
fn mounts_of_the_user_are_there() {
    if !can_run() {
        return;
    }
    let mut plan = Plan::shell(
        "cat /data/file /data/inner/file; echo changed >/data/file; touch /ro/x; echo $?; \
         grep ' /scratch ' /proc/mounts; stat -c %a /scratch; cat /one",
    );
    let (data, inner, volume) =
        (plan.path().join("data"), plan.path().join("inner"), plan.path().join("volume"));
    for (directory, text) in [(&data, "outer\n"), (&inner, "inner\n"), (&volume, "volume\n")] {
        fs::create_dir(directory).unwrap();
        fs::write(directory.join("file"), text).unwrap();
    }
    plan.volumes.insert("named".into(), volume.clone());
    let mount = |source, target: &str, read_only| Mount { source, target: target.into(), read_only };
    let bind = |path: &std::path::Path| MountSource::Bind { path: path.into(), propagation: None };
    let end = plan
        .with(|config| {
            let tmpfs = MountSource::Tmpfs { size_bytes: Some(1 << 20), mode: Some(0o750), options: vec![] };
            config.mounts = vec![
                mount(bind(&inner), "/data/inner", false),
                mount(bind(&data), "/data", false),
                mount(MountSource::Volume { name: "named".into(), copy: false }, "/ro", true),
                mount(tmpfs, "/scratch", false),
                mount(bind(&inner.join("file")), "/one", true),
            ];
        })
        .run();
    let lines: Vec<&str> = end.stdout.lines().collect();
    assert_eq!(lines[..3], ["outer", "inner", "1"], "{end:?}");
    assert!(
        lines[3].contains("tmpfs rw,nosuid,nodev,noexec") && lines[3].contains("size=1024k"),
        "{}",
        lines[3]
    );
    assert_eq!(lines[4..], ["750", "inner"]);
}

#[test]
fn mounts_of_a_volume_come_through_only_where_that_was_asked_for() {
    if !can_run() {
        return;
    }
    for (propagation, visible) in [(None, false), (Some("rslave"), true)] {
        let plan = Plan::shell("read x; ls /data/later");
        let data = plan.path().join("data");
        fs::create_dir_all(data.join("later")).unwrap();
        let host = plan.path().join("host");
        fs::create_dir(&host).unwrap();
        // A mount of its own that is shared, as a host's root is.
        let run = |arguments: &[&str]| crate::support::tool("mount", arguments);
        run(&["--bind", data.to_str().unwrap(), data.to_str().unwrap()]);
        run(&["--make-shared", data.to_str().unwrap()]);
        let source = MountSource::Bind { path: data.clone(), propagation: propagation.map(str::to_owned) };
        let mut container = plan
            .with(|config| {
                config.process.stdin = true;
                config.mounts = vec![Mount { source, target: "/data".into(), read_only: false }];
            })
            .start();
        run(&["-t", "tmpfs", "late", data.join("later").to_str().unwrap()]);
        fs::write(data.join("later/file"), "").unwrap();
        container.ask(json!({ "write": [0, "\n"] }));
        let end = container.wait(0);
        crate::support::tool("umount", &["-R", data.to_str().unwrap()]);
        container.delete();
        assert_eq!(end.stdout == "file\n", visible, "{propagation:?}: {end:?}");
    }
}

#[test]
fn devices_are_there_and_no_others_can_be_used() {
    if !can_run() {
        return;
    }
    let others = "mknod /sda b 8 0; cat /sda; mknod /kmsg c 1 11; head -c1 /kmsg; head -c2 /dev/zero | wc -c; \
                  echo x >/dev/null; head -c1 /dev/urandom | wc -c; ls /dev/null2";
    let end = Plan::shell(others).run();
    assert_eq!(end.stdout, "2\n1\n");
    assert_eq!(end.stderr.matches("Operation not permitted").count(), 2, "{}", end.stderr);

    let device = |host: &str, container: &str, access: &str| Device {
        host: host.into(),
        container: container.into(),
        access: access.into(),
    };
    let end = Plan::shell("head -c2 /dev/nothing | wc -c; head -c1 /dev/log >/dev/null; echo x >/dev/log")
        .with(|config| {
            config.devices =
                vec![device("/dev/zero", "/dev/nothing", "rw"), device("/dev/kmsg", "/dev/log", "r")]
        })
        .run();
    assert_eq!(end.stdout, "2\n");
    assert!(end.stderr.contains("can't create /dev/log: Operation not permitted"), "{}", end.stderr);
}

#[test]
fn resource_limits_are_set_and_impossible_ones_explained() {
    if !can_run() {
        return;
    }
    let limit = |name: &str, soft, hard| Rlimit { name: name.into(), soft, hard };
    let end = Plan::shell("ulimit -n; ulimit -Hn; ulimit -c")
        .with(|config| config.process.rlimits = vec![limit("nofile", 100, 200), limit("CORE", 0, 0)])
        .run();
    assert_eq!(end.stdout, "100\n200\n0\n");
    if !rvmm::container::spec::available_capabilities().has("SYS_RESOURCE") {
        let plan = Plan::shell("true")
            .with(|config| config.process.rlimits = vec![limit("NOFILE", 1 << 30, 1 << 30)]);
        let (text, code) = plan.fails();
        assert!(code == 125 && text.contains("NOFILE") && text.contains("SYS_RESOURCE"), "{text}");
    }
}

#[test]
fn kernel_parameters_are_the_containers_own() {
    if !can_run() {
        return;
    }
    let end = Plan::shell("cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ip_forward")
        .with(|config| {
            config.sysctls.insert("kernel.shmmni".into(), "77".into());
            config.sysctls.insert("net.ipv4.ip_forward".into(), "1".into());
        })
        .run();
    assert_eq!(end.stdout, "77\n0\n1\n", "{}", end.stderr);
}

#[test]
fn secrets_are_files_in_memory_with_their_owners() {
    if !can_run() {
        return;
    }
    let plan = Plan::shell(
        "cat /run/secrets/key; stat -c '%u %g %a' /run/secrets/key; touch /run/secrets/x; echo $?",
    );
    let source = plan.path().join("source");
    fs::write(&source, "hidden\n").unwrap();
    let secret = Secret { name: "key".into(), source, uid: 1000, gid: 29, mode: 0o440 };
    let end = plan
        .with(|config| {
            config.secrets = vec![secret];
            config.process.user = "ann".into();
        })
        .run();
    assert_eq!(end.stdout, "hidden\n1000 29 440\n1\n", "{}", end.stderr);
}

#[test]
fn network_is_the_hosts_or_only_a_loopback() {
    if !can_run() {
        return;
    }
    assert_eq!(Plan::shell("ls /sys/class/net").run().stdout, "lo\n");
    let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
    let mut plan =
        Plan::shell("stat -Lc %i /proc/self/ns/net").with(|config| config.network.mode = NetworkMode::Host);
    plan.host_network = true;
    assert_eq!(plan.run().stdout.trim(), own.to_string());
}

#[test]
fn shared_memory_has_its_size() {
    if !can_run() {
        return;
    }
    let end =
        Plan::shell("df -k /dev/shm | tail -1").with(|config| config.limits.shm_bytes = Some(8 << 20)).run();
    assert!(end.stdout.contains(" 8192 "), "{}", end.stdout);
}
