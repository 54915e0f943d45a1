//! `persistence`: what survives stop and start, kill and start, remove and create. docs/probes/persistence.md

use std::fs;

use serde_json::Value as Json;

use super::{Context, Error, Found, Probe, spoken};
use crate::bench::executor::{Executor, Instance, Job};

/// Where the volume is inside.
const VOLUME: &str = "/rvmm-probe-volume";

/// Marks in files.
pub struct Persistence;

impl Probe for Persistence {
    fn names(&self) -> Vec<&'static str> {
        vec!["persistence"]
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn starts(&self) -> f64 {
        8.0
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let mut found = vec![];
        // The root, and memory with it, in an instance without a volume: not all can have one.
        match trials(context, executor, None) {
            Ok(kept) => found.extend(kept.into_iter().map(|(way, kept)| (format!("root_{way}"), kept))),
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) => found.push(("root_stop".into(), Err(error))),
        }
        match trials(context, executor, Some(VOLUME)) {
            Ok(kept) => found.extend(kept.into_iter().map(|(way, kept)| (format!("volume_{way}"), kept))),
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) => found.push(("volume_stop".into(), Err(error))),
        }
        let named = found.into_iter().map(|(metric, kept)| match kept {
            Ok(true) => Found::text(&metric, "kept"),
            Ok(false) => Found::text(&metric, "lost"),
            Err(error) => Found::failed(&metric, crate::error_chain(&error)),
        });
        Ok(named.map(|found| ("persistence", found)).collect())
    }
}

type Kept = (&'static str, Result<bool, Error>);

fn trials(context: &Context, executor: &dyn Executor, volume: Option<&str>) -> Result<Vec<Kept>, Error> {
    // A place that no earlier instance has been at: some share their root.
    let place = volume.map_or_else(|| format!("/root/{}", context.name()), String::from);
    let mut job = context.helper(["persist", &place]);
    if let Some(inside) = volume {
        let host = context.directory.join(format!("volume-{}", job.name));
        fs::create_dir_all(&host).map_err(|error| Error::Other(format!("cannot make {host:?}: {error}")))?;
        job.volumes.push((host, inside.to_owned()));
    } else if executor.isolation() == crate::bench::results::Isolation::None {
        return Err(Error::Other("a process of the host has no root of its own".into()));
    }
    let mut instance = executor.start(&context.spawner, &job)?;
    let result = stop_and_kill(context, executor, &mut instance);
    executor.remove(&context.spawner, instance)?;
    let mut kept = result?;
    // The same again under another name, for names may be remembered.
    let job = Job { name: context.name(), ..job };
    let mut instance = executor.start(&context.spawner, &job)?;
    let found = look(context, executor, &mut instance, 1);
    executor.remove(&context.spawner, instance)?;
    kept.push(("remove", found));
    Ok(kept)
}

fn stop_and_kill(
    context: &Context,
    executor: &dyn Executor,
    instance: &mut Instance,
) -> Result<Vec<Kept>, Error> {
    look(context, executor, instance, 1)?;
    executor.stop(&context.spawner, instance)?;
    executor.restart(&context.spawner, instance)?;
    let stopped = look(context, executor, instance, 2);
    executor.kill(&context.spawner, instance)?;
    executor.restart(&context.spawner, instance)?;
    let killed = look(context, executor, instance, 3);
    Ok(vec![("stop", stopped), ("kill", killed)])
}

/// Whether the mark was there in the `nth` life of an instance. An engine's log has all lives in it.
fn look(
    context: &Context,
    executor: &dyn Executor,
    instance: &mut Instance,
    nth: usize,
) -> Result<bool, Error> {
    let lives = if instance.running.is_some() { 1 } else { nth };
    let place = instance.job.argv.last().cloned().unwrap_or_default();
    let mut line = String::new();
    // Each life says one line more; the log is read from its beginning each time.
    for _ in 0..100 {
        let said = executor.wait_for_line(&context.spawner, instance, super::MARKER)?;
        if lives == 1 {
            line = said;
            break;
        }
        let all = executor.lines(&context.spawner, instance, "\"persist\"")?;
        if let Some(found) = all.get(lives - 1) {
            line = found.clone();
            break;
        }
        context.pause(std::time::Duration::from_millis(50))?;
    }
    let said = spoken(&line).ok_or_else(|| Error::Other("the helper did not say what it found".into()))?;
    if let Some(error) = said.pointer("/persist").and_then(|found| found.get(format!("{place} error"))) {
        return Err(Error::Other(format!("the helper cannot write there: {error}")));
    }
    let found = said
        .get("persist")
        .and_then(Json::as_object)
        .and_then(|found| found.values().find_map(Json::as_bool));
    found.ok_or_else(|| Error::Other("the helper did not say what it found".into()))
}
