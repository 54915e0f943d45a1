//! Hierarchies as hosts have them.

use super::*;

const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset,clone_children
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
99 31 0:31 / /mnt/cpuset rw,relatime - cgroup cgroup rw,cpuset
";

#[test]
fn hybrid_host_has_controllers_of_version_1_and_a_tree_of_version_2() {
    let found = Hierarchies::parse(HYBRID);
    let lists: Vec<String> = found.v1.iter().map(|one| one.controllers.join("+")).collect();
    assert_eq!(lists, ["cpu+cpuacct", "cpuset", "name=systemd"]);
    assert_eq!(found.v1[1].mount, Path::new("/sys/fs/cgroup/cpuset"));
    assert_eq!(found.v2.as_ref().unwrap().mount, Path::new("/sys/fs/cgroup/unified"));

    let cgroup = Cgroup::at(&found, Path::new("/rvmm/../x"));
    assert_eq!(cgroup.part("cpuacct").unwrap().directory, Path::new("/sys/fs/cgroup/cpu,cpuacct/rvmm/x"));
    assert!(!cgroup.is_unified());
    let names: Vec<String> = cgroup.v1_mounts().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["cpu", "cpuacct", "cpuset", "systemd"]);
}

#[test]
fn unified_host_has_version_2_alone() {
    let found = Hierarchies::parse("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n");
    assert!(found.v1.is_empty());
    assert!(Cgroup::at(&found, Path::new("/rvmm/x")).is_unified());
}

#[test]
fn no_path_is_no_group_and_never_the_root() {
    let found = Hierarchies::parse(HYBRID);
    assert!(Cgroup::at(&found, Path::new("/")).parts.is_empty());
    assert!(Cgroup::at(&found, Path::new("..")).parts.is_empty());
    assert!(Cgroup::at(&Hierarchies::parse("rubbish\n - \n"), Path::new("/x")).parts.is_empty());
}
