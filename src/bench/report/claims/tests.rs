//! Tests of what is answered to the claims.

use super::*;
use crate::bench::results::{Results, Value};
use crate::bench::{catalogue, summarise, testing};

fn judged(results: &Results, number: usize) -> Claim {
    claims(&summarise(results)).swap_remove(number - 1)
}

/// Replaces what was found for a metric in an executor.
fn set(results: &mut Results, metric: &str, executor: &str, change: impl Fn(&mut Value)) {
    let mut count = 0;
    for sample in results.samples.iter_mut().filter(|s| s.metric == metric && s.executor == executor) {
        change(&mut sample.value);
        count += 1;
    }
    assert!(count > 0, "{metric} of {executor}");
}

fn scaled(by: f64) -> impl Fn(&mut Value) {
    move |value| {
        if let Value::Number(number) = value {
            *number *= by;
        }
    }
}

#[test]
fn tests_are_of_metrics_that_there_are() {
    for (index, info) in list::CLAIMS.iter().enumerate() {
        for test in info.tests {
            let (probe, metrics): (_, Vec<&str>) = match test {
                Test::Better(p, m, ..) | Test::Same(p, m, ..) | Test::Within(p, m, ..) => (p, vec![m]),
                Test::Fact(p, m, ..) | Test::Figure(p, m, ..) | Test::PerMinute(p, m, ..) => (p, vec![m]),
                Test::Beyond(p, (a, _), (b, _)) => (p, vec![a, b]),
                Test::Ran(..) | Test::NoProbe(_) => continue,
            };
            let info =
                catalogue::probe(probe).unwrap_or_else(|| panic!("claim {}: probe {probe}", index + 1));
            for metric in metrics {
                assert!(info.metrics.iter().any(|m| m.0 == metric), "claim {}: {probe}.{metric}", index + 1);
            }
        }
    }
}

#[test]
fn own_kernel_is_confirmed_and_refuted_by_what_was_found() {
    let mut results = testing::results(1);
    assert_eq!(judged(&results, 1).judgement, Judgement::Confirmed);
    set(&mut results, "kernel", "rvmm-microvm", |value| *value = Value::Text("the host's".into()));
    assert_eq!(judged(&results, 1).judgement, Judgement::Mixed);
    set(&mut results, "kernel", "rvmm-native", |value| *value = Value::Text("its own".into()));
    assert_eq!(judged(&results, 1).judgement, Judgement::Refuted);
}

#[test]
fn minutes_are_confirmed_only_where_they_are_minutes() {
    let mut results = testing::results(1);
    let claim = judged(&results, 2);
    assert_eq!(claim.judgement, Judgement::Mixed);
    assert!(claim.evidence.iter().any(|found| found.says == Says::Against && found.text.contains("microVM")));
    for (executor, by) in [("rvmm-microvm", 1e3), ("full-vm-qemu", 20.0)] {
        set(&mut results, "first_output", executor, scaled(by));
    }
    assert_eq!(judged(&results, 2).judgement, Judgement::Confirmed);
}

#[test]
fn slower_vm_is_confirmed_and_faster_refuted() {
    let mut results = testing::results(1);
    results.samples.retain(|sample| sample.metric == "random");
    assert_eq!(judged(&results, 13).judgement, Judgement::Confirmed);
    set(&mut results, "random", "rvmm-microvm", scaled(0.5));
    let claim = judged(&results, 13);
    assert_eq!(claim.judgement, Judgement::Refuted);
    assert!(claim.answer.starts_with("The one measurement disagrees"), "{}", claim.answer);
}

#[test]
fn one_side_alone_decides_nothing_that_is_said_of_both() {
    let mut results = testing::results(1);
    results
        .samples
        .retain(|sample| ["process", "rvmm-native", "crun", "docker"].contains(&sample.executor.as_str()));
    for number in [1, 2, 4, 5, 6] {
        let claim = judged(&results, number);
        assert_eq!(claim.judgement, Judgement::Undecided, "{claim:?}");
        assert!(claim.answer.contains("in a virtual machine was not measured"), "{claim:?}");
    }
    assert_eq!(judged(&results, 8).judgement, Judgement::Confirmed, "it is of containers alone");
}

#[test]
fn few_samples_leave_a_comparison_undecided() {
    let mut results = testing::made_up(1, 3);
    results.samples.retain(|sample| sample.metric == "random");
    assert_eq!(judged(&results, 13).judgement, Judgement::Undecided);
}

#[test]
fn what_was_not_measured_says_so_and_what_is_missing() {
    let results = Results { samples: vec![], ..testing::results(1) };
    for claim in claims(&summarise(&results)) {
        let expected = [Judgement::NotMeasured, Judgement::Definition];
        assert!(expected.contains(&claim.judgement), "{claim:?}");
        assert!(claim.evidence.is_empty() && !claim.missing.is_empty(), "{claim:?}");
    }
}

#[test]
fn answer_holds_the_figures_that_were_measured() {
    let results = testing::results(1);
    let summary = summarise(&results);
    let claim = judged(&results, 2);
    let median = summary.series("start", "first_output", "rvmm-native").unwrap().quantiles.median;
    let figure = format::figure(Unit::Seconds, median);
    assert!(claim.evidence.iter().any(|found| found.text.contains(&figure)), "{figure}: {claim:?}");
}

#[test]
fn warnings_of_the_host_stand_at_the_claims_that_they_touch() {
    let results = testing::results(1);
    assert_eq!(judged(&results, 2).warnings, ["governor"]);
    assert!(judged(&results, 1).warnings.is_empty());
}

#[test]
fn document_has_every_claim_and_what_it_is_measured_by() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/claims.md");
    let text = std::fs::read_to_string(path).unwrap();
    for (index, info) in list::CLAIMS.iter().enumerate() {
        let number = index + 1;
        let start = format!("| {number} | {}", info.claim);
        let row =
            text.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("claim {number}"));
        assert_eq!(row.contains("a matter of definition"), info.definition.is_some(), "claim {number}");
        for test in info.tests {
            let named = match test {
                Test::Better(p, m, ..) | Test::Same(p, m, ..) | Test::Within(p, m, ..) => {
                    format!("`{p}.{m}`")
                }
                Test::Fact(p, m, ..) | Test::Figure(p, m, ..) | Test::PerMinute(p, m, ..) => {
                    format!("`{p}.{m}`")
                }
                Test::Beyond(p, (m, _), _) => format!("`{p}.{m}`"),
                Test::Ran(side, _) => format!("the same image runs in {}", side.words()),
                Test::NoProbe(what) => (*what).to_owned(),
            };
            assert!(row.contains(&named), "claim {number} has no {named}");
        }
    }
}
