//! Mounts: those of every container, the files that the engine writes for it, and the user's.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};

use super::{Error, Inputs};
use crate::container::config::{self, MountSource};

/// Size of `/dev/shm` unless the user says another.
const SHM_BYTES: u64 = 64 << 20;
/// Where secrets are.
const SECRETS: &str = "/run/secrets";
/// Where no mount may be put: it would hide what the container is made of.
const RESERVED: [&str; 2] = ["/", "/proc"];

/// All mounts, in the order in which they are made.
pub fn of_container(inputs: &Inputs) -> Result<Vec<Mount>, Error> {
    let mut asked: Vec<(PathBuf, Mount)> = vec![];
    for mount in &inputs.config.mounts {
        let target = target(&mount.target)?;
        asked.push((target.clone(), user_mount(inputs, mount, target)?));
    }
    // One on top of another hides it, so the shallow ones come first; of two at one place the later one wins.
    asked.sort_by_key(|(target, _)| target.components().count());
    let taken: BTreeSet<PathBuf> = asked.iter().map(|(target, _)| target.clone()).collect();

    let mut mounts = standard(inputs)?;
    mounts.extend(written_files(inputs)?);
    mounts.retain(|mount| !taken.contains(mount.destination()));
    mounts.extend(asked.into_iter().map(|(_, mount)| mount));
    Ok(mounts)
}

fn mount<S: Into<String>>(
    kind: &str,
    source: impl Into<PathBuf>,
    target: impl Into<PathBuf>,
    options: impl IntoIterator<Item = S>,
) -> Result<Mount, Error> {
    let builder = MountBuilder::default().typ(kind).source(source).destination(target);
    let options: Vec<String> = options.into_iter().map(Into::into).collect();
    builder.options(options).build().map_err(Error::Oci)
}

fn standard(inputs: &Inputs) -> Result<Vec<Mount>, Error> {
    let config = inputs.config;
    let hard = ["nosuid", "noexec", "nodev"];
    let shm = config.limits.shm_bytes.unwrap_or(SHM_BYTES);
    let shm = format!("size={shm}");
    let ro: &[&str] = if config.security.privileged { &[] } else { &["ro"] };
    Ok(vec![
        mount("proc", "proc", "/proc", hard)?,
        mount("tmpfs", "tmpfs", "/dev", ["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "devpts",
            "devpts",
            "/dev/pts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("sysfs", "sysfs", "/sys", [&hard, ro].concat())?,
        mount("cgroup", "cgroup", "/sys/fs/cgroup", [&hard, ro].concat())?,
        mount("mqueue", "mqueue", "/dev/mqueue", hard)?,
        mount("tmpfs", "shm", "/dev/shm", [&hard[..], &["mode=1777", &shm]].concat())?,
    ])
}

/// Files and directories that the engine writes for this container.
fn written_files(inputs: &Inputs) -> Result<Vec<Mount>, Error> {
    let mut mounts = vec![];
    let files = [
        (&inputs.resolv_conf, "/etc/resolv.conf"),
        (&inputs.hostname_file, "/etc/hostname"),
        (&inputs.hosts, "/etc/hosts"),
    ];
    for (source, target) in files {
        if let Some(source) = source {
            mounts.push(mount("bind", source, target, ["rbind", "rprivate"])?);
        }
    }
    if !inputs.config.secrets.is_empty() {
        for secret in &inputs.config.secrets {
            let mut parts = Path::new(&secret.name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(Error::SecretName { name: secret.name.clone() });
            }
        }
        let source = inputs.secrets.clone().ok_or(Error::NoSecretsDirectory)?;
        mounts.push(mount(
            "bind",
            source,
            SECRETS,
            ["rbind", "rprivate", "ro", "nosuid", "nodev", "noexec"],
        )?);
    }
    Ok(mounts)
}

fn user_mount(inputs: &Inputs, asked: &config::Mount, target: PathBuf) -> Result<Mount, Error> {
    match &asked.source {
        MountSource::Bind { path, propagation } => {
            if !path.is_absolute() {
                return Err(Error::SourceRelative { path: path.clone() });
            }
            bind(path.clone(), target, propagation.as_deref().unwrap_or("rprivate"), asked.read_only)
        }
        MountSource::Volume { name, .. } => {
            let path = inputs.volumes.get(name).ok_or_else(|| Error::NoVolume { name: name.clone() })?;
            bind(path.clone(), target, "rprivate", asked.read_only)
        }
        MountSource::Tmpfs { size_bytes, mode, options } => {
            let mut all = tmpfs_options(options);
            all.extend(size_bytes.map(|bytes| format!("size={bytes}")));
            all.push(format!("mode={:o}", mode.unwrap_or(0o1777)));
            if asked.read_only {
                all.push("ro".into());
            }
            mount("tmpfs", "tmpfs", target, all)
        }
    }
}

fn bind(source: PathBuf, target: PathBuf, propagation: &str, read_only: bool) -> Result<Mount, Error> {
    if !["private", "rprivate", "shared", "rshared", "slave", "rslave"].contains(&propagation) {
        return Err(Error::Propagation { name: propagation.into() });
    }
    // `rro` also makes what is mounted below it read-only, which `ro` alone does not.
    let read_only: &[&str] = if read_only { &["ro", "rro"] } else { &[] };
    mount("bind", source, target, [&["rbind", propagation], read_only].concat())
}

/// Docker's options for memory file systems, changed by the user's.
fn tmpfs_options(user: &[String]) -> Vec<String> {
    let mut options: Vec<String> = ["noexec", "nosuid", "nodev"].map(str::to_owned).into();
    for option in user {
        let opposite = match option.strip_prefix("no") {
            Some(positive) => positive.to_owned(),
            None => format!("no{option}"),
        };
        options.retain(|earlier| *earlier != opposite && earlier != option);
        options.push(option.clone());
    }
    options
}

/// A target without `.`, `..` and doubled slashes.
fn target(path: &Path) -> Result<PathBuf, Error> {
    let bad = |why: &'static str| Error::Target { path: path.into(), why };
    if !path.is_absolute() {
        return Err(bad("it is not absolute"));
    }
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    if RESERVED.iter().any(|reserved| clean == Path::new(reserved)) || clean.starts_with("/proc") {
        return Err(bad("the container's own file systems are there"));
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_cleaned_and_reserved_ones_refused() {
        assert_eq!(target(Path::new("//a/./b/../c/")).unwrap(), Path::new("/a/c"));
        for bad in ["a", "/", "/a/..", "/proc", "/proc/sys", "/../proc"] {
            assert!(target(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_of_memory_file_systems_replace_their_opposites() {
        let of = |options: &[&str]| {
            tmpfs_options(&options.iter().map(|option| (*option).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&[]), ["noexec", "nosuid", "nodev"]);
        assert_eq!(of(&["exec", "uid=7"]), ["nosuid", "nodev", "exec", "uid=7"]);
        assert_eq!(of(&["nodev"]), ["noexec", "nosuid", "nodev"]);
    }
}
