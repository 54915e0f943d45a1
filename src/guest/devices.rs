//! Which devices a container may open and make, as an eBPF program for its control group.
//!
//! The kernel runs the program with `struct bpf_cgroup_dev_ctx`: `access << 16 | kind`, major and minor number, four bytes
//! each; what it returns is whether the access is allowed (linux/bpf.h).

/// A rule. Of those that fit an access the last one counts; what none fits is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRule {
    /// Whether the access is allowed.
    pub allow: bool,
    /// For which kind of device.
    pub kind: DeviceKind,
    /// For which major number; `None` for all.
    pub major: Option<u32>,
    /// For which minor number; `None` for all.
    pub minor: Option<u32>,
    /// For which accesses: of [`Self::MAKE`], [`Self::READ`] and [`Self::WRITE`].
    pub access: u32,
}

impl DeviceRule {
    /// mknod(2).
    pub const MAKE: u32 = 1;
    /// Opening it to read.
    pub const READ: u32 = 2;
    /// Opening it to write.
    pub const WRITE: u32 = 4;
    /// All of them.
    pub const ALL: u32 = 7;
}

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Both.
    Any,
    /// Block devices.
    Block,
    /// Character devices.
    Character,
}

// Registers.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

// Instructions: linux/bpf_common.h, linux/bpf.h.
const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const JUMP_IF_NOT: u8 = 0x55;
const JUMP_IF_EQUAL: u8 = 0x15;
const EXIT: u8 = 0x95;

/// Instructions that a rule has at most: a jump over it stays short.
const RULE_MAX: usize = 8;

#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    value: i32,
}

impl Instruction {
    fn new(code: u8, to: u8, value: u32) -> Self {
        Self { code, to, from: 0, offset: 0, value: value as i32 }
    }

    fn load(to: u8, offset: i16) -> Self {
        Self { code: LOAD_WORD, to, from: CONTEXT, offset, value: 0 }
    }

    fn bytes(self) -> [u8; 8] {
        let ([o0, o1], [v0, v1, v2, v3]) = (self.offset.to_le_bytes(), self.value.to_le_bytes());
        [self.code, self.to | self.from << 4, o0, o1, v0, v1, v2, v3]
    }
}

/// The program for rules.
pub fn device_filter(rules: &[DeviceRule]) -> Vec<u8> {
    let mut program = vec![
        Instruction::load(KIND, 0),
        Instruction { code: MOVE_REGISTER, to: ACCESS, from: KIND, offset: 0, value: 0 },
        Instruction::new(AND, KIND, 0xffff),
        Instruction::new(SHIFT_RIGHT, ACCESS, 16),
        Instruction::load(MAJOR, 4),
        Instruction::load(MINOR, 8),
    ];
    // The kernel refuses a program in which an instruction is never reached, so nothing follows a rule for everything.
    let for_everything = rules.iter().rposition(fits_everything);
    for rule in rules[for_everything.unwrap_or(0)..].iter().rev() {
        program.extend(of_rule(rule));
    }
    if for_everything.is_none() {
        program.push(Instruction::new(MOVE, RESULT, 0));
        program.push(Instruction::new(EXIT, 0, 0));
    }
    program.into_iter().flat_map(Instruction::bytes).collect()
}

fn fits_everything(rule: &DeviceRule) -> bool {
    rule.kind == DeviceKind::Any
        && rule.major.is_none()
        && rule.minor.is_none()
        && rule.access & DeviceRule::ALL == DeviceRule::ALL
}

fn of_rule(rule: &DeviceRule) -> Vec<Instruction> {
    let mut instructions = Vec::with_capacity(RULE_MAX);
    let kind = match rule.kind {
        DeviceKind::Any => None,
        DeviceKind::Block => Some(1),
        DeviceKind::Character => Some(2),
    };
    // What does not fit jumps to the end of the rule, whose place is known last.
    for (register, value) in [(KIND, kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
        instructions.extend(value.map(|value| Instruction::new(JUMP_IF_NOT, register, value)));
    }
    if rule.access != DeviceRule::ALL {
        instructions.push(Instruction {
            code: MOVE_REGISTER,
            to: SCRATCH,
            from: ACCESS,
            offset: 0,
            value: 0,
        });
        if rule.allow {
            // All that is wanted must be among what is allowed.
            instructions.push(Instruction::new(AND, SCRATCH, !rule.access & DeviceRule::ALL));
            instructions.push(Instruction::new(JUMP_IF_NOT, SCRATCH, 0));
        } else {
            // Anything of what is wanted may be among what is not.
            instructions.push(Instruction::new(AND, SCRATCH, rule.access));
            instructions.push(Instruction::new(JUMP_IF_EQUAL, SCRATCH, 0));
        }
    }
    instructions.push(Instruction::new(MOVE, RESULT, rule.allow.into()));
    instructions.push(Instruction::new(EXIT, 0, 0));
    let len = instructions.len();
    for (at, instruction) in instructions.iter_mut().enumerate() {
        if matches!(instruction.code, JUMP_IF_NOT | JUMP_IF_EQUAL) {
            instruction.offset = (len - at - 1) as i16;
        }
    }
    instructions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel does.
    fn run(program: &[u8], kind: u32, major: u32, minor: u32, access: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let bytes: [u8; 8] = program[at * 8..at * 8 + 8].try_into().unwrap();
            let (to, from) = (usize::from(bytes[1] & 15), usize::from(bytes[1] >> 4));
            let offset = i16::from_le_bytes([bytes[2], bytes[3]]);
            let value = i64::from(i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]])) as u64;
            let mut jump = |condition: bool| {
                if condition {
                    at += offset as usize
                }
            };
            match bytes[0] {
                LOAD_WORD => registers[to] = context[offset as usize / 4].into(),
                AND => registers[to] &= value,
                SHIFT_RIGHT => registers[to] >>= value,
                MOVE => registers[to] = value,
                MOVE_REGISTER => registers[to] = registers[from],
                JUMP_IF_NOT => jump(registers[to] != value),
                JUMP_IF_EQUAL => jump(registers[to] == value),
                EXIT => return registers[0] != 0,
                code => panic!("{code:#x}"),
            }
            at += 1;
        }
    }

    /// Whether the kernel's verifier finds a way to every instruction, and no way past the end.
    fn is_reached_everywhere(program: &[u8]) -> bool {
        let count = program.len() / 8;
        let (mut reached, mut open) = (vec![false; count], vec![0]);
        while let Some(at) = open.pop() {
            if at >= count {
                return false;
            }
            if std::mem::replace(&mut reached[at], true) {
                continue;
            }
            let code = program[at * 8];
            if code != EXIT {
                open.push(at + 1);
            }
            if matches!(code, JUMP_IF_NOT | JUMP_IF_EQUAL) {
                let offset = i16::from_le_bytes([program[at * 8 + 2], program[at * 8 + 3]]);
                open.push(at + 1 + offset as usize);
            }
        }
        reached.into_iter().all(|reached| reached)
    }

    #[test]
    fn every_instruction_is_reached_whatever_the_rules() {
        let all = |allow| rule(allow, DeviceKind::Any, None, None, DeviceRule::ALL);
        let null = rule(true, DeviceKind::Character, Some(1), Some(3), DeviceRule::ALL);
        let read = rule(true, DeviceKind::Any, None, None, DeviceRule::READ);
        let lists = [
            vec![],
            vec![null],
            vec![all(false), null],
            vec![null, all(true)],
            vec![all(false), null, all(true), read],
            vec![read, all(false)],
        ];
        for rules in lists {
            assert!(is_reached_everywhere(&device_filter(&rules)), "{rules:?}");
        }
        // What came before a rule for everything does not count.
        let program = device_filter(&[null, all(false), read]);
        assert!(!run(&program, CHARACTER, 1, 3, DeviceRule::WRITE));
        assert!(run(&program, CHARACTER, 1, 3, DeviceRule::READ));
        assert!(run(&device_filter(&[all(false), null]), CHARACTER, 1, 3, DeviceRule::ALL));
    }

    const BLOCK: u32 = 1;
    const CHARACTER: u32 = 2;

    fn rule(
        allow: bool,
        kind: DeviceKind,
        major: Option<u32>,
        minor: Option<u32>,
        access: u32,
    ) -> DeviceRule {
        DeviceRule { allow, kind, major, minor, access }
    }

    #[test]
    fn without_rules_nothing_is_allowed() {
        assert!(!run(&device_filter(&[]), CHARACTER, 1, 3, DeviceRule::READ));
    }

    #[test]
    fn rule_allows_what_it_names() {
        let read_write = DeviceRule::READ | DeviceRule::WRITE;
        let program = device_filter(&[rule(true, DeviceKind::Character, Some(1), Some(3), read_write)]);
        assert!(run(&program, CHARACTER, 1, 3, DeviceRule::READ));
        assert!(run(&program, CHARACTER, 1, 3, read_write));
        assert!(!run(&program, CHARACTER, 1, 3, DeviceRule::MAKE));
        assert!(!run(&program, CHARACTER, 1, 3, DeviceRule::ALL));
        assert!(!run(&program, CHARACTER, 1, 5, DeviceRule::READ));
        assert!(!run(&program, CHARACTER, 2, 3, DeviceRule::READ));
        assert!(!run(&program, BLOCK, 1, 3, DeviceRule::READ));
    }

    #[test]
    fn last_rule_counts() {
        let program = device_filter(&[
            rule(true, DeviceKind::Any, None, None, DeviceRule::ALL),
            rule(false, DeviceKind::Block, Some(254), None, DeviceRule::WRITE),
            rule(true, DeviceKind::Block, Some(254), Some(7), DeviceRule::ALL),
        ]);
        assert!(run(&program, BLOCK, 254, 0, DeviceRule::READ));
        assert!(!run(&program, BLOCK, 254, 0, DeviceRule::READ | DeviceRule::WRITE));
        assert!(run(&program, BLOCK, 254, 7, DeviceRule::WRITE));
        assert!(run(&program, CHARACTER, 254, 0, DeviceRule::WRITE));
    }
}
