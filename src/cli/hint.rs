//! What to try when something fails.

use std::io::ErrorKind;

use crate::boot;
use crate::kvm;
use crate::vm::{BuildError, RunError, config};

/// Advice for an error that some is known for.
pub fn for_error(error: &anyhow::Error) -> Option<String> {
    if let Some(error) = error.downcast_ref::<BuildError>() {
        return for_build(error);
    }
    match error.downcast_ref::<RunError>() {
        Some(RunError::Kvm(error)) => for_kvm(error),
        _ => None,
    }
}

fn for_build(error: &BuildError) -> Option<String> {
    let text = match error {
        BuildError::Kvm(error) => return for_kvm(error),
        BuildError::NoKernel { .. } => "build it with `scripts/build-kernel`, or name one with --kernel",
        BuildError::Boot(boot::Error::Open { .. }) => "check the path given with --kernel or --initrd",
        BuildError::Config(config::Error::TooMuchMemory { .. }) => "give the guest less with --memory",
        BuildError::Config(config::Error::TooManyDevices(_)) => "put several file systems on one disk",
        _ => return None,
    };
    Some(text.into())
}

fn for_kvm(error: &kvm::Error) -> Option<String> {
    let text = match error {
        kvm::Error::Open(source) => match source.kind() {
            ErrorKind::NotFound => {
                "is virtualization enabled in the firmware, and the module kvm_intel or kvm_amd loaded? \
                 `rvmm doctor` tells more"
            }
            ErrorKind::PermissionDenied => {
                "become a member of the group kvm: `sudo usermod -aG kvm $USER`, then log in again"
            }
            _ => "`rvmm doctor` tells more",
        },
        kvm::Error::ApiVersion(_) | kvm::Error::MissingCapability(_) => {
            "the host's kernel is too old; `rvmm doctor` lists what is missing"
        }
        _ => return None,
    };
    Some(text.into())
}
