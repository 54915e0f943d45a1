//! `neighbour`: how much longer work takes beside an instance that takes all that it may. docs/probes/neighbour.md

use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, Job};

/// Processes that the neighbour keeps busy, and processors that it may have.
const GREEDY: &str = "4";
const LIMIT: u32 = 1;

/// Milliseconds of each kind of work.
const WORK: &str = "300";

/// Work alone, and beside a neighbour at its limit.
pub struct Neighbour;

impl Probe for Neighbour {
    fn names(&self) -> Vec<&'static str> {
        vec!["neighbour"]
    }

    fn is_quick(&self) -> bool {
        false
    }

    fn starts(&self) -> f64 {
        3.0
    }

    fn seconds(&self) -> f64 {
        4.0
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let quiet = work(context, executor)?;
        let job = Job { cpus: Some(LIMIT), ..context.helper(["burn", GREEDY]) };
        let mut neighbour = executor.start(&context.spawner, &job)?;
        let noisy = executor
            .wait_for_line(&context.spawner, &mut neighbour, super::MARKER)
            .map_err(Error::from)
            .and_then(|_| work(context, executor));
        executor.remove(&context.spawner, neighbour)?;
        let noisy = noisy?;
        let found = quiet.iter().zip(&noisy).filter(|((_, quiet), _)| *quiet > 0.0);
        Ok(found
            .map(|((name, quiet), (_, noisy))| ("neighbour", Found::number(name, noisy / quiet)))
            .collect())
    }
}

/// What a step of work takes.
fn work(context: &Context, executor: &dyn Executor) -> Result<Vec<(&'static str, f64)>, Error> {
    let said = context.run_helper(executor, &context.helper(["micro", "cpu", WORK]))?;
    let found = said.iter().find_map(|line| line.get("found"));
    let found = found.ok_or_else(|| Error::Other("the helper said no figures".into()))?;
    let figure = |name: &str| {
        let value = found.get(name).and_then(serde_json::Value::as_f64);
        value.ok_or_else(|| Error::Other(format!("the helper said nothing of {name}")))
    };
    Ok(vec![("integer", figure("integer")?), ("random", figure("random")?)])
}
