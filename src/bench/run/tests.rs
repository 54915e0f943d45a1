//! Runs of mocks: no process is started, and nothing depends on this host's speed.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::bench::executor::mock::Mock;
use crate::bench::interrupt::Interrupt;
use crate::bench::process::Spawner;
use crate::bench::results::Results;
use crate::bench::testing::{self, Noisy};
use crate::bench::{Verdict, probe, summarise};

/// Draws from a source of figures for each executor.
struct Drawn {
    sources: Vec<(&'static str, Noisy)>,
    random: Xoshiro256PlusPlus,
    slow: Option<(&'static str, Duration)>,
    interrupt_after: Option<(u32, Interrupt)>,
    order: Vec<String>,
}

impl Drawn {
    fn new(sources: &[(&'static str, f64, f64)], seed: u64) -> Drawn {
        let source = |(name, median, spread): &(&'static str, f64, f64)| {
            (*name, Noisy { median: *median, spread: *spread })
        };
        Drawn {
            sources: sources.iter().map(source).collect(),
            random: Xoshiro256PlusPlus::seed_from_u64(seed),
            slow: None,
            interrupt_after: None,
            order: vec![],
        }
    }
}

impl Probe for Drawn {
    fn names(&self) -> Vec<&'static str> {
        vec!["start"]
    }

    fn sample(
        &mut self,
        _: &Context,
        executor: &dyn Executor,
    ) -> Result<Vec<(&'static str, Found)>, probe::Error> {
        self.order.push(executor.name().into());
        if let Some((left, interrupt)) = &mut self.interrupt_after {
            *left -= 1;
            if *left == 0 {
                interrupt.interrupt();
            }
        }
        if let Some((name, time)) = self.slow
            && name == executor.name()
        {
            std::thread::sleep(time);
        }
        let source = self.sources.iter().find(|(name, _)| *name == executor.name());
        let Some((_, source)) = source else { return Err(probe::Error::Other("no source".into())) };
        Ok(vec![("start", Found::number("first_output", source.draw(&mut self.random)))])
    }
}

fn context(directory: &Path) -> Context {
    let image = crate::bench::executor::Image {
        name: "i".into(),
        archive: "a".into(),
        rootfs: "r".into(),
        env: vec![],
        command: vec![],
    };
    let source = crate::bench::image::Source { name: "i".into(), id: None, bytes: (None, None) };
    Context {
        spawner: Spawner { run: "cmp-test".into(), interrupt: Interrupt::never() },
        image,
        source,
        helper: "h".into(),
        rvmm: "v".into(),
        guest: "g".into(),
        directory: directory.into(),
        quick: true,
        memory_on_purpose: 0,
        starts: RefCell::new(vec![]),
        instances: Cell::new(0),
        commands: RefCell::new(vec![]),
    }
}

/// Runs a probe with mocks of these names, and reads the folder.
fn run(probe: Drawn, names: &[&str], runs: u32, seed: u64) -> (Results, Vec<String>, Result<(), Error>) {
    run_within(probe, names, runs, seed, None)
}

/// The same with a limit of time.
fn run_within(
    mut probe: Drawn,
    names: &[&str],
    runs: u32,
    seed: u64,
    budget: Option<Duration>,
) -> (Results, Vec<String>, Result<(), Error>) {
    let directory = tempfile::tempdir().unwrap();
    let mut context = context(directory.path());
    if let Some((_, interrupt)) = &probe.interrupt_after {
        context.spawner.interrupt = interrupt.clone();
    }
    let mut made_up = testing::made_up(seed, runs);
    made_up.plan.executors = names.iter().map(|name| (*name).into()).collect();
    made_up.plan.probes.retain(|planned| planned.name == "start");
    write_one(&directory.path().join("host.json"), &made_up.host).unwrap();
    write_one(&directory.path().join("plan.json"), &made_up.plan).unwrap();
    let executors: Vec<Box<dyn Executor>> = names
        .iter()
        .map(|name| Box::new(Mock::new(name, "h", Duration::ZERO)) as Box<dyn Executor>)
        .collect();
    let mut session = Session {
        context: &context,
        plan: made_up.plan,
        writer: Writer::new(directory.path()).unwrap(),
        directory: directory.path().into(),
        started: Instant::now(),
        budget,
        measuring: Instant::now(),
        order: 0,
    };
    let order;
    let result = {
        let mut boxed: Vec<Box<dyn Probe>> = vec![];
        let shared = std::rc::Rc::new(RefCell::new(vec![]));
        struct Watched(Drawn, std::rc::Rc<RefCell<Vec<String>>>);
        impl Probe for Watched {
            fn names(&self) -> Vec<&'static str> {
                self.0.names()
            }
            fn sample(
                &mut self,
                context: &Context,
                executor: &dyn Executor,
            ) -> Result<Vec<(&'static str, Found)>, probe::Error> {
                let found = self.0.sample(context, executor);
                *self.1.borrow_mut() = self.0.order.clone();
                found
            }
        }
        probe.order.clear();
        boxed.push(Box::new(Watched(probe, shared.clone())));
        let result = session.measure(&mut boxed, &executors, &mut |_| {});
        order = shared.borrow().clone();
        result
    };
    (Results::open(directory.path()).unwrap(), order, result)
}

#[test]
fn every_round_has_every_executor_once_in_an_order_of_the_seed() {
    let sources = [("a", 1.0, 0.1), ("b", 1.0, 0.1), ("c", 1.0, 0.1)];
    let names = ["a", "b", "c"];
    let (results, order, result) = run(Drawn::new(&sources, 1), &names, 10, 5);
    result.unwrap();
    assert_eq!(results.samples.len(), 30);
    // One warm-up round stands before those that count.
    assert_eq!(order.len(), 33);
    for round in order.chunks(3) {
        let mut sorted = round.to_vec();
        sorted.sort();
        assert_eq!(sorted, names);
    }
    assert!(order.chunks(3).any(|round| round != &order[..3]), "{order:?}");
    let again = run(Drawn::new(&sources, 1), &names, 10, 5).1;
    assert_eq!(order, again);
    assert_ne!(order, run(Drawn::new(&sources, 1), &names, 10, 6).1);
}

#[test]
fn executor_that_fails_is_asked_once_and_the_others_go_on() {
    let (results, order, result) = run(Drawn::new(&[("a", 1.0, 0.1)], 1), &["a", "b"], 8, 1);
    result.unwrap();
    assert_eq!(order.iter().filter(|name| *name == "b").count(), 1);
    let summary = summarise(&results);
    assert_eq!(summary.series("start", "first_output", "a").unwrap().values.len(), 8);
    assert_eq!(summary.series("start", "first_output", "b").unwrap().failures, ["no source"]);
}

#[test]
fn interrupted_run_leaves_what_it_has() {
    let interrupt = Interrupt::never();
    let probe =
        Drawn { interrupt_after: Some((9, interrupt)), ..Drawn::new(&[("a", 1.0, 0.1), ("b", 1.0, 0.1)], 1) };
    let (results, _, result) = run(probe, &["a", "b"], 30, 1);
    assert!(matches!(result, Err(Error::Interrupted)));
    // Two of the nine were the warm-up.
    assert_eq!(results.samples.len(), 7);
    assert!(!results.complete());
}

/// Of a hundred comparisons between equals with 95 % confidence, five are expected to be wrong: as many as are likely at
/// all, with one chance of a thousand for more, are allowed.
#[test]
fn equals_differ_as_seldom_as_the_confidence_says() {
    let (tries, error) = (100_u32, 0.05);
    let wrong = (0..tries)
        .filter(|seed| {
            let sources = [("a", 0.02, 0.2), ("b", 0.02, 0.2)];
            let (results, _, result) = run(Drawn::new(&sources, u64::from(*seed)), &["a", "b"], 20, 1);
            result.unwrap();
            let summary = summarise(&results);
            summary.comparison("start", "first_output", "a", "b").unwrap().verdict != Verdict::NoDifference
        })
        .count();
    let allowed = testing::allowed_misses(tries, error, 0.001);
    assert!(wrong <= allowed as usize, "{wrong} wrong of {tries}, allowed are {allowed}");
}

#[test]
fn run_without_time_says_so_instead_of_measuring() {
    let (results, order, result) =
        run_within(Drawn::new(&[("a", 1.0, 0.1)], 1), &["a"], 8, 1, Some(Duration::ZERO));
    result.unwrap();
    assert!(order.is_empty());
    let summary = summarise(&results);
    let series = summary.series("start", "first_output", "a").unwrap();
    assert_eq!(series.failures, ["no time was left in a quick run"]);
}

#[test]
fn slow_executor_takes_part_in_fewer_rounds_and_the_fast_one_in_all() {
    let sources = [("fast", 1.0, 0.01), ("slow", 2.0, 0.01)];
    let probe = Drawn { slow: Some(("slow", Duration::from_millis(200))), ..Drawn::new(&sources, 1) };
    let (results, order, result) =
        run_within(probe, &["fast", "slow"], 20, 1, Some(Duration::from_millis(1100)));
    result.unwrap();
    let summary = summarise(&results);
    let count = |name| summary.series("start", "first_output", name).unwrap().values.len();
    assert_eq!(count("fast"), 20);
    assert!((1..=5).contains(&count("slow")), "{order:?}");
    // The few lie among the many, and not all at an end.
    let first = order.iter().rposition(|name| name == "slow").unwrap();
    assert!(order[first..].len() > 1 || count("slow") > 3, "{order:?}");
}

#[test]
fn five_percent_slower_is_found() {
    let wrong = (0..20)
        .filter(|seed| {
            let sources = [("a", 0.020, 0.02), ("b", 0.021, 0.02)];
            let (results, _, result) = run(Drawn::new(&sources, *seed), &["a", "b"], 30, 1);
            result.unwrap();
            let found = summarise(&results).comparison("start", "first_output", "a", "b").unwrap();
            found.verdict != Verdict::Higher
        })
        .count();
    assert_eq!(wrong, 0);
}

#[test]
fn noise_is_a_share_of_all_time() {
    let before = Ticks { all: 100.0, busy: 50.0, stolen: 1.0 };
    let after = Ticks { all: 200.0, busy: 75.0, stolen: 11.0 };
    assert_eq!(after.since(before), Noise { steal: 0.1, busy: 0.25 });
    assert_eq!(before.since(before), Noise::default());
}
