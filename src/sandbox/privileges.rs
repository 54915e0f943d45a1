//! Capabilities given up for good.

use std::io;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::{Error, Step};

/// Gives up every way to get other capabilities than these; what this thread has it keeps, also when it changes its
/// user. Takes CAP_SETPCAP.
pub fn bound(kept: CapabilitySet) -> io::Result<()> {
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities_secure_bits(bits)?;
    for capability in (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit)) {
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel knows no further ones.
            Err(Errno::INVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

/// The same, unless this thread may not: then there is no way to others anyway, but for programs that are never run.
pub(super) fn bound_if_possible(kept: CapabilitySet) -> Result<(), Error> {
    let mine = rustix::thread::capabilities(None).step("read capabilities")?;
    if mine.effective.contains(CapabilitySet::SETPCAP) {
        bound(kept).step("give up capabilities")
    } else {
        Ok(())
    }
}

/// Gives up all capabilities but these, in this thread and all that it starts, and hides from debuggers.
pub(super) fn keep(kept: CapabilitySet) -> Result<(), Error> {
    let what = "give up capabilities";
    let kept = kept & rustix::thread::capabilities(None).step("read capabilities")?.permitted;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).step(what)?;
    rustix::thread::set_no_new_privs(true).step("renounce privileges")?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    // Guest memory is nothing to leave behind in files.
    rustix::process::setrlimit(Resource::Core, none).step("do without core files")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).step("hide from debuggers")
}
