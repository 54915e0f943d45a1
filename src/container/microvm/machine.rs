//! What VM a container gets: its size class, and its devices, booted or restored.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::monitor::{CONSOLE, VSOCK, failed};
use crate::container::backend::Error;
use crate::container::config::Limits;
use crate::container::files;
use crate::container::network::{Interface, TapPlug};
use crate::vm::config::{
    Balloon, Disk, DiskPart as Part, Mac, Net, SerialConfig, Share, Size, VmConfig, Vsock,
};
use crate::vm::kernel_directories as directories;

/// Serial numbers of the disks.
pub const LAYERS_DISK: &str = "layers";
pub const WRITABLE_DISK: &str = "writable";
/// Tag of the share.
pub const SHARE_TAG: &str = "sandbox";
/// File name of the agent's initial RAM disk.
const AGENT: &str = "agent.cpio";
/// The guest's vsock address: the same in all VMs, since each has a socket of its own on the host.
const CID: u32 = 3;
/// What the guest is told beside what the monitor adds.
const CMDLINE: &str = "quiet";

/// Memory of a VM whose container has no limit.
const MEMORY_BYTES: u64 = 512 << 20;
/// What kernel and agent take beside a container's limit.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// The least memory of a class, and where classes stop to be powers of two.
const CLASS_BYTES_MIN: u64 = 128 << 20;
const CLASS_BYTES_POWERS: u64 = 4 << 30;
/// Processors of a VM whose container has no limit, at most.
const CPUS_MAX: u32 = 4;

/// What VMs have in common that go on from one template.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Class {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Processors.
    pub cpus: u32,
    /// The MTU of each network device.
    pub mtus: Vec<u16>,
}

impl Class {
    /// The class for a container with these limits, on networks with these MTUs.
    pub fn of(limits: &Limits, mtus: Vec<u16>) -> Class {
        Class { memory_bytes: class_memory(memory(limits), host_memory()), cpus: cpus(limits), mtus }
    }

    /// A name that no other class has.
    pub fn name(&self) -> String {
        let mut name = format!("{}m-{}c", self.memory_bytes >> 20, self.cpus);
        for mtu in &self.mtus {
            name.push_str(&format!("-n{mtu}"));
        }
        name
    }
}

/// Processors of the VM: as many as the limit needs, or the host's up to four.
fn cpus(limits: &Limits) -> u32 {
    let host =
        std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(1));
    match limits.cpu_millis {
        Some(millis) => u32::try_from(millis.div_ceil(1000)).unwrap_or(u32::MAX).clamp(1, host.max(1)),
        None => host.clamp(1, CPUS_MAX),
    }
}

/// Memory of the VM at least.
fn memory(limits: &Limits) -> u64 {
    let bytes = limits.memory_bytes.map_or(MEMORY_BYTES, |limit| limit.saturating_add(OVERHEAD_BYTES));
    bytes.checked_next_multiple_of(1 << 20).unwrap_or(bytes)
}

fn host_memory() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total())
}

/// Memory of the smallest class that has so much. What is more than was asked for costs nothing until it is used, and the
/// container's control group in the guest holds it to its limit.
fn class_memory(bytes: u64, host: u64) -> u64 {
    let class = match bytes {
        0..=CLASS_BYTES_POWERS => bytes.max(CLASS_BYTES_MIN).next_power_of_two(),
        _ => bytes.checked_next_multiple_of(1 << 30).unwrap_or(bytes),
    };
    if class > host { bytes } else { class }
}

/// The VM of a container.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its size.
    pub class: Class,
    /// File systems that are partitions of the first disk.
    pub layers: Vec<Part>,
    /// The image of the second.
    pub writable: PathBuf,
    /// Network devices.
    pub nets: Vec<Net>,
}

/// A list of parts, as `--disk ID=parts=FILE` reads it.
#[derive(Serialize)]
struct Parts<'a> {
    parts: &'a [Part],
}

impl Machine {
    /// The machine of a container with these limits.
    pub fn new(
        limits: &Limits,
        layers: &[PathBuf],
        writable: &Path,
        interfaces: &[(Interface, TapPlug)],
        netns: Option<&Path>,
    ) -> Result<Machine, Error> {
        let part = |(at, path): (usize, &PathBuf)| Part { path: path.clone(), name: format!("layer{at}") };
        let nets = interfaces.iter().map(|(_, plug)| net(plug, netns)).collect::<Result<Vec<_>, _>>()?;
        Ok(Machine {
            class: Class::of(limits, interfaces.iter().map(|(_, plug)| plug.mtu).collect()),
            layers: layers.iter().enumerate().map(part).collect(),
            writable: writable.into(),
            nets,
        })
    }

    /// Its configuration, to be booted in `dir`.
    pub fn config(&self, dir: &Path) -> Result<VmConfig, Error> {
        let layers = Disk::composed(self.layers.clone());
        let disks = vec![layers_disk(layers), writable_disk(Disk::new(&self.writable))];
        Ok(VmConfig { disks, nets: self.nets.clone(), initrd: Some(agent()?), ..base(&self.class, dir) })
    }

    /// What `rvmm restore` is told to make it of the template at `template`, in `dir`. The empty places of the template are
    /// taken by what the machine has.
    pub fn restore(&self, template: &Path, dir: &Path) -> Result<Vec<OsString>, Error> {
        let list = dir.join("layers.json");
        files::write_json(&list, &Parts { parts: &self.layers })
            .map_err(|error| Error::failed("cannot describe the VM", error))?;
        let mut arguments: Vec<OsString> = vec!["restore".into(), template.into()];
        let mut add = |flag: &str, name: &str, value: &dyn AsRef<Path>| {
            let mut argument = OsString::from(name);
            argument.push(value.as_ref());
            arguments.extend([OsString::from(flag), argument]);
        };
        add("--disk", &format!("{LAYERS_DISK}=parts="), &list);
        add("--disk", &format!("{WRITABLE_DISK}="), &self.writable);
        for (index, net) in self.nets.iter().enumerate() {
            let netns = net.netns.as_ref().map_or(Path::new(""), |netns| netns);
            let place = if net.netns.is_some() { ",netns=" } else { "" };
            add("--net", &format!("{}={}{place}", slot_id(index), net.tap), &netns);
        }
        add("--share", &format!("{SHARE_TAG}="), &dir.join("share"));
        add("--vsock", "", &dir.join(VSOCK));
        add("--serial", "file=", &dir.join(CONSOLE));
        Ok(arguments)
    }
}

/// A machine of that class without a container, to be booted in `dir`: with disks that have no contents, and taps in the namespace
/// `netns`.
pub fn empty(class: &Class, dir: &Path, netns: Option<&Path>) -> Result<VmConfig, Error> {
    let mut config = slots(class, dir);
    config.initrd = Some(agent()?);
    for disk in &config.disks {
        fs::File::create(&disk.path).map_err(failed("make", &disk.path))?;
    }
    for net in &mut config.nets {
        net.netns = netns.map(Path::to_path_buf);
    }
    Ok(config)
}

/// The same without what is another for each machine.
pub fn outline(class: &Class) -> VmConfig {
    slots(class, Path::new(""))
}

fn slots(class: &Class, dir: &Path) -> VmConfig {
    let place = |name: &str| Disk { may_be_empty: true, ..Disk::new(dir.join(name)) };
    let layers = Disk { readonly: true, ..place("layers.img") };
    let net = |(index, mtu): (usize, &u16)| {
        let mut net = Net::new(format!("tap{index}"));
        net.mac = Some(Mac(slot_mac(index)));
        net.id = Some(slot_id(index));
        net.mtu = Some(*mtu);
        net
    };
    let disks = vec![layers_disk(layers), writable_disk(place("writable.img"))];
    VmConfig { disks, nets: class.mtus.iter().enumerate().map(net).collect(), ..base(class, dir) }
}

/// The id of a network device of a template.
fn slot_id(index: usize) -> String {
    format!("net{index}")
}

/// The hardware address that a network device of a template has until the agent gives it another one.
pub fn slot_mac(index: usize) -> [u8; 6] {
    [0x02, b'r', b'v', b'm', b'm', index as u8]
}

fn layers_disk(disk: Disk) -> Disk {
    Disk { id: Some(LAYERS_DISK.into()), queues: Some(1), ..disk }
}

fn writable_disk(disk: Disk) -> Disk {
    Disk { id: Some(WRITABLE_DISK.into()), ..disk }
}

fn net(plug: &TapPlug, netns: Option<&Path>) -> Result<Net, Error> {
    let mac: Mac = plug.mac.parse().map_err(|error| Error::Unsupported {
        what: format!("the address {:?} of a network device: {error}", plug.mac),
    })?;
    let mut net = Net::new(&plug.tap);
    net.mac = Some(mac);
    net.netns = netns.map(Path::to_path_buf);
    net.mtu = Some(plug.mtu);
    Ok(net)
}

/// All that does not depend on the container.
fn base(class: &Class, dir: &Path) -> VmConfig {
    VmConfig {
        cpus: class.cpus,
        memory: Size(class.memory_bytes),
        cmdline: Some(CMDLINE.into()),
        rng: true,
        balloon: Some(Balloon { free_page_reporting: true, deflate_on_oom: true, ..Balloon::default() }),
        vsock: Some(Vsock { cid: CID, socket: dir.join(VSOCK) }),
        shares: vec![Share::new(SHARE_TAG, dir.join("share"))],
        serial: SerialConfig::File(dir.join(CONSOLE)),
        ..VmConfig::default()
    }
}

/// The agent's initial RAM disk.
pub fn agent() -> Result<PathBuf, Error> {
    let found = directories().into_iter().map(|place| place.join(AGENT)).find(|path| path.is_file());
    found.ok_or_else(|| Error::Unsupported {
        what: format!(
            "microVMs need the guest's agent, and there is no {AGENT}: build it with `scripts/build-agent`"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn limits_choose_the_class() {
        let class = |memory_bytes, cpu_millis| {
            Class::of(&Limits { memory_bytes, cpu_millis, ..Limits::default() }, vec![])
        };
        assert_eq!(class(None, None).memory_bytes, MEMORY_BYTES);
        assert_eq!(class(Some(6 << 20), None).memory_bytes, 128 << 20);
        assert_eq!(class(Some(64 << 20), None).memory_bytes, 128 << 20);
        assert_eq!(class(Some((64 << 20) + 1), None).memory_bytes, 256 << 20);
        assert_eq!(class(None, Some(500)).cpus, 1);
        assert!((1..=CPUS_MAX).contains(&class(None, None).cpus));
    }

    #[test]
    fn no_class_is_larger_than_the_host_unless_the_limit_is() {
        assert_eq!(class_memory(3 * GIB, 24 * GIB), 4 * GIB);
        assert_eq!(class_memory(5 * GIB + 1, 24 * GIB), 6 * GIB);
        assert_eq!(class_memory(3 * GIB, 7 * GIB / 2), 3 * GIB);
        assert_eq!(class_memory(30 * GIB + 1, 24 * GIB), 30 * GIB + 1);
        assert_eq!(class_memory(u64::MAX, GIB), u64::MAX);
    }

    #[test]
    fn classes_have_different_names() {
        let class = Class { memory_bytes: 512 << 20, cpus: 2, mtus: vec![1500, 9000] };
        assert_eq!(class.name(), "512m-2c-n1500-n9000");
    }

    #[test]
    fn a_restored_machine_takes_the_places_of_its_template() {
        let directory = tempfile::tempdir().unwrap();
        let mut net = Net::new("tap5");
        net.netns = Some("/ns".into());
        let machine = Machine {
            class: Class { memory_bytes: GIB, cpus: 1, mtus: vec![1500] },
            layers: vec![Part { path: "/a".into(), name: "layer0".into() }],
            writable: "/w".into(),
            nets: vec![net],
        };
        let arguments = machine.restore(Path::new("/t"), directory.path()).unwrap();
        let words: Vec<_> = arguments.iter().map(|word| word.to_str().unwrap()).collect();
        let dir = directory.path().to_str().unwrap();
        let list = format!("layers=parts={dir}/layers.json");
        assert_eq!(words[..6], ["restore", "/t", "--disk", list.as_str(), "--disk", "writable=/w"]);
        assert_eq!(words[6..8], ["--net", "net0=tap5,netns=/ns"]);
        let list = fs::read_to_string(directory.path().join("layers.json")).unwrap();
        assert!(list.contains("\"/a\""), "{list}");
    }
}
