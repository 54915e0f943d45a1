//! Ids, and names for containers that were given none.

use crate::container::records::Records;

const FIRST: [&str; 32] = [
    "able", "amber", "bold", "brisk", "calm", "clear", "crisp", "deft", "eager", "fair", "fleet", "fond",
    "glad", "grand", "keen", "kind", "light", "lively", "mild", "neat", "noble", "plain", "proud", "quick",
    "quiet", "ready", "sharp", "steady", "still", "swift", "tidy", "warm",
];
const SECOND: [&str; 32] = [
    "abacus", "anvil", "beacon", "bridge", "canal", "chisel", "compass", "crane", "engine", "ferry", "flint",
    "forge", "harbor", "hinge", "kiln", "ladder", "lantern", "lathe", "lever", "loom", "mill", "pulley",
    "quarry", "rudder", "sextant", "shuttle", "signal", "spindle", "turbine", "valve", "viaduct", "winch",
];
/// How often a name is tried before it gets a number.
const TRIES: usize = 8;

/// An id that nobody else has: 64 hexadecimal digits.
pub fn new_id() -> anyhow::Result<String> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A name that no container has.
pub fn free_name(records: &Records) -> anyhow::Result<String> {
    let taken: Vec<String> = records.all()?.into_iter().map(|record| record.config.name).collect();
    for _ in 0..TRIES {
        let name = pick(getrandom::u32()?);
        if !taken.contains(&name) {
            return Ok(name);
        }
    }
    Ok(format!("{}_{:08x}", pick(getrandom::u32()?), getrandom::u32()?))
}

fn pick(number: u32) -> String {
    let number = number as usize;
    format!("{}_{}", FIRST[number % FIRST.len()], SECOND[number / FIRST.len() % SECOND.len()])
}
