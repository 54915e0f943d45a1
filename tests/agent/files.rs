//! Root file systems, mounts and copies.

use std::fs;
use std::io::Read;

use rvmm::guest::protocol::{ExitStatus, Failure};
use rvmm::guest::spec::*;

use super::rig::{Sandbox, failure, layer};

pub fn layers_hide_what_is_below(sandbox: &mut Sandbox) {
    let script = "cat /etc/below /etc/above; ls /etc/gone 2>/dev/null; ls /opaque; echo changed >/etc/below; cat /etc/below";
    let ended = sandbox.run_shell(script, |_| {});
    assert_eq!(ended.output(), "lowest\nhigher\nnew\nchanged");
    // The next container sees nothing of it.
    assert_eq!(sandbox.run_shell("cat /etc/below", |_| {}).output(), "lowest");
    // A layer alone, as a whole disk, which cannot be written to.
    let ended = sandbox.run_shell("cat /etc/gone; touch /x 2>/dev/null || echo refused", |spec| {
        let whole = Volume { disk: "whole".into(), partition: 0, kind: "erofs".into(), data: String::new() };
        spec.root = Root::Layers { lower: vec![whole], upper: Upper::None };
    });
    assert_eq!(ended.output(), "to be hidden\nrefused");
}

pub fn hundred_layers_are_one_root(sandbox: &mut Sandbox) {
    let ended = sandbox.run_shell("ls /many | wc -l; cat /etc/below", |spec| {
        spec.root =
            Root::Layers { lower: (1..=100).map(layer).collect(), upper: Upper::Memory(String::new()) };
    });
    assert_eq!(ended.output(), "98\nlowest");
    let process = sandbox.program(&["true"]);
    let mut spec = sandbox.container(process);
    spec.root = Root::Layers { lower: vec![layer(101)], upper: Upper::None };
    let refused = failure(sandbox.client.create(spec.clone()));
    assert_eq!(refused, Failure::NoDisk { disk: "layers".into(), partition: 101 });
    spec.root = Root::Layers { lower: vec![], upper: Upper::None };
    assert!(matches!(failure(sandbox.client.create(spec)), Failure::Invalid(_)));
}

pub fn disk_keeps_what_is_written(sandbox: &mut Sandbox) {
    let on_disk = |spec: &mut ContainerSpec| {
        let disk = Volume { disk: "rw".into(), partition: 0, kind: "ext4".into(), data: String::new() };
        spec.root = Root::Layers { lower: vec![layer(1), layer(2)], upper: Upper::Volume(disk) };
    };
    sandbox.run_shell("echo kept >/root/file; rm /etc/below; stat -c %a /", on_disk).output();
    let ended = sandbox.run_shell("cat /root/file; ls /etc/below 2>/dev/null; stat -c %a /", on_disk);
    assert_eq!(ended.output(), "kept\n755");
    sandbox.client.sync().unwrap();
}

fn mount(source: Source, target: &str, flags: u64) -> Mount {
    Mount { source, target: target.into(), flags, propagation: 0 }
}

pub fn mounts_of_every_kind(sandbox: &mut Sandbox) {
    sandbox.client.mount_share("share").unwrap();
    sandbox.client.mount_share("share").unwrap();
    let file = |text: &str, mode| Source::File { contents: text.into(), mode, uid: 33, gid: 34 };
    let memory = || Source::Memory { name: "shm".into(), data: "size=1m,mode=1777".into() };
    let mounts = vec![
        mount(Source::Share { path: "folder".into() }, "/mnt/deep/folder", 0),
        mount(Source::Share { path: "folder/file".into() }, "/etc/one", libc::MS_RDONLY),
        mount(file("hello\n", 0o640), "/etc/new/file", 0),
        mount(file("resolver\n", 0o644), "/etc/resolv.conf", 0),
        mount(memory(), "/dev/shm", 0),
        mount(Source::Inside { path: "/etc".into() }, "/data", libc::MS_RDONLY),
        mount(Source::New { kind: "sysfs".into(), data: String::new() }, "/sys", libc::MS_RDONLY),
        mount(Source::New { kind: "cgroup2".into(), data: String::new() }, "/sys/fs/cgroup", libc::MS_RDONLY),
        mount(Source::New { kind: "mqueue".into(), data: String::new() }, "/dev/mqueue", 0),
        mount(Source::New { kind: "tmpfs".into(), data: "size=1m".into() }, "/scratch", libc::MS_NOEXEC),
        mount(Source::Volume(layer(2)), "/volume", libc::MS_RDONLY),
    ];
    let script = "cat /mnt/deep/folder/file /etc/one /etc/new/file /etc/resolv.conf /volume/etc/above; \
                  stat -c %u:%g:%a /etc/new/file; echo more >/mnt/deep/folder/from-guest; \
                  touch /etc/one 2>/dev/null || echo refused; touch /data/x 2>/dev/null || echo refused; \
                  echo kept >/dev/shm/file; cat /data/above; ls /sys/fs/cgroup/cgroup.procs; \
                  cat /proc/self/cgroup; grep -c ' /scratch tmpfs rw,noexec' /proc/mounts";
    let extend = |mounts: Vec<Mount>| move |spec: &mut ContainerSpec| spec.mounts.extend(mounts);
    let ended = sandbox.run_shell(script, extend(mounts));
    assert_eq!(
        ended.output(),
        "shared\nshared\nhello\nresolver\nhigher\n33:34:640\nrefused\nrefused\nhigher\n\
         /sys/fs/cgroup/cgroup.procs\n0::/\n1"
    );
    assert_eq!(fs::read_to_string(sandbox.share.join("folder/from-guest")).unwrap(), "more\n");
    // Memory of the sandbox outlives a container.
    let ended = sandbox.run_shell("cat /dev/shm/file", extend(vec![mount(memory(), "/dev/shm", 0)]));
    assert_eq!(ended.output(), "kept");
    // A root in the shared folder.
    let ended = sandbox.run_shell("cat /etc/below; echo x >/etc/written", |spec| {
        spec.root = Root::Share { path: "bundle".into() };
    });
    assert_eq!(ended.output(), "lowest");
    assert!(sandbox.share.join("bundle/etc/written").exists());
    // What is not there says so.
    let process = sandbox.program(&["true"]);
    let mut spec = sandbox.container(process);
    spec.mounts.push(mount(Source::Share { path: "nothing".into() }, "/x", 0));
    assert!(matches!(sandbox.start_fails(&spec), Failure::System { errno: libc::ENOENT, .. }));
    spec.mounts.pop();
    spec.mounts.push(mount(Source::New { kind: "nosuchfs".into(), data: String::new() }, "/x", 0));
    let refused = sandbox.start_fails(&spec).to_string();
    assert_eq!(refused, "cannot mount nosuchfs at /x: no such device");
}

pub fn archives_go_in_and_out(sandbox: &mut Sandbox) {
    let id = sandbox.idle();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o4751);
    header.set_uid(33);
    header.set_gid(34);
    header.set_mtime(1_000_000_000);
    archive.append_data(&mut header, "in/file", &b"bytes"[..]).unwrap();
    let bytes = archive.into_inner().unwrap();
    sandbox.client.write_archive(&id, "/data", &mut &*bytes).unwrap();
    let process =
        sandbox.shell("stat -c '%u:%g:%a:%Y' /data/in/file; cat /data/in/file; ln -s in /data/link");
    assert_eq!(sandbox.exec(&id, 1, process).output(), "33:34:4751:1000000000\nbytes");

    let mut packed = vec![];
    sandbox.client.read_archive(&id, "/data/in", &mut packed).unwrap();
    let mut names = vec![];
    for entry in tar::Archive::new(&*packed).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut contents = String::new();
        entry.read_to_string(&mut contents).unwrap();
        names.push((entry.path().unwrap().to_string_lossy().into_owned(), contents));
    }
    names.sort();
    assert_eq!(names, [("in/".into(), String::new()), ("in/file".into(), "bytes".into())]);

    let info = sandbox.client.stat_path(&id, "/data/link", false).unwrap();
    assert_eq!((info.mode & libc::S_IFMT, info.link.as_deref()), (libc::S_IFLNK, Some("in")));
    let info = sandbox.client.stat_path(&id, "/data/link", true).unwrap();
    assert_eq!((info.mode & libc::S_IFMT, info.link), (libc::S_IFDIR, None));
    assert!(matches!(
        failure(sandbox.client.stat_path(&id, "/nothing", true)),
        Failure::System { errno: libc::ENOENT, .. }
    ));
    assert!(matches!(
        failure(sandbox.client.read_archive(&id, "/nothing", &mut std::io::sink())),
        Failure::System { errno: libc::ENOENT, .. }
    ));
    assert!(matches!(
        failure(sandbox.client.write_archive(&id, "/etc/passwd", &mut &*bytes)),
        Failure::System { errno: libc::ENOTDIR, .. }
    ));
    assert!(matches!(
        failure(sandbox.client.write_archive("nobody", "/", &mut &*bytes)),
        Failure::NoContainer(_)
    ));
    // A link out of the container leads nowhere else.
    let mut evil = vec![];
    let refused = sandbox.client.read_archive(&id, "/evil/", &mut evil);
    assert!(refused.is_err() || !String::from_utf8_lossy(&evil).contains(&id));
    sandbox.remove(&id);

    // The same without a process.
    let process = sandbox.shell("cat /data/in/file");
    let spec = sandbox.container(process);
    sandbox.client.create(spec.clone()).unwrap();
    sandbox.client.write_archive(&spec.id, "/data", &mut &*bytes).unwrap();
    sandbox.client.start(&spec.id).unwrap();
    let streams = sandbox.open(&spec.process.stdio);
    let ended = sandbox.finish(&spec.id, 0, streams);
    assert_eq!((ended.status, ended.stdout.as_str()), (ExitStatus::Code(0), "bytes"));
    sandbox.client.delete(&spec.id, false).unwrap();
}
