//! Which devices a container may use: lines for the controller of version 1, a program for version 2.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::super::sys::attach_device_program;
use super::write;

/// Letters of an access and the bits that they are in a program (linux/bpf.h: `BPF_DEVCG_ACC_*`).
const ACCESS: [(char, u64); 3] = [('m', 1), ('r', 2), ('w', 4)];

/// Writes rules for the controller of version 1.
pub(super) fn write_rules(directory: &Path, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    for rule in rules {
        let file = if rule.allow() { "devices.allow" } else { "devices.deny" };
        write(&directory.join(file), &rule.to_string())?;
    }
    Ok(())
}

/// Attaches a program for the rules to a group of version 2.
pub(super) fn attach(directory: &File, rules: &[LinuxDeviceCgroup]) -> io::Result<()> {
    attach_device_program(directory.as_fd(), &program(rules))
}

/// An instruction: code, registers (destination in the lower half of a byte), jump, value.
fn instruction(code: u8, to: u8, from: u8, jump: i16, value: i32) -> u64 {
    let mut bytes = [code, from << 4 | to, 0, 0, 0, 0, 0, 0];
    bytes[2..4].copy_from_slice(&jump.to_ne_bytes());
    bytes[4..].copy_from_slice(&value.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

// Codes of the instructions that are used (the kernel's Documentation/bpf/standardization/instruction-set.rst).
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xbc;
const MOVE_VALUE: u8 = 0xb4;
const JUMP_NOT_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

/// The program: the last rule that fits decides, so they are looked at from the last to the first.
///
/// It gets kind and access in one word (access in the upper half), then major and minor number.
fn program(rules: &[LinuxDeviceCgroup]) -> Vec<u64> {
    let (result, context, kind, access, major, minor, part) = (0, 1, 2, 3, 4, 5, 6);
    let mut program = vec![
        instruction(LOAD_WORD, kind, context, 0, 0),
        instruction(MOVE, access, kind, 0, 0),
        instruction(AND, kind, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, access, 0, 0, 16),
        instruction(LOAD_WORD, major, context, 4, 0),
        instruction(LOAD_WORD, minor, context, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut block = vec![];
        // Tests whose failure leads to the next rule: code, register, value.
        let mut tests: Vec<(u8, i32)> = vec![];
        match rule.typ() {
            Some(LinuxDeviceType::B) => tests.push((kind, 1)),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => tests.push((kind, 2)),
            _ => {}
        }
        let number =
            |number: Option<i64>| number.and_then(|number| i32::try_from(number).ok()).filter(|n| *n >= 0);
        tests.extend(number(rule.major()).map(|number| (major, number)));
        tests.extend(number(rule.minor()).map(|number| (minor, number)));
        let letters = rule.access().as_deref().unwrap_or_default();
        let bits =
            ACCESS.iter().filter(|(letter, _)| letters.contains(*letter)).fold(0, |all, (_, bit)| all | bit);
        let any_access = bits == 7;
        let len = tests.len() + if any_access { 0 } else { 3 } + 2;
        for (register, value) in tests {
            block.push(instruction(JUMP_NOT_EQUAL, register, 0, skip(len, block.len()), value));
        }
        if !any_access {
            // An allowed access has no bit besides those of the rule; a denied one has any of them.
            let mask = if rule.allow() { !bits & 7 } else { bits };
            block.push(instruction(MOVE, part, access, 0, 0));
            block.push(instruction(AND, part, 0, 0, mask as i32));
            let code = if rule.allow() { JUMP_NOT_EQUAL } else { JUMP_EQUAL };
            block.push(instruction(code, part, 0, skip(len, block.len()), 0));
        }
        block.push(instruction(MOVE_VALUE, result, 0, 0, i32::from(rule.allow())));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        program.extend(block);
        if rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A)
            && rule.major().is_none()
            && rule.minor().is_none()
            && any_access
        {
            // It fits everything; the kernel takes no instructions that cannot be reached.
            return program;
        }
    }
    program.push(instruction(MOVE_VALUE, result, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

const JUMP_EQUAL: u8 = 0x16;

/// The jump from a place in a block over its rest.
fn skip(len: usize, at: usize) -> i16 {
    (len - at - 1) as i16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program says (1: allowed).
    fn run(program: &[u64], kind: u32, major: u32, minor: u32, access: u32) -> u32 {
        let words = [access << 16 | kind, major, minor];
        let mut registers = [0u32; 11];
        let mut at = 0usize;
        loop {
            let one = program[at].to_ne_bytes();
            let (to, from) = (usize::from(one[1] & 15), usize::from(one[1] >> 4));
            let jump = i16::from_ne_bytes([one[2], one[3]]);
            let value = i32::from_ne_bytes([one[4], one[5], one[6], one[7]]) as u32;
            at += 1;
            match one[0] {
                LOAD_WORD => registers[to] = words[jump as usize / 4],
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                MOVE => registers[to] = registers[from],
                MOVE_VALUE => registers[to] = value,
                JUMP_NOT_EQUAL if registers[to] != value => at += jump as usize,
                JUMP_EQUAL if registers[to] == value => at += jump as usize,
                JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                EXIT => return registers[0],
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn rule(
        allow: bool,
        kind: LinuxDeviceType,
        major: Option<i64>,
        minor: Option<i64>,
        access: &str,
    ) -> LinuxDeviceCgroup {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(allow);
        rule.set_typ(Some(kind));
        rule.set_major(major);
        rule.set_minor(minor);
        rule.set_access(Some(access.into()));
        rule
    }

    const BLOCK: u32 = 1;
    const CHARACTER: u32 = 2;
    const MAKE: u32 = 1;
    const READ: u32 = 2;
    const WRITE: u32 = 4;

    #[test]
    fn last_rule_that_fits_decides() {
        let rules = [
            rule(false, LinuxDeviceType::A, None, None, "rwm"),
            rule(true, LinuxDeviceType::C, None, None, "m"),
            rule(true, LinuxDeviceType::C, Some(1), Some(3), "rwm"),
            rule(true, LinuxDeviceType::B, Some(8), None, "r"),
            rule(false, LinuxDeviceType::C, Some(1), Some(7), "w"),
        ];
        let program = program(&rules);
        let say = |kind, major, minor, access| run(&program, kind, major, minor, access);
        assert_eq!(say(CHARACTER, 1, 3, READ | WRITE), 1);
        assert_eq!(say(CHARACTER, 9, 9, MAKE), 1);
        assert_eq!(say(CHARACTER, 9, 9, MAKE | READ), 0);
        assert_eq!(say(BLOCK, 8, 1, READ), 1);
        assert_eq!(say(BLOCK, 8, 1, READ | WRITE), 0);
        assert_eq!(say(BLOCK, 9, 1, READ), 0);
        assert_eq!(say(CHARACTER, 1, 7, WRITE), 0);
        assert_eq!(say(CHARACTER, 1, 7, MAKE), 1);
    }

    #[test]
    fn everything_may_be_allowed_and_nothing_said_is_nothing_allowed() {
        assert_eq!(
            run(&program(&[rule(true, LinuxDeviceType::A, None, None, "rwm")]), BLOCK, 8, 0, WRITE),
            1
        );
        assert_eq!(run(&program(&[]), CHARACTER, 1, 3, READ), 0);
    }
}
