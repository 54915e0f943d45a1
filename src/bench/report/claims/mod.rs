//! What is commonly said of containers and virtual machines, and what this host's figures say to it.
//!
//! [`list`] has the claims and the measurements that speak to each; here they are asked. No answer is written down anywhere:
//! its words follow from the figures, so another host may well refute what this one confirms.

mod list;

use serde::Serialize;

use super::format;
use super::verdict::{self, Outcome};
use crate::bench::results::{Isolation, Unit};
use crate::bench::stats::Interval;
use crate::bench::summary::{Series, Summary};

/// A claim as it stands in [`list`].
struct Info {
    claim: &'static str,
    /// What to say where the claim is a matter of definition.
    definition: Option<&'static str>,
    tests: &'static [Test],
}

/// A measurement that speaks to a claim: a probe, a metric, and what the claim expects of them.
enum Test {
    /// The first is better than the second.
    Better(&'static str, &'static str, Side, Side),
    /// They do not differ.
    Same(&'static str, &'static str, Side, Side),
    /// The median is at least the first number and below the second.
    Within(&'static str, &'static str, Side, f64, f64),
    /// Of two counts the first is the greater.
    Beyond(&'static str, (&'static str, Side), (&'static str, Side)),
    /// The fact begins with one of the first words, and not with one of the second.
    Fact(&'static str, &'static str, Side, &'static [&'static str], &'static [&'static str]),
    /// The same image ran: expected or not.
    Ran(Side, bool),
    /// A figure that belongs to the answer, and says neither yes nor no.
    Figure(&'static str, &'static str, Side),
    /// The same, as how often it can be done in a minute.
    PerMinute(&'static str, &'static str, Side),
    /// What would speak to it and no probe measures.
    NoProbe(&'static str),
}

/// Who is meant.
#[derive(Clone, Copy)]
enum Side {
    Process,
    Container,
    Microvm,
    Restored,
    FullVm,
    /// The first virtual machine that has the figure, microVMs first.
    AnyVm,
}

/// A claim with this host's answer.
#[derive(Clone, Debug, Serialize)]
pub struct Claim {
    /// From 1 to 25.
    pub number: usize,
    /// What is said.
    pub claim: &'static str,
    /// What the figures say to it.
    pub judgement: Judgement,
    /// The same in sentences.
    pub answer: String,
    /// What was asked, and what came out.
    pub evidence: Vec<Evidence>,
    /// What would speak to it too, and was not measured in this run.
    pub missing: Vec<String>,
    /// Names of the probes that speak to it.
    pub probes: Vec<&'static str>,
    /// Codes of the host's warnings that touch its evidence.
    pub warnings: Vec<String>,
}

/// What the figures say to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    /// Everything that was measured agrees.
    Confirmed,
    /// Everything that was measured disagrees.
    Refuted,
    /// Some agrees and some does not.
    Mixed,
    /// Too few samples to say, or only one of two sides was measured.
    Undecided,
    /// Nothing that speaks to it was measured in this run.
    NotMeasured,
    /// No measurement decides it.
    Definition,
}

impl Judgement {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Judgement::Confirmed => "confirmed",
            Judgement::Refuted => "refuted",
            Judgement::Mixed => "mixed",
            Judgement::Undecided => "undecided",
            Judgement::NotMeasured => "not measured in this run",
            Judgement::Definition => "a matter of definition",
        }
    }
}

/// What one measurement says to a claim.
#[derive(Clone, Debug, Serialize)]
pub struct Evidence {
    /// The probe behind it.
    pub probe: &'static str,
    /// The metric behind it.
    pub metric: &'static str,
    /// What it says.
    pub says: Says,
    /// The figures, with their intervals.
    pub text: String,
    /// The interval of the ratio, or of the figure.
    pub interval: Option<Interval>,
}

/// What one measurement says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Says {
    /// The claim holds in this.
    For,
    /// It does not.
    Against,
    /// Too few samples to say.
    Unsure,
    /// A figure that decides nothing.
    Neither,
}

/// All 25 claims in their order.
pub fn claims(summary: &Summary) -> Vec<Claim> {
    list::CLAIMS.iter().enumerate().map(|(index, info)| claim(summary, index + 1, info)).collect()
}

fn claim(summary: &Summary, number: usize, info: &Info) -> Claim {
    let (mut evidence, mut missing, mut probes, mut warnings) = (vec![], vec![], vec![], vec![]);
    let (mut wanted, mut heard) = ((false, false), (false, false));
    for test in info.tests {
        let probe = test.probe();
        if !probe.is_empty() && !probes.contains(&probe) {
            probes.push(probe);
        }
        let speaks_of = test.speaks_of();
        wanted = (wanted.0 | speaks_of.0, wanted.1 | speaks_of.1);
        match test.ask(summary) {
            Some((found, executors)) => {
                heard = (heard.0 | speaks_of.0, heard.1 | speaks_of.1);
                for code in verdict::warnings(summary, probe, &executors) {
                    if !warnings.contains(&code) {
                        warnings.push(code);
                    }
                }
                evidence.push(found);
            }
            None => missing.push(test.missing(summary)),
        }
    }
    missing.dedup();
    // What is said of both is not decided by one of them.
    let unheard = match () {
        () if wanted.0 && !heard.0 => Some("a container"),
        () if wanted.1 && !heard.1 => Some("a virtual machine"),
        () => None,
    };
    let judgement = match judge(info, &evidence) {
        Judgement::Confirmed | Judgement::Refuted | Judgement::Mixed if unheard.is_some() => {
            Judgement::Undecided
        }
        judgement => judgement,
    };
    let answer = answer(info, judgement, &evidence, unheard);
    Claim { number, claim: info.claim, judgement, answer, evidence, missing, probes, warnings }
}

fn judge(info: &Info, evidence: &[Evidence]) -> Judgement {
    let count = |says| evidence.iter().filter(|found| found.says == says).count();
    match (count(Says::For), count(Says::Against), count(Says::Unsure)) {
        _ if info.definition.is_some() => Judgement::Definition,
        (0, 0, 0) => Judgement::NotMeasured,
        (0, 0, _) => Judgement::Undecided,
        (_, 0, _) => Judgement::Confirmed,
        (0, _, _) => Judgement::Refuted,
        _ => Judgement::Mixed,
    }
}

fn answer(info: &Info, judgement: Judgement, evidence: &[Evidence], unheard: Option<&str>) -> String {
    let count = |says| evidence.iter().filter(|found| found.says == says).count();
    let (agree, disagree, unsure) = (count(Says::For), count(Says::Against), count(Says::Unsure));
    let measured = |count| format::counted(count, "measurement", "measurements");
    let first = match judgement {
        Judgement::Confirmed if agree == 1 => "The one measurement agrees".to_owned(),
        Judgement::Confirmed if agree == 2 => "Both measurements agree".to_owned(),
        Judgement::Confirmed => format!("All {} agree", measured(agree)),
        Judgement::Refuted if disagree == 1 => "The one measurement disagrees".to_owned(),
        Judgement::Refuted if disagree == 2 => "Both measurements disagree".to_owned(),
        Judgement::Refuted => format!("All {} disagree", measured(disagree)),
        Judgement::Mixed => format!("Of {}, {agree} agree and {disagree} do not", measured(agree + disagree)),
        Judgement::Undecided if agree + disagree > 0 => format!(
            "What would decide it in {} was not measured; of the rest, {agree} agree and {disagree} do not",
            unheard.unwrap_or_default()
        ),
        Judgement::Undecided => format!("{}, with too few samples to say", measured(unsure)),
        Judgement::NotMeasured if evidence.is_empty() => return "Not measured in this run.".into(),
        Judgement::NotMeasured => "What would decide it was not measured in this run".to_owned(),
        Judgement::Definition => info.definition.unwrap_or_default().trim_end_matches('.').to_owned(),
    };
    let more = match unsure {
        0 => String::new(),
        _ if matches!(judgement, Judgement::Undecided | Judgement::Definition) => String::new(),
        unsure => format!("; {unsure} more with too few samples"),
    };
    // What disagrees is news, and stands first.
    let rank = |says| match says {
        Says::Against => 0,
        Says::For => 1,
        Says::Neither => 2,
        Says::Unsure => 3,
    };
    let mut shown: Vec<&Evidence> = evidence.iter().collect();
    shown.sort_by_key(|found| rank(found.says));
    let shown: Vec<&str> = shown.iter().take(2).map(|found| found.text.as_str()).collect();
    let figures = if shown.is_empty() { String::new() } else { format!(" {}.", shown.join(". ")) };
    format!("{first}{more}.{figures}")
}

impl Side {
    /// The executor that is meant: the run's baseline if it is one of these, else the first that has the metric.
    fn series<'a>(self, summary: &'a Summary, probe: &str, metric: &str) -> Option<&'a Series> {
        let there =
            |name: &str| summary.series(probe, metric, name).filter(|series| !series.values.is_empty());
        self.candidates(summary).into_iter().find_map(there)
    }

    fn candidates(self, summary: &Summary) -> Vec<&str> {
        let plan = &summary.plan;
        let of = |wanted: Isolation, restored: Option<bool>| {
            plan.executors.iter().map(String::as_str).filter(move |name| {
                summary.isolation(name) == Some(wanted)
                    && restored.is_none_or(|is| name.contains("restored") == is)
            })
        };
        let mut names: Vec<&str> = match self {
            Side::Process => of(Isolation::None, None).collect(),
            Side::Container => of(Isolation::Container, None).collect(),
            Side::Microvm => of(Isolation::Microvm, Some(false)).collect(),
            Side::Restored => of(Isolation::Microvm, Some(true)).collect(),
            Side::FullVm => of(Isolation::FullVm, None).collect(),
            Side::AnyVm => of(Isolation::Microvm, Some(false)).chain(of(Isolation::FullVm, None)).collect(),
        };
        // A stable sort: only the baseline changes its place.
        names.sort_by_key(|name| *name != plan.baseline);
        names
    }

    fn words(self) -> &'static str {
        match self {
            Side::Process => "a plain process",
            Side::Container => "a container",
            Side::Microvm => "a microVM",
            Side::Restored => "a restored microVM",
            Side::FullVm => "a full VM",
            Side::AnyVm => "a VM",
        }
    }
}

impl Test {
    fn probe(&self) -> &'static str {
        match self {
            Test::Better(probe, ..)
            | Test::Same(probe, ..)
            | Test::Within(probe, ..)
            | Test::Beyond(probe, ..) => probe,
            Test::Fact(probe, ..) | Test::Figure(probe, ..) | Test::PerMinute(probe, ..) => probe,
            Test::Ran(..) => "start",
            Test::NoProbe(_) => "",
        }
    }

    /// Whether it decides something about containers, and about virtual machines.
    fn speaks_of(&self) -> (bool, bool) {
        let of = |sides: &[Side]| {
            let container = sides.iter().any(|side| matches!(side, Side::Container));
            (container, sides.iter().any(|side| !matches!(side, Side::Container | Side::Process)))
        };
        match self {
            Test::Better(_, _, a, b) | Test::Same(_, _, a, b) => of(&[*a, *b]),
            Test::Within(_, _, side, ..) | Test::Fact(_, _, side, ..) | Test::Ran(side, _) => of(&[*side]),
            Test::Beyond(_, (_, a), (_, b)) => of(&[*a, *b]),
            Test::Figure(..) | Test::PerMinute(..) | Test::NoProbe(_) => (false, false),
        }
    }

    /// What it would need, in words.
    fn missing(&self, summary: &Summary) -> String {
        let title = |probe: &str, metric: &str| {
            format!(
                "{}: {}",
                verdict::probe_title(summary, probe),
                verdict::metric_title(summary, probe, metric)
            )
        };
        match self {
            Test::Better(probe, metric, a, b) | Test::Same(probe, metric, a, b) => {
                format!("{} ({} and {})", title(probe, metric), a.words(), b.words())
            }
            Test::Within(probe, metric, side, ..)
            | Test::Fact(probe, metric, side, ..)
            | Test::Figure(probe, metric, side)
            | Test::PerMinute(probe, metric, side) => format!("{} ({})", title(probe, metric), side.words()),
            Test::Beyond(probe, (metric, side), _) => format!("{} ({})", title(probe, metric), side.words()),
            Test::Ran(side, _) => format!("a run of the image in {}", side.words()),
            Test::NoProbe(what) => format!("{what} (no probe measures it)"),
        }
    }

    /// What it says, and which executors it asked; `None` where something was not measured.
    fn ask<'a>(&self, summary: &'a Summary) -> Option<(Evidence, Vec<&'a str>)> {
        let (metric, says, text, interval, executors) = match *self {
            Test::Better(probe, metric, a, b) | Test::Same(probe, metric, a, b) => {
                let (a, b) = (a.series(summary, probe, metric)?, b.series(summary, probe, metric)?);
                let comparison = summary.comparison(probe, metric, &a.executor, &b.executor)?;
                let outcome = verdict::outcome(&comparison);
                let same = matches!(self, Test::Same(..));
                let says = match outcome {
                    Outcome::TooFew => Says::Unsure,
                    Outcome::NoDifference if same => Says::For,
                    Outcome::Won { by: 0, .. } if !same => Says::For,
                    _ => Says::Against,
                };
                let text = format!(
                    "{}: {}, {}{}",
                    verdict::metric_title(summary, probe, metric),
                    named(summary, a, false),
                    named(summary, b, false),
                    outcome_words(summary, outcome)
                );
                (metric, says, text, comparison.interval, vec![a.executor.as_str(), b.executor.as_str()])
            }
            Test::Within(probe, metric, side, low, high) => {
                let series = side.series(summary, probe, metric)?;
                let text = with_title(summary, series);
                let says = within(series, low, high);
                (metric, says, text, series.interval, vec![series.executor.as_str()])
            }
            Test::Beyond(probe, (metric, side), (other, than)) => {
                let (a, b) = (side.series(summary, probe, metric)?, than.series(summary, probe, other)?);
                let says = if a.quantiles.median > b.quantiles.median { Says::For } else { Says::Against };
                let text = format!("{}; {}", with_title(summary, a), with_title(summary, b));
                (metric, says, text, None, vec![a.executor.as_str(), b.executor.as_str()])
            }
            Test::Fact(probe, metric, side, holds, fails) => {
                let there =
                    |name: &str| summary.fact(probe, metric, name).filter(|fact| !fact.values.is_empty());
                let fact = side.candidates(summary).into_iter().find_map(there)?;
                let begins = |words: &[&str], text: &str| {
                    let text = text.to_lowercase();
                    words.iter().any(|word| text.starts_with(word))
                };
                let all = |words| fact.values.iter().all(|text| begins(words, text));
                let any = |words| fact.values.iter().any(|text| begins(words, text));
                let says = match () {
                    () if any(fails) => Says::Against,
                    () if all(holds) => Says::For,
                    () => Says::Neither,
                };
                let values: Vec<String> = fact.values.iter().map(|text| format::clean(text)).collect();
                let text = format!(
                    "{}: {}: {}",
                    verdict::metric_title(summary, probe, metric),
                    verdict::title(summary, &fact.executor),
                    values.join(", or ")
                );
                (metric, says, text, None, vec![fact.executor.as_str()])
            }
            Test::Ran(side, expected) => {
                let executor = side.candidates(summary).into_iter().find(|name| {
                    summary.series.iter().any(|series| series.executor == *name && !series.values.is_empty())
                })?;
                let says = if expected { Says::For } else { Says::Against };
                let image = format::clean(&summary.plan.image);
                let text = format!("The image {image} ran in {}", verdict::title(summary, executor));
                ("first_output", says, text, None, vec![executor])
            }
            Test::Figure(probe, metric, side) => {
                if let Some(series) = side.series(summary, probe, metric) {
                    let text = with_title(summary, series);
                    (metric, Says::Neither, text, series.interval, vec![series.executor.as_str()])
                } else {
                    // The same words serve for facts.
                    return Test::Fact(probe, metric, side, &[], &[]).ask(summary);
                }
            }
            Test::NoProbe(_) => return None,
            Test::PerMinute(probe, metric, side) => {
                let series = side.series(summary, probe, metric)?;
                let often = 60.0 / series.quantiles.median;
                if !often.is_finite() {
                    return None;
                }
                let text = format!(
                    "{}: {} a minute, one after the other",
                    verdict::title(summary, &series.executor),
                    format::figure(Unit::Count, often)
                );
                (metric, Says::Neither, text, None, vec![series.executor.as_str()])
            }
        };
        let text = format::capitalised(&text);
        Some((Evidence { probe: self.probe(), metric, says, text, interval }, executors))
    }
}

/// Whether a median lies in a range: unsure if its interval says both, or if there is none.
fn within(series: &Series, low: f64, high: f64) -> Says {
    let inside = |value: f64| low <= value && value < high;
    let says = |inside: bool| if inside { Says::For } else { Says::Against };
    match series.interval {
        _ if series.exact => says(inside(series.quantiles.median)),
        Some(interval) if inside(interval.low) == inside(interval.high) => {
            says(inside(series.quantiles.median))
        }
        // Few samples say it if all of them lie on one side, and by a factor of two.
        None if inside(series.quantiles.min / 2.0) == inside(series.quantiles.max * 2.0)
            && inside(series.quantiles.min) == inside(series.quantiles.max)
            && inside(series.quantiles.min) == inside(series.quantiles.max * 2.0) =>
        {
            says(inside(series.quantiles.median))
        }
        _ => Says::Unsure,
    }
}

/// An executor and its figure.
fn named(summary: &Summary, series: &Series, with_interval: bool) -> String {
    let median = series.quantiles.median;
    let interval = match series.interval {
        Some(interval) if with_interval => format!(" ({})", format::interval(series.unit, median, interval)),
        _ => String::new(),
    };
    format!("{} {}{interval}", verdict::title(summary, &series.executor), format::figure(series.unit, median))
}

fn with_title(summary: &Summary, series: &Series) -> String {
    format!(
        "{}: {}",
        verdict::metric_title(summary, &series.probe, &series.metric),
        named(summary, series, true)
    )
}

fn outcome_words(summary: &Summary, outcome: Outcome) -> String {
    match outcome {
        Outcome::Won { factor: Some(factor), interval: Some(interval), .. } => format!(
            ": a factor of {} ({} interval {})",
            format::factor(factor),
            format::percent(summary.plan.confidence),
            format::factors(interval)
        ),
        Outcome::Won { factor: Some(factor), .. } => format!(": a factor of {}", format::factor(factor)),
        Outcome::Won { factor: None, .. } => String::new(),
        Outcome::NoDifference => ": no difference found".into(),
        Outcome::TooFew => ": too few samples to say".into(),
    }
}

#[cfg(test)]
mod tests;
