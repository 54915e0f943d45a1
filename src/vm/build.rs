//! From a configuration to a machine that is ready to run: one list, top to bottom. Only here are things opened.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::config::{self, CpuTemplate, Register, SerialConfig, VmConfig};
use super::console::{ConsoleOutput, Line, NoOutput};
use super::control::{Control, Controlled, State};
use super::devices;
use super::kernel;
use super::pause::Gate;
use super::snapshot::{Errand, LoadError, Snapshot};
use super::timeline::Timeline;
use super::vcpu::VcpuShared;
use super::{Console, Machine, Vm};
use crate::boot::cmdline::{Cmdline, CmdlineError};
use crate::bus::{Bus, BusDevice, Overlap};
use crate::kvm::kind::{self, Kind};
use crate::kvm::pvm::{self, Emulator};
use crate::kvm::{self, Kvm, emulated};
use crate::legacy::{GuestEvent, GuestRequests, I8042, PowerBlock, PvPanic, Serial, SerialSink};
use crate::memory::{self, Ram};
use crate::mmds::Store;
use crate::platform::{
    self, COM1, COM1_GSI, GUEST_EVENT, I8042 as I8042_PORTS, I8042_GSI, MmioSlot, POWER, POWER_GSI, PVPANIC,
    Ports, VIRTIO_MMIO_SIZE,
};
use crate::virtio::Device;
use crate::virtio::console::{ConsoleHandle, Size};
use crate::virtio::mmio::Transport;
use crate::virtio::spec::register;
use crate::{boot, terminal, virtio};

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Fewer vCPUs than asked for.
    #[error("{wanted} vCPUs: this KVM allows {max} for one VM")]
    KvmCpus {
        /// What was asked for.
        wanted: u32,
        /// KVM's limit.
        max: usize,
    },
    /// No kernel was named, and none was found.
    #[error("no guest kernel was named, and there is no {name} in {directories}")]
    NoKernel {
        /// What was looked for.
        name: &'static str,
        /// Where.
        directories: String,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The handler for lost pages could not be installed.
    #[error("cannot guard guest memory against truncated files")]
    Guard(#[source] io::Error),
    /// Kernel, initrd, or what goes with them.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// A device's files.
    #[error(transparent)]
    Device(#[from] devices::Error),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] virtio::mmio::Error),
    /// An event descriptor could not be made.
    #[error("cannot create an event descriptor")]
    EventFd(#[source] io::Error),
    /// The console.
    #[error("cannot open {what} for the console")]
    Console {
        /// The file, or a name for it.
        what: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host has no random numbers.
    #[error("cannot get random numbers from the host")]
    Random(#[source] getrandom::Error),
    /// More CPUID leaves or MSRs than KVM takes.
    #[error("{0} entries are more than KVM takes")]
    TooManyEntries(usize),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] LoadError),
    /// Two devices at one address: a mistake in the platform map.
    #[error(transparent)]
    Overlap(#[from] Overlap),
}

/// Builds the machine that `config` describes, whose metadata service, if it has one, tells `metadata`.
pub fn build(config: &VmConfig, metadata: &Arc<Store>, timeline: &mut Timeline) -> Result<Vm, Error> {
    assemble(config, metadata, None, timeline)
}

/// Builds the machine that a snapshot was taken of; metadata are not in it.
pub fn restore(snapshot: &Snapshot, metadata: &Arc<Store>, timeline: &mut Timeline) -> Result<Vm, Error> {
    assemble(snapshot.config(), metadata, Some(snapshot), timeline)
}

/// Builds a machine, and has it begin with its kernel, or go on where it was saved.
fn assemble(
    config: &VmConfig,
    metadata: &Arc<Store>,
    saved: Option<&Snapshot>,
    timeline: &mut Timeline,
) -> Result<Vm, Error> {
    config.validate(host_memory_bytes())?;
    let room_event = event()?;
    let (mut devices, mut handles) = devices::open(config, metadata)?;
    let mut consoles = Vec::new();
    let mut sized = None;
    if let Some((device, handle, console)) = open_virtio_console(config, &room_event)? {
        sized = console.reads_stdin.then_some((devices.len(), handle));
        devices.push(device);
        consoles.push(console);
    }
    let kvm = Kvm::open()?;
    let kind = kind::detect(kvm.fd());
    let quirks = kind == Kind::Pvm && config.host_quirks;
    tracing::debug!("KVM kind: {kind:?}");
    if config.cpus as usize > kvm.max_vcpus() {
        return Err(Error::KvmCpus { wanted: config.cpus, max: kvm.max_vcpus() });
    }
    let supported = kvm.supported_cpuid()?;
    if let Some(saved) = saved {
        saved.check_host(kind, &supported)?;
        saved.check_disks(handles.disks.iter().map(|disk| (disk.id.as_str(), disk.handle.image())))?;
    }
    let kernel_path = saved.is_none().then(|| kernel_path(config, kind)).transpose()?;

    let ram = match saved {
        None => memory::allocate(config.memory.bytes())?,
        Some(saved) => saved.map_memory()?,
    };
    for region in ram.iter() {
        let (guest, host, len) = (region.start_addr().0, region.as_ptr(), region.len());
        tracing::debug!("guest memory {guest:#x} at host {host:p}+{len:#x}");
    }
    memory::guard::install(&ram).map_err(Error::Guard)?;
    memory::file::prepare_to_write();
    timeline.mark("memory mapped");

    let slots: Vec<MmioSlot> = (0..devices.len()).filter_map(platform::mmio_slot).collect();
    // Before KVM knows of the memory, so that it need not be told of the mappings that the kernel replaces.
    let loaded = match &kernel_path {
        Some(path) => Some(load_kernel(config, path, &ram, &slots, kind, quirks)?),
        None => None,
    };
    timeline.mark("kernel loaded");

    let mut vm = kvm.create_vm()?;
    vm.set_memory(&ram, config.track_dirty_pages)?;
    if config.track_dirty_pages {
        memory::dirty::start(&ram);
    }
    vm.create_interrupt_controllers()?;
    let reports_instructions = vm.exit_on_emulation_failure()?;
    tracing::debug!("KVM reports instructions that it cannot emulate: {reports_instructions}");
    timeline.mark("VM made");

    let requests_event = event()?;
    let requests = Arc::new(GuestRequests::new(clone(&requests_event)?));
    let irq = |gsi| -> Result<EventFd, Error> {
        let irq = event()?;
        vm.register_irqfd(&irq, gsi)?;
        Ok(irq)
    };

    let output = open_console(config.serial_place())?;
    let sink: Arc<dyn SerialSink> = match &output {
        Some(open) => open.output.clone(),
        None => Arc::new(NoOutput),
    };
    let serial = Arc::new(Serial::new(sink, irq(COM1_GSI)?, clone(&room_event)?));
    consoles.extend(output.map(|open| open.with(serial.clone())));
    let i8042 = Arc::new(I8042::new(requests.clone(), irq(I8042_GSI)?));
    let power = Arc::new(PowerBlock::new(requests.clone(), irq(POWER_GSI)?));
    let guest_event = Arc::new(GuestEvent::default());
    let mut ports = Bus::default();
    let mut at =
        |place: Ports, device: Arc<dyn BusDevice>| ports.insert(place.start.into(), place.len.into(), device);
    at(COM1, serial.clone())?;
    at(I8042_PORTS, i8042.clone())?;
    at(POWER, power.clone())?;
    at(PVPANIC, Arc::new(PvPanic::new(requests.clone())))?;
    at(GUEST_EVENT, guest_event.clone())?;

    let mut mmio = Bus::default();
    let mut transports = Vec::with_capacity(devices.len());
    for (index, (device, slot)) in devices.into_iter().zip(&slots).enumerate() {
        let mut transport = Transport::new(ram.clone(), device, irq(slot.gsi)?)?;
        if let Some(saved) = saved {
            saved.restore_device(index, &mut transport)?;
        }
        let transport = Arc::new(transport);
        for (queue, event) in (0..).zip(transport.queue_events()) {
            vm.register_ioeventfd(event, slot.addr + register::QUEUE_NOTIFY, queue)?;
        }
        mmio.insert(slot.addr, VIRTIO_MMIO_SIZE, transport.clone())?;
        transports.push(transport);
    }
    timeline.mark("devices made");

    let mut vcpus = Vec::with_capacity(config.cpus as usize);
    // Not one of the quirks that help, which may be turned off: without it guest users could become guest kernel.
    let patches = if kind == Kind::Pvm { boot::cpuid::vendor(kvm::pvm::VENDOR).to_vec() } else { Vec::new() };
    for index in 0..config.cpus {
        let mut vcpu = vm.create_vcpu(index)?;
        match (&loaded, saved) {
            (Some(loaded), _) => {
                prepare_vcpu(&vcpu, &supported, loaded, config, kvm.has_tsc_deadline(), &patches)?;
            }
            (None, Some(saved)) => saved.restore_vcpu(&mut vcpu, &kvm, &vm)?,
            (None, None) => {}
        }
        let emulator = quirks.then(Emulator::new);
        vcpus.push((vcpu, emulator));
    }
    timeline.mark("vCPUs made");
    let machine = Machine {
        sized,
        serial,
        i8042,
        power,
        guest_event,
        transports,
        kind,
        msr_indices: kvm.msr_indices()?,
        generation_id_addr: match (&loaded, saved) {
            (Some(loaded), _) => loaded.generation_id_addr,
            (None, saved) => saved.map_or(0, |saved| saved.state.generation_id_addr),
        },
        kvm_vm: vm,
    };
    if let Some(saved) = saved {
        saved.restore_machine(&machine, &requests, &ram)?;
        timeline.mark("state restored");
    }

    for server in &mut handles.file_servers {
        server.wait_ready().map_err(devices::Error::from)?;
    }
    let shared = VcpuShared {
        ports,
        mmio,
        ram,
        requests,
        stop: AtomicBool::new(false),
        gate: Gate::default(),
        errand: Errand::default(),
        failure: Mutex::new(None),
        failed: event()?,
    };
    Ok(Vm {
        shared: Arc::new(shared),
        vcpus,
        machine,
        requests_event,
        room_event,
        consoles,
        control: Control::new().map_err(Error::EventFd)?,
        controlled: Controlled {
            config: VmConfig { kernel: kernel_path.or_else(|| config.kernel.clone()), ..config.clone() },
            handles,
            // One that was saved goes on when its devices are told to.
            state: if saved.is_some() { State::Paused } else { State::Running },
            keeper: None,
            base: saved.map(|saved| saved.layers().to_vec()),
        },
        metrics: None,
        shutdown_timeout: Duration::from_secs(config.shutdown_timeout),
    })
}

fn event() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::EventFd)
}

fn clone(event: &EventFd) -> Result<EventFd, Error> {
    event.try_clone().map_err(Error::EventFd)
}

/// RAM and swap of the host: more than that no guest can ever use.
fn host_memory_bytes() -> u64 {
    nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total().saturating_add(info.swap_total()))
}

fn kernel_path(config: &VmConfig, kind: Kind) -> Result<PathBuf, Error> {
    if let Some(path) = &config.kernel {
        return Ok(path.clone());
    }
    let path = kernel::find(kind).ok_or_else(|| Error::NoKernel {
        name: kernel::file_name(kind),
        directories: kernel::directories()
            .iter()
            .map(|d| d.display().to_string())
            .collect::<Vec<_>>()
            .join(", "),
    })?;
    tracing::info!("guest kernel: {}", path.display());
    Ok(path)
}

/// What rvmm tells the guest's kernel where the user does not.
fn command_line(config: &VmConfig, quirks: bool) -> Result<Cmdline, Error> {
    let mut cmdline = Cmdline::new(config.cmdline.as_deref().unwrap_or_default())?;
    let mut additions: Vec<String> = vec![];
    if *config.serial_place() != SerialConfig::None {
        additions.push("console=ttyS0".into());
    }
    // The last one is the guest's /dev/console.
    if config.console != SerialConfig::None {
        additions.push("console=hvc0".into());
    }
    // There is no PCI, and a kernel that looks for it takes time and complains.
    additions.extend(["reboot=k".into(), "panic=-1".into(), "pci=off".into()]);
    if let Some(root) = &config.rootfs {
        additions.push("root=/dev/vda".into());
        additions.push(if root.is_read_only() { "ro" } else { "rw" }.into());
    }
    let for_host = match quirks {
        true => pvm::cmdline_additions(),
        false if config.host_quirks && emulated::host_is_emulated() => emulated::cmdline_additions(),
        false => &[],
    };
    for addition in for_host {
        tracing::debug!("{}: {}", addition.parameter, addition.reason);
        additions.push(addition.parameter.to_owned());
    }
    let user_sets_access = ["ro", "rw"].iter().any(|name| cmdline.user_value(name).is_some());
    for addition in additions {
        let name = addition.split('=').next().unwrap_or_default();
        let user_sets_it =
            cmdline.user_value(name).is_some() || user_sets_access && matches!(name, "ro" | "rw");
        if !user_sets_it {
            cmdline.add(&addition)?;
        }
    }
    Ok(cmdline)
}

fn load_kernel(
    config: &VmConfig,
    path: &Path,
    ram: &Ram,
    slots: &[MmioSlot],
    kind: Kind,
    quirks: bool,
) -> Result<boot::Loaded, Error> {
    // A page fault costs some microseconds with nested paging, so that few and large pages are worth a copy of the kernel.
    // PVM shadows page tables of small pages whatever the memory is made of.
    let placement = if kind == Kind::Pvm { boot::Placement::Map } else { boot::Placement::Copy };
    if placement == boot::Placement::Copy {
        memory::prefer_huge_pages(ram);
    }
    let source = boot::Source {
        kernel: boot::Kernel::open(path)?,
        initrd: config.initrd.as_deref().map(boot::Initrd::open).transpose()?,
        protocol: config.boot_protocol,
        placement,
    };
    let machine = boot::Machine {
        cpus: config.cpus as u8,
        virtio: slots.to_vec(),
        // A kernel that can run on a PVM host hardly has ACPI, so the search for it in the file is spared there.
        discovery: if quirks { boot::Discovery::Both } else { boot::Discovery::Auto },
        serial: *config.serial_place() != SerialConfig::None,
        generation_id: generation_id()?,
    };
    let loaded = boot::load(ram, &source, &machine, &command_line(config, quirks)?)?;
    tracing::info!("added to the guest's command line: {}", loaded.added.join(" "));
    tracing::debug!("guest's command line: {}", loaded.cmdline);
    tracing::debug!(
        "boot protocol: {:?}, entry {:#x}, devices by {:?}",
        loaded.protocol,
        loaded.entry,
        loaded.discovery
    );
    Ok(loaded)
}

/// A number that no other VM has had.
fn generation_id() -> Result<u128, Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(Error::Random)?;
    Ok(u128::from_le_bytes(bytes))
}

fn prepare_vcpu(
    vcpu: &kvm::Vcpu,
    supported: &CpuId,
    loaded: &boot::Loaded,
    config: &VmConfig,
    tsc_deadline: bool,
    patches: &[boot::cpuid::CpuidPatch],
) -> Result<(), Error> {
    let place = boot::cpuid::Vcpu {
        index: vcpu.index() as u8,
        count: config.cpus as u8,
        tsc_deadline,
        tsc_khz: None,
    };
    let mut entries = boot::cpuid::build(supported.as_slice(), place, patches);
    let template = config.cpu.template();
    apply_template(&mut entries, &template);
    vcpu.set_cpuid(&CpuId::from_entries(&entries).map_err(|_| Error::TooManyEntries(entries.len()))?)?;
    let msrs = boot::registers::msrs();
    vcpu.set_msrs(&Msrs::from_entries(&msrs).map_err(|_| Error::TooManyEntries(msrs.len()))?)?;
    for modifier in &template.msr_modifiers {
        let value = modifier.bitmap.apply(vcpu.msr(modifier.addr.0)?);
        let entry = kvm_msr_entry { index: modifier.addr.0, data: value, ..Default::default() };
        vcpu.set_msrs(&Msrs::from_entries(&[entry]).map_err(|_| Error::TooManyEntries(1))?)?;
    }
    if vcpu.index() == 0 {
        let sregs = boot::registers::sregs(loaded, vcpu.sregs()?);
        vcpu.set_registers(&boot::registers::regs(loaded), &sregs)?;
    }
    vcpu.set_fpu(&boot::registers::fpu())?;
    // Where KVM itself runs in an emulated machine it may miss that the guest sets XCR0; elsewhere this is a help
    // that nobody needs, so it may fail.
    if let Some(Err(error)) = boot::cpuid::xcr0(&entries).map(|xcr0| vcpu.set_xcr0(xcr0)) {
        tracing::debug!("{}", crate::error_chain(&error));
    }
    let mut lapic = vcpu.lapic()?;
    boot::registers::wire_lapic(&mut lapic);
    Ok(vcpu.set_lapic(&lapic)?)
}

/// Changes those leaves that are there.
fn apply_template(entries: &mut [kvm_cpuid_entry2], template: &CpuTemplate) {
    for modifier in &template.cpuid_modifiers {
        let matching = entries
            .iter_mut()
            .filter(|entry| (entry.function, entry.index) == (modifier.leaf.0, modifier.subleaf.0));
        for entry in matching {
            for change in &modifier.modifiers {
                let register = match change.register {
                    Register::Eax => &mut entry.eax,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                *register = change.bitmap.apply((*register).into()) as u32;
            }
        }
    }
}

/// A virtio console: the device, what sets its size, and the host's side.
type VirtioConsole = (Box<dyn Device>, ConsoleHandle, Console);

/// The virtio console, if there is one.
fn open_virtio_console(config: &VmConfig, room: &EventFd) -> Result<Option<VirtioConsole>, Error> {
    let Some(open) = open_console(&config.console)? else { return Ok(None) };
    let size = open.reads_stdin.then(terminal::size).flatten();
    let size = size.map_or(Size::default(), |(columns, rows)| Size { columns, rows });
    let (device, handle) =
        virtio::console::Console::new(open.output.clone(), size, clone(room)?).map_err(Error::EventFd)?;
    let console = open.with(Arc::new(handle.clone()));
    Ok(Some((Box::new(device), handle, console)))
}

/// A console's output, before the device is there.
struct OpenConsole {
    output: Arc<ConsoleOutput>,
    target: File,
    reads_stdin: bool,
}

impl OpenConsole {
    fn with(self, line: Arc<dyn Line>) -> Console {
        Console { output: self.output, line, target: self.target, reads_stdin: self.reads_stdin }
    }
}

fn open_console(config: &SerialConfig) -> Result<Option<OpenConsole>, Error> {
    let (what, target, reads_stdin) = match config {
        SerialConfig::None => return Ok(None),
        SerialConfig::Stdio => {
            ("standard output".to_owned(), io::stdout().as_fd().try_clone_to_owned().map(File::from), true)
        }
        SerialConfig::File(path) => {
            (format!("{path:?}"), OpenOptions::new().create(true).append(true).open(path), false)
        }
    };
    let target = target.map_err(|source| Error::Console { what, source })?;
    Ok(Some(OpenConsole { output: Arc::default(), target, reads_stdin }))
}
