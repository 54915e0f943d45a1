//! `effort`: from nothing to the first answer of a service. docs/probes/effort.md

use std::time::Instant;

use super::service::archive;
use super::start::{free_port, wait_for_http};
use super::{Context, Error, Found, Probe};
use crate::bench::executor::{Executor, Job, Network, PATIENCE};

/// The service: image and port inside.
const IMAGE: &str = "fastapi";
const PORT: u16 = 8000;

/// The usual proof of concept.
pub struct Effort;

impl Probe for Effort {
    fn names(&self) -> Vec<&'static str> {
        vec!["effort"]
    }

    fn is_quick(&self) -> bool {
        false
    }

    fn starts(&self) -> f64 {
        2.0
    }

    fn seconds(&self) -> f64 {
        1.0
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let archive = archive(context, IMAGE)?;
        let bytes =
            std::fs::metadata(&archive).map_err(|error| Error::Other(format!("{archive:?}: {error}")))?.len();
        let name = format!("{IMAGE}:latest");
        if executor.has_image(&context.spawner, &name) {
            return Err(Error::Other(format!(
                "the image {name:?} is here already: without it there would be nothing yet"
            )));
        }
        let port = free_port()?;
        let job = Job {
            name: context.name(),
            image: Some(name.clone()),
            network: Network::Bridge,
            ports: vec![(port, PORT)],
            ..Job::default()
        };
        let begun = Instant::now();
        let mut commands = 0;
        executor.load(&context.spawner, &archive, &name)?;
        commands += 1;
        let result = (|| {
            let instance = executor.start(&context.spawner, &job)?;
            commands += 1;
            let answered = wait_for_http(context, port, begun + PATIENCE, &|| true);
            executor.remove(&context.spawner, instance)?;
            answered
        })();
        executor.unload(&context.spawner, &name);
        let took = (result? - begun).as_secs_f64();
        let found = [
            // The image, which is a file; nothing has to be written.
            Found::number("files", 1.0),
            Found::number("commands", f64::from(commands)),
            Found::number("fetched", bytes as f64),
            Found::number("first_answer", took),
        ];
        Ok(found.into_iter().map(|found| ("effort", found)).collect())
    }
}
