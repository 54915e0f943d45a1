//! `network`: throughput, latency and connections, from the host and between instances. docs/probes/network.md

use serde_json::Value as Json;

use super::start::free_port;
use super::{Context, Error, Found, Probe, spoken};
use crate::bench::executor::{Executor, Instance, Job, Network as Net, PATIENCE};
use crate::bench::process::Invocation;
use crate::bench::results::Isolation;

/// A server in one instance; clients on the host and in another.
pub struct Network;

impl Probe for Network {
    fn names(&self) -> Vec<&'static str> {
        vec!["network"]
    }

    fn weight(&self) -> f64 {
        1.5
    }

    fn starts(&self) -> f64 {
        3.0
    }

    fn seconds(&self) -> f64 {
        1.5
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let port = free_port()?;
        let inside = port.to_string();
        let job =
            Job { network: Net::Bridge, ports: vec![(port, port)], ..context.helper(["serve", &inside]) };
        if let Ok(invocation) = executor.run(&job) {
            context.note(&invocation);
        }
        let mut server = executor.start(&context.spawner, &job)?;
        let result = measure(context, executor, &mut server, port);
        executor.remove(&context.spawner, server)?;
        Ok(result?.into_iter().map(|found| ("network", found)).collect())
    }
}

fn measure(
    context: &Context,
    executor: &dyn Executor,
    server: &mut Instance,
    port: u16,
) -> Result<Vec<Found>, Error> {
    executor.wait_for_line(&context.spawner, server, super::MARKER)?;
    let seconds = if context.quick { "0.2" } else { "1" };
    let port = port.to_string();
    let from_host = |address: &str| -> Result<Vec<Json>, Error> {
        let client =
            Invocation::new([context.helper.to_string_lossy().as_ref(), "client", address, &port, seconds]);
        context.note(&client);
        Ok(context.spawner.output(&client, PATIENCE)?.lines().filter_map(spoken).collect())
    };
    let mut found = vec![];
    // Behind QEMU's own network there is no address, and the forwarded port is the only way.
    let address = executor.address(&context.spawner, server);
    // One way that is barred says nothing of the others.
    let mut note = |result: Result<Vec<Json>, Error>, way: &str, names: &[&str]| -> Result<(), Error> {
        match result {
            Ok(said) => found.extend(figures(&said, way, names)),
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) => {
                let why = crate::error_chain(&error);
                found.extend(names.iter().map(|name| Found::failed(&format!("{way}_{name}"), why.as_str())));
            }
        }
        Ok(())
    };
    let all = ["throughput", "latency", "connections"];
    note(from_host(address.as_deref().unwrap_or("127.0.0.1")), "host", &all)?;
    if executor.isolation() != Isolation::None {
        note(from_host("127.0.0.1"), "published", &["connections"])?;
    }
    let address = match address {
        Ok(address) => address,
        Err(error) => {
            found.push(Found::failed("peer_throughput", crate::error_chain(&error)));
            return Ok(found);
        }
    };
    let peer = |arguments: [&str; 4]| -> Result<Vec<Json>, Error> {
        let words = arguments.into_iter().filter(|word| !word.is_empty());
        let job = Job { network: Net::Bridge, ..context.helper(words) };
        context.run_helper(executor, &job)
    };
    let between = peer(["client", &address, &port, seconds]);
    let mut note = |result: Result<Vec<Json>, Error>| match result {
        Ok(said) => {
            found.extend(figures(&said, "peer", &all));
            Ok(())
        }
        Err(error) if error.is_interruption() => Err(error),
        Err(error) => {
            found.push(Found::failed("peer_throughput", crate::error_chain(&error)));
            Ok(())
        }
    };
    note(between)?;
    if executor.isolation() != Isolation::None {
        let said = peer(["resolve", &server.job.name, "", ""])?;
        let known = said.iter().any(|line| line.get("address").is_some_and(Json::is_string));
        found.push(Found::text("names", if known { "yes" } else { "no, not on the default network" }));
    }
    Ok(found)
}

fn figures(said: &[Json], prefix: &str, names: &[&str]) -> Vec<Found> {
    let Some(line) = said.iter().find(|line| line.get("throughput").is_some()) else { return vec![] };
    let figure = |name: &&str| Some(Found::number(&format!("{prefix}_{name}"), line.get(*name)?.as_f64()?));
    names.iter().filter_map(figure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_carry_the_way_they_were_taken() {
        let said = [serde_json::json!({"throughput": 5.0, "latency": 0.5, "connections": 7.0})];
        let found = figures(&said, "peer", &["latency"]);
        assert_eq!(found, [Found::number("peer_latency", 0.5)]);
        assert!(figures(&[], "peer", &["latency"]).is_empty());
    }
}
