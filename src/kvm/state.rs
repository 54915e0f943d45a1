//! What KVM keeps of a VM besides its memory, to be read from one VM and put into another.
//!
//! The order of the calls matters: `docs/snapshots.md` has it with its reasons.
#![allow(unsafe_code)]

use std::io;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::calls::call;
use super::{Error, Kvm, Vcpu, Vm};

/// Bytes of `struct kvm_xsave` without what some processors have beyond it.
const XSAVE_BYTES: usize = size_of::<kvm_xsave>();
/// MSRs that KVM takes in one call.
const MSRS_AT_ONCE: usize = 128;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Offset of a local APIC's timer register, and its mode in which it follows [`MSR_IA32_TSC_DEADLINE`] (SDM volume 3,
/// §11.5.1).
const APIC_LVT_TIMER: usize = 0x320;
const TIMER_MODE_MASK: u32 = 3 << 17;
const TIMER_MODE_DEADLINE: u32 = 2 << 17;

/// How far two clocks that mean the same may be apart: parts of a million by which the host's calibration differs
/// from boot to boot.
const TSC_TOLERANCE_PPM: u64 = 250;

/// The state of a vCPU.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// As 32-bit numbers, of which most are 0.
    xsave: Vec<u32>,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: Option<u32>,
}

impl VcpuState {
    /// What CPUID shows.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }
}

/// The state of the devices that KVM has, and the guest's clock.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct ChipState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// Why KVM's state cannot be read or set.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A call failed.
    #[error(transparent)]
    Kvm(#[from] Error),
    /// KVM holds on to another value of an MSR.
    #[error("this KVM does not take {value:#x} for MSR {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// Its value in the state.
        value: u64,
    },
    /// More registers than a processor has.
    #[error("the state of a vCPU has {what} of {len}, which cannot be")]
    Length {
        /// What it is.
        what: &'static str,
        /// How many of them.
        len: usize,
    },
    /// Vector registers that this host's processor does not have.
    #[error("the state of a vCPU has {saved} bytes of vector registers, and this host has room for {host}")]
    VectorState {
        /// Bytes in the state.
        saved: usize,
        /// Bytes that KVM takes.
        host: usize,
    },
    /// The guest's clock cannot be made as fast as it was.
    #[error(
        "the guest's time stamp counter ran at {saved} kHz, this host's runs at {host} kHz and cannot be scaled"
    )]
    TscFrequency {
        /// In the state.
        saved: u32,
        /// Here.
        host: u32,
    },
}

impl Kvm {
    /// The MSRs that make up the state of a vCPU.
    pub fn msr_indices(&self) -> Result<Vec<u32>, Error> {
        let list = call("KVM_GET_MSR_INDEX_LIST", || self.fd().get_msr_index_list())?;
        Ok(list.as_slice().to_vec())
    }
}

impl Vm {
    /// Bytes of a vCPU's vector registers as KVM exchanges them.
    pub fn xsave_bytes(&self) -> usize {
        usize::try_from(self.fd().check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_BYTES)
    }

    /// Reads the interrupt controllers, the timer and the clock. While no vCPU runs, after the vCPUs' own states.
    pub fn chip_state(&self) -> Result<ChipState, Error> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            call("KVM_GET_IRQCHIP", || self.fd().get_irqchip(&mut chip))?;
            Ok::<_, Error>(chip)
        };
        Ok(ChipState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: call("KVM_GET_PIT2", || self.fd().get_pit2())?,
            clock: call("KVM_GET_CLOCK", || self.fd().get_clock())?,
        })
    }

    /// Sets them; after the vCPUs' own states.
    pub fn set_chip_state(&self, state: &ChipState) -> Result<(), Error> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, &state.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &state.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &state.ioapic),
        ];
        for (chip_id, chip) in chips {
            // What the state says of it must not make KVM fill another one.
            let chip = kvm_irqchip { chip_id, pad: 0, ..*chip };
            call("KVM_SET_IRQCHIP", || self.fd().set_irqchip(&chip))?;
        }
        call("KVM_SET_PIT2", || self.fd().set_pit2(&state.pit))?;
        // The clock goes on where it stood: without the flags no time passes in between.
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        call("KVM_SET_CLOCK", || self.fd().set_clock(&clock))
    }
}

impl Vcpu {
    /// Reads the whole state, with the MSRs of that list. While no vCPU runs, and after an interrupted run: an access
    /// that the guest waits for is no part of it.
    pub fn state(&mut self, msr_indices: &[u32], xsave_bytes: usize) -> Result<VcpuState, StateError> {
        // First, since it lets the vCPU take a waiting INIT or SIPI.
        let mp_state = call("KVM_GET_MP_STATE", || self.fd().get_mp_state())?;
        let regs = call("KVM_GET_REGS", || self.fd().get_regs())?;
        let sregs = self.sregs()?;
        let xsave = self.xsave(xsave_bytes)?;
        // A KVM without extended registers has none to read.
        let xcrs = call("KVM_GET_XCRS", || self.fd().get_xcrs()).ok();
        let debug_regs = call("KVM_GET_DEBUGREGS", || self.fd().get_debug_regs())?;
        let lapic = self.lapic()?;
        let mut msrs = self.msrs(msr_indices)?;
        wake_deadline_timer(&lapic, &mut msrs);
        let cpuid = call("KVM_GET_CPUID2", || self.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES))?;
        let tsc_khz = call("KVM_GET_TSC_KHZ", || self.fd().get_tsc_khz()).ok();
        // Last, since the others may change it.
        let events = call("KVM_GET_VCPU_EVENTS", || self.fd().get_vcpu_events())?;
        Ok(VcpuState {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            events,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz,
        })
    }

    /// Puts a state into a new vCPU. `scales_tsc` says whether this KVM can change the speed of its time stamp counter.
    pub fn set_state(
        &mut self,
        state: &VcpuState,
        xsave_bytes: usize,
        scales_tsc: bool,
    ) -> Result<(), StateError> {
        let too_long = |what, len| StateError::Length { what, len };
        let cpuid =
            CpuId::from_entries(&state.cpuid).map_err(|_| too_long("CPUID leaves", state.cpuid.len()))?;
        // What all others are checked against.
        self.set_cpuid(&cpuid)?;
        if let Some(khz) = state.tsc_khz {
            self.set_tsc_khz(khz, scales_tsc)?;
        }
        // SREGS sets the local APIC's base, so it comes before the APIC; REGS drops exceptions, so before the events.
        self.set_registers(&state.regs, &state.sregs)?;
        if let Some(xcrs) = &state.xcrs {
            call("KVM_SET_XCRS", || self.fd().set_xcrs(xcrs))?;
        }
        self.set_xsave(&state.xsave, xsave_bytes)?;
        call("KVM_SET_DEBUGREGS", || self.fd().set_debug_regs(&state.debug_regs))?;
        self.set_lapic(&state.lapic)?;
        // The deadline of the APIC's timer is an MSR, so after the APIC.
        self.restore_msrs(&state.msrs)?;
        call("KVM_SET_MP_STATE", || self.fd().set_mp_state(state.mp_state))?;
        Ok(call("KVM_SET_VCPU_EVENTS", || self.fd().set_vcpu_events(&state.events))?)
    }

    fn set_tsc_khz(&mut self, khz: u32, scales_tsc: bool) -> Result<(), StateError> {
        let Ok(host) = call("KVM_GET_TSC_KHZ", || self.fd().get_tsc_khz()) else { return Ok(()) };
        if u64::from(host.abs_diff(khz)) * 1_000_000 <= u64::from(khz) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if !scales_tsc {
            return Err(StateError::TscFrequency { saved: khz, host });
        }
        Ok(call("KVM_SET_TSC_KHZ", || self.fd().set_tsc_khz(khz))?)
    }

    fn xsave(&mut self, bytes: usize) -> Result<Vec<u32>, StateError> {
        if bytes <= XSAVE_BYTES {
            let xsave = call("KVM_GET_XSAVE", || self.fd().get_xsave())?;
            return Ok(xsave.region.to_vec());
        }
        let mut xsave = xsave_buffer(bytes)?;
        // SAFETY: the buffer has the size that KVM reported for this VM.
        call("KVM_GET_XSAVE2", || unsafe { self.fd().get_xsave2(&mut xsave) })?;
        let first = xsave.as_fam_struct_ref().xsave.region;
        Ok(first.iter().chain(xsave.as_slice()).copied().collect())
    }

    fn set_xsave(&mut self, saved: &[u32], bytes: usize) -> Result<(), StateError> {
        let mut xsave = xsave_buffer(bytes)?;
        let (first, rest) = saved
            .split_at_checked(XSAVE_BYTES / 4)
            .ok_or(StateError::VectorState { saved: size_of_val(saved), host: bytes })?;
        let room = xsave.as_slice().len();
        if rest.iter().skip(room).any(|word| *word != 0) {
            return Err(StateError::VectorState { saved: size_of_val(saved), host: bytes });
        }
        for (to, from) in xsave.as_mut_slice().iter_mut().zip(rest) {
            *to = *from;
        }
        // SAFETY: only the fixed part is written, and the length of the flexible one stays as it is.
        let region = unsafe { &mut (*xsave.as_mut_fam_struct_ptr()).xsave.region };
        for (to, from) in region.iter_mut().zip(first) {
            *to = *from;
        }
        // SAFETY: KVM reads as many bytes as it reported for this VM, and the buffer has them.
        Ok(call("KVM_SET_XSAVE", || unsafe { self.fd().set_xsave2(&xsave) })?)
    }

    /// Reads MSRs; those that KVM names and does not have here are left out.
    fn msrs(&mut self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
        let mut all = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(MSRS_AT_ONCE));
            let entries: Vec<_> =
                now.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries)
                .map_err(|_| StateError::Length { what: "MSRs", len: entries.len() })?;
            let read = call("KVM_GET_MSRS", || self.fd().get_msrs(&mut msrs))?;
            all.extend(msrs.as_slice().iter().take(read));
            rest = match now.get(read..) {
                // The one at which KVM stopped is skipped.
                Some([refused, ..]) => {
                    tracing::debug!("MSR {refused:#x} cannot be read");
                    rest.get(read + 1..).unwrap_or_default()
                }
                _ => later,
            };
        }
        Ok(all)
    }

    /// Sets MSRs. One that KVM refuses may stay if it has that value already.
    fn restore_msrs(&mut self, saved: &[kvm_msr_entry]) -> Result<(), StateError> {
        let mut ordered = saved.to_vec();
        // Deadlines and the clock's parameters are taken against the counter, which therefore comes first.
        ordered.sort_by_key(|msr| match msr.index {
            MSR_IA32_TSC => 0,
            MSR_IA32_TSC_DEADLINE => 2,
            _ => 1,
        });
        let mut rest = ordered.as_slice();
        while !rest.is_empty() {
            let now = rest.get(..MSRS_AT_ONCE).unwrap_or(rest);
            let msrs =
                Msrs::from_entries(now).map_err(|_| StateError::Length { what: "MSRs", len: now.len() })?;
            let set = call("KVM_SET_MSRS", || self.fd().set_msrs(&msrs))?.min(now.len());
            rest = rest.get(set..).unwrap_or_default();
            if set < now.len()
                && let Some((refused, later)) = rest.split_first()
            {
                let here = self.msrs(&[refused.index])?;
                if here.first().map(|msr| msr.data) != Some(refused.data) {
                    return Err(StateError::Msr { index: refused.index, value: refused.data });
                }
                rest = later;
            }
        }
        Ok(())
    }
}

fn xsave_buffer(bytes: usize) -> Result<Xsave, StateError> {
    let extra = bytes.saturating_sub(XSAVE_BYTES).div_ceil(4);
    Xsave::new(extra).map_err(|_| {
        StateError::Kvm(Error::Call { call: "KVM_GET_XSAVE2", source: io::ErrorKind::OutOfMemory.into() })
    })
}

/// A deadline that has passed reads as 0, although its interrupt may not have been delivered yet. Set to a moment that
/// has passed, it is delivered, at worst once too often, which a timer's handler bears.
fn wake_deadline_timer(lapic: &kvm_lapic_state, msrs: &mut [kvm_msr_entry]) {
    let mut timer = [0; 4];
    for (to, from) in timer.iter_mut().zip(lapic.regs.iter().skip(APIC_LVT_TIMER)) {
        *to = *from as u8;
    }
    if u32::from_le_bytes(timer) & TIMER_MODE_MASK != TIMER_MODE_DEADLINE {
        return;
    }
    let now = msrs.iter().find(|msr| msr.index == MSR_IA32_TSC).map(|msr| msr.data);
    let deadline = msrs.iter_mut().find(|msr| msr.index == MSR_IA32_TSC_DEADLINE);
    if let (Some(now), Some(deadline)) = (now, deadline)
        && deadline.data == 0
    {
        deadline.data = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry { index, data, ..Default::default() }
    }

    #[test]
    fn deadline_that_passed_is_kept_for_a_timer_that_follows_it() {
        let mut lapic = kvm_lapic_state::default();
        let mut msrs = [msr(MSR_IA32_TSC, 500), msr(MSR_IA32_TSC_DEADLINE, 0)];
        wake_deadline_timer(&lapic, &mut msrs);
        assert_eq!(msrs[1].data, 0, "a timer of another mode");
        for (at, byte) in TIMER_MODE_DEADLINE.to_le_bytes().into_iter().enumerate() {
            lapic.regs[APIC_LVT_TIMER + at] = byte as _;
        }
        wake_deadline_timer(&lapic, &mut msrs);
        assert_eq!(msrs[1].data, 500);
        msrs[1].data = 700;
        wake_deadline_timer(&lapic, &mut msrs);
        assert_eq!(msrs[1].data, 700, "one that is still to come");
    }

    #[test]
    fn state_of_one_vcpu_is_that_of_another_after_it_was_set() {
        let kvm = match Kvm::open() {
            Ok(kvm) => kvm,
            Err(error) => return eprintln!("skipped: no KVM: {error}"),
        };
        let make = || {
            let vm = kvm.create_vm().unwrap();
            vm.create_interrupt_controllers().unwrap();
            let vcpu = vm.create_vcpu(0).unwrap();
            vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
            (vm, vcpu)
        };
        let indices = kvm.msr_indices().unwrap();
        let scales = kvm.fd().check_extension(Cap::TscControl);
        let (vm, mut vcpu) = make();
        let mut regs = vcpu.fd().get_regs().unwrap();
        (regs.rax, regs.r15, regs.rip) = (0x1234_5678_9abc, 0xfeed, 0x10_0000);
        vcpu.fd().set_regs(&regs).unwrap();
        let state = vcpu.state(&indices, vm.xsave_bytes()).unwrap();
        let chips = vm.chip_state().unwrap();

        let bytes = postcard::to_allocvec(&(&state, &chips)).unwrap();
        let (read, read_chips): (VcpuState, ChipState) = postcard::from_bytes(&bytes).unwrap();
        let (other, mut second) = make();
        second.set_state(&read, other.xsave_bytes(), scales).unwrap();
        other.set_chip_state(&read_chips).unwrap();
        let again = second.state(&indices, other.xsave_bytes()).unwrap();
        assert_eq!(again.regs, regs);
        assert_eq!((again.sregs, &again.xsave), (state.sregs, &state.xsave));
        let tsc = |state: &VcpuState| state.msrs.iter().find(|msr| msr.index == MSR_IA32_TSC).unwrap().data;
        assert!(tsc(&again) >= tsc(&state), "the counter must not go back");
        let others = |msrs: &[kvm_msr_entry]| -> Vec<_> {
            msrs.iter().filter(|msr| msr.index != MSR_IA32_TSC).map(|msr| (msr.index, msr.data)).collect()
        };
        assert_eq!(others(&again.msrs), others(&state.msrs));
        assert!(other.chip_state().unwrap().clock.clock >= chips.clock.clock);

        let mut short = state.clone();
        short.xsave = vec![0; 7];
        assert!(matches!(
            second.set_state(&short, other.xsave_bytes(), scales),
            Err(StateError::VectorState { saved: 28, .. })
        ));
        let mut long = read;
        long.xsave.extend([0, 0, 1]);
        let result = second.set_state(&long, other.xsave_bytes(), scales);
        assert!(matches!(result, Err(StateError::VectorState { .. })), "{result:?}");
    }
}
