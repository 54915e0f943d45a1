//! What each instruction does.
#![allow(unsafe_code)]

use iced_x86::{Instruction, OpKind, Register};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xsave};
use kvm_ioctls::VcpuFd;

use super::access::{self, Failure, Range};
use super::decode::{self, Operation};
use super::walk::{Access, Paging};
use super::xstate::{self, HEADER_END, IMAGE_BYTES, Image, Refused, Save};
use super::{Error, Event, Processor, call};
use crate::memory::Ram;

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_PGE: u64 = 1 << 7;
const CR4_OSXSAVE: u64 = 1 << 18;

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;

const INVALID_OPCODE: u8 = 6;
const NO_DEVICE: u8 = 7;
const FPU_ERROR: u8 = 16;

/// Bit 7 of the x87 status word: an exception waits that is not masked.
const FPU_ERROR_SUMMARY: u16 = 1 << 7;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_AUX: u32 = 0xc000_0103;

/// What an instruction comes to.
#[derive(Debug)]
pub enum Step {
    /// The vCPU goes on at this address.
    Advance(u64),
    /// The instruction is done, and an exception reports it.
    Trap {
        /// Address of the next instruction.
        next: u64,
        /// The exception.
        event: Event,
    },
    /// The instruction is not done; an exception says why.
    Raise(Event),
    /// The monitor does not know how.
    Unsupported,
    /// An address that the instruction needs is not in memory.
    NotMemory(u64),
}

/// Why an instruction stops halfway.
enum Stop {
    Step(Step),
    Error(Error),
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Stop {
        Stop::Step(failure.into())
    }
}

impl From<Event> for Stop {
    fn from(event: Event) -> Stop {
        Stop::Step(Step::Raise(event))
    }
}

impl From<Refused> for Stop {
    fn from(_: Refused) -> Stop {
        Event::general_protection().into()
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Error(error)
    }
}

const UNSUPPORTED: Stop = Stop::Step(Step::Unsupported);

/// A vCPU while one instruction is carried out.
pub struct Machine<'a> {
    vcpu: &'a VcpuFd,
    ram: &'a Ram,
    regs: &'a mut kvm_regs,
    sregs: &'a kvm_sregs,
    paging: Paging,
    processor: &'a Processor,
}

impl<'a> Machine<'a> {
    /// `regs` takes the results; the caller gives them to the vCPU.
    pub fn new(
        vcpu: &'a VcpuFd,
        ram: &'a Ram,
        regs: &'a mut kvm_regs,
        sregs: &'a kvm_sregs,
        paging: Paging,
        processor: &'a Processor,
    ) -> Machine<'a> {
        Machine { vcpu, ram, regs, sregs, paging, processor }
    }

    /// Carries out the instruction that `bytes` start with.
    pub fn run(&mut self, bytes: &[u8]) -> Result<Step, Error> {
        let bitness = decode::bitness(&self.sregs.cs, self.sregs.efer);
        let Some(instruction) = decode::decode(bytes, self.regs.rip, bitness) else {
            return Ok(Step::Unsupported);
        };
        let Some(operation) = decode::operation(&instruction) else { return Ok(Step::Unsupported) };
        match self.execute(operation, &instruction) {
            Ok(None) => Ok(Step::Advance(instruction.next_ip())),
            Ok(Some(event)) => Ok(Step::Trap { next: instruction.next_ip(), event }),
            Err(Stop::Step(step)) => Ok(step),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    fn execute(&mut self, operation: Operation, instruction: &Instruction) -> Result<Option<Event>, Stop> {
        match operation {
            Operation::Trap { vector } => return Ok(Some(Event::plain(vector))),
            Operation::SetAc(on) => {
                if self.is_user() {
                    return Err(Event::plain(INVALID_OPCODE).into());
                }
                self.regs.rflags = self.regs.rflags & !AC | if on { AC } else { 0 };
            }
            Operation::PopulationCount => {
                let source = self.read_source(instruction)?;
                self.write_target(instruction, source.count_ones().into())?;
                self.set_flags(CF | PF | AF | ZF | SF | OF, if source == 0 { ZF } else { 0 });
            }
            Operation::Crc32 => {
                let width = width(instruction, 1).ok_or(UNSUPPORTED)?;
                let source = self.read_source(instruction)?.to_le_bytes();
                let crc = decode::read_register(self.regs, instruction.op0_register()).ok_or(UNSUPPORTED)?;
                let crc = source.iter().take(width).fold(crc as u32, |crc, byte| crc32c(crc, *byte));
                self.write_target(instruction, crc.into())?;
            }
            Operation::MoveSwapped => self.move_swapped(instruction)?,
            Operation::CompareExchange16 => self.compare_exchange_16(instruction)?,
            Operation::Save { form, wide, supervisor } => self.save(instruction, form, wide, supervisor)?,
            Operation::Restore { wide, supervisor } => self.restore(instruction, wide, supervisor)?,
            Operation::LoadMxcsr => {
                self.require_vectors(instruction)?;
                let value = self.read_memory(instruction, 4)? as u32;
                let mut image = self.image()?;
                xstate::set_mxcsr(&mut image, value)?;
                self.set_image(&image)?;
            }
            Operation::StoreMxcsr => {
                self.require_vectors(instruction)?;
                let value = xstate::mxcsr(&self.image()?);
                self.write_memory(instruction, value.into(), 4)?;
            }
            Operation::ZeroVectors(whole) => {
                self.require_vectors(instruction)?;
                let mut image = self.image()?;
                self.processor.layout.zero_vectors(whole, &mut image);
                self.set_image(&image)?;
            }
            Operation::Wait => {
                if self.sregs.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
                    return Err(Event::plain(NO_DEVICE).into());
                }
                if xstate::fpu_status(&self.image()?) & FPU_ERROR_SUMMARY != 0 {
                    return Err(Event::plain(FPU_ERROR).into());
                }
            }
            Operation::ClearFpuExceptions => {
                self.require_fpu()?;
                let mut image = self.image()?;
                xstate::clear_fpu_exceptions(&mut image);
                self.set_image(&image)?;
            }
            Operation::StoreFpuStatus => {
                self.require_fpu()?;
                let status = xstate::fpu_status(&self.image()?);
                self.write_target(instruction, status.into())?;
            }
            Operation::ReadProcessorId => {
                let [id] = self.msrs([MSR_TSC_AUX])?;
                self.write_target(instruction, id)?;
            }
            Operation::ReadTimestamp => {
                let [timestamp, id] = self.msrs([MSR_TSC, MSR_TSC_AUX])?;
                self.regs.rax = timestamp & 0xffff_ffff;
                self.regs.rdx = timestamp >> 32;
                self.regs.rcx = id & 0xffff_ffff;
            }
            Operation::ReadXcr => self.read_xcr()?,
            Operation::InvalidatePcid => self.invalidate_pcid(instruction)?,
            Operation::LoadSegment { limit } => self.load_segment(instruction, limit)?,
            Operation::VerifySegment { write } => self.verify_segment(instruction, write)?,
            Operation::CacheHint => {
                self.memory(instruction, 1, Access::Read)?;
            }
        }
        Ok(None)
    }

    fn is_user(&self) -> bool {
        self.sregs.ss.dpl == 3
    }

    fn require_supervisor(&self) -> Result<(), Stop> {
        if self.is_user() { Err(Event::general_protection().into()) } else { Ok(()) }
    }

    /// What every instruction on vector state needs.
    fn require_vectors(&self, instruction: &Instruction) -> Result<(), Stop> {
        let needs_xsave = instruction.encoding() != iced_x86::EncodingKind::Legacy;
        if self.sregs.cr0 & CR0_EM != 0 || needs_xsave && self.sregs.cr4 & CR4_OSXSAVE == 0 {
            return Err(Event::plain(INVALID_OPCODE).into());
        }
        if self.sregs.cr0 & CR0_TS != 0 { Err(Event::plain(NO_DEVICE).into()) } else { Ok(()) }
    }

    fn require_fpu(&self) -> Result<(), Stop> {
        if self.sregs.cr0 & (CR0_EM | CR0_TS) != 0 { Err(Event::plain(NO_DEVICE).into()) } else { Ok(()) }
    }

    fn require_xsave(&self) -> Result<(), Stop> {
        if self.sregs.cr4 & CR4_OSXSAVE == 0 {
            return Err(Event::plain(INVALID_OPCODE).into());
        }
        if self.sregs.cr0 & CR0_TS != 0 { Err(Event::plain(NO_DEVICE).into()) } else { Ok(()) }
    }

    fn set_flags(&mut self, changed: u64, value: u64) {
        self.regs.rflags = self.regs.rflags & !changed | value;
    }

    fn address(&self, instruction: &Instruction) -> Result<u64, Stop> {
        // Other modes have segment bases and limits, and code that would need them has not been met.
        if decode::bitness(&self.sregs.cs, self.sregs.efer) != 64 {
            return Err(UNSUPPORTED);
        }
        decode::linear_address(instruction, self.regs, self.sregs).ok_or(UNSUPPORTED)
    }

    /// Checks the memory operand.
    fn memory(&self, instruction: &Instruction, len: usize, access: Access) -> Result<Range, Stop> {
        let address = self.address(instruction)?;
        let stack = decode::is_stack_access(instruction);
        Ok(access::check(&self.paging, self.ram, address, len, access, stack)?)
    }

    fn read_memory(&self, instruction: &Instruction, len: usize) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        let range = self.memory(instruction, len, Access::Read)?;
        range.read(self.ram, 0, bytes.get_mut(..len).ok_or(UNSUPPORTED)?)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write_memory(&self, instruction: &Instruction, value: u64, len: usize) -> Result<(), Stop> {
        let range = self.memory(instruction, len, Access::Write)?;
        range.write(self.ram, 0, value.to_le_bytes().get(..len).ok_or(UNSUPPORTED)?)?;
        Ok(())
    }

    /// Value of the second operand, a register or memory.
    fn read_source(&self, instruction: &Instruction) -> Result<u64, Stop> {
        match instruction.op1_kind() {
            OpKind::Register => {
                decode::read_register(self.regs, instruction.op1_register()).ok_or(UNSUPPORTED)
            }
            OpKind::Memory => self.read_memory(instruction, width(instruction, 1).ok_or(UNSUPPORTED)?),
            _ => Err(UNSUPPORTED),
        }
    }

    /// Sets the first operand, a register.
    fn write_target(&mut self, instruction: &Instruction, value: u64) -> Result<(), Stop> {
        decode::write_register(self.regs, instruction.op0_register(), value).ok_or(UNSUPPORTED)
    }

    fn move_swapped(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        let stores = instruction.op0_kind() == OpKind::Memory;
        let width = width(instruction, if stores { 1 } else { 0 }).ok_or(UNSUPPORTED)?;
        let swap = |value: u64| value.swap_bytes() >> (64 - 8 * width);
        let source = self.read_source(instruction)?;
        if stores {
            self.write_memory(instruction, swap(source), width)
        } else {
            self.write_target(instruction, swap(source))
        }
    }

    fn compare_exchange_16(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        if !self.address(instruction)?.is_multiple_of(16) {
            return Err(Event::general_protection().into());
        }
        let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let range = self.memory(instruction, 16, Access::Write)?;
        let expected = pair(self.regs.rdx, self.regs.rax);
        let new = pair(self.regs.rcx, self.regs.rbx);
        let found = range.compare_exchange_16(self.ram, expected, new)?.ok_or(UNSUPPORTED)?;
        if found == expected {
            self.set_flags(ZF, ZF);
        } else {
            self.set_flags(ZF, 0);
            self.regs.rax = found as u64;
            self.regs.rdx = (found >> 64) as u64;
        }
        Ok(())
    }

    /// The requested-feature bitmap of a save or restore instruction, and XCR0.
    fn requested(&self) -> Result<(u64, u64), Stop> {
        let xcr0 = self.xcr0()?;
        if xcr0 & !self.processor.layout.known() != 0 {
            // A component that KVM does not hand out, such as AMX tiles.
            return Err(UNSUPPORTED);
        }
        Ok((xcr0 & (self.regs.rdx << 32 | self.regs.rax & 0xffff_ffff), xcr0))
    }

    /// XSAVE and its kin. IA32_XSS counts as 0: KVM has no supervisor state on these hosts.
    fn save(
        &mut self,
        instruction: &Instruction,
        form: Save,
        wide: bool,
        supervisor: bool,
    ) -> Result<(), Stop> {
        self.require_xsave()?;
        if supervisor {
            self.require_supervisor()?;
        }
        let (requested, _) = self.requested()?;
        if !self.address(instruction)?.is_multiple_of(64) {
            return Err(Event::general_protection().into());
        }
        let layout = &self.processor.layout;
        let extent = layout.extent(requested, (form == Save::Compacted).then_some(requested));
        let range = self.memory(instruction, extent, Access::Write)?;
        let mut area = [0; IMAGE_BYTES];
        if form != Save::Compacted {
            range.read(self.ram, 512, area.get_mut(512..HEADER_END).ok_or(UNSUPPORTED)?)?;
        }
        let old = xstate::in_use(&area);
        let image = self.image()?;
        let parts = layout.save(form, wide, requested, &image, old, &mut area);
        for (start, end) in parts.iter() {
            range.write(self.ram, start, area.get(start..end).ok_or(UNSUPPORTED)?)?;
        }
        Ok(())
    }

    fn restore(&mut self, instruction: &Instruction, wide: bool, supervisor: bool) -> Result<(), Stop> {
        self.require_xsave()?;
        if supervisor {
            self.require_supervisor()?;
        }
        let (requested, xcr0) = self.requested()?;
        if !self.address(instruction)?.is_multiple_of(64) {
            return Err(Event::general_protection().into());
        }
        let layout = &self.processor.layout;
        let mut area = [0; IMAGE_BYTES];
        let range = self.memory(instruction, HEADER_END, Access::Read)?;
        range.read(self.ram, 0, area.get_mut(..HEADER_END).ok_or(UNSUPPORTED)?)?;
        let xcomp_bv = layout.check_header(&area, xcr0, supervisor)?;
        let extent = layout.restored_extent(requested, &area, xcomp_bv);
        if extent > HEADER_END {
            let range = self.memory(instruction, extent, Access::Read)?;
            let rest = area.get_mut(HEADER_END..extent).ok_or(UNSUPPORTED)?;
            range.read(self.ram, HEADER_END, rest)?;
        }
        let mut image = self.image()?;
        layout.restore(wide, requested, &area, xcomp_bv, &mut image)?;
        self.set_image(&image)?;
        Ok(())
    }

    fn read_xcr(&mut self) -> Result<(), Stop> {
        if self.sregs.cr4 & CR4_OSXSAVE == 0 {
            return Err(Event::plain(INVALID_OPCODE).into());
        }
        let xcr0 = self.xcr0()?;
        let value = match self.regs.rcx as u32 {
            0 => xcr0,
            1 => xcr0 & xstate::in_use(&self.image()?),
            _ => return Err(Event::general_protection().into()),
        };
        self.regs.rax = value & 0xffff_ffff;
        self.regs.rdx = value >> 32;
        Ok(())
    }

    /// INVPCID. Whatever it names, everything is invalidated, which the guest cannot tell apart.
    fn invalidate_pcid(&mut self, instruction: &Instruction) -> Result<(), Stop> {
        self.require_supervisor()?;
        let kind = decode::read_register(self.regs, instruction.op0_register()).ok_or(UNSUPPORTED)?;
        self.memory(instruction, 16, Access::Read)?;
        if kind > 3 {
            return Err(Event::general_protection().into());
        }
        // A change of CR4.PGE makes KVM drop what it has cached of the guest's tables.
        let toggled = kvm_sregs { cr4: self.sregs.cr4 ^ CR4_PGE, ..*self.sregs };
        call("KVM_SET_SREGS", self.vcpu.set_sregs(&toggled))?;
        call("KVM_SET_SREGS", self.vcpu.set_sregs(self.sregs))?;
        Ok(())
    }

    /// A descriptor of the GDT; `None` if the selector names none. LDTs are not looked into.
    fn descriptor(&self, selector: u64) -> Result<Option<u64>, Stop> {
        let offset = selector & 0xfff8;
        let is_local = selector & 4 != 0;
        if offset == 0 || is_local || offset + 7 > u64::from(self.sregs.gdt.limit) {
            return Ok(None);
        }
        let address = self.sregs.gdt.base.wrapping_add(offset);
        let supervisor = Paging::new(self.regs, self.sregs, false, self.processor.physical_bits);
        let range = access::check(&supervisor, self.ram, address, 8, Access::Read, false)?;
        let mut bytes = [0; 8];
        range.read(self.ram, 0, &mut bytes)?;
        Ok(Some(u64::from_le_bytes(bytes)))
    }

    /// Selector operand of LAR, LSL, VERR, VERW.
    fn selector(&self, instruction: &Instruction, operand: u32) -> Result<u64, Stop> {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                Ok(decode::read_register(self.regs, register).ok_or(UNSUPPORTED)? & 0xffff)
            }
            OpKind::Memory => self.read_memory(instruction, 2),
            _ => Err(UNSUPPORTED),
        }
    }

    /// Whether the descriptor may be used from this privilege level by way of `selector`.
    fn is_accessible(&self, selector: u64, descriptor: u64) -> bool {
        let (dpl, kind) = (descriptor >> 45 & 3, descriptor >> 40 & 0x1f);
        let conforming_code = kind & 0b11100 == 0b11100;
        let cpl = u64::from(self.sregs.ss.dpl);
        conforming_code || dpl >= cpl.max(selector & 3)
    }

    fn load_segment(&mut self, instruction: &Instruction, limit: bool) -> Result<(), Stop> {
        let selector = self.selector(instruction, 1)?;
        let descriptor = self.descriptor(selector)?.filter(|descriptor| {
            let kind = descriptor >> 40 & 0x1f;
            // Code, data, and the system types that 64-bit mode has: LDT, both TSS; call gates for LAR only.
            let known = kind & 0x10 != 0 || matches!(kind, 0x2 | 0x9 | 0xb) || !limit && kind == 0xc;
            known && self.is_accessible(selector, *descriptor)
        });
        let Some(descriptor) = descriptor else {
            self.set_flags(ZF, 0);
            return Ok(());
        };
        let value = if limit {
            let raw = descriptor & 0xffff | descriptor >> 32 & 0xf_0000;
            if descriptor >> 55 & 1 != 0 { raw << 12 | 0xfff } else { raw }
        } else {
            descriptor >> 32 & 0x00ff_ff00
        };
        self.write_target(instruction, value)?;
        self.set_flags(ZF, ZF);
        Ok(())
    }

    fn verify_segment(&mut self, instruction: &Instruction, write: bool) -> Result<(), Stop> {
        let selector = self.selector(instruction, 0)?;
        let usable = self.descriptor(selector)?.is_some_and(|descriptor| {
            let kind = descriptor >> 40 & 0x1f;
            let (memory, code, bit) = (kind & 0x10 != 0, kind & 8 != 0, kind & 2 != 0);
            let allowed = if write { !code && bit } else { !code || bit };
            memory && allowed && self.is_accessible(selector, descriptor)
        });
        self.set_flags(ZF, if usable { ZF } else { 0 });
        Ok(())
    }

    fn xcr0(&self) -> Result<u64, Error> {
        let xcrs = call("KVM_GET_XCRS", self.vcpu.get_xcrs())?;
        let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
        let xcr0 = xcrs.xcrs.iter().take(count).find(|register| register.xcr == 0);
        Ok(xcr0.map_or(1, |register| register.value))
    }

    fn msrs<const N: usize>(&self, indices: [u32; N]) -> Result<[u64; N], Stop> {
        let entries = indices.map(|index| kvm_msr_entry { index, ..Default::default() });
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| UNSUPPORTED)?;
        if call("KVM_GET_MSRS", self.vcpu.get_msrs(&mut msrs))? != N {
            return Err(UNSUPPORTED);
        }
        let mut values = [0; N];
        for (value, entry) in values.iter_mut().zip(msrs.as_slice()) {
            *value = entry.data;
        }
        Ok(values)
    }

    fn image(&self) -> Result<Image, Error> {
        let xsave = call("KVM_GET_XSAVE", self.vcpu.get_xsave())?;
        let mut image = [0; IMAGE_BYTES];
        for (bytes, word) in image.chunks_exact_mut(4).zip(&xsave.region) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(image)
    }

    fn set_image(&self, image: &Image) -> Result<(), Error> {
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(image.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        // SAFETY: KVM reads 4096 bytes, the size of the structure, as long as this process has not asked for
        // components that are only given on request (`ARCH_REQ_XCOMP_GUEST_PERM`), which rvmm never does.
        call("KVM_SET_XSAVE", unsafe { self.vcpu.set_xsave(&xsave) })
    }
}

/// Bytes of an operand: of the register, or as the instruction says for memory.
fn width(instruction: &Instruction, operand: u32) -> Option<usize> {
    let width = match instruction.op_kind(operand) {
        OpKind::Register => match instruction.op_register(operand) {
            Register::None => return None,
            register => register.size(),
        },
        OpKind::Memory => instruction.memory_size().size(),
        _ => return None,
    };
    matches!(width, 1 | 2 | 4 | 8).then_some(width)
}

/// One byte of CRC-32C, bits reflected (SDM volume 2, CRC32).
fn crc32c(crc: u32, byte: u8) -> u32 {
    (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 })
}
