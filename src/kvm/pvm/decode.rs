//! Which instructions the monitor carries out, and where their operands are.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::xstate::Save;

const EFER_LMA: u64 = 1 << 10;

/// An instruction that KVM's emulator lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// INT3, ICEBP.
    Trap {
        /// Vector of the exception that it raises.
        vector: u8,
    },
    /// CLAC, STAC: the new value of RFLAGS.AC.
    SetAc(bool),
    /// POPCNT.
    PopulationCount,
    /// CRC32.
    Crc32,
    /// MOVBE.
    MoveSwapped,
    /// CMPXCHG16B.
    CompareExchange16,
    /// XSAVE, XSAVEOPT, XSAVEC, XSAVES, with and without REX.W.
    Save {
        /// Form of the area.
        form: Save,
        /// The instruction has REX.W.
        wide: bool,
        /// XSAVES: only at CPL 0.
        supervisor: bool,
    },
    /// XRSTOR, XRSTORS, with and without REX.W.
    Restore {
        /// The instruction has REX.W.
        wide: bool,
        /// XRSTORS: only at CPL 0, and only from the compacted form.
        supervisor: bool,
    },
    /// LDMXCSR.
    LoadMxcsr,
    /// STMXCSR.
    StoreMxcsr,
    /// VZEROUPPER, or VZEROALL if `true`.
    ZeroVectors(bool),
    /// FWAIT.
    Wait,
    /// FNCLEX.
    ClearFpuExceptions,
    /// FNSTSW AX.
    StoreFpuStatus,
    /// RDPID.
    ReadProcessorId,
    /// RDTSCP.
    ReadTimestamp,
    /// XGETBV.
    ReadXcr,
    /// INVPCID.
    InvalidatePcid,
    /// LSL, or LAR if `false`.
    LoadSegment {
        /// LSL rather than LAR.
        limit: bool,
    },
    /// VERR, or VERW if `true`.
    VerifySegment {
        /// VERW rather than VERR.
        write: bool,
    },
    /// CLWB, CLFLUSHOPT, CLDEMOTE: nothing to see for a guest whose memory is cached, but the address is checked.
    CacheHint,
}

/// Bits of code that runs in segment `cs`.
pub fn bitness(cs: &kvm_segment, efer: u64) -> u32 {
    match (efer & EFER_LMA != 0 && cs.l != 0, cs.db != 0) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    }
}

/// Decodes the instruction at `rip`; `None` if `bytes` do not start with a whole and valid one.
pub fn decode(bytes: &[u8], rip: u64, bitness: u32) -> Option<Instruction> {
    if let Some((code, len)) = zero_vectors(bytes) {
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        instruction.set_len(len);
        instruction.set_next_ip(rip.wrapping_add(len as u64));
        return Some(instruction);
    }
    let mut decoder = Decoder::with_ip(bitness, bytes, rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// VZEROUPPER and VZEROALL, the only instructions with a VEX prefix here. The decoder is built without its tables for the
/// others, which would be a quarter of the monitor's private memory.
fn zero_vectors(bytes: &[u8]) -> Option<(Code, usize)> {
    // VEX.vvvv is 1111b, VEX.pp is 0, and VEX.L tells them apart (SDM volume 2, VZEROALL). The bits above are those that
    // a decoder of 32-bit code wants, where the same byte begins LES and LDS.
    let (vex, len) = match bytes {
        [0xc5, vex, 0x77, ..] if vex & 0xc0 == 0xc0 => (*vex, 3),
        [0xc4, map, vex, 0x77, ..] if map & 0xdf == 0xc1 => (*vex, 4),
        _ => return None,
    };
    match vex & 0x7f {
        0x78 => Some((Code::VEX_Vzeroupper, len)),
        0x7c => Some((Code::VEX_Vzeroall, len)),
        _ => None,
    }
}

/// What there is to do for an instruction; `None` if the monitor cannot.
pub fn operation(instruction: &Instruction) -> Option<Operation> {
    let save = |form, wide| Operation::Save { form, wide, supervisor: false };
    Some(match instruction.mnemonic() {
        Mnemonic::Int3 => Operation::Trap { vector: 3 },
        Mnemonic::Int1 => Operation::Trap { vector: 1 },
        Mnemonic::Clac => Operation::SetAc(false),
        Mnemonic::Stac => Operation::SetAc(true),
        Mnemonic::Popcnt => Operation::PopulationCount,
        Mnemonic::Crc32 => Operation::Crc32,
        Mnemonic::Movbe => Operation::MoveSwapped,
        Mnemonic::Cmpxchg16b => Operation::CompareExchange16,
        Mnemonic::Xsave => save(Save::Standard, false),
        Mnemonic::Xsave64 => save(Save::Standard, true),
        Mnemonic::Xsaveopt => save(Save::Optimized, false),
        Mnemonic::Xsaveopt64 => save(Save::Optimized, true),
        Mnemonic::Xsavec => save(Save::Compacted, false),
        Mnemonic::Xsavec64 => save(Save::Compacted, true),
        Mnemonic::Xsaves => Operation::Save { form: Save::Compacted, wide: false, supervisor: true },
        Mnemonic::Xsaves64 => Operation::Save { form: Save::Compacted, wide: true, supervisor: true },
        Mnemonic::Xrstor => Operation::Restore { wide: false, supervisor: false },
        Mnemonic::Xrstor64 => Operation::Restore { wide: true, supervisor: false },
        Mnemonic::Xrstors => Operation::Restore { wide: false, supervisor: true },
        Mnemonic::Xrstors64 => Operation::Restore { wide: true, supervisor: true },
        Mnemonic::Ldmxcsr => Operation::LoadMxcsr,
        Mnemonic::Stmxcsr => Operation::StoreMxcsr,
        Mnemonic::Vzeroupper => Operation::ZeroVectors(false),
        Mnemonic::Vzeroall => Operation::ZeroVectors(true),
        Mnemonic::Wait => Operation::Wait,
        Mnemonic::Fnclex => Operation::ClearFpuExceptions,
        Mnemonic::Fnstsw if instruction.op0_kind() == OpKind::Register => Operation::StoreFpuStatus,
        Mnemonic::Rdpid => Operation::ReadProcessorId,
        Mnemonic::Rdtscp => Operation::ReadTimestamp,
        Mnemonic::Xgetbv => Operation::ReadXcr,
        Mnemonic::Invpcid => Operation::InvalidatePcid,
        Mnemonic::Lsl => Operation::LoadSegment { limit: true },
        Mnemonic::Lar => Operation::LoadSegment { limit: false },
        Mnemonic::Verr => Operation::VerifySegment { write: false },
        Mnemonic::Verw => Operation::VerifySegment { write: true },
        Mnemonic::Clwb | Mnemonic::Clflushopt | Mnemonic::Cldemote => Operation::CacheHint,
        _ => return None,
    })
}

/// Linear address of the memory operand of 64-bit code.
pub fn linear_address(instruction: &Instruction, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
    let operand = (0..instruction.op_count()).find(|op| instruction.op_kind(*op) == OpKind::Memory)?;
    instruction.virtual_address(operand, 0, |register, _, _| match register {
        // 64-bit code has no other segment bases (SDM volume 1, §3.4.4).
        Register::FS => Some(sregs.fs.base),
        Register::GS => Some(sregs.gs.base),
        Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
        general => read_register(regs, general),
    })
}

/// Whether the memory operand counts as a stack access, which faults with another vector.
pub fn is_stack_access(instruction: &Instruction) -> bool {
    instruction.memory_segment() == Register::SS
}

/// Value of a general register of any width; `None` for other registers.
pub fn read_register(regs: &kvm_regs, register: Register) -> Option<u64> {
    let mut copy = *regs;
    let full = *slot(&mut copy, register)?;
    Some(match register.size() {
        1 if is_high_byte(register) => full >> 8 & 0xff,
        1 => full & 0xff,
        2 => full & 0xffff,
        4 => full & 0xffff_ffff,
        _ => full,
    })
}

/// Sets a general register; a 32-bit write clears the upper half (SDM volume 1, §3.4.1.1).
pub fn write_register(regs: &mut kvm_regs, register: Register, value: u64) -> Option<()> {
    let slot = slot(regs, register)?;
    *slot = match register.size() {
        1 if is_high_byte(register) => *slot & !0xff00 | (value & 0xff) << 8,
        1 => *slot & !0xff | value & 0xff,
        2 => *slot & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    Some(())
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

fn slot(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RBX => &mut regs.rbx,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_that_zero_vectors_are_known_in_every_form() {
        let decoded = |bytes: &[u8]| decode(bytes, 0x1000, 64).map(|i| (operation(&i), i.len(), i.next_ip()));
        let zero = |all, len| Some((Some(Operation::ZeroVectors(all)), len, 0x1000 + len as u64));
        assert_eq!(decoded(&[0xc5, 0xf8, 0x77, 0x90]), zero(false, 3));
        assert_eq!(decoded(&[0xc5, 0xfc, 0x77]), zero(true, 3));
        assert_eq!(decoded(&[0xc4, 0xe1, 0x78, 0x77]), zero(false, 4));
        assert_eq!(decoded(&[0xc4, 0xc1, 0xfc, 0x77]), zero(true, 4));
        // Another opcode, another map, another prefix, vvvv that names a register, and too few bytes.
        for bytes in [
            &[0xc5, 0xf8, 0x28, 0xc1][..],
            &[0xc4, 0xe2, 0x78, 0x77],
            &[0xc5, 0xf9, 0x77],
            &[0xc5, 0xf0, 0x77],
            &[0xc5, 0xf8],
        ] {
            assert_eq!(decoded(bytes), None, "{bytes:02x?}");
        }
    }
}
