//! The report as one page that needs nothing else: no network, no library, and without its script only sorting is missing.
//!
//! maud escapes every text that is put into the page; the policy in its head lets nothing run but the page's own script,
//! whatever a result may hold.

mod charts;
mod parts;
mod plot;

use std::io::Write;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use flate2::{Compression, GzBuilder};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use sha2::{Digest, Sha256};

use super::claims::{self, Claim, Judgement, Says};
use super::format;
use super::verdict::{self, Outcome, Ruling};
use crate::bench::results::{self, Isolation, Results};
use crate::bench::summary::Summary;
use parts::{Cell, Column, isolation_class, sortable};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The whole page. `results` are those that `summary` was made from: their samples and commands stand in it as they are.
pub fn html(summary: &Summary, results: &Results) -> String {
    let rulings = verdict::rulings(summary);
    let claims = claims::claims(summary);
    let title = format!("{}: container or virtual machine", format::clean(&summary.plan.image));
    let policy = format!(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        BASE64_STANDARD.encode(Sha256::digest(SCRIPT))
    );
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(policy);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                a.skip href="#verdict" { "Skip to the verdict" }
                header.top {
                    p.kicker { "rvmm compare" }
                    h1 { "Container or virtual machine?" }
                    p.lead {
                        "The image " b { (format::clean(&summary.plan.image)) } ", run in "
                        (format::counted(summary.plan.executors.len(), "isolation", "isolations"))
                        " of one host and measured there: " (format::clean(&summary.host.cpu.model)) ", "
                        (format::counted(summary.host.cpu.count as usize, "processor", "processors")) ", KVM "
                        b { (format::clean(&summary.host.kvm)) } ", " (format::clean(&summary.host.date)) "."
                    }
                    nav aria-label="Parts of this page" {
                        ul {
                            @for (id, name) in [("verdict", "Verdict"), ("charts", "Charts"), ("claims", "Claims"), ("figures", "All figures"), ("host", "Host and method"), ("raw", "Raw data")] {
                                li { a href={ "#" (id) } { (name) } }
                            }
                        }
                    }
                }
                main {
                    (warnings(summary))
                    (verdict_part(summary, &rulings))
                    (parts::charts_part(summary))
                    (claims_part(&claims))
                    (parts::figures_part(summary))
                    (parts::host_part(summary))
                    (raw(results))
                }
                footer {
                    p { "Made by " (format::clean(&summary.host.rvmm.version)) ". Everything on this page follows from the samples at its end." }
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    page.into_string()
}

fn warnings(summary: &Summary) -> Markup {
    let why = summary.why_incomplete.as_deref().unwrap_or("the run did not come to its end");
    html! {
        @if !summary.complete || !summary.host.warnings.is_empty() {
            aside.warnings aria-label="Warnings" {
                h2 { "Read this first" }
                ul {
                    @if !summary.complete {
                        li { b { "partial" } " " (format::clean(why)) }
                    }
                    @for warning in &summary.host.warnings {
                        li { b { (format::clean(&warning.code)) } " " (format::clean(&warning.text)) }
                    }
                }
            }
        }
    }
}

/// Dimensions that have a card of their own above the chart of all.
const CARDS: [&str; 6] = ["Start", "Memory", "Computing", "System calls", "Service", "Attack surface"];

fn verdict_part(summary: &Summary, rulings: &[Ruling]) -> Markup {
    let chart = plot::draw(&charts::advantages(summary, rulings));
    let title = |name: Option<&str>| name.map_or(String::new(), |name| verdict::title(summary, name));
    let pair = verdict::pair(summary);
    let (a, b) = (title(pair.map(|pair| pair.0)), title(pair.map(|pair| pair.1)));
    html! {
        section #verdict aria-labelledby="verdict-title" {
            h2 #verdict-title { "Verdict" }
            p.headline { (verdict::headline(summary, rulings)) }
            div.cards {
                @for ruling in rulings.iter().filter(|ruling| CARDS.contains(&ruling.title.as_str())) { (card(ruling)) }
            }
            @if !rulings.is_empty() {
                div.figure {
                    figure {
                        figcaption {
                            h3 { "By how much" }
                            p {
                                "How many times better each is, with " (format::percent(summary.plan.confidence)) " intervals. "
                                "To the left of 1× " b { (a) } " is better, to the right " b { (b) } "."
                            }
                            (parts::isolation_legend(summary))
                        }
                        (PreEscaped(chart.unwrap_or_default()))
                    }
                    (sortable("Verdict by dimension", &[
                        Column::text("Dimension"), Column::number(&a), Column::number(&b), Column::text("Better"), Column::number("Factor"),
                    ], rulings.iter().map(|ruling| {
                        let (better, factor, interval) = match ruling.outcome {
                            Outcome::Won { factor, interval, .. } => {
                                (ruling.winner().map_or("", |side| &side.title), factor, interval)
                            }
                            Outcome::NoDifference => ("no difference found", None, None),
                            Outcome::TooFew => ("too few samples", None, None),
                        };
                        let figure = |side: &verdict::Side| Cell::number(format::figure(ruling.unit, side.median), side.median);
                        let factor = match factor {
                            Some(factor) => Cell::number(format!("{}×", format::factor(factor)), factor)
                                .with_small(interval.map_or(String::new(), format::factors)),
                            None => Cell::text(String::new()),
                        };
                        let dimension = Cell::text(ruling.title.clone())
                            .with_small(format!("{}{}", ruling.metric_title, parts::marked(&ruling.warnings)));
                        vec![dimension, figure(&ruling.sides[0]), figure(&ruling.sides[1]), Cell::text(better.to_owned()), factor]
                    }).collect()))
                }
            }
        }
    }
}

fn card(ruling: &Ruling) -> Markup {
    let class = ruling.winner().map_or("undecided", |winner| isolation_class(winner.isolation));
    let big = match ruling.outcome {
        Outcome::Won { factor: Some(factor), .. } => format!("{}×", format::factor(factor)),
        Outcome::Won { factor: None, by, .. } => {
            let figure = |at: usize| {
                ruling.sides.get(at).map_or(String::new(), |side| format::figure(ruling.unit, side.median))
            };
            format!("{} vs {}", figure(by), figure(1 - by.min(1)))
        }
        Outcome::NoDifference => "=".into(),
        Outcome::TooFew => "?".into(),
    };
    html! {
        article.card.(class) {
            h3 { (ruling.title) }
            p.big aria-hidden="true" { (big) }
            p { (ruling.sentence) (parts::marked(&ruling.warnings)) }
            dl {
                @for side in &ruling.sides {
                    dt { (side.title) }
                    dd { (format::figure(ruling.unit, side.median)) }
                }
                @if let Some(best) = &ruling.best {
                    dt { "best: " (best.title) }
                    dd { (format::figure(ruling.unit, best.median)) }
                }
            }
        }
    }
}

fn claims_part(claims: &[Claim]) -> Markup {
    let class = |judgement| match judgement {
        Judgement::Confirmed => "confirmed",
        Judgement::Refuted => "refuted",
        Judgement::Mixed => "mixed",
        _ => "open",
    };
    let count = |judgement| claims.iter().filter(|claim| claim.judgement == judgement).count();
    let kinds = [
        Judgement::Confirmed,
        Judgement::Mixed,
        Judgement::Refuted,
        Judgement::Undecided,
        Judgement::NotMeasured,
        Judgement::Definition,
    ];
    html! {
        section #claims aria-labelledby="claims-title" {
            h2 #claims-title { "What is commonly said, and what this host says to it" }
            ul.tally {
                @for kind in kinds.into_iter().filter(|kind| count(*kind) > 0) {
                    li { span.badge.(class(kind)) { (count(kind)) " " (kind.words()) } }
                }
            }
            (sortable("The claims", &[
                Column::number("#"), Column::text("Claim"), Column::text("On this host"), Column::text("Answer"), Column::text("Probes"),
            ], claims.iter().map(|claim| vec![
                Cell::number(claim.number.to_string(), claim.number as f64),
                Cell::text(claim.claim.to_owned()).of("claim"),
                Cell::markup(claim.judgement.words(), html! { span.badge.(class(claim.judgement)) { (claim.judgement.words()) } }),
                Cell::markup(&claim.answer, answer(claim)).of("answer"),
                Cell::text(claim.probes.join(", ")).of("probes"),
            ]).collect()))
        }
    }
}

fn answer(claim: &Claim) -> Markup {
    html! {
        p { (claim.answer) (parts::marked(&claim.warnings)) }
        @if !claim.evidence.is_empty() || !claim.missing.is_empty() {
            details {
                summary {
                    @if !claim.evidence.is_empty() { (format::counted(claim.evidence.len(), "figure or fact", "figures and facts")) }
                    @if !claim.evidence.is_empty() && !claim.missing.is_empty() { ", " }
                    @if !claim.missing.is_empty() { (claim.missing.len()) " not measured" }
                }
                ul.evidence {
                    @for found in &claim.evidence {
                        @let (sign, words) = match found.says {
                            Says::For => ("✓", "agrees"),
                            Says::Against => ("✗", "disagrees"),
                            Says::Unsure => ("?", "too few samples"),
                            Says::Neither => ("·", "decides nothing"),
                        };
                        li {
                            span.sign role="img" aria-label=(words) title=(words) { (sign) } " " (found.text) " "
                            code { (found.probe) "." (found.metric) }
                        }
                    }
                    @for missing in &claim.missing {
                        li.missing { span.sign aria-hidden="true" { "–" } " not measured: " (missing) }
                    }
                }
            }
        }
    }
}

fn raw(results: &Results) -> Markup {
    let lines = |text: String| {
        // Without a name and a time in it, the same samples make the same page.
        let mut packed = GzBuilder::new().write(vec![], Compression::best());
        let packed = packed.write_all(text.as_bytes()).and_then(|()| packed.finish()).unwrap_or_default();
        format!("data:application/gzip;base64,{}", BASE64_STANDARD.encode(packed))
    };
    let samples = lines(results.samples.iter().map(results::line).collect());
    let commands = lines(results.commands.iter().map(results::line).collect());
    let plain = |text: String| format!("data:application/json;base64,{}", BASE64_STANDARD.encode(text));
    let files = [
        ("samples.jsonl.gz", format::counted(results.samples.len(), "sample", "samples"), samples),
        (
            "commands.jsonl.gz",
            format::counted(results.commands.len(), "command line", "command lines"),
            commands,
        ),
        ("host.json", "the machine".into(), plain(results::line(&results.host))),
        ("plan.json", "what was to be done".into(), plain(results::line(&results.plan))),
    ];
    html! {
        section #raw aria-labelledby="raw-title" {
            h2 #raw-title { "Raw data" }
            p { "The result folder, as it is in this page. " code { "rvmm compare report" } " makes every report from it again." }
            ul.files {
                @for (name, what, link) in files {
                    li { a download=(name) href=(link) { (name) } " " span.muted { (what) } }
                }
            }
            details {
                summary { "Command lines (" (results.commands.len()) ")" }
                (sortable("Command lines", &[Column::text("Probe"), Column::text("Executor"), Column::text("Command")],
                    results.commands.iter().take(parts::MAX_ROWS).map(|command| vec![
                        Cell::text(format::clean(&command.probe)),
                        Cell::text(format::clean(&command.executor)),
                        Cell::markup("", html! { code.line { (format::clean(&format::shell(&command.argv))) } }),
                    ]).collect()))
            }
        }
    }
}

/// Cells of an executor, for every table that begins with one.
fn executor_cell(summary: &Summary, executor: &str) -> Cell {
    let isolation: Option<Isolation> = summary.isolation(executor);
    let title = verdict::title(summary, executor);
    Cell::markup(&title, html! { span.chip.(isolation_class(isolation)) { (title) } })
}
