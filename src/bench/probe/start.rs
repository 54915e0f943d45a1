//! `start`: how long until the work begins, speaks, answers; and until it is gone. docs/probes/start.md

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::{Context, Error, Found, Probe, spoken};
use crate::bench::executor::{Executor, Instance, Job, Network, PATIENCE};
use crate::bench::process::Running;

/// How often the helper is asked for its clock. The fastest answer counts.
const CLOCK_QUESTIONS: usize = 7;

/// Where starting one takes longer than this, many at once are not tried.
const SLOW: Duration = Duration::from_secs(3);

/// How long a first look waits for an answer over HTTP.
const QUICK_PATIENCE: Duration = Duration::from_secs(40);

/// Starts and stops: one way to measure them, so that what is slow in one is not asked for all.
pub struct Part {
    metrics: &'static [&'static str],
    measure: Measure,
    /// Instances that a sample starts, and what it is worth.
    starts: f64,
    weight: f64,
    quick: bool,
}

/// All ways.
pub fn all() -> Vec<Part> {
    let part =
        |metrics, measure: Measure, starts, weight| Part { metrics, measure, starts, weight, quick: true };
    vec![
        // What a comparison is asked for first: where there is time for one slow sample, it is this.
        part(&["first_instruction", "first_output"], first_output, 1.0, 20.0),
        part(&["first_http"], first_http, 1.5, 2.0),
        part(&["whole"], whole, 1.0, 1.0),
        part(&["stop"], stop, 1.0, 2.0),
        Part { quick: false, ..part(&["parallel_10"], parallel_10, 10.0, 1.0) },
        Part { quick: false, ..part(&["parallel_50"], parallel_50, 50.0, 1.0) },
    ]
}

impl Probe for Part {
    fn names(&self) -> Vec<&'static str> {
        vec!["start"]
    }

    fn is_quick(&self) -> bool {
        self.quick
    }

    fn weight(&self) -> f64 {
        self.weight
    }

    fn starts(&self) -> f64 {
        self.starts
    }

    fn covers(&self, metric: &str) -> bool {
        self.metrics.contains(&metric)
    }

    fn sample(
        &mut self,
        context: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, Error> {
        let found = (self.measure)(context, executor)?;
        Ok(found.into_iter().map(|found| ("start", found)).collect())
    }
}

type Measure = fn(&Context, &dyn Executor) -> Result<Vec<Found>, Error>;

/// The clock of a helper: how far it is ahead of this process's own, and how sure that is.
struct Clock {
    /// The moment, by this process's clock, that stands behind `theirs`.
    ours: Instant,
    theirs: u64,
    /// Of the question whose answer came fastest.
    round_trip: Duration,
}

impl Clock {
    /// Asks several times. The answer is taken to have been made in the middle of the time that it took.
    fn ask(running: &mut Running) -> Result<Clock, Error> {
        let mut best: Option<Clock> = None;
        for _ in 0..CLOCK_QUESTIONS {
            let sent = Instant::now();
            running.write(b"t")?;
            let (theirs, received) =
                running.line(PATIENCE, |line| spoken(line)?.get("clock").and_then(Json::as_u64))?;
            let round_trip = received - sent;
            if best.as_ref().is_none_or(|best| round_trip < best.round_trip) {
                best = Some(Clock { ours: sent + round_trip / 2, theirs, round_trip });
            }
        }
        best.ok_or_else(|| Error::Other("the helper's clock was not asked for".into()))
    }

    /// When it was `theirs` there, by this process's clock.
    fn at(&self, theirs: u64) -> Option<Instant> {
        self.ours.checked_sub(Duration::from_nanos(self.theirs.checked_sub(theirs)?))
    }
}

fn first_output(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let invocation = executor.run(&context.helper(["start"]))?;
    context.note(&invocation);
    let mut running = context.spawner.spawn(&invocation)?;
    let begun = running.started;
    let entry = |line: &str| spoken(line)?.get("entry").and_then(Json::as_u64);
    let (entry, spoke) = running.line(PATIENCE, entry)?;
    let output = (spoke - begun).as_secs_f64();
    let clock = Clock::ask(&mut running)?;
    // It began before it spoke and after it was started, whatever the clocks' uncertainty says.
    let began = clock.at(entry).map_or(output, |at| at.saturating_duration_since(begun).as_secs_f64());
    // A guest's own end takes its time, and is not of interest here.
    running.write(b"q")?;
    running.close_stdin();
    running.finish(PATIENCE)?;
    Ok(vec![Found::number("first_instruction", began.min(output)), Found::number("first_output", output)])
}

fn parallel_10(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    parallel(context, executor, "parallel_10", 10)
}

fn parallel_50(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    parallel(context, executor, "parallel_50", 50)
}

/// Many at once, until the last has spoken.
fn parallel(
    context: &Context,
    executor: &dyn Executor,
    metric: &str,
    count: u32,
) -> Result<Vec<Found>, Error> {
    let start = context.start_of(executor.name());
    if start > SLOW {
        let why = format!("starting one takes {:.0} s: many at once were not tried", start.as_secs_f64());
        return Err(Error::Other(why));
    }
    let invocations: Result<Vec<_>, _> =
        (0..count).map(|_| executor.run(&context.helper(["start"]))).collect();
    let invocations = invocations?;
    let begun = Instant::now();
    let mut running = vec![];
    for invocation in &invocations {
        running.push(context.spawner.spawn(invocation)?);
    }
    let mut last = begun;
    for one in &mut running {
        let (_, spoke) = one.line(PATIENCE, |line| spoken(line)?.get("entry").and_then(Json::as_u64))?;
        last = last.max(spoke);
    }
    // The times are those of this process's reading: a line may have come while another was waited for, never later.
    let took = (last - begun).as_secs_f64();
    for one in &mut running {
        one.write(b"q")?;
        one.close_stdin();
    }
    for one in &mut running {
        one.finish(PATIENCE)?;
    }
    Ok(vec![Found::number(metric, took)])
}

/// The whole command, as a shell sees it.
fn whole(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let invocation = executor.run(&context.helper(["true"]))?;
    context.note(&invocation);
    let mut running = context.spawner.spawn(&invocation)?;
    running.close_stdin();
    let begun = running.started;
    let finished = running.finish(PATIENCE)?;
    Ok(vec![Found::number("whole", (finished.at - begun).as_secs_f64())])
}

/// A long-lived instance that is told to end.
fn stop(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let mut instance = executor.start(&context.spawner, &context.helper(["idle"]))?;
    let result = wait_and_stop(context, executor, &mut instance);
    executor.remove(&context.spawner, instance)?;
    result
}

fn wait_and_stop(
    context: &Context,
    executor: &dyn Executor,
    instance: &mut Instance,
) -> Result<Vec<Found>, Error> {
    executor.wait_for_line(&context.spawner, instance, super::MARKER)?;
    let begun = Instant::now();
    executor.stop(&context.spawner, instance)?;
    Ok(vec![Found::number("stop", begun.elapsed().as_secs_f64())])
}

fn first_http(context: &Context, executor: &dyn Executor) -> Result<Vec<Found>, Error> {
    let port = free_port()?;
    let inside = port.to_string();
    let job =
        Job { network: Network::Bridge, ports: vec![(port, port)], ..context.helper(["http", &inside]) };
    let begun = Instant::now();
    let instance = executor.start(&context.spawner, &job)?;
    let patience = if context.quick { QUICK_PATIENCE } else { PATIENCE };
    // A command that stays with its instance has ended if that has.
    let lives = || instance.running.as_ref().is_none_or(|running| !running.has_ended());
    let answered = wait_for_http(context, port, begun + patience, &lives);
    executor.remove(&context.spawner, instance)?;
    Ok(vec![Found::number("first_http", (answered? - begun).as_secs_f64())])
}

/// A port of the host that nobody listens on now.
pub fn free_port() -> Result<u16, Error> {
    let other = |error: std::io::Error| Error::Other(format!("there is no free port: {error}"));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(other)?;
    Ok(listener.local_addr().map_err(other)?.port())
}

/// Asks again and again until there is a whole answer, as long as there is somebody to ask.
pub(super) fn wait_for_http(
    context: &Context,
    port: u16,
    deadline: Instant,
    lives: &dyn Fn() -> bool,
) -> Result<Instant, Error> {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: compare\r\nConnection: close\r\n\r\n")?;
        let mut answer = vec![];
        stream.take(64 << 10).read_to_end(&mut answer)?;
        Ok(answer.starts_with(b"HTTP/1.1 200"))
    };
    while Instant::now() < deadline {
        if matches!(ask(), Ok(true)) {
            return Ok(Instant::now());
        }
        if !lives() {
            return Err(Error::Other("it ended before it answered".into()));
        }
        context.pause(Duration::from_millis(1))?;
    }
    Err(Error::Other("no answer came".into()))
}
