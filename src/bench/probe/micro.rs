//! `cpu`, `syscall`, `fault`, `fork`, `switch`: what single operations cost inside. docs/probes/micro.md

use super::{Context, Error, Found, Probe};
use crate::bench::executor::Executor;

/// The groups of the helper; each is a probe of its own.
const GROUPS: [&str; 5] = ["cpu", "syscall", "fault", "fork", "switch"];

/// Any of the groups, in one instance for each sample: starting one may cost more than measuring in it.
pub struct Micro {
    groups: Vec<&'static str>,
}

impl Micro {
    /// All groups.
    pub fn all() -> Micro {
        Micro { groups: GROUPS.to_vec() }
    }

    /// Only those that are asked for.
    pub fn only(names: &[String]) -> Micro {
        Micro { groups: GROUPS.into_iter().filter(|group| names.iter().any(|name| name == group)).collect() }
    }
}

impl Probe for Micro {
    fn names(&self) -> Vec<&'static str> {
        self.groups.clone()
    }

    fn weight(&self) -> f64 {
        3.0
    }

    fn seconds(&self) -> f64 {
        0.5
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let time = if context.quick { "10" } else { "50" };
        let job = context.helper(["micro", &self.groups.join(","), time]);
        let mut found = vec![];
        for line in context.run_helper(executor, &job)? {
            let group = line.get("group").and_then(|group| group.as_str()).unwrap_or_default();
            let Some(group) = self.groups.iter().find(|known| **known == group) else { continue };
            for (metric, value) in line.get("found").and_then(|found| found.as_object()).into_iter().flatten()
            {
                if let Some(value) = value.as_f64() {
                    found.push((*group, Found::number(metric, value)));
                }
            }
        }
        Ok(found)
    }
}
