//! One vCPU: its state, and running it until something needs the monitor.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_run, kvm_sregs,
    kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::Error;
use super::calls::call;

/// Why `KVM_RUN` returned, free of KVM's own types.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads `data.len() / width` times `width` bytes from an I/O port.
    PortRead {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// To be filled before the vCPU runs again.
        data: &'a mut [u8],
    },
    /// The guest writes `data.len() / width` times `width` bytes to an I/O port.
    PortWrite {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// What was written.
        data: &'a [u8],
    },
    /// The guest reads where there is no memory.
    MmioRead {
        /// Guest physical address.
        addr: u64,
        /// To be filled before the vCPU runs again.
        data: &'a mut [u8],
    },
    /// The guest writes where there is no memory.
    MmioWrite {
        /// Guest physical address.
        addr: u64,
        /// What was written.
        data: &'a [u8],
    },
    /// A signal, or an immediate exit that was asked for.
    Interrupted,
    /// A triple fault, or an INIT that nobody can take.
    TripleFault,
    /// The guest asked KVM itself for a reset.
    Reset,
    /// The guest asked KVM itself to be powered off.
    PowerOff,
    /// The guest told KVM that it crashed.
    Crash,
    /// KVM met an instruction that it cannot emulate; up to 15 bytes of it, fewer where KVM does not know them.
    EmulationFailure {
        /// The instruction's bytes.
        instruction: [u8; 15],
        /// How many of them are known.
        len: usize,
    },
    /// KVM gave up for another reason.
    InternalError {
        /// KVM's number of the reason.
        suberror: u32,
    },
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
    },
    /// The host could not provide a page of guest memory.
    MemoryFault {
        /// Guest physical address, where KVM tells.
        addr: Option<u64>,
    },
    /// An exit that rvmm does not ask for.
    Unexpected(String),
}

thread_local! {
    /// `immediate_exit` of the vCPU that runs on this thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer was set by this thread's `Vcpu::bind_to_thread`, and is taken back before the mapping
        // that it points into goes away; the byte is only ever accessed atomically while it is set.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Relaxed);
    }
}

/// Installs the process-wide handler of the signal that interrupts vCPUs. Once, before any vCPU thread starts.
pub fn register_kick_signal() -> Result<(), Error> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(|error| Error::Signal(error.into()))
}

/// Interrupts the vCPU that a thread runs: its current or its next `KVM_RUN` returns [`Exit::Interrupted`].
pub trait Kick {
    /// See the trait.
    fn kick(&self);
}

impl<T> Kick for JoinHandle<T> {
    fn kick(&self) {
        // SAFETY: the handle has not been joined (it is borrowed), so the thread's id is still its own.
        unsafe { libc::pthread_kill(self.as_pthread_t(), SIGRTMIN()) };
    }
}

/// A virtual processor.
pub struct Vcpu {
    index: u32,
    fd: VcpuFd,
}

impl Vcpu {
    pub(super) fn new(index: u32, fd: VcpuFd) -> Vcpu {
        Vcpu { index, fd }
    }

    /// Number of the vCPU, from 0 on; also its APIC id.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The handle of kvm-ioctls, for the state calls.
    pub fn fd(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Sets what CPUID shows. To be called before registers are set.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), Error> {
        call("KVM_SET_CPUID2", || self.fd.set_cpuid2(cpuid))
    }

    /// Sets model-specific registers, all or none reported as set.
    pub fn set_msrs(&self, msrs: &Msrs) -> Result<(), Error> {
        let set = call("KVM_SET_MSRS", || self.fd.set_msrs(msrs))?;
        match msrs.as_slice().get(set) {
            Some(refused) => Err(Error::Msr(refused.index)),
            None => Ok(()),
        }
    }

    /// Reads a model-specific register.
    pub fn msr(&self, index: u32) -> Result<u64, Error> {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::Msr(index))?;
        match call("KVM_GET_MSRS", || self.fd.get_msrs(&mut msrs))? {
            0 => Err(Error::Msr(index)),
            _ => Ok(msrs.as_slice().first().map_or(0, |entry| entry.data)),
        }
    }

    /// Reads the special registers.
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        call("KVM_GET_SREGS", || self.fd.get_sregs())
    }

    /// Sets the general and the special registers.
    pub fn set_registers(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), Error> {
        call("KVM_SET_SREGS", || self.fd.set_sregs(sregs))?;
        call("KVM_SET_REGS", || self.fd.set_regs(regs))
    }

    /// Sets the x87 and SSE state.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        call("KVM_SET_FPU", || self.fd.set_fpu(fpu))
    }

    /// Sets XCR0, which says what XSAVE saves. To be called after [`Vcpu::set_cpuid`].
    pub fn set_xcr0(&self, value: u64) -> Result<(), Error> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = value;
        call("KVM_SET_XCRS", || self.fd.set_xcrs(&xcrs))
    }

    /// Reads the local APIC's page.
    pub fn lapic(&self) -> Result<kvm_lapic_state, Error> {
        call("KVM_GET_LAPIC", || self.fd.get_lapic())
    }

    /// Sets the local APIC's page.
    pub fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), Error> {
        call("KVM_SET_LAPIC", || self.fd.set_lapic(lapic))
    }

    /// Tells a guest with a KVM clock that it was stopped, so that its watchdogs do not take that for a lock-up.
    pub fn tell_paused(&self) {
        // Fails for a guest that has not set up such a clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Says that the calling thread will run this vCPU, so that [`Kick`] reaches it. Until the value is dropped.
    pub fn bind_to_thread(&mut self) -> BoundVcpu<'_> {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        BoundVcpu { vcpu: self }
    }
}

/// A vCPU that the current thread runs.
pub struct BoundVcpu<'a> {
    vcpu: &'a mut Vcpu,
}

impl Drop for BoundVcpu<'_> {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(null_mut());
    }
}

impl BoundVcpu<'_> {
    /// The vCPU, for its state.
    pub fn vcpu(&mut self) -> &mut Vcpu {
        self.vcpu
    }

    /// Takes back an immediate exit, before the vCPU is run again.
    pub fn clear_kick(&mut self) {
        let flag = IMMEDIATE_EXIT.get();
        // SAFETY: set by `bind_to_thread` from this very vCPU, which this value borrows.
        unsafe { AtomicU8::from_ptr(flag) }.store(0, Ordering::Relaxed);
    }

    /// Runs the guest until something needs the monitor.
    pub fn run(&mut self) -> Result<Exit<'_>, Error> {
        let fd = &mut self.vcpu.fd;
        let shared: *const kvm_run = fd.get_kvm_run();
        let exit = match fd.run() {
            Ok(exit) => exit,
            Err(error) => {
                return match error.errno() {
                    libc::EINTR | libc::EAGAIN => Ok(Exit::Interrupted),
                    libc::EFAULT => Ok(Exit::MemoryFault { addr: None }),
                    errno => {
                        Err(Error::Call { call: "KVM_RUN", source: io::Error::from_raw_os_error(errno) })
                    }
                };
            }
        };
        Ok(match exit {
            VcpuExit::IoIn(port, data) => {
                // SAFETY: `shared` is the vCPU's `kvm_run`, and this is the exit that `port_width` is about.
                let width = unsafe { port_width(shared) };
                Exit::PortRead { port, width, data }
            }
            VcpuExit::IoOut(port, data) => {
                // SAFETY: as above.
                let width = unsafe { port_width(shared) };
                Exit::PortWrite { port, width, data }
            }
            VcpuExit::MmioRead(addr, data) => Exit::MmioRead { addr, data },
            VcpuExit::MmioWrite(addr, data) => Exit::MmioWrite { addr, data },
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Shutdown => Exit::TripleFault,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Exit::PowerOff,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => Exit::Crash,
            // SAFETY: as above, for `internal_error`.
            VcpuExit::InternalError => unsafe { internal_error(shared) },
            VcpuExit::FailEntry(reason, _) => Exit::FailEntry { reason },
            VcpuExit::MemoryFault { gpa, .. } => Exit::MemoryFault { addr: Some(gpa) },
            other => Exit::Unexpected(format!("{other:?}")),
        })
    }
}

/// Bytes of one access of the latest port exit; string instructions make several accesses in one exit.
///
/// # Safety
///
/// `shared` is the mapped `kvm_run` of a vCPU that has just left the guest with `KVM_EXIT_IO`.
unsafe fn port_width(shared: *const kvm_run) -> usize {
    // SAFETY: the caller's promise; `io` is the union's member for this exit, its fields are plain integers, and a
    // raw read makes no reference that could overlap the data that follows the structure.
    usize::from(unsafe { (&raw const (*shared).__bindgen_anon_1.io.size).read() }).max(1)
}

/// Reads the details of `KVM_EXIT_INTERNAL_ERROR`.
///
/// # Safety
///
/// `shared` is the mapped `kvm_run` of a vCPU that has just left the guest with that exit.
unsafe fn internal_error(shared: *const kvm_run) -> Exit<'static> {
    // SAFETY: the caller's promise; both are the union's members for this exit and hold plain integers: `internal`,
    // and its form for a failed emulation (`emulation_failure` in `linux/kvm.h`).
    let (details, failure) = unsafe {
        let union = &raw const (*shared).__bindgen_anon_1;
        ((&raw const (*union).internal).read(), (&raw const (*union).emulation_failure).read())
    };
    if details.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return Exit::InternalError { suberror: details.suberror };
    }
    let mut instruction = [0; 15];
    let mut len = 0;
    if failure.ndata >= 1 && failure.flags & KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES != 0 {
        // SAFETY: plain bytes, filled in when the flag is set.
        let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        instruction = bytes.insn_bytes;
        len = usize::from(bytes.insn_size).min(instruction.len());
    }
    Exit::EmulationFailure { instruction, len }
}

/// `KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES` of `linux/kvm.h`.
const KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: u64 = 1;
