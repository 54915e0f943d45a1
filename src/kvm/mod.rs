//! The KVM API as rvmm uses it: one system handle, one VM, its vCPUs, and a neutral [`Exit`].
//!
//! Every set-up call is timed, so that the share of KVM in the start of a VM can be told from rvmm's own.

mod calls;
pub mod emulated;
pub mod features;
pub mod kind;
pub mod probe;
pub mod pvm;
mod state;
mod vcpu;
mod vm;

pub use calls::{CallTime, take_call_times};
pub use state::{ChipState, StateError, VcpuState};
pub use vcpu::{Exit, Kick, Vcpu, register_kick_signal};
pub use vm::{MemorySlot, Vm};

use std::io;
use std::path::Path;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Cap;

use calls::{call, timed};

/// A parameter for the guest kernel's command line that this kind of host asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CmdlineAddition {
    /// The parameter as the guest kernel reads it.
    pub parameter: &'static str,
    /// Why, for the log.
    pub reason: &'static str,
}

/// Where the KVM device is.
pub const KVM_PATH: &str = "/dev/kvm";

/// The one version of the KVM API that there has ever been (`Documentation/virt/kvm/api.rst` §4.1).
const API_VERSION: i32 = 12;

/// What rvmm cannot do without, and the name by which it is asked for.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

/// Why KVM could not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device could not be opened.
    #[error("cannot open {KVM_PATH}")]
    Open(#[source] io::Error),
    /// The device is not KVM's, or speaks another version of its API.
    #[error("{KVM_PATH} speaks version {0} of the KVM API, not {API_VERSION}")]
    ApiVersion(i32),
    /// This KVM lacks something that rvmm needs.
    #[error("this KVM lacks {0}")]
    MissingCapability(&'static str),
    /// A call failed.
    #[error("{call} failed")]
    Call {
        /// Name of the ioctl.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM took fewer MSRs than it was given.
    #[error("KVM refuses to set MSR {0:#x}")]
    Msr(u32),
    /// The signal that interrupts vCPUs could not be prepared.
    #[error("cannot install the handler of the vCPU signal")]
    Signal(#[source] io::Error),
}

/// The open KVM device.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it has all that rvmm needs.
    pub fn open() -> Result<Kvm, Error> {
        let path = c"/dev/kvm";
        debug_assert_eq!(Path::new(KVM_PATH).as_os_str().as_encoded_bytes(), path.to_bytes());
        let fd = timed("open", || kvm_ioctls::Kvm::new_with_path(path))
            .map_err(|error| Error::Open(error.into()))?;
        match timed("KVM_GET_API_VERSION", || fd.get_api_version()) {
            API_VERSION => {}
            version => return Err(Error::ApiVersion(version)),
        }
        let missing = || REQUIRED.iter().find(|(cap, _)| !fd.check_extension(*cap));
        if let Some((_, name)) = timed("KVM_CHECK_EXTENSION", missing) {
            return Err(Error::MissingCapability(name));
        }
        Ok(Kvm { fd })
    }

    /// The handle of kvm-ioctls, for questions about this KVM.
    pub fn fd(&self) -> &kvm_ioctls::Kvm {
        &self.fd
    }

    /// The CPUID leaves that KVM can show to a guest.
    pub fn supported_cpuid(&self) -> Result<CpuId, Error> {
        call("KVM_GET_SUPPORTED_CPUID", || self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES))
    }

    /// Whether the local APIC's timer can be set to a TSC value.
    pub fn has_tsc_deadline(&self) -> bool {
        self.fd.check_extension(Cap::TscDeadlineTimer)
    }

    /// The most vCPUs that one VM may have.
    pub fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    /// Makes an empty VM.
    pub fn create_vm(&self) -> Result<Vm, Error> {
        let fd = call("KVM_CREATE_VM", || self.fd.create_vm())?;
        Ok(Vm::new(fd))
    }
}
