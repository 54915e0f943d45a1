//! A virtual machine, from its configuration to its end.

mod build;
pub mod config;
mod console;
pub mod control;
mod devices;
mod ended;
mod kernel;
pub mod page;
mod pause;
mod run;
pub mod snapshot;
mod timeline;
mod vcpu;

pub use build::{Error as BuildError, build, restore};
pub use devices::Error as DeviceError;
pub use ended::{EXIT_FAILED, EXIT_PANIC, EXIT_RESET, EXIT_STUCK, EXIT_TRIPLE_FAULT, End, Ended};
pub use kernel::{directories as kernel_directories, file_name as kernel_file_name, find as find_kernel};
pub use pause::Error as PauseError;
pub use run::{Error as RunError, run};
pub use timeline::{Moment, Timeline};

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::kvm::kind::Kind;
use crate::kvm::pvm::Emulator;
use crate::kvm::{self, Vcpu};
use crate::legacy::{GuestEvent, I8042, PowerBlock, Serial};
use crate::sandbox::keeper::Keeper;
use crate::virtio::console::ConsoleHandle;
use crate::virtio::mmio::Transport;

/// The devices that the rest of rvmm talks to.
pub struct Machine {
    /// The console at the terminal, and its place among the devices, if it has a size.
    sized: Option<(usize, ConsoleHandle)>,
    serial: Arc<Serial>,
    i8042: Arc<I8042>,
    power: Arc<PowerBlock>,
    guest_event: Arc<GuestEvent>,
    transports: Vec<Arc<Transport>>,
    /// With the last handle on the VM go its interrupts and notifications, so it stays open.
    kvm_vm: kvm::Vm,
    kind: Kind,
    /// The MSRs that make up a vCPU's state.
    msr_indices: Vec<u32>,
    generation_id_addr: u64,
}

impl Machine {
    fn transports(&self) -> impl Iterator<Item = &Transport> + Clone {
        self.transports.iter().map(Arc::as_ref)
    }
}

/// The host's side of a console.
struct Console {
    output: Arc<console::ConsoleOutput>,
    line: Arc<dyn console::Line>,
    target: File,
    reads_stdin: bool,
}

/// A machine that is complete and does not run yet.
pub struct Vm {
    shared: Arc<vcpu::VcpuShared>,
    vcpus: Vec<(Vcpu, Option<Emulator>)>,
    machine: Machine,
    requests_event: EventFd,
    room_event: EventFd,
    consoles: Vec<Console>,
    control: control::Control,
    controlled: control::Controlled,
    /// Whether metrics are written by themselves, and where the page for Prometheus goes.
    metrics: Option<Option<PathBuf>>,
    shutdown_timeout: Duration,
}

impl Vm {
    /// Has metrics written every now and then: lines of JSON to [`metrics`](crate::metrics)' file, and a page for
    /// Prometheus to the file at `page`.
    pub fn write_metrics(&mut self, page: Option<PathBuf>) {
        self.metrics = Some(page);
    }

    /// Gives this VM what opens images and makes snapshots' files for it behind the walls.
    pub fn set_keeper(&mut self, keeper: Keeper) {
        self.controlled.keeper = Some(Arc::new(keeper));
    }

    /// Has the VM rest from the start, until it is told to go on.
    pub fn start_paused(&mut self) {
        self.controlled.state = control::State::Paused;
        self.shared.gate.close_early();
    }

    /// What controls this VM from another thread, once it runs.
    pub fn control(&self) -> control::Control {
        self.control.clone()
    }
}
