//! What to try when something fails.

use std::io::ErrorKind;

use crate::kvm;

/// Advice for the first cause that some is known for.
pub fn for_error(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| cause.downcast_ref::<kvm::Error>().and_then(for_kvm))
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
