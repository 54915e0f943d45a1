//! Changes to a `Spec` before libcontainer gets it: what it would make wrong of, and what cannot be had without root.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Process, Spec};
use rustix::mount::MountPropagationFlags;

use super::cgroup::Cgroup;
use super::{missing, rootless};
use crate::container::backend::Error;
use crate::container::config::Device;

/// What is left to do with a container's mounts when all of them are there.
#[derive(Default)]
pub(super) struct Afterwards {
    pub(super) propagation: Vec<(PathBuf, MountPropagationFlags)>,
    pub(super) read_only: Vec<PathBuf>,
}

/// Changes a `Spec` into what libcontainer makes right of.
pub(super) fn for_libcontainer(spec: &mut Spec, cgroup: &Cgroup) -> Result<Afterwards, Error> {
    let mut mounts = vec![];
    let mut afterwards = Afterwards::default();
    let mut shared = false;
    for mount in spec.mounts().clone().unwrap_or_default() {
        let has = |name: &str| mount.options().iter().flatten().any(|option| option == name);
        let target = mount.destination().clone();
        if has("shared") || has("rshared") {
            shared = true;
        } else if has("slave") || has("rslave") {
            let recursive =
                if has("rslave") { MountPropagationFlags::REC } else { MountPropagationFlags::empty() };
            afterwards.propagation.push((target, MountPropagationFlags::DOWNSTREAM | recursive));
        } else if mount.typ().as_deref() == Some("bind") {
            let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            afterwards.propagation.push((target, flags));
        }
        if mount.typ().as_deref() == Some("cgroup") && !cgroup.is_unified() {
            mounts.extend(v1_mounts(&mount, cgroup, has("ro"))?);
            if has("ro") {
                afterwards.read_only.push(mount.destination().clone());
            }
        } else {
            mounts.push(mount);
        }
    }
    let is_private =
        |(_, flags): &(PathBuf, MountPropagationFlags)| flags.contains(MountPropagationFlags::PRIVATE);
    let linux = spec.linux_mut().as_mut().ok_or_else(|| missing("linux section"))?;
    if linux.rootfs_propagation().is_none() {
        if shared {
            linux.set_rootfs_propagation(Some("shared".into()));
        } else if afterwards.propagation.iter().all(is_private) {
            // All that is mounted is private from the start, and nothing has to be set afterwards.
            linux.set_rootfs_propagation(Some("private".into()));
            afterwards.propagation.clear();
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(afterwards)
}

/// Without root there are only the users that the host has set aside.
pub(super) fn check_users(process: &Process) -> Result<(), Error> {
    let user = process.user();
    let groups = user.additional_gids().iter().flatten().copied().chain([user.gid()]);
    let missing = (!rootless::has_user(user.uid())).then(|| ("user", user.uid()));
    let missing = missing
        .or_else(|| groups.into_iter().find(|gid| !rootless::has_group(*gid)).map(|gid| ("group", gid)));
    missing.map_or(Ok(()), |(kind, id)| {
        let what = format!("there is no {kind} {id}: /etc/sub{}id sets none aside for you", &kind[..1]);
        Err(Error::Unsupported { what })
    })
}

/// Leaves out what only the host's root can do, or does it otherwise. `devices` are those that the user wants.
pub(super) fn for_users(spec: &mut Spec, devices: &[Device]) -> Result<(), Error> {
    mount_devices(spec, devices)?;
    let host_network = {
        let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        !list.into_iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::Network)
    };
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let mut options = mount.options().clone().unwrap_or_default();
        if mount.typ().as_deref() == Some("devpts") && !rootless::has_group(5) {
            options.retain(|option| option != "gid=5");
        }
        if mount.typ().as_deref() == Some("sysfs") && host_network {
            // A view of the host's network is not to be had anew.
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some("/sys".into()));
            options.extend(["rbind".to_owned(), "rprivate".to_owned(), "rro".to_owned()]);
        }
        mount.set_options(Some(options));
    }
    if let Some(sysctl) = spec.linux_mut().as_mut().and_then(|linux| linux.sysctl_mut().as_mut()) {
        // It names groups, and most are not there.
        sysctl.remove("net.ipv4.ping_group_range");
    }
    Ok(())
}

/// Mounts devices that have another name in the container. Nodes cannot be made, so libcontainer mounts what has the same
/// name on the host; and it does so with all others, too.
fn mount_devices(spec: &mut Spec, wanted: &[Device]) -> Result<(), Error> {
    let Some(nodes) = spec.linux_mut().as_mut().and_then(|linux| linux.devices_mut().as_mut()) else {
        return Ok(());
    };
    let mut mounts = vec![];
    for node in nodes.iter() {
        let within = |device: &&Device| node.path().starts_with(&device.container);
        let Some(device) = wanted.iter().rev().find(within) else { continue };
        let rest = node.path().strip_prefix(&device.container).unwrap_or(Path::new(""));
        let host = if rest.as_os_str().is_empty() { device.host.clone() } else { device.host.join(rest) };
        if host != *node.path() {
            let options = ["bind", "nosuid", "noexec"].map(str::to_owned).to_vec();
            let mount = MountBuilder::default().typ("bind").source(host).destination(node.path().clone());
            let failed = |source| Error::failed("cannot mount a device", source);
            mounts.push(mount.options(options).build().map_err(failed)?);
        }
    }
    nodes.retain(|node| mounts.iter().all(|mount: &Mount| mount.destination() != node.path()));
    spec.mounts_mut().get_or_insert_with(Vec::new).extend(mounts);
    Ok(())
}

/// What a container sees of control groups of version 1: its own, read-only unless it is privileged.
///
/// libcontainer would mount the hierarchies so that the container's root could raise its own limits.
fn v1_mounts(mount: &Mount, cgroup: &Cgroup, read_only: bool) -> Result<Vec<Mount>, Error> {
    let target = mount.destination();
    let build = |builder: MountBuilder| {
        builder.build().map_err(|source| Error::failed("cannot mount cgroups", source))
    };
    let hard = ["nosuid", "noexec", "nodev"].map(str::to_owned).to_vec();
    let mut options = hard.clone();
    options.push("mode=755".into());
    let base = MountBuilder::default().typ("tmpfs").source("tmpfs").destination(target.clone());
    let mut mounts = vec![build(base.options(options))?];
    for (name, directory) in cgroup.v1_mounts() {
        let mut options = [vec!["bind".to_owned()], hard.clone()].concat();
        options.extend(read_only.then(|| "ro".to_owned()));
        let one = MountBuilder::default().typ("bind").source(directory).destination(target.join(name));
        mounts.push(build(one.options(options))?);
    }
    Ok(mounts)
}
