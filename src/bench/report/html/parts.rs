//! Tables that sort, and the parts of the page that are mostly tables.

use maud::{Markup, PreEscaped, html};

use super::charts::{self, MEMORY_PARTS, PERCENTILES, SERVICES};
use super::executor_cell;
use super::plot::{self, Plot};
use crate::bench::report::table::reasons;
use crate::bench::report::{format, verdict};
use crate::bench::results::{Isolation, Unit};
use crate::bench::summary::{Series, Summary};

/// Rows of a table at most: what is more is in the raw data.
pub const MAX_ROWS: usize = 2000;

/// A column of a table.
pub struct Column {
    name: String,
    number: bool,
}

impl Column {
    pub fn text(name: &str) -> Column {
        Column { name: name.into(), number: false }
    }
    pub fn number(name: &str) -> Column {
        Column { name: name.into(), number: true }
    }
}

/// A cell, and what it is sorted by.
pub struct Cell {
    content: Markup,
    small: String,
    sort: Option<String>,
    class: &'static str,
}

impl Cell {
    pub fn text(text: String) -> Cell {
        Cell { content: html! { (text) }, small: String::new(), sort: None, class: "" }
    }
    pub fn number(text: String, value: f64) -> Cell {
        let sort = value.is_finite().then(|| format!("{value:e}"));
        Cell { content: html! { (text) }, small: String::new(), sort, class: "number" }
    }
    /// Sorted by a text that is not what it shows.
    pub fn markup(sort: &str, content: Markup) -> Cell {
        Cell { content, small: String::new(), sort: Some(sort.into()), class: "" }
    }
    /// With a line of lesser weight below.
    pub fn with_small(self, small: String) -> Cell {
        Cell { small, ..self }
    }
    /// With a class of its own.
    pub fn of(self, class: &'static str) -> Cell {
        Cell { class, ..self }
    }
}

/// A table whose columns sort by click and by key. On narrow screens its rows become blocks, so cells know their columns.
pub fn sortable(caption: &str, columns: &[Column], rows: Vec<Vec<Cell>>) -> Markup {
    html! {
        div.table {
            table {
                caption { (caption) }
                thead {
                    tr {
                        @for column in columns {
                            th scope="col" class=[column.number.then_some("number")] data-number=[column.number.then_some("")] {
                                @if column.name.is_empty() { span.hidden { "note" } } @else {
                                    button type="button" { (column.name) span.arrow aria-hidden="true" {} }
                                }
                            }
                        }
                    }
                }
                tbody {
                    @for row in rows {
                        tr {
                            @for (cell, column) in row.iter().zip(columns) {
                                td class=[(!cell.class.is_empty()).then_some(cell.class)] data-label=(column.name) data-sort=[cell.sort.as_ref()] {
                                    div { (cell.content) @if !cell.small.is_empty() { small { (cell.small) } } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The class that gives an isolation its colour.
pub fn isolation_class(isolation: Option<Isolation>) -> &'static str {
    match isolation {
        Some(Isolation::Container) => "container",
        Some(Isolation::Microvm) => "microvm",
        Some(Isolation::FullVm) => "full-vm",
        Some(Isolation::None) | None => "process",
    }
}

/// Which colour is which isolation.
pub fn isolation_legend(summary: &Summary) -> Markup {
    let names = [
        (Isolation::None, "plain process"),
        (Isolation::Container, "container"),
        (Isolation::Microvm, "microVM"),
        (Isolation::FullVm, "full VM"),
    ];
    let there = |isolation| {
        summary.series.iter().any(|series| summary.isolation(&series.executor) == Some(isolation))
    };
    html! {
        ul.legend {
            @for (isolation, name) in names.into_iter().filter(|(isolation, _)| there(*isolation)) {
                li { span.swatch.(isolation_class(Some(isolation))) {} (name) }
            }
        }
    }
}

/// The codes of warnings, behind what they touch.
pub fn marked(warnings: &[String]) -> String {
    if warnings.is_empty() { String::new() } else { format!(" (warning: {})", warnings.join(", ")) }
}

/// Median with its interval, and how many samples.
pub fn figure_cells(series: &Series) -> [Cell; 2] {
    let median = series.quantiles.median;
    if series.values.is_empty() {
        return [Cell::text("–".into()).with_small(reasons(&series.failures)), Cell::number("0".into(), 0.0)];
    }
    let interval =
        series.interval.map_or(String::new(), |interval| format::interval(series.unit, median, interval));
    let outliers = match series.outliers.len() {
        0 => String::new(),
        count => format::counted(count, "outlier", "outliers"),
    };
    [
        Cell::number(format::figure(series.unit, median), median).with_small(interval),
        Cell::number(series.values.len().to_string(), series.values.len() as f64).with_small(outliers),
    ]
}

/// Rows of a table beside a chart at most; of more, the table is folded.
const UNFOLDED_ROWS: usize = 24;

/// A table that is folded where it is long.
fn folded(rows: usize, table: Markup) -> Markup {
    html! {
        @if rows > UNFOLDED_ROWS {
            details { summary { "Table of " (rows) " figures" } (table) }
        } @else { (table) }
    }
}

/// A chart with its table beside it.
fn chart(title: &str, text: Markup, plot: &Plot, table: Markup) -> Markup {
    let Some(drawn) = plot::draw(plot) else { return html! {} };
    html! {
        div.figure {
            figure {
                figcaption { h3 { (title) } (text) }
                (PreEscaped(drawn))
            }
            (table)
        }
    }
}

/// All charts, each only where something of it was measured.
pub fn charts_part(summary: &Summary) -> Markup {
    let parts: Vec<Markup> =
        vec![start(summary), memory(summary), timeline(summary), latency(summary), costs(summary)];
    html! {
        section #charts aria-labelledby="charts-title" {
            h2 #charts-title { "Charts" }
            @if parts.iter().all(|part| part.0.is_empty()) { p.muted { "Nothing that has a chart was measured in this run." } }
            @for part in parts { (part) }
        }
    }
}

fn start(summary: &Summary) -> Markup {
    html! {
        @for (metric, title) in [("first_output", "Start"), ("first_http", "First HTTP answer"), ("stop", "Stop")] {
            (chart(title, html! {
                p {
                    (format::capitalised(&verdict::metric_title(summary, "start", metric))) ". Each dot is a sample, the upright line the median, the "
                    "bar through it its interval, and rings are outliers. The axis is logarithmic."
                }
                (isolation_legend(summary))
            }, &charts::distribution(summary, "start", metric), series_table(summary, title, &charts::measured(summary, "start", metric))))
        }
    }
}

fn series_table(summary: &Summary, caption: &str, series: &[&Series]) -> Markup {
    let columns = ["Executor", "Median", "Samples", "5 %", "95 %"];
    let columns: Vec<Column> = columns
        .iter()
        .enumerate()
        .map(|(at, name)| if at == 0 { Column::text(name) } else { Column::number(name) })
        .collect();
    sortable(
        caption,
        &columns,
        series
            .iter()
            .map(|series| {
                let at = |value: f64| Cell::number(format::figure(series.unit, value), value);
                let [median, samples] = figure_cells(series);
                vec![
                    executor_cell(summary, &series.executor),
                    median,
                    samples,
                    at(series.quantiles.p5),
                    at(series.quantiles.p95),
                ]
            })
            .collect(),
    )
}

fn memory(summary: &Summary) -> Markup {
    let metrics = ["pss", "workload", "monitor", "guest", "system", "page_cache"];
    let there: Vec<&str> = metrics
        .into_iter()
        .filter(|metric| !charts::measured(summary, "memory", metric).is_empty())
        .collect();
    let mut columns = vec![Column::text("Executor")];
    let short = |metric: &&str| match *metric {
        "pss" => "All (PSS)",
        "workload" => "Workload",
        "monitor" => "Runtime, monitor",
        "guest" => "Guest",
        "system" => "Host's difference",
        _ => "Page cache",
    };
    columns.extend(there.iter().map(|metric| Column::number(short(metric))));
    let rows = summary.plan.executors.iter().filter(|name| {
        there.iter().any(|m| summary.series("memory", m, name).is_some_and(|s| !s.values.is_empty()))
    });
    let table = sortable(
        "Memory of one more idle instance",
        &columns,
        rows.map(|executor| {
            let cell = |metric: &&str| match summary.series("memory", metric, executor) {
                Some(series) => {
                    let [cell, _] = figure_cells(series);
                    cell
                }
                None => Cell::text(String::new()),
            };
            std::iter::once(executor_cell(summary, executor)).chain(there.iter().map(cell)).collect()
        })
        .collect(),
    );
    chart(
        "Memory",
        html! {
            p { "Of one more idle instance: medians. What no part accounts for is grey." }
            ul.legend {
                @for ((name, _), (class, title)) in MEMORY_PARTS.iter().zip([("container", "workload"), ("microvm", "runtime and monitor"), ("full-vm", "guest's memory")]) {
                    li data-part=(name) { span.swatch.(class) {} (title) }
                }
            }
        },
        &charts::memory(summary),
        table,
    )
}

fn timeline(summary: &Summary) -> Markup {
    let stages = charts::timeline_stages(summary);
    let table = sortable(
        "Stages of a start",
        &[Column::text("Stage"), Column::number("Median"), Column::number("Samples")],
        stages
            .iter()
            .map(|series| {
                let [median, samples] = figure_cells(series);
                vec![
                    Cell::text(verdict::metric_title(summary, &series.probe, &series.metric)),
                    median,
                    samples,
                ]
            })
            .collect(),
    );
    let whose = stages.first().map_or(String::new(), |series| verdict::title(summary, &series.executor));
    chart(
        "Where a start goes",
        html! { p { "The start of " b { (whose) } ", stage by stage: medians, one after the other." } },
        &charts::timeline(summary),
        table,
    )
}

fn latency(summary: &Summary) -> Markup {
    let mut columns = vec![Column::text("Executor")];
    columns.extend(["Requests", "Half within", "99 % within", "99.9 % within"].map(Column::number));
    let table = |service: &str, title: &str| {
        let series = |metric: &str, executor: &str| {
            summary
                .series("service", &format!("{service}_{metric}"), executor)
                .filter(|s| !s.values.is_empty())
        };
        let rows = summary
            .plan
            .executors
            .iter()
            .filter(|name| PERCENTILES.iter().any(|(p, _)| series(p, name).is_some()));
        sortable(
            title,
            &columns,
            rows.map(|executor| {
                let cell = |metric| {
                    series(metric, executor).map_or(Cell::text(String::new()), |series| {
                        let [cell, _] = figure_cells(series);
                        cell
                    })
                };
                let percentiles = PERCENTILES.iter().map(|(percentile, _)| cell(percentile));
                std::iter::once(executor_cell(summary, executor))
                    .chain(std::iter::once(cell("requests")))
                    .chain(percentiles)
                    .collect()
            })
            .collect(),
        )
    };
    html! {
        @for (service, title) in SERVICES {
            (chart(&format!("{title} under load"), html! {
                p { "Within which time answers come: the circle half of them, the square 99 %, the ring 99.9 %. The axis is logarithmic." }
                (isolation_legend(summary))
            }, &charts::latency(summary, service, title), table(service, title)))
        }
    }
}

fn costs(summary: &Summary) -> Markup {
    let operations = charts::operations(summary);
    let columns = [
        Column::text("Operation"),
        Column::text("Executor"),
        Column::number("Median"),
        Column::number("Beside the first"),
    ];
    let count = operations.iter().map(Vec::len).sum();
    let rows = operations.iter().flat_map(|of_metric| {
        let first = of_metric.first().map_or(0.0, |first| first.quantiles.median);
        of_metric.iter().map(move |series| {
            let [median, _] = figure_cells(series);
            let ratio = series.quantiles.median / first;
            let beside = if ratio.is_finite() {
                Cell::number(format!("{}×", format::factor(ratio)), ratio)
            } else {
                Cell::text(String::new())
            };
            vec![
                Cell::text(verdict::metric_title(summary, &series.probe, &series.metric)),
                executor_cell(summary, &series.executor),
                median,
                beside,
            ]
        })
    });
    chart(
        "Cost of an operation",
        html! {
            p { "Medians, as multiples of the first executor's, one of each isolation; the table has all. The axis is logarithmic." }
            (isolation_legend(summary))
        },
        &charts::costs(summary),
        folded(count, sortable("Cost of an operation", &columns, rows.take(MAX_ROWS).collect())),
    )
}

/// Every figure and every fact, folded by probe.
pub fn figures_part(summary: &Summary) -> Markup {
    let mut probes: Vec<&str> = vec![];
    let all = summary
        .series
        .iter()
        .map(|series| series.probe.as_str())
        .chain(summary.facts.iter().map(|fact| fact.probe.as_str()));
    for probe in all {
        if !probes.contains(&probe) {
            probes.push(probe);
        }
    }
    html! {
        section #figures aria-labelledby="figures-title" {
            h2 #figures-title { "All figures and facts" }
            @for probe in probes {
                details {
                    summary { (verdict::probe_title(summary, probe)) }
                    (probe_figures(summary, probe))
                    (probe_facts(summary, probe))
                }
            }
        }
    }
}

fn probe_figures(summary: &Summary, probe: &str) -> Markup {
    let series: Vec<&Series> = summary.series.iter().filter(|series| series.probe == probe).collect();
    if series.is_empty() {
        return html! {};
    }
    let columns = [
        Column::text("Metric"),
        Column::text("Executor"),
        Column::number("Median"),
        Column::number("Samples"),
        Column::number("Least"),
        Column::number("Greatest"),
    ];
    sortable(
        "Figures",
        &columns,
        series
            .into_iter()
            .take(MAX_ROWS)
            .map(|series| {
                let [median, samples] = figure_cells(series);
                let at = |value: f64| {
                    if series.values.is_empty() {
                        Cell::text(String::new())
                    } else {
                        Cell::number(format::figure(series.unit, value), value)
                    }
                };
                vec![
                    Cell::text(verdict::metric_title(summary, &series.probe, &series.metric)),
                    executor_cell(summary, &series.executor),
                    median,
                    samples,
                    at(series.quantiles.min),
                    at(series.quantiles.max),
                ]
            })
            .collect(),
    )
}

fn probe_facts(summary: &Summary, probe: &str) -> Markup {
    let facts: Vec<_> = summary.facts.iter().filter(|fact| fact.probe == probe).collect();
    if facts.is_empty() {
        return html! {};
    }
    sortable(
        "Facts",
        &[Column::text("Fact"), Column::text("Executor"), Column::text("Found")],
        facts
            .into_iter()
            .take(MAX_ROWS)
            .map(|fact| {
                let found = if fact.values.is_empty() {
                    Cell::text("–".into()).with_small(reasons(&fact.failures))
                } else {
                    Cell::text(reasons(&fact.values))
                };
                vec![
                    Cell::text(verdict::metric_title(summary, &fact.probe, &fact.metric)),
                    executor_cell(summary, &fact.executor),
                    found,
                ]
            })
            .collect(),
    )
}

/// Host, executors, method.
pub fn host_part(summary: &Summary) -> Markup {
    let (host, plan) = (&summary.host, &summary.plan);
    let or_none = |text: &Option<String>| text.as_ref().map_or("none".into(), |text| format::clean(text));
    let load = host.load.iter().map(|load| format!("{load:.2}")).collect::<Vec<_>>().join(", ");
    let lines = [
        ("Processor", format!("{} × {}", host.cpu.count, format::clean(&host.cpu.model))),
        ("Frequency", host.cpu.mhz.map_or("unknown".into(), |mhz| format!("{mhz:.0} MHz"))),
        ("Governor", or_none(&host.cpu.governor)),
        ("Memory", format::figure(Unit::Bytes, host.memory_bytes as f64)),
        ("System", format!("{}, Linux {}", format::clean(&host.os), format::clean(&host.kernel))),
        ("KVM", format::clean(&host.kvm)),
        ("Under a hypervisor", or_none(&host.virtualisation)),
        ("Control groups", format::clean(&host.cgroups)),
        ("Load before", load),
        (
            "Stolen time",
            format!("{} (median over all measurements)", format::figure(Unit::Share, summary.steal)),
        ),
        ("rvmm", format!("{}, commit {}", format::clean(&host.rvmm.version), or_none(&host.commit))),
        (
            "Image",
            format!(
                "{} {}",
                format::clean(&plan.image),
                plan.image_id.as_ref().map_or(String::new(), |id| format::clean(id))
            ),
        ),
        ("Command", format::clean(&format::shell(&plan.command))),
        (
            "Run",
            format!(
                "{}, {}, seed {}, {}",
                format::clean(&plan.run),
                format::clean(&plan.kind),
                plan.seed,
                format::duration(summary.seconds)
            ),
        ),
    ];
    let executors = host.executors.iter().map(|info| {
        let note = match (&info.left_out, &info.version) {
            (Some(why), _) => format!("left out: {}", format::clean(why)),
            (None, Some(version)) => format::clean(version),
            (None, None) => String::new(),
        };
        vec![executor_cell(summary, &info.name), Cell::text(note)]
    });
    let probes = plan.probes.iter().map(|probe| {
        let note = match &probe.left_out {
            Some(why) => format!("left out: {}", format::clean(why)),
            None => format!(
                "{} after {}",
                format::counted(probe.runs as usize, "round", "rounds"),
                format::counted(probe.warmups as usize, "warm-up", "warm-ups")
            ),
        };
        vec![Cell::text(format::clean(&probe.title)).with_small(format::clean(&probe.name)), Cell::text(note)]
    });
    html! {
        section #host aria-labelledby="host-title" {
            h2 #host-title { "Host and method" }
            dl.host {
                @for (name, value) in lines { div { dt { (name) } dd { (value) } } }
            }
            div.columns {
                (sortable("Executors", &[Column::text("Executor"), Column::text("Version")], executors.collect()))
                (sortable("Probes", &[Column::text("Probe"), Column::text("Rounds")], probes.collect()))
            }
            div.prose {
                h3 { "How it was measured" }
                p {
                    "Every executor is driven by its public command line. In each round of a probe every executor has one turn, in an "
                    "order drawn anew, so that what drifts touches all alike. Intervals are " (format::percent(plan.confidence))
                    " bootstrap intervals of medians, and two executors are compared by the interval of the ratio of their medians. "
                    "Where it holds 1, no difference was found; with fewer than six samples nothing is said. Counted numbers have no "
                    "interval. Outliers are marked and counted, never dropped. Of many comparisons between equals, "
                    (format::percent(1.0 - plan.confidence)) " are expected to be wrong."
                }
                @if !host.tools.is_empty() {
                    p.muted { "Tools: " (host.tools.iter().map(|tool| format::clean(&tool.version)).collect::<Vec<_>>().join("; ")) }
                }
            }
        }
    }
}
