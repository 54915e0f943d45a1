//! `exits`: how often a guest leaves to its monitor, and for what. docs/probes/exits.md

use std::collections::BTreeMap;
use std::fs;

use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, PATIENCE};
use crate::bench::process::Invocation;
use crate::bench::results::{Better, Metric, Unit};

/// Seconds that a guest rests, so that its exits in that time are seen.
const REST_SECONDS: u32 = 2;

/// What `rvmm --metrics` counts over a boot, and over a rest.
pub struct Exits;

impl Probe for Exits {
    fn names(&self) -> Vec<&'static str> {
        vec!["exits"]
    }

    fn starts(&self) -> f64 {
        1.5
    }

    fn seconds(&self) -> f64 {
        f64::from(REST_SECONDS)
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        if executor.name() != "rvmm-microvm" {
            return Err(Error::Other("only rvmm counts the exits of a guest".into()));
        }
        let boot = count(context, "true")?;
        let rest = count(context, &format!("sleep {REST_SECONDS}"))?;
        let all = |exits: &BTreeMap<String, f64>| exits.values().sum::<f64>();
        let mut found = vec![
            Found::number("boot", all(&boot)),
            Found::number("idle", ((all(&rest) - all(&boot)) / f64::from(REST_SECONDS)).max(0.0)),
        ];
        for (reason, count) in boot.iter().filter(|(_, count)| **count > 0.0) {
            found.push(Found {
                means: Some(Metric {
                    probe: "exits".into(),
                    name: format!("boot_{reason}"),
                    title: format!("of a boot: {}", reason.replace('_', " ")),
                    unit: Unit::Count,
                    better: Better::Lower,
                    exact: false,
                }),
                ..Found::number(&format!("boot_{reason}"), *count)
            });
        }
        Ok(found.into_iter().map(|found| ("exits", found)).collect())
    }
}

/// The exits of a small guest that runs a command, by reason.
fn count(context: &Context, command: &str) -> Result<BTreeMap<String, f64>, Error> {
    let page = context.directory.join("exits.prom");
    let initrd = context.guest.join("initrd.cpio");
    let invocation = Invocation::new([context.rvmm.to_string_lossy()])
        .and(["--initrd".to_owned(), initrd.to_string_lossy().into_owned()])
        .and([
            "--memory".to_owned(),
            "128M".into(),
            "--cmdline".into(),
            format!("quiet rvmm.exec=\"{command}\""),
        ])
        .and(["--metrics".to_owned(), page.to_string_lossy().into_owned()]);
    context.note(&invocation);
    context.spawner.output(&invocation, PATIENCE)?;
    let text =
        fs::read_to_string(&page).map_err(|error| Error::Other(format!("rvmm left no metrics: {error}")))?;
    let exits = reasons(&text);
    match exits.is_empty() {
        true => Err(Error::Other("rvmm counted no exits".into())),
        false => Ok(exits),
    }
}

/// What a page of metrics says of exits.
fn reasons(page: &str) -> BTreeMap<String, f64> {
    let line = |line: &str| {
        let (reason, count) = line.strip_prefix("rvmm_vcpu_exits_total{reason=\"")?.split_once("\"}")?;
        let safe =
            reason.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' });
        Some((safe.collect(), count.trim().parse().ok()?))
    };
    page.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_read_by_reason() {
        let page = "# HELP rvmm_vcpu_exits_total x\nrvmm_vcpu_exits_total{reason=\"io-out\"} 12\n\
                    rvmm_vcpu_exits_total{reason=\"mmio\"} 3\nother{reason=\"x\"} 9\n";
        let found = reasons(page);
        assert_eq!(found.len(), 2);
        assert_eq!(found["io_out"], 12.0);
    }
}
