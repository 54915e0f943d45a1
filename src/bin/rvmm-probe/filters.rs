//! Which system calls the filters of a process let through.
//!
//! The filters are read as a debugger reads them, and run here for every number, with arguments that are not known: a call counts as
//! allowed if some arguments may let it through.

use std::collections::{BTreeSet, HashSet};

use serde_json::json;

use crate::facts::SYSCALLS;
use crate::{Failure, say, system};

/// `AUDIT_ARCH_X86_64` of `linux/audit.h`.
const ARCHITECTURE: u32 = 0xc000_003e;

/// States of a filter that are looked at for one number at most: no filter that a kernel takes has as many.
const MAX_STATES: usize = 200_000;

/// Says how many system calls the threads of processes may make, together.
pub fn run(pids: &[&str]) -> Result<(), Failure> {
    let mut allowed = BTreeSet::new();
    let (mut threads, mut filtered) = (0, 0);
    for pid in pids {
        let pid: u32 = pid.parse()?;
        for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let name = entry?.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let filters = system::filters(thread)?;
            threads += 1;
            filtered += usize::from(!filters.is_empty());
            let passes = |number: &u32| filters.iter().all(|filter| Machine::new(filter, *number).may_pass());
            allowed.extend(SYSCALLS.flat().filter(passes));
        }
    }
    say(&json!({ "allowed": allowed.len(), "threads": threads, "filtered": filtered }));
    Ok(())
}

/// An instruction of a filter.
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// How far it jumps if its condition holds.
    pub then: u8,
    /// How far if not.
    pub otherwise: u8,
    /// Its number.
    pub k: u32,
}

/// Where a filter may be, and what it may hold: `None` is anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    at: usize,
    a: Option<u32>,
    x: Option<u32>,
    memory: [Option<u32>; 16],
}

struct Machine<'a> {
    filter: &'a [Instruction],
    number: u32,
}

impl Machine<'_> {
    fn new(filter: &[Instruction], number: u32) -> Machine<'_> {
        Machine { filter, number }
    }

    /// Whether any arguments let the call through.
    fn may_pass(&self) -> bool {
        let mut seen = HashSet::new();
        let mut todo = vec![State { at: 0, a: Some(0), x: Some(0), memory: [Some(0); 16] }];
        while let Some(state) = todo.pop() {
            if seen.len() > MAX_STATES {
                return true;
            }
            if !seen.insert(state) {
                continue;
            }
            // Whoever runs out of a filter has not been let through.
            let Some(instruction) = self.filter.get(state.at) else { continue };
            match self.step(state, *instruction) {
                Step::On(next) => todo.push(next),
                Step::Either(one, other) => todo.extend([one, other]),
                Step::End(None) => return true,
                Step::End(Some(action)) if passes(action) => return true,
                Step::End(Some(_)) | Step::Stuck => {}
            }
        }
        false
    }

    fn step(&self, state: State, instruction: Instruction) -> Step {
        let Instruction { code, then, otherwise, k } = instruction;
        let mut next = State { at: state.at + 1, ..state };
        let operand = if code & 0x08 == 0 { Some(k) } else { state.x };
        let cell = state.memory.get(k as usize).copied().flatten();
        match code & 0x07 {
            // Loads: what the kernel says of the call, a number, or memory.
            0 | 1 => {
                let value = match code & 0xe0 {
                    0x00 | 0x80 => Some(k),
                    0x20 => self.told(k),
                    0x60 => cell,
                    _ => return Step::Stuck,
                };
                *if code & 0x07 == 0 { &mut next.a } else { &mut next.x } = value;
            }
            2 | 3 => {
                let Some(cell) = next.memory.get_mut(k as usize) else { return Step::Stuck };
                *cell = if code & 0x07 == 2 { state.a } else { state.x };
            }
            4 => next.a = calculate(code & 0xf0, state.a, operand),
            5 => {
                if code & 0xf0 == 0 {
                    next.at = state.at.saturating_add(1).saturating_add(k as usize);
                    return Step::On(next);
                }
                let to = |by: u8| State { at: state.at + 1 + usize::from(by), ..state };
                let holds = state.a.zip(operand).map(|(a, b)| match code & 0xf0 {
                    0x10 => a == b,
                    0x20 => a > b,
                    0x30 => a >= b,
                    _ => a & b != 0,
                });
                return match holds {
                    Some(true) => Step::On(to(then)),
                    Some(false) => Step::On(to(otherwise)),
                    None => Step::Either(to(then), to(otherwise)),
                };
            }
            6 => return Step::End(if code & 0x18 == 0x10 { state.a } else { Some(k) }),
            _ if code & 0xf8 == 0x80 => next.a = state.x,
            _ => next.x = state.a,
        }
        Step::On(next)
    }

    /// A word of `struct seccomp_data`: number, architecture, and what is not known.
    fn told(&self, offset: u32) -> Option<u32> {
        match offset {
            0 => Some(self.number),
            4 => Some(ARCHITECTURE),
            _ => None,
        }
    }
}

enum Step {
    On(State),
    Either(State, State),
    /// The filter's answer; `None`: any.
    End(Option<u32>),
    Stuck,
}

fn calculate(operation: u16, a: Option<u32>, b: Option<u32>) -> Option<u32> {
    let (a, b) = (a?, b.or((operation == 0x80).then_some(0))?);
    match operation {
        0x00 => Some(a.wrapping_add(b)),
        0x10 => Some(a.wrapping_sub(b)),
        0x20 => Some(a.wrapping_mul(b)),
        0x30 => a.checked_div(b),
        0x40 => Some(a | b),
        0x50 => Some(a & b),
        0x60 => Some(a.checked_shl(b).unwrap_or(0)),
        0x70 => Some(a.checked_shr(b).unwrap_or(0)),
        0x80 => Some(a.wrapping_neg()),
        0x90 => a.checked_rem(b),
        _ => Some(a ^ b),
    }
}

/// Whether an answer lets the call be made: allowed, logged, or left to somebody who watches.
fn passes(action: u32) -> bool {
    matches!(action & 0xffff_0000, 0x7fff_0000 | 0x7ffc_0000 | 0x7ff0_0000 | 0x7fc0_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const TRAP: u32 = 0x0003_0000;

    fn filter(list: &[(u16, u8, u8, u32)]) -> Vec<Instruction> {
        list.iter()
            .map(|(code, then, otherwise, k)| Instruction {
                code: *code,
                then: *then,
                otherwise: *otherwise,
                k: *k,
            })
            .collect()
    }

    #[test]
    fn number_that_is_listed_passes_and_another_does_not() {
        let filter =
            filter(&[(LOAD, 0, 0, 0), (JUMP_EQUAL, 0, 1, 7), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, TRAP)]);
        assert!(Machine::new(&filter, 7).may_pass());
        assert!(!Machine::new(&filter, 8).may_pass());
    }

    #[test]
    fn call_that_passes_with_some_arguments_counts() {
        let filter = filter(&[
            (LOAD, 0, 0, 0),
            (JUMP_EQUAL, 0, 3, 16),
            (LOAD, 0, 0, 24),
            (JUMP_EQUAL, 0, 1, 0xae80),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, TRAP),
        ]);
        assert!(Machine::new(&filter, 16).may_pass());
        assert!(!Machine::new(&filter, 17).may_pass());
    }

    #[test]
    fn filter_without_an_end_lets_nothing_through() {
        assert!(!Machine::new(&filter(&[(LOAD, 0, 0, 0)]), 1).may_pass());
        assert!(!Machine::new(&[], 1).may_pass());
    }

    #[test]
    fn own_filter_is_none_and_everything_passes() {
        assert!([].iter().all(|filter: &Vec<Instruction>| Machine::new(filter, 1).may_pass()));
    }
}
