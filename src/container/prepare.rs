//! What goes before a container's start, what is taken away after its end, and how others reach it in between.
//!
//! Everything that is made here is taken away by [`clear`], whoever calls it and however far [`prepare`] came: a killed
//! supervisor's container is cleared by the next command.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::backend::{self, Backend, Bundle};
use super::config::{ContainerConfig, Isolation, MountSource, NetworkMode};
use super::files;
use super::microvm::template::{self, Templates};
use super::microvm::{self, Microvm, Place};
use super::native::{self, Native};
use super::network::{self, Attachment, Networks, netns};
use super::records::{self, Record, Records, short};
use super::roots::run_name;
use super::spec::{self, Inputs, NetworkNamespace, Users};
use super::state::Endpoint;
use super::volume::{self, Volumes};
use crate::image::store::{Image, Store};
use crate::image::{self, digest};

/// A microVM's kernel, for the choice of system calls that a filter allows: that of `scripts/build-kernel`.
const GUEST_KERNEL: (u32, u32) = (6, 1);
/// The one queue pair of a microVM's network devices.
const TAP_QUEUES: u16 = 1;

/// Why a container could not be prepared or cleared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Images.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// Networks.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// Volumes.
    #[error(transparent)]
    Volume(#[from] volume::Error),
    /// The specification.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The container.
    #[error(transparent)]
    Backend(#[from] backend::Error),
    /// Directories.
    #[error(transparent)]
    Records(#[from] records::Error),
    /// Templates of microVMs.
    #[error(transparent)]
    Template(#[from] template::Error),
    /// Files.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The other container of `--network container:…`.
    #[error("container {id}, whose network this one is to share, {why}", id = short(.id))]
    OtherContainer {
        /// The other container.
        id: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A combination that cannot be.
    #[error("{0}")]
    Impossible(&'static str),
}

/// A container that can be made.
pub struct Prepared {
    /// What makes it.
    pub backend: Box<dyn Backend>,
    /// What it is made from.
    pub bundle: Bundle,
    /// Its places on networks.
    pub endpoints: Vec<Endpoint>,
    /// Its published ports.
    pub ports: Vec<super::config::Port>,
    /// Holds ports of the host as long as it lives.
    pub attachment: Option<Attachment>,
}

/// Where a container's network is.
enum Namespace {
    Own(PathBuf),
    Others { sandbox: PathBuf, netns: Option<PathBuf> },
    Host,
    None,
}

/// Prepares a container: its image, network, volumes and files, and its specification.
pub fn prepare(records: &Records, config: &ContainerConfig) -> Result<Prepared, Error> {
    let roots = records.roots();
    let run = roots.container_run(&config.id);
    let store = Store::open(&roots.images())?;
    let image = store.image(&parsed(&config.image_id)?)?;
    let layers = store.layer_dirs(&image)?;

    let namespace = namespace(records, config)?;
    let attachment = match &namespace {
        Namespace::Own(path) if matches!(config.network.mode, NetworkMode::Networks(_)) => {
            let networks = Networks::new(&roots.data, &roots.run);
            let (id, name) = (config.id.as_str(), config.name.as_str());
            let guest = config.isolation == Isolation::Microvm;
            let network = &config.network;
            Some(networks.setup(&network::Request { id, name, netns: path, network, guest })?)
        }
        _ => None,
    };
    let empty = network::Status::default();
    let status = attachment.as_ref().map_or(&empty, |attachment| &attachment.status);

    let hostname = spec::hostname(config)?;
    let resolv_conf = network::resolv_conf(&config.network, status, &network::host_resolv_conf());
    let hosts = match &config.network.mode {
        NetworkMode::Host => fs::read_to_string("/etc/hosts").unwrap_or_default(),
        _ => String::new(),
    };
    let hosts = network::hosts(&config.network, status, &hostname, &hosts);
    let file = |name: &str, text: &str| -> Result<Option<PathBuf>, Error> {
        let path = run.join(name);
        files::write(&path, text.as_bytes(), 0o644)?;
        Ok(Some(path))
    };
    let volumes = volumes(records, config, &layers)?;
    let users = Users::in_layers(&with_upper(records, config, &layers))?;
    let native = config.isolation == Isolation::Native;
    let spec = spec::build(&Inputs {
        config,
        users: &users,
        rootfs: &run.join("rootfs"),
        network: match &namespace {
            Namespace::Own(path) => NetworkNamespace::Path(path.clone()),
            Namespace::Others { netns: Some(path), .. } => NetworkNamespace::Path(path.clone()),
            Namespace::Host => NetworkNamespace::Host,
            Namespace::None | Namespace::Others { netns: None, .. } => NetworkNamespace::New,
        },
        resolv_conf: file("resolv.conf", &resolv_conf)?,
        hosts: file("hosts", &hosts)?,
        hostname_file: file("hostname", &format!("{hostname}\n"))?,
        volumes: &volumes,
        secrets: Some(Native::secrets_directory(&run)),
        cgroup: match config.isolation {
            Isolation::Native => native::cgroup_path(&config.id),
            Isolation::Microvm => Path::new("/rvmm").join(&config.id),
        },
        available: available(config),
        kernel: if native { spec::kernel_version() } else { GUEST_KERNEL },
    })?;
    // For whoever adds a process later.
    files::write_json(&run.join("spec.json"), &spec)?;

    let backend: Box<dyn Backend> = match config.isolation {
        Isolation::Native => Box::new(Native::new(&run).keep_filters_in(&filters(records)?)),
        Isolation::Microvm => {
            // The guest sees the host's copy, in memory, by its share; `clear` takes it away as it does natively.
            if !config.secrets.is_empty() {
                native::copy_secrets(&config.secrets, &Native::secrets_directory(&run))?;
            }
            let place = place(records, config, &namespace, status, &store, &image)?;
            Box::new(Microvm::new(&config.id, place))
        }
    };
    let joins_other = matches!(namespace, Namespace::Others { .. });
    let bundle = Bundle {
        dir: run.clone(),
        spec,
        rootfs: run.join("rootfs"),
        // A microVM of its own puts the layers together itself.
        layers: if native || joins_other { layers } else { vec![] },
        writable: roots.container(&config.id).join("rw"),
        config: config.clone(),
    };
    if !native && joins_other {
        native::mount_rootfs(&bundle)?;
    }
    let endpoints = status.interfaces.iter().map(endpoint).collect();
    let ports = status.ports.clone();
    Ok(Prepared { backend, bundle, endpoints, ports, attachment })
}

fn endpoint(interface: &network::Interface) -> Endpoint {
    Endpoint {
        network: interface.network.clone(),
        interface: interface.name.clone(),
        mac: interface.mac.clone(),
        addresses: interface.addresses.iter().map(|net| (net.addr(), net.prefix_len())).collect(),
        gateway: interface.gateway(),
    }
}

/// The layers, and what the container has written, where the host sees it.
fn with_upper(records: &Records, config: &ContainerConfig, layers: &[PathBuf]) -> Vec<PathBuf> {
    let upper = records.roots().container(&config.id).join("rw/upper");
    layers.iter().cloned().chain(upper.is_dir().then_some(upper)).collect()
}

fn namespace(records: &Records, config: &ContainerConfig) -> Result<Namespace, Error> {
    let roots = records.roots();
    let microvm = config.isolation == Isolation::Microvm;
    match &config.network.mode {
        NetworkMode::None if microvm => Ok(Namespace::None),
        NetworkMode::Host if microvm => Err(Error::Impossible(
            "--network host is not for microVMs: a guest has network devices of its own, so it cannot be in the host's network",
        )),
        NetworkMode::Host => Ok(Namespace::Host),
        // Natively also one without networks: its loopback device is to be up.
        NetworkMode::Networks(_) | NetworkMode::None => {
            let sandbox = roots.sandbox(&config.id);
            files::make_directory(&sandbox)?;
            let path = sandbox.join("netns");
            netns::delete(&path)?;
            netns::create(&path)?;
            Ok(Namespace::Own(path))
        }
        NetworkMode::Container(id) => {
            let other = |why| Error::OtherContainer { id: id.clone(), why };
            let record = records.read(id).map_err(|_| other("is not there"))?;
            if !record.state.status.is_live() {
                return Err(other("is not running"));
            }
            if record.config.isolation != config.isolation {
                return Err(other("has another isolation, and so another kernel's network"));
            }
            if matches!(record.config.network.mode, NetworkMode::Container(_)) {
                return Err(other("shares another's network itself: name that container"));
            }
            let sandbox = roots.sandbox(id);
            let path = sandbox.join("netns");
            let netns = match record.state.pid {
                _ if netns::exists(&path) => Some(path),
                // One without networks has a namespace all the same.
                Some(pid) if !microvm => Some(PathBuf::from(format!("/proc/{pid}/ns/net"))),
                _ => None,
            };
            Ok(Namespace::Others { sandbox, netns })
        }
    }
}

fn place(
    records: &Records,
    config: &ContainerConfig,
    namespace: &Namespace,
    status: &network::Status,
    store: &Store,
    image: &Image,
) -> Result<Place, Error> {
    let roots = records.roots();
    let mut interfaces = vec![];
    let (sandbox, netns, own) = match namespace {
        Namespace::Others { sandbox, .. } => (sandbox.clone(), None, false),
        Namespace::Own(path) => {
            for interface in &status.interfaces {
                let plug = network::plug_tap(path, interface, TAP_QUEUES)?;
                interfaces.push((interface.clone(), plug));
            }
            (roots.sandbox(&config.id), Some(path.clone()), true)
        }
        Namespace::Host | Namespace::None => (roots.sandbox(&config.id), None, true),
    };
    let layers = if own { store.layer_disks(image)? } else { vec![] };
    let writable = roots.container(&config.id).join("disk.img");
    let templates = Templates::new(roots);
    Ok(Place { sandbox, own, netns, interfaces, layers, writable, templates })
}

/// The container's volumes, made and filled if they are new.
fn volumes(
    records: &Records,
    config: &ContainerConfig,
    layers: &[PathBuf],
) -> Result<BTreeMap<String, PathBuf>, Error> {
    let volumes = Volumes::new(&records.roots().data);
    let mut found = BTreeMap::new();
    for mount in &config.mounts {
        let MountSource::Volume { name, copy } = &mount.source else { continue };
        volumes.acquire(Some(name), &config.id)?;
        let data = volumes.data(name);
        if *copy && is_empty(&data) {
            fill(records, config, &volumes, name, &mount.target, layers)?;
        }
        found.insert(name.clone(), data);
    }
    Ok(found)
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

/// Fills a new volume from the image, which is put together for that.
fn fill(
    records: &Records,
    config: &ContainerConfig,
    volumes: &Volumes,
    name: &str,
    target: &Path,
    layers: &[PathBuf],
) -> Result<(), Error> {
    let root = records.roots().container_run(&config.id).join("image");
    let scratch = records.roots().container_run(&config.id).join("scratch");
    native::mount_layers(layers, &scratch, &root)?;
    let filled = volumes.fill(name, &root, target);
    native::unmount(&root)?;
    files::remove_tree(&scratch)?;
    filled?;
    Ok(())
}

/// Where compiled filters are kept, since compiling one takes longer than the rest of a start.
fn filters(records: &Records) -> Result<PathBuf, Error> {
    let place = records.roots().run.join("filters");
    files::make_directory(&place)?;
    Ok(place)
}

fn parsed(digest: &str) -> Result<digest::Digest, image::Error> {
    digest.parse().map_err(|_| image::Error::NotFound(digest.into()))
}

/// The users of a container that runs, for a further process.
fn users(records: &Records, config: &ContainerConfig) -> Result<Users, Error> {
    let store = Store::open(&records.roots().images())?;
    let image = store.image(&parsed(&config.image_id)?)?;
    let layers = store.layer_dirs(&image)?;
    Ok(Users::in_layers(&with_upper(records, config, &layers))?)
}

/// A process that is added to a container, in its environment and as its user where `process` says nothing else.
pub fn exec_process(
    records: &Records,
    record: &Record,
    process: &super::config::Process,
    privileged: bool,
) -> Result<oci_spec::runtime::Process, Error> {
    let users = users(records, &record.config)?;
    let available = available(&record.config);
    Ok(spec::exec_process(&record.config, process, privileged, &users, available)?)
}

/// The process of a health check.
pub fn check_process(
    records: &Records,
    config: &ContainerConfig,
    args: Vec<String>,
) -> Result<oci_spec::runtime::Process, Error> {
    let process = super::config::Process { args, ..Default::default() };
    Ok(spec::exec_process(config, &process, false, &users(records, config)?, available(config))?)
}

fn available(config: &ContainerConfig) -> spec::CapabilitySet {
    match config.isolation {
        Isolation::Native => spec::available_capabilities(),
        Isolation::Microvm => spec::CapabilitySet::all(),
    }
}

/// A container that runs, to be looked at or added to.
pub fn open(records: &Records, record: &Record) -> Result<Box<dyn Backend>, Error> {
    let roots = records.roots();
    let config = &record.config;
    let run = roots.container_run(&config.id);
    let spec: Spec = files::read_json(&run.join("spec.json"))?;
    Ok(match config.isolation {
        Isolation::Native => Box::new(Native::open(&run, spec)?),
        Isolation::Microvm => Box::new(open_microvm_with(records, config, spec)?),
    })
}

/// A container that runs in a microVM, for what only those can do.
pub fn open_microvm(records: &Records, config: &ContainerConfig) -> Result<Microvm, Error> {
    let spec: Spec = files::read_json(&records.roots().container_run(&config.id).join("spec.json"))?;
    open_microvm_with(records, config, spec)
}

fn open_microvm_with(records: &Records, config: &ContainerConfig, spec: Spec) -> Result<Microvm, Error> {
    let roots = records.roots();
    let (id, own) = match &config.network.mode {
        NetworkMode::Container(id) => (id, false),
        _ => (&config.id, true),
    };
    let place = Place {
        sandbox: roots.sandbox(id),
        own,
        netns: None,
        interfaces: vec![],
        layers: vec![],
        writable: PathBuf::new(),
        templates: Templates::new(roots),
    };
    Ok(Microvm::open(&config.id, place, spec)?)
}

/// The image that a container stands on, and its unpacked layers, the bottom one first.
pub fn image_of(records: &Records, config: &ContainerConfig) -> Result<(Store, Image, Vec<PathBuf>), Error> {
    let store = Store::open(&records.roots().images())?;
    let image = store.image(&parsed(&config.image_id)?)?;
    let layers = store.layer_dirs(&image)?;
    Ok((store, image, layers))
}

/// Whether a VM was started for a container and not taken away.
pub fn has_machine(records: &Records, id: &str) -> bool {
    records.roots().sandbox(id).join("monitor.json").exists()
}

/// Takes away what a container has left on the host, but not what it keeps: its configuration, log and writable layer.
/// What is not there is no error.
pub fn clear(records: &Records, config: &ContainerConfig) -> Result<(), Error> {
    let roots = records.roots();
    let run = roots.container_run(&config.id);
    let own = roots.sandbox(&config.id);
    if config.isolation == Isolation::Microvm {
        let sandbox = match &config.network.mode {
            NetworkMode::Container(id) => roots.sandbox(id),
            _ => own.clone(),
        };
        microvm::leave(&sandbox, &config.id)?;
        // Its supervisor may have been killed while it made a template.
        Templates::new(roots).sweep()?;
    }
    if run.is_dir() {
        if let Err(error) = Native::new(&run).delete() {
            // Its record is damaged, say; what it has is where every container has it.
            tracing::debug!("{}", crate::error_chain(&error));
            native::clear_away(&run, &native::cgroup_path(&config.id))?;
        }
        for name in ["image", "rootfs"] {
            native::unmount(&run.join(name))?;
        }
        files::remove_tree(&run.join("scratch"))?;
        for name in ["resolv.conf", "hosts", "hostname", "spec.json"] {
            let _ = fs::remove_file(run.join(name));
        }
    }
    Networks::new(&roots.data, &roots.run).teardown(&config.id)?;
    if own.is_dir() {
        netns::delete(&own.join("netns"))?;
        let _ = fs::remove_file(own.join("lock"));
        // Others may still be in it.
        let _ = fs::remove_dir(&own);
    }
    Ok(())
}

/// Forgets a container that was cleared, with all that it keeps but its volumes.
pub fn remove(records: &Records, config: &ContainerConfig) -> Result<(), Error> {
    let roots = records.roots();
    Volumes::new(&roots.data).release(&config.id, config.auto_remove)?;
    let store = Store::open(&roots.images())?;
    store.release(&parsed(&config.image_id)?, &config.id)?;
    Ok(records.remove(&config.id)?)
}

/// Takes away and forgets a container whose files cannot be read: what every container may have had is looked for. What
/// cannot be cleared is a warning where leaving it harms nobody, since nothing else would ever remove the container.
pub fn remove_damaged(records: &Records, id: &str) -> Result<(), Error> {
    let roots = records.roots();
    let warn = |error: &dyn std::error::Error| tracing::warn!("{}", crate::error_chain(error));
    let sandboxes = roots.run.join("sandboxes");
    let entries = fs::read_dir(&sandboxes).into_iter().flatten().flatten();
    let own = roots.sandbox(id);
    // It may have been in another container's.
    let joined = entries.map(|entry| entry.path()).filter(|place| place.join("users").join(id).exists());
    for sandbox in joined.collect::<Vec<_>>() {
        microvm::leave(&sandbox, id)?;
    }
    let run = roots.container_run(id);
    native::clear_away(&run, &native::cgroup_path(id))?;
    for name in ["image", "rootfs"] {
        native::unmount(&run.join(name))?;
    }
    if let Err(error) = Networks::new(&roots.data, &roots.run).teardown(id) {
        warn(&error);
    }
    if own.is_dir() {
        netns::delete(&own.join("netns"))?;
        if microvm::leave(&own, id)? {
            files::remove_tree(&own)?;
        }
    }
    if let Err(error) = Volumes::new(&roots.data).release(id, false) {
        warn(&error);
    }
    let store = Store::open(&roots.images())?;
    for image in store.images()? {
        store.release(&image.id, id)?;
    }
    Ok(records.remove(id)?)
}

/// Removes the volumes of a removed container that nobody has named, and nobody else uses.
pub fn remove_own_volumes(records: &Records, config: &ContainerConfig) -> Result<(), Error> {
    let volumes = Volumes::new(&records.roots().data);
    for mount in &config.mounts {
        if let MountSource::Volume { name, .. } = &mount.source
            && volumes.get(name)?.is_some_and(|volume| volume.anonymous)
            && volumes.users(name)?.is_empty()
        {
            volumes.remove(name)?;
        }
    }
    Ok(())
}

/// Takes away what is left of containers that are not there any more.
pub fn sweep(records: &Records) -> Result<(), Error> {
    records.sweep()?;
    let roots = records.roots();
    Templates::new(roots).sweep()?;
    let names = |place: &Path| -> Vec<String> {
        let entries = fs::read_dir(place).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let (containers, sandboxes) = (roots.run.join("containers"), roots.run.join("sandboxes"));
    let mut left = names(&containers);
    left.extend(names(&sandboxes));
    // Without one nobody holds anything, and looking must not make one.
    let store = roots.images().is_dir().then(|| Store::open(&roots.images())).transpose()?;
    let held = store.as_ref().map_or_else(|| Ok(vec![]), Store::all_users)?;
    // Read after them: a container that is made meanwhile has its record first.
    let there: Vec<String> = names(&roots.containers());
    let is_gone = |id: &str| !there.iter().any(|other| other == id) && !records.is_supervised(run_name(id));
    for (image, id) in held.iter().filter(|(_, id)| is_gone(id)) {
        store.iter().try_for_each(|store| store.release(image, id))?;
    }
    // Whoever holds a life is about to take its container away.
    left.retain(|name| !there.iter().any(|id| run_name(id) == name) && !records.is_supervised(name));
    if left.is_empty() {
        return Ok(());
    }
    Networks::new(&roots.data, &roots.run)
        .repair(|id| there.iter().any(|other| other == id) || records.is_supervised(id))?;
    for name in left {
        let (run, sandbox) = (containers.join(&name), sandboxes.join(&name));
        if run.is_dir() {
            Native::new(&run).delete()?;
        }
        netns::delete(&sandbox.join("netns"))?;
        // Others may still be in its sandbox, and then there are mounts.
        if microvm::leave(&sandbox, &name)? {
            files::remove_tree(&sandbox)?;
        }
        files::remove_tree(&run)?;
    }
    Ok(())
}
