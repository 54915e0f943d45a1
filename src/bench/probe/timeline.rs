//! `timeline`: where the time of a microVM's start goes, stage by stage. docs/probes/timeline.md

use serde_json::Value as Json;

use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, PATIENCE};
use crate::bench::process::Invocation;
use crate::bench::results::{Better, Metric, Unit, Value};

/// What `rvmm --timeline=json` says of a boot of the guest's kernel and a small busybox system.
pub struct BootTimeline;

impl Probe for BootTimeline {
    fn names(&self) -> Vec<&'static str> {
        vec!["timeline"]
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        if executor.name() != "rvmm-microvm" {
            return Err(Error::Other("only rvmm says where the time of a boot goes".into()));
        }
        let initrd = context.guest.join("initrd.cpio");
        let invocation = Invocation::new([context.rvmm.to_string_lossy()])
            .and(["--initrd".to_owned(), initrd.to_string_lossy().into_owned()])
            .and(["--memory", "128M", "--cmdline", "quiet rvmm.exec=\"true\"", "--timeline=json"]);
        context.note(&invocation);
        let said = context.spawner.output(&invocation, PATIENCE)?;
        let moments = said.lines().rev().find_map(|line| {
            let line: Json = serde_json::from_str(line.trim()).ok()?;
            line.get("moments").and_then(Json::as_array).cloned()
        });
        let moments = moments.ok_or_else(|| Error::Other("rvmm said no timeline".into()))?;
        Ok(stages(&moments).into_iter().map(|found| ("timeline", found)).collect())
    }
}

/// From moments to the time between each and the one before.
fn stages(moments: &[Json]) -> Vec<Found> {
    let mut before = 0.0;
    let mut found = vec![];
    for moment in moments {
        let (Some(name), Some(wall)) = (moment["name"].as_str(), moment["wall_us"].as_f64()) else {
            continue;
        };
        let metric: String =
            name.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        found.push(Found {
            value: Value::Number((wall - before) / 1e6),
            means: Some(Metric {
                probe: "timeline".into(),
                name: metric.clone(),
                title: format!("until: {name}"),
                unit: Unit::Seconds,
                better: Better::Lower,
                exact: false,
            }),
            metric,
        });
        before = wall;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_the_times_between_moments() {
        let moments =
            serde_json::json!([{"name": "KVM ready", "wall_us": 100}, {"name": "first run", "wall_us": 350}]);
        let found = stages(moments.as_array().unwrap());
        assert_eq!(found[0].metric, "kvm_ready");
        assert_eq!(found[1].value, Value::Number(0.00025));
    }
}
