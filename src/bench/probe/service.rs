//! `service`: FastAPI, nginx and redis under load, through a published port. docs/probes/service.md

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::memory::{busy_ticks, ticks_per_second};
use super::start::{free_port, wait_for_http};
use super::{Context, Error, Found, Probe, spoken};
use crate::bench::executor::{Executor, Instance, Job, Network, PATIENCE, find};
use crate::bench::process::Invocation;

/// What is asked of wrk when it is done: requests in a second, and percentiles from its histogram.
const WRK_SCRIPT: &str = r#"done = function(summary, latency, requests)
    local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.status
        + summary.errors.timeout
    io.write(string.format(
        'rvmm-probe {"requests":%f,"count":%d,"failed":%d,"p50":%f,"p99":%f,"p999":%f}\n',
        summary.requests / (summary.duration / 1e6), summary.requests, failed, latency:percentile(50) / 1e6,
        latency:percentile(99) / 1e6, latency:percentile(99.9) / 1e6))
end
"#;

/// Requests for redis.
const REDIS_REQUESTS: u32 = 40_000;

/// A service: its image, the port that it listens on inside, and the path that answers with 200.
struct Kind {
    name: &'static str,
    port: u16,
    path: Option<&'static str>,
}

const KINDS: [Kind; 3] = [
    Kind { name: "fastapi", port: 8000, path: Some("/") },
    Kind { name: "nginx", port: 80, path: Some("/") },
    Kind { name: "redis", port: 6379, path: None },
];

/// Services under load.
#[derive(Default)]
pub struct Service {
    /// What engines have loaded, and what they could not do: neither is tried again.
    loaded: Vec<(String, &'static str)>,
    refused: Vec<(String, &'static str)>,
}

impl Probe for Service {
    fn names(&self) -> Vec<&'static str> {
        vec!["service"]
    }

    fn is_quick(&self) -> bool {
        false
    }

    fn weight(&self) -> f64 {
        3.0
    }

    fn starts(&self) -> f64 {
        4.0
    }

    fn seconds(&self) -> f64 {
        12.0
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let mut found = vec![];
        for kind in &KINDS {
            let key = (executor.name().to_owned(), kind.name);
            if self.refused.contains(&key) {
                continue;
            }
            match self.one(context, executor, kind) {
                Ok(figures) => found.extend(figures),
                Err(error) if error.is_interruption() => return Err(error),
                Err(error) => {
                    self.refused.push(key);
                    found.push(Found::failed(&format!("{}_requests", kind.name), crate::error_chain(&error)));
                }
            }
        }
        Ok(found.into_iter().map(|found| ("service", found)).collect())
    }
}

impl Service {
    fn one(&mut self, context: &Context, executor: &dyn Executor, kind: &Kind) -> Result<Vec<Found>, Error> {
        let key = (executor.name().to_owned(), kind.name);
        if !self.loaded.contains(&key) {
            let archive = archive(context, kind.name)?;
            executor.load(&context.spawner, &archive, &format!("{}:latest", kind.name))?;
            self.loaded.push(key);
        }
        let port = free_port()?;
        let job = Job {
            name: context.name(),
            image: Some(format!("{}:latest", kind.name)),
            network: Network::Bridge,
            ports: vec![(port, kind.port)],
            ..Job::default()
        };
        if let Ok(invocation) = executor.run(&job) {
            context.note(&invocation);
        }
        let instance = executor.start(&context.spawner, &job)?;
        let result = measure(context, executor, &instance, kind, port);
        executor.remove(&context.spawner, instance)?;
        result
    }
}

pub(super) fn archive(context: &Context, name: &str) -> Result<PathBuf, Error> {
    let built = context.guest.parent().map(|target| target.join(format!("images/{name}.tar")));
    built.filter(|path| path.is_file()).ok_or_else(|| {
        Error::Other(format!("there is no target/images/{name}.tar: run scripts/build-images {name}"))
    })
}

fn measure(
    context: &Context,
    executor: &dyn Executor,
    instance: &Instance,
    kind: &Kind,
    port: u16,
) -> Result<Vec<Found>, Error> {
    let deadline = Instant::now() + PATIENCE;
    match kind.path {
        Some(_) => drop(wait_for_http(context, port, deadline, &|| true)?),
        None => wait_for_redis(context, port, deadline)?,
    }
    let processes = executor.processes(&context.spawner, instance)?;
    let before = busy_ticks(&processes);
    let figures = match kind.path {
        Some(path) => wrk(context, port, path)?,
        None => redis_benchmark(context, port)?,
    };
    let used = (busy_ticks(&processes) - before) / ticks_per_second();
    let figure = |name: &str| figures.get(name).and_then(Json::as_f64);
    let mut found: Vec<Found> = ["requests", "p50", "p99", "p999"]
        .iter()
        .filter_map(|name| Some(Found::number(&format!("{}_{name}", kind.name), figure(name)?)))
        .collect();
    if let Some(count) = figure("count").filter(|count| *count > 0.0) {
        found.push(Found::number(&format!("{}_cpu", kind.name), used / count));
    }
    Ok(found)
}

fn tool(name: &str, package: &str) -> Result<String, Error> {
    let path =
        find(name).ok_or_else(|| Error::Other(format!("there is no {name} here: apt install {package}")))?;
    Ok(path.to_string_lossy().into_owned())
}

fn wrk(context: &Context, port: u16, path: &str) -> Result<Json, Error> {
    let script = context.directory.join("wrk.lua");
    fs::write(&script, WRK_SCRIPT)
        .map_err(|error| Error::Other(format!("cannot write {script:?}: {error}")))?;
    let url = format!("http://127.0.0.1:{port}{path}");
    let invocation = Invocation::new([tool("wrk", "wrk")?])
        .and(["-t1", "-c16", "-d3s", "-s"])
        .and([script.to_string_lossy().into_owned(), url]);
    context.note(&invocation);
    let said = context.spawner.output(&invocation, PATIENCE)?;
    let figures = said.lines().find_map(spoken).ok_or_else(|| Error::Other("wrk said no figures".into()))?;
    match figures.get("failed").and_then(Json::as_u64) {
        Some(0) => Ok(figures),
        failed => Err(Error::Other(format!("{} requests failed", failed.unwrap_or(0)))),
    }
}

fn redis_benchmark(context: &Context, port: u16) -> Result<Json, Error> {
    let (port, count) = (port.to_string(), REDIS_REQUESTS.to_string());
    let invocation = Invocation::new([tool("redis-benchmark", "redis-tools")?]).and([
        "-h",
        "127.0.0.1",
        "-p",
        &port,
        "-n",
        &count,
        "-c",
        "16",
        "-t",
        "get",
        "--csv",
    ]);
    context.note(&invocation);
    let said = context.spawner.output(&invocation, PATIENCE)?;
    let mut figures = csv(&said).ok_or_else(|| Error::Other("redis-benchmark said no figures".into()))?;
    figures["count"] = REDIS_REQUESTS.into();
    Ok(figures)
}

/// The last line of a table with a header, times in milliseconds.
fn csv(said: &str) -> Option<Json> {
    let row = |line: &str| -> Vec<String> {
        line.split(',').map(|cell| cell.trim_matches('"').to_owned()).collect()
    };
    let mut lines = said.lines().filter(|line| line.starts_with('"'));
    let (header, values) = (row(lines.next()?), row(lines.next()?));
    let cell = |name: &str| -> Option<f64> {
        values.get(header.iter().position(|column| column == name)?)?.parse().ok()
    };
    Some(serde_json::json!({
        "requests": cell("rps")?,
        "p50": cell("p50_latency_ms")? / 1e3,
        "p99": cell("p99_latency_ms")? / 1e3,
    }))
}

fn wait_for_redis(context: &Context, port: u16, deadline: Instant) -> Result<(), Error> {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"PING\r\n")?;
        let mut answer = [0; 7];
        stream.read_exact(&mut answer)?;
        Ok(&answer == b"+PONG\r\n")
    };
    while Instant::now() < deadline {
        if matches!(ask(), Ok(true)) {
            return Ok(());
        }
        context.pause(Duration::from_millis(10))?;
    }
    Err(Error::Other("redis did not answer".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_of_redis_benchmark_is_read() {
        let said = "\"test\",\"rps\",\"avg_latency_ms\",\"p50_latency_ms\",\"p99_latency_ms\"\n\
                    \"GET\",\"81632.65\",\"0.1\",\"0.100\",\"0.500\"\n";
        let found = csv(said).unwrap();
        assert_eq!(found["requests"], 81632.65);
        assert_eq!(found["p99"], 0.0005);
        assert!(csv("nothing").is_none());
    }
}
