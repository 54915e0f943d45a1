//! Every report of the same made-up run, as it is kept in `tests/bench/snapshots`; and of runs as strange as can be.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::bench::results::{Better, Isolation, Noise, Sample, Unit, Value, Warning};
use crate::bench::{Results, Summary, summarise, summary, testing};

/// Compares with what is kept. After a change that is meant: `RVMM_WRITE_SNAPSHOTS=1 cargo test --lib bench::report`.
fn snapshot(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/snapshots").join(name);
    if std::env::var_os("RVMM_WRITE_SNAPSHOTS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let line = kept.lines().zip(text.lines()).position(|(kept, new)| kept != new);
    assert!(kept == text, "{} differs from line {:?} on", path.display(), line.map(|line| line + 1));
}

/// The run of `tests/bench/fixture`.
fn fixture() -> Results {
    testing::made_up(1, 8)
}

#[test]
fn table_is_as_it_was() {
    let summary = summarise(&fixture());
    let plain = table(&summary, false);
    snapshot("table.txt", &plain);
    assert!(!plain.contains('\x1b'));
    let coloured = table(&summary, true);
    let mut without = coloured.clone();
    for code in ["\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[33m", "\x1b[0m"] {
        without = without.replace(code, "");
    }
    assert_ne!(coloured, plain);
    assert_eq!(without, plain, "colour changes nothing but colour");
}

#[test]
fn markdown_is_as_it_was() {
    snapshot("report.md", &markdown(&summarise(&fixture())));
}

#[test]
fn csv_is_as_it_was() {
    snapshot("report.csv", &csv(&summarise(&fixture())));
}

#[test]
fn json_is_as_it_was() {
    let mut results = fixture();
    results.samples.retain(|sample| sample.probe == "syscall" || sample.metric == "kernel");
    snapshot("report.json", &json(&summarise(&results)));
}

#[test]
fn page_is_as_it_was() {
    let results = fixture();
    let page = html(&summarise(&results), &results);
    let (mut kept, mut rest) = (String::new(), page.as_str());
    // What is packed depends on the packer.
    while let Some((before, after)) = rest.split_once(";base64,") {
        kept.push_str(before);
        kept.push_str(";base64,…");
        rest = after.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "+/=".contains(c));
    }
    kept.push_str(rest);
    snapshot("page.html", &kept);
}

#[test]
fn claims_are_as_they_were() {
    let lines = claims(&summarise(&fixture())).into_iter().map(|claim| {
        let evidence: String =
            claim.evidence.iter().map(|found| format!("    {:?} {}\n", found.says, found.text)).collect();
        let missing: String =
            claim.missing.iter().map(|missing| format!("    missing {missing}\n")).collect();
        format!(
            "{}. {}\n  {}: {}\n{evidence}{missing}",
            claim.number,
            claim.claim,
            claim.judgement.words(),
            claim.answer
        )
    });
    snapshot("claims.txt", &lines.collect::<String>());
}

#[test]
fn advice_is_as_it_was() {
    let summary = summarise(&fixture());
    let advise = |needs: &str| {
        format!("# {needs}\n{}\n", advice_text(&advice(&summary, &needs.parse().unwrap()), false))
    };
    let needs = [
        "",
        "untrusted",
        "untrusted,start=100ms",
        "start=20ms,instances=100",
        "kernel",
        "untrusted,instances=1000,memory=8G",
    ];
    snapshot("advice.txt", &needs.map(advise).concat());
}

#[test]
fn difference_is_as_it_was() {
    let (first, mut second) = (fixture(), testing::made_up(2, 8));
    second.host.kvm = "nested".into();
    for sample in second
        .samples
        .iter_mut()
        .filter(|sample| sample.metric == "first_output" && sample.executor == "rvmm-microvm")
    {
        if let Value::Number(number) = &mut sample.value {
            *number *= 1.3;
        }
    }
    let text = diff(&summarise(&first), &summarise(&second), &summary::diff(&first, &second), false);
    snapshot("diff.txt", &text);
}

#[test]
fn page_needs_nothing_from_elsewhere() {
    let results = fixture();
    let page = html(&summarise(&results), &results).replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for foreign in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(foreign), "{foreign}");
    }
}

/// Puts a text wherever a result can hold one.
fn with_text(mut results: Results, text: &str) -> Results {
    let hostile = || text.to_owned();
    results.plan.image = hostile();
    results.plan.command = vec![hostile()];
    results.host.kernel = hostile();
    results.host.kvm = hostile();
    results.host.cpu.model = hostile();
    results.host.rvmm.version = hostile();
    results.host.executors.iter_mut().for_each(|info| {
        info.title = hostile();
        info.version = Some(hostile());
    });
    results.plan.metrics.iter_mut().for_each(|metric| metric.title = hostile());
    results.plan.probes.iter_mut().for_each(|probe| probe.title = hostile());
    results.host.warnings =
        vec![Warning { code: hostile(), text: hostile(), probes: vec![], executors: vec![] }];
    results.commands.iter_mut().for_each(|command| command.argv = vec![hostile()]);
    results.samples.iter_mut().for_each(|sample| match &mut sample.value {
        Value::Text(text) | Value::Failed(text) => *text = hostile(),
        Value::Number(_) => {}
    });
    results
}

#[test]
fn hostile_text_stays_text_in_every_report() {
    let attack = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>|\x1b]0;x\x07\r\n=cmd()";
    let results = with_text(testing::made_up(1, 2), attack);
    let summary = summarise(&results);
    let page = html(&summary, &results);
    assert_eq!(page.matches("<script").count(), 1, "only the page's own");
    assert!(!page.contains("<img"));
    check_html(&page);
    for text in [table(&summary, false), advice_text(&advice(&summary, &Needs::default()), false)] {
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
    }
    let text = markdown(&summary);
    assert!(!text.contains("<script") && text.chars().all(|c| c == '\n' || !c.is_control()));
    check_csv(&csv(&summary));
}

/// Tags are closed in their order, attributes quoted, identifiers unique.
fn check_html(page: &str) {
    const VOID: [&str; 3] = ["meta", "link", "br"];
    let (mut open, mut ids, mut rest) = (vec![], HashSet::new(), page);
    while let Some((text, after)) = rest.split_once('<') {
        assert!(
            !text.contains('>') || open.last() == Some(&"script") || open.last() == Some(&"style"),
            "stray > in {text:.80}"
        );
        let mut quoted = false;
        let end = after.find(|c| {
            quoted ^= c == '"';
            c == '>' && !quoted
        });
        let end = end.expect("a tag that ends");
        let tag = &after[..end];
        rest = &after[end + 1..];
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        if let Some(id) = tag.split(" id=\"").nth(1).and_then(|id| id.split('"').next()) {
            assert!(ids.insert(id.to_owned()), "{id} twice");
        }
        if tag.starts_with('!') || tag.ends_with('/') || VOID.contains(&name) {
            continue;
        }
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None => open.push(name),
        }
        if ["script", "style"].contains(&name) && !tag.starts_with('/') {
            let end = rest.find(&format!("</{name}>")).expect("an end");
            rest = &rest[end..];
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

/// Every record has as many fields as the first.
fn check_csv(text: &str) {
    let (mut fields, mut counts, mut quoted) = (1, vec![], false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields += 1,
            '\r' if !quoted && chars.peek() == Some(&'\n') => {
                chars.next();
                counts.push(std::mem::replace(&mut fields, 1));
            }
            _ => {}
        }
    }
    assert!(!quoted && !counts.is_empty() && counts.iter().all(|count| *count == counts[0]), "{counts:?}");
}

fn any_value() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        3 => 1e-9..1e9f64,
        1 => prop::sample::select(vec![0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MAX, f64::MIN_POSITIVE, 5e-324, 1e308]),
    ];
    prop_oneof![6 => number.prop_map(Value::Number), 1 => any_text().prop_map(Value::Text), 1 => any_text().prop_map(Value::Failed)]
}

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z ]{0,12}",
        "\\PC{0,20}",
        ".{0,20}",
        Just("<b>\"'&|`\x1b[0m\u{202e}\0".to_owned()),
        Just("=1+1,\r\n".to_owned())
    ]
}

/// Any results: metrics and executors known and unknown, whole and partial.
fn any_results() -> impl Strategy<Value = Results> {
    let probes = ["start", "memory", "cpu", "timeline", "service", "isolation", "size", "syscall", "<x>"];
    let metrics = [
        "first_output",
        "pss",
        "guest",
        "integer",
        "getppid",
        "fastapi_p50",
        "fastapi_p999",
        "kernel",
        "syscalls_allowed",
        "instance",
        "\"y\"",
    ];
    let executors =
        ["process", "rvmm-native", "docker", "rvmm-microvm", "rvmm-restored", "full-vm-qemu", "?"];
    let units = [
        Unit::Seconds,
        Unit::Bytes,
        Unit::BytesPerSecond,
        Unit::PerSecond,
        Unit::Count,
        Unit::Share,
        Unit::Text,
    ];
    let better = [Better::Lower, Better::Higher, Better::None];
    use prop::sample::select;
    let sample = (
        select(probes.to_vec()),
        select(metrics.to_vec()),
        select(executors.to_vec()),
        select(units.to_vec()),
        select(better.to_vec()),
        any_value(),
    );
    let series = (sample, 1..9u32);
    (prop::collection::vec(series, 0..12), any_text(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(series, text, hostile, exact, killed)| {
            let mut results = testing::made_up(1, 0);
            for ((probe, metric, executor, unit, better, value), rounds) in series {
                for round in 0..rounds {
                    let value = match &value {
                        Value::Number(number) => Value::Number(number * (1.0 + f64::from(round) / 50.0)),
                        other => other.clone(),
                    };
                    let order = results.samples.len() as u32;
                    let (probe, metric, executor) = (probe.into(), metric.into(), executor.into());
                    let sample = Sample {
                        probe,
                        metric,
                        executor,
                        round,
                        order,
                        at: f64::NAN,
                        unit,
                        better,
                        value,
                        noise: Noise::default(),
                    };
                    results.samples.push(sample);
                }
            }
            results.plan.metrics.iter_mut().for_each(|metric| metric.exact |= exact);
            results.plan.executors.push("?".into());
            results.host.memory_bytes = if exact { u64::MAX } else { 0 };
            if killed {
                results.end = None;
            }
            if hostile { with_text(results, &text) } else { results }
        },
    )
}

/// Every report of a run, and of the run beside another.
fn check_all(results: &Results, other: &Results, needs: &Needs) {
    let (summary, others): (Summary, Summary) = (summarise(results), summarise(other));
    table(&summary, true);
    markdown(&summary);
    check_csv(&csv(&summary));
    let value: serde_json::Value = serde_json::from_str(&json(&summary)).expect("JSON");
    assert_eq!(value["claims"].as_array().map(Vec::len), Some(25));
    check_html(&html(&summary, results));
    advice_text(&advice(&summary, needs), true);
    diff(&summary, &others, &summary::diff(results, other), true);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_results_make_valid_reports(
        results in any_results(),
        other in any_results(),
        untrusted: bool,
        own_kernel: bool,
        start in prop::option::of(prop_oneof![1e-9..1e3f64, Just(f64::INFINITY), Just(f64::NAN)]),
        instances in prop::option::of(any::<u64>()),
        memory in prop::option::of(any::<u64>()),
    ) {
        check_all(&results, &other, &Needs { untrusted, own_kernel, start, instances, memory });
    }
}

#[test]
fn nothing_measured_still_makes_reports() {
    let results = testing::made_up(1, 0);
    check_all(&results, &results, &Needs::default());
    let mut bare = results;
    bare.plan.executors.clear();
    bare.plan.metrics.clear();
    bare.plan.probes.clear();
    bare.host.executors.clear();
    bare.host.warnings.clear();
    check_all(&bare, &bare, &Needs::default());
}

#[test]
fn isolation_without_a_name_in_the_plan_is_no_isolation() {
    assert_eq!(summarise(&fixture()).isolation("?"), None);
    assert_eq!(summarise(&fixture()).isolation("docker"), Some(Isolation::Container));
}
