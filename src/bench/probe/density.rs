//! `density`: how many idle instances fit into an amount of memory, found by starting them. docs/probes/density.md

use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, Instance};

/// The memory that they share.
const MEMORY_BYTES: f64 = 256.0 * 1024.0 * 1024.0;

/// Instances at most: more say nothing that these do not.
const MOST: usize = 128;

/// Instances before the first look at their memory.
const FIRST: usize = 4;

/// Idle instances, one after the other.
pub struct Density;

impl Probe for Density {
    fn names(&self) -> Vec<&'static str> {
        vec!["density"]
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn is_quick(&self) -> bool {
        false
    }

    fn starts(&self) -> f64 {
        40.0
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let mut instances = vec![];
        let result = fill(context, executor, &mut instances);
        for instance in instances {
            executor.remove(&context.spawner, instance)?;
        }
        Ok(vec![("density", result?)])
    }
}

fn fill(context: &Context, executor: &dyn Executor, instances: &mut Vec<Instance>) -> Result<Found, Error> {
    let (mut before, mut step) = (0.0, FIRST);
    loop {
        for _ in 0..step {
            let mut instance = executor.start(&context.spawner, &context.helper(["idle"]))?;
            let spoke = executor.wait_for_line(&context.spawner, &mut instance, super::MARKER);
            instances.push(instance);
            spoke?;
        }
        let mut processes = vec![];
        for instance in instances.iter() {
            for process in executor.processes(&context.spawner, instance)? {
                // A keeper that several share counts once.
                if !processes.contains(&process) {
                    processes.push(process);
                }
            }
        }
        let taken = super::memory::total(&processes)?;
        if taken > MEMORY_BYTES {
            // Between the last two looks, as if each of them took the same.
            let over = (taken - MEMORY_BYTES) / (taken - before).max(1.0) * step as f64;
            return Ok(Found::number("instances", (instances.len() as f64 - over.ceil()).max(0.0)));
        }
        if instances.len() >= MOST {
            let why = format!("more than {MOST}: these took only {:.0} MiB", taken / 1_048_576.0);
            return Ok(Found::failed("instances", why));
        }
        before = taken;
        // As many as will fill it, if they take what those before took; not more than doubling.
        let each = (taken / instances.len() as f64).max(1.0);
        let fill = ((MEMORY_BYTES - taken) / each).ceil();
        step = (fill as usize).clamp(1, instances.len()).min(MOST - instances.len());
    }
}
