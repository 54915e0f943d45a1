//! Stated needs and measured figures to a recommendation, its reasons, and what would turn it.
//!
//! Each kind of isolation that was measured is a candidate. Each need is asked of each candidate's figures. Of those that meet
//! every need the one that takes the least memory is recommended; if none does, the one that misses the fewest. What would
//! turn the recommendation is found by asking again with one need changed, at the figures where a candidate's answer changes.

use std::cmp::Ordering;
use std::str::FromStr;

use serde::Serialize;

use super::format;
use super::table::Paint;
use super::verdict;
use crate::bench::results::{Isolation, Unit};
use crate::bench::summary::{Series, Summary};

/// What the work needs. Everything else is weighed by memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Needs {
    /// The code is not trusted: it must not reach the host's kernel.
    pub untrusted: bool,
    /// Kernel modules, parameters or features of its own.
    pub own_kernel: bool,
    /// Seconds from the command to the first output at most.
    pub start: Option<f64>,
    /// Instances at once at least.
    pub instances: Option<u64>,
    /// Bytes of memory for all instances; the host's, if not said.
    pub memory: Option<u64>,
}

/// Why needs are not understood.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// There is no such need.
    #[error(
        "there is no need {0:?}: say untrusted, kernel, start=TIME, instances=N or memory=SIZE, with commas between"
    )]
    Unknown(String),
    /// Its value is not one.
    #[error("{need}={value:?} is not {expected}")]
    Value {
        /// The need.
        need: &'static str,
        /// What was given.
        value: String,
        /// What is asked for.
        expected: &'static str,
    },
}

impl FromStr for Needs {
    type Err = Error;

    /// `untrusted,kernel,start=200ms,instances=50,memory=8G`; empty: no needs.
    fn from_str(text: &str) -> Result<Needs, Error> {
        let mut needs = Needs::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let wrong = |need, expected| Error::Value { need, value: value.into(), expected };
            match (name, value) {
                ("untrusted", "") => needs.untrusted = true,
                ("kernel", "") => needs.own_kernel = true,
                ("start", _) => {
                    needs.start =
                        Some(seconds(value).ok_or_else(|| wrong("start", "a time such as 200ms or 2s"))?);
                }
                ("instances", _) => {
                    let count = value.parse().ok().filter(|count| *count > 0);
                    needs.instances = Some(count.ok_or_else(|| wrong("instances", "a number from 1 on"))?);
                }
                ("memory", _) => {
                    needs.memory =
                        Some(bytes(value).ok_or_else(|| wrong("memory", "a size such as 512M or 8G"))?);
                }
                _ => return Err(Error::Unknown(part.into())),
            }
        }
        Ok(needs)
    }
}

fn seconds(text: &str) -> Option<f64> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    number
        .trim()
        .parse::<f64>()
        .ok()
        .map(|number| number * unit)
        .filter(|seconds| *seconds > 0.0 && seconds.is_finite())
}

fn bytes(text: &str) -> Option<u64> {
    let text = text.trim_end_matches(['b', 'B']).trim_end_matches('i');
    let shift = match text.chars().last()? {
        'k' | 'K' => 10,
        'm' | 'M' => 20,
        'g' | 'G' => 30,
        't' | 'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 { text } else { &text[..text.len() - 1] };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

/// A need, in words.
const START: &str = "the start budget";

/// A recommendation.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// What was asked for.
    pub needs: Needs,
    /// The executor to take; `None`: nothing was measured that could be recommended.
    pub executor: Option<String>,
    /// The recommendation in a sentence.
    pub sentence: String,
    /// Whether it meets every need for sure.
    pub meets_all: bool,
    /// Why, with figures.
    pub reasons: Vec<String>,
    /// What would turn it, each with the figure at which it turns.
    pub flips: Vec<String>,
    /// Each need asked of each candidate.
    pub checks: Vec<Check>,
    /// Texts of the host's warnings that touch the figures used.
    pub warnings: Vec<String>,
}

/// One need asked of one candidate.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The executor that stands for its kind.
    pub executor: String,
    /// The need, in words.
    pub need: &'static str,
    /// Whether it is met.
    pub met: Met,
    /// By which figure.
    pub because: String,
}

/// Whether a need is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Met {
    /// It is.
    Yes,
    /// The limit lies within the interval, or nothing was measured.
    Unknown,
    /// It is not.
    No,
}

/// A kind of isolation that was measured, and the figures that count.
struct Candidate<'a> {
    executor: &'a str,
    title: String,
    /// Whether its kernel is its own, and how that is known.
    own_kernel: (bool, String),
    start: Option<&'a Series>,
    memory: Option<&'a Series>,
}

impl<'a> Candidate<'a> {
    fn of(summary: &'a Summary, executor: &'a str) -> Candidate<'a> {
        let title = verdict::title(summary, executor);
        let figure = |probe, metrics: &[&str]| {
            let there = |metric: &&str| {
                summary.series(probe, metric, executor).filter(|series| !series.values.is_empty())
            };
            metrics.iter().find_map(there)
        };
        let by_kind =
            !matches!(summary.isolation(executor), Some(Isolation::Container | Isolation::None) | None);
        let fact = summary.fact("isolation", "kernel", executor).and_then(|fact| fact.values.last());
        let own_kernel = match fact {
            Some(text) => (
                text.to_lowercase().starts_with("its own"),
                format!("the kernel that its work sees is {}", format::clean(text)),
            ),
            None if by_kind => (
                true,
                "its work has a kernel of its own by construction, which this run did not probe".into(),
            ),
            None => (
                false,
                "its work is on the host's kernel by construction, which this run did not probe".into(),
            ),
        };
        Candidate {
            executor,
            title,
            own_kernel,
            start: figure("start", &["first_output", "first_instruction", "whole"]),
            memory: figure("memory", &["pss", "system"]),
        }
    }

    /// The least start budget that it meets for sure.
    fn start_limit(&self) -> Option<f64> {
        self.start.map(|series| series.interval.map_or(series.quantiles.max, |interval| interval.high))
    }

    /// Bytes of one more instance, for sure.
    fn memory_limit(&self) -> Option<f64> {
        self.memory
            .map(|series| series.interval.map_or(series.quantiles.max, |interval| interval.high))
            .filter(|b| *b > 0.0)
    }

    /// How many instances fit.
    fn capacity(&self, memory: f64) -> Option<f64> {
        self.memory_limit().map(|bytes| (memory / bytes).floor())
    }

    fn checks(&self, needs: &Needs, host_memory: u64) -> Vec<Check> {
        let mut checks = vec![];
        let mut check =
            |need, met, because| checks.push(Check { executor: self.executor.into(), need, met, because });
        let kernel = if self.own_kernel.0 { Met::Yes } else { Met::No };
        if needs.untrusted {
            check("untrusted code", kernel, self.own_kernel.1.clone());
        }
        if needs.own_kernel {
            check("a kernel of its own", kernel, self.own_kernel.1.clone());
        }
        if let Some(budget) = needs.start {
            let limit = format::figure(Unit::Seconds, budget);
            match (self.start, self.start_limit()) {
                (Some(series), Some(high)) => {
                    let low = series.interval.map_or(series.quantiles.min, |interval| interval.low);
                    let met = if high <= budget {
                        Met::Yes
                    } else if low > budget {
                        Met::No
                    } else {
                        Met::Unknown
                    };
                    check(
                        START,
                        met,
                        format!("it starts in {}, and may take {limit}", with_interval(series)),
                    );
                }
                _ => check(START, Met::Unknown, "its start was not measured".into()),
            }
        }
        if let Some(instances) = needs.instances {
            let memory = needs.memory.unwrap_or(host_memory) as f64;
            let of = format::figure(Unit::Bytes, memory);
            match (self.memory, self.capacity(memory)) {
                (Some(series), Some(fit)) => {
                    let met = if fit >= instances as f64 { Met::Yes } else { Met::No };
                    let fit = format::figure(Unit::Count, fit);
                    let each = with_interval(series);
                    check(
                        "the number of instances",
                        met,
                        format!("at {each} each, {fit} fit in {of}, and {instances} are needed"),
                    );
                }
                _ => check("the number of instances", Met::Unknown, "its memory was not measured".into()),
            }
        }
        checks
    }

    /// What is least is taken: walls missed, needs missed, needs unknown, bytes, seconds. A wall is not traded for speed.
    fn rank(&self, needs: &Needs, host_memory: u64) -> Rank {
        let checks = self.checks(needs, host_memory);
        let count = |met| checks.iter().filter(|check| check.met == met).count();
        let median = |series: Option<&Series>| series.map_or(f64::INFINITY, |series| series.quantiles.median);
        Rank {
            wall: needs.untrusted && !self.own_kernel.0,
            missed: count(Met::No),
            unknown: count(Met::Unknown),
            bytes: median(self.memory),
            seconds: median(self.start),
        }
    }
}

/// How well a candidate suits.
struct Rank {
    wall: bool,
    missed: usize,
    unknown: usize,
    bytes: f64,
    seconds: f64,
}

impl Rank {
    fn meets_all(&self) -> bool {
        self.missed + self.unknown == 0
    }

    fn compare(&self, other: &Rank) -> Ordering {
        let needs = |rank: &Rank| (rank.wall, rank.missed, rank.unknown);
        let needs = needs(self).cmp(&needs(other));
        needs.then(self.bytes.total_cmp(&other.bytes)).then(self.seconds.total_cmp(&other.seconds))
    }
}

fn with_interval(series: &Series) -> String {
    let median = series.quantiles.median;
    let interval = series
        .interval
        .map_or(String::new(), |interval| format!(" ({})", format::interval(series.unit, median, interval)));
    format::figure(series.unit, median) + &interval
}

/// One candidate for each kind of isolation that was measured: the baseline, or the first of the plan.
fn candidates(summary: &Summary) -> Vec<Candidate<'_>> {
    let measured = |name: &&str| {
        summary.series.iter().any(|series| series.executor == *name && !series.values.is_empty())
    };
    let mut names: Vec<&str> = summary.plan.executors.iter().map(String::as_str).filter(measured).collect();
    names.sort_by_key(|name| *name != summary.plan.baseline);
    let mut kinds = vec![];
    let mut found = vec![];
    for name in names {
        let kind = (summary.isolation(name), name.contains("restored"));
        if kind.0 != Some(Isolation::None) && !kinds.contains(&kind) {
            kinds.push(kind);
            found.push(Candidate::of(summary, name));
        }
    }
    found
}

fn choose<'a, 'b>(
    candidates: &'b [Candidate<'a>],
    needs: &Needs,
    host_memory: u64,
) -> Option<&'b Candidate<'a>> {
    candidates.iter().min_by(|a, b| a.rank(needs, host_memory).compare(&b.rank(needs, host_memory)))
}

/// What to take for these needs, on the figures of this run.
pub fn advice(summary: &Summary, needs: &Needs) -> Advice {
    let candidates = candidates(summary);
    let memory = summary.host.memory_bytes;
    let checks: Vec<Check> =
        candidates.iter().flat_map(|candidate| candidate.checks(needs, memory)).collect();
    let mut advice = Advice {
        needs: *needs,
        executor: None,
        sentence: "Nothing was measured that could be recommended: let probes start and memory run, in two isolations.".into(),
        meets_all: false,
        reasons: vec![],
        flips: vec![],
        checks,
        warnings: vec![],
    };
    let Some(chosen) = choose(&candidates, needs, memory) else { return advice };
    advice.executor = Some(chosen.executor.into());
    let rank = chosen.rank(needs, memory);
    advice.meets_all = rank.meets_all();
    advice.sentence = match (rank.missed, rank.unknown) {
        (0, 0) => format!("Take {}.", chosen.title),
        (0, _) => format!(
            "Take {}, though the figures do not show for sure that it meets every need.",
            chosen.title
        ),
        _ => format!("Nothing that was measured meets every need; {} comes closest.", chosen.title),
    };
    advice.reasons = reasons(&candidates, chosen, needs, memory);
    advice.flips = flips(&candidates, chosen, needs, memory);
    let executors: Vec<&str> = candidates.iter().map(|candidate| candidate.executor).collect();
    for probe in ["start", "memory", "isolation"] {
        let codes = verdict::warnings(summary, probe, &executors);
        for warning in summary.host.warnings.iter().filter(|w| codes.contains(&format::clean(&w.code))) {
            let text = format::clean(&warning.text);
            if !advice.warnings.contains(&text) {
                advice.warnings.push(text);
            }
        }
    }
    advice
}

fn reasons(candidates: &[Candidate], chosen: &Candidate, needs: &Needs, memory: u64) -> Vec<String> {
    let mut reasons: Vec<String> = vec![];
    for check in chosen.checks(needs, memory) {
        let word = match check.met {
            Met::Yes => "meets",
            Met::Unknown => "may meet",
            Met::No => "misses",
        };
        reasons.push(format!("{} {word} {}: {}.", chosen.title, check.need, check.because));
    }
    for other in candidates.iter().filter(|other| other.executor != chosen.executor) {
        let bad: Vec<String> = other
            .checks(needs, memory)
            .into_iter()
            .filter(|check| check.met != Met::Yes)
            .map(|check| {
                format!(
                    "{} {}: {}",
                    if check.met == Met::No { "misses" } else { "may miss" },
                    check.need,
                    check.because
                )
            })
            .collect();
        let beside = beside(chosen, other);
        match (bad.is_empty(), beside.is_empty()) {
            (false, _) => reasons.push(format!("{} {}.", other.title, bad.join("; it "))),
            (true, false) => reasons.push(format!("{} would do too, but {beside}.", other.title)),
            (true, true) => reasons.push(format!("{} would do too.", other.title)),
        }
    }
    reasons
}

/// What another candidate costs beside the chosen one.
fn beside(chosen: &Candidate, other: &Candidate) -> String {
    let compare = |mine: Option<&Series>, its: Option<&Series>, more: &str, less: &str| {
        let ratio = its?.quantiles.median / mine?.quantiles.median;
        let (ratio, word) = if ratio >= 1.0 { (ratio, more) } else { (1.0 / ratio, less) };
        (ratio.is_finite() && ratio > 1.0).then(|| format!("{} {word}", format::times(ratio)))
    };
    let memory = compare(chosen.memory, other.memory, "more memory", "less memory")
        .map(|text| format!("takes {text}"));
    let start = compare(chosen.start, other.start, "later", "sooner").map(|text| format!("starts {text}"));
    [memory, start].into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

/// What would turn the recommendation.
fn flips(candidates: &[Candidate], chosen: &Candidate, needs: &Needs, memory: u64) -> Vec<String> {
    // What is recommended, or that nothing meets every need: a change of this is what counts.
    let outcome = |needs: &Needs| -> Option<&str> {
        let best = choose(candidates, needs, memory);
        best.filter(|best| best.rank(needs, memory).meets_all()).map(|best| best.title.as_str())
    };
    let before = outcome(needs);
    let turned = |changed: Needs| {
        let now = outcome(&changed);
        let words = |title| format!("take {title}");
        (now != before).then(|| now.map_or("nothing that was measured meets every need".into(), words))
    };
    let mut flips: Vec<String> = vec![];
    let mut add = |condition: String, then: Option<String>| {
        flips.extend(then.map(|then| format!("{condition}: {then}.")))
    };

    let condition = if needs.untrusted { "If the code were trusted" } else { "If the code were not trusted" };
    add(condition.into(), turned(Needs { untrusted: !needs.untrusted, ..*needs }));
    let condition = if needs.own_kernel {
        "If it needed no kernel of its own"
    } else {
        "If it needed a kernel of its own"
    };
    add(condition.into(), turned(Needs { own_kernel: !needs.own_kernel, ..*needs }));

    // A budget turns it where a candidate begins or ceases to meet it: at the candidates' own figures.
    let mut starts: Vec<f64> =
        candidates.iter().filter_map(Candidate::start_limit).filter(|s| s.is_finite()).collect();
    starts.sort_by(f64::total_cmp);
    let now = needs.start.unwrap_or(f64::INFINITY);
    let with = |start: f64| turned(Needs { start: Some(start), ..*needs });
    let seconds = |limit| format::figure(Unit::Seconds, limit);
    let mut below = starts.iter().rev().filter(|limit| **limit <= now);
    if let Some((limit, then)) = below.find_map(|limit| Some((*limit, with(limit * (1.0 - 1e-9))?))) {
        add(format!("With a start budget below {}", seconds(limit)), Some(then));
    }
    let mut above = starts.iter().filter(|limit| **limit > now);
    if let Some((limit, then)) = above.find_map(|limit| Some((*limit, with(*limit)?))) {
        add(format!("With a start budget of {} or more", seconds(limit)), Some(then));
    }

    let bytes = needs.memory.unwrap_or(memory) as f64;
    let of = format::figure(Unit::Bytes, bytes);
    let mut fits: Vec<u64> =
        candidates.iter().filter_map(|one| one.capacity(bytes)).map(|fit| fit as u64).collect();
    fits.sort_unstable();
    let asked = needs.instances.unwrap_or(0);
    let with = |instances: u64| turned(Needs { instances: Some(instances.max(1)), ..*needs });
    let count = |fit: u64| format::figure(Unit::Count, fit as f64);
    let mut more = fits.iter().filter(|fit| **fit >= asked);
    if let Some((fit, then)) = more.find_map(|fit| Some((*fit, with(fit.saturating_add(1))?))) {
        add(format!("With more than {} in {of}", counted_instances(fit, &count(fit))), Some(then));
    }
    let mut fewer = fits.iter().rev().filter(|fit| **fit < asked && **fit > 0);
    if let Some((fit, then)) = fewer.find_map(|fit| Some((*fit, with(*fit)?))) {
        add(format!("With {} or fewer in {of}", counted_instances(fit, &count(fit))), Some(then));
    }

    // The figures of the others at which they would have been taken.
    let rank = chosen.rank(needs, memory);
    for other in candidates.iter().filter(|other| other.executor != chosen.executor) {
        let its = other.rank(needs, memory);
        let then = || Some(format!("take {}", other.title));
        if rank.meets_all() && its.meets_all() && rank.bytes.is_finite() && its.bytes.is_finite() {
            let [least, now] = [rank.bytes, its.bytes].map(|bytes| format::figure(Unit::Bytes, bytes));
            add(format!("If {} took less than {least} for an instance, and not {now}", other.title), then());
        }
        let checks = other.checks(needs, memory);
        let mut open = checks.iter().filter(|check| check.met != Met::Yes);
        let only_start = open.next().is_some_and(|check| check.need == START) && open.next().is_none();
        if let (true, Some(budget)) =
            (only_start && (!rank.meets_all() || its.bytes < rank.bytes), needs.start)
        {
            let now = if its.seconds.is_finite() {
                format!(", and not {}", seconds(its.seconds))
            } else {
                String::new()
            };
            add(format!("If {} started within {}{now}", other.title, seconds(budget)), then());
        }
    }
    flips
}

fn counted_instances(count: u64, words: &str) -> String {
    format!("{words} {}", if count == 1 { "instance" } else { "instances" })
}

/// The advice for people.
pub fn advice_text(advice: &Advice, colour: bool) -> String {
    let paint = Paint(colour);
    let mut text = format!("{}\n{}\n", paint.bold("Advice"), advice.sentence);
    for warning in &advice.warnings {
        text.push_str(&paint.warn(&format!("Warning: {warning}\n")));
    }
    let mut list = |title: &str, lines: &[String]| {
        if !lines.is_empty() {
            text.push_str(&format!("\n{}\n", paint.bold(title)));
            lines.iter().for_each(|line| text.push_str(&format!("- {line}\n")));
        }
    };
    list("Reasons", &advice.reasons);
    list("What would turn it", &advice.flips);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{summarise, testing};

    fn advise(needs: &str) -> Advice {
        advice(&summarise(&testing::results(1)), &needs.parse().unwrap())
    }

    #[test]
    fn needs_are_read_and_wrong_ones_refused() {
        let needs: Needs = "untrusted, start=200ms,instances=50,memory=8GiB,kernel".parse().unwrap();
        let expected = Needs {
            untrusted: true,
            own_kernel: true,
            start: Some(0.2),
            instances: Some(50),
            memory: Some(8 << 30),
        };
        assert_eq!(needs, expected);
        assert_eq!("".parse(), Ok(Needs::default()));
        assert!(matches!("fast".parse::<Needs>(), Err(Error::Unknown(_))));
        for wrong in
            ["start=-1s", "start=", "start=nan", "instances=0", "memory=99999999999G", "memory=é", "memory="]
        {
            assert!(matches!(wrong.parse::<Needs>(), Err(Error::Value { .. })), "{wrong}");
        }
    }

    #[test]
    fn without_needs_memory_decides_and_distrust_would_turn_it() {
        let advice = advise("");
        assert_eq!(advice.executor.as_deref(), Some("rvmm-native"));
        assert!(advice.meets_all);
        assert!(
            advice.flips.contains(&"If the code were not trusted: take rvmm, microVM.".to_owned()),
            "{:?}",
            advice.flips
        );
    }

    #[test]
    fn untrusted_code_goes_into_a_microvm_until_the_budget_forbids_it() {
        let advice = advise("untrusted");
        assert_eq!(advice.executor.as_deref(), Some("rvmm-microvm"));
        assert!(
            advice.flips.iter().any(|flip| flip.starts_with("If the code were trusted: take rvmm, native")),
            "{:?}",
            advice.flips
        );
    }

    #[test]
    fn budget_that_only_a_container_meets_is_found_to_the_figure() {
        let summary = summarise(&testing::results(1));
        let limit = summary.series("start", "first_output", "rvmm-microvm").unwrap().interval.unwrap().high;
        let with = |budget| {
            advice(
                &summary,
                &Needs { own_kernel: false, untrusted: true, start: Some(budget), ..Needs::default() },
            )
        };
        assert!(with(limit).meets_all);
        assert!(!with(limit * 0.5).meets_all);
    }

    #[test]
    fn wall_is_not_traded_for_a_budget() {
        let advice = advise("untrusted,start=100ms");
        assert!(!advice.meets_all);
        assert_eq!(advice.executor.as_deref(), Some("rvmm-microvm"));
        let flips = |end: &str| advice.flips.iter().any(|flip| flip.ends_with(end));
        assert!(flips("or more: take rvmm, microVM."), "{:?}", advice.flips);
    }

    #[test]
    fn instances_that_do_not_fit_are_missed() {
        let advice = advise("untrusted,instances=100,memory=1G");
        assert!(!advice.meets_all);
        let check = advice
            .checks
            .iter()
            .find(|check| check.executor == "rvmm-microvm" && check.need.contains("instances"));
        assert_eq!(check.unwrap().met, Met::No);
    }

    #[test]
    fn nothing_measured_is_nothing_recommended() {
        let results = crate::bench::Results { samples: vec![], ..testing::results(1) };
        let advice = advice(&summarise(&results), &Needs::default());
        assert_eq!(advice.executor, None);
        assert!(advice_text(&advice, false).contains("Nothing was measured"));
    }
}
