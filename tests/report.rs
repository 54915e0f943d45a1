//! The page of `rvmm compare`, in a real browser. Pictures of it are kept in `target/test`.

mod browser;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rvmm::bench::results::{Results, Value, Warning};
use rvmm::bench::{report, summarise, testing};

use crate::support;
use browser::Browser;

/// A page on disk, as long as the value lives.
struct Page {
    directory: tempfile::TempDir,
}

impl Page {
    fn of(results: &Results) -> Page {
        let page = Page { directory: support::directory() };
        fs::write(page.path(), report::html(&summarise(results), results)).unwrap();
        page
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("page.html")
    }
}

fn run() -> Results {
    testing::made_up(1, 8)
}

/// Whatever is not a list of nothing.
fn is_empty(value: &serde_json::Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

const UNFOLD: &str = "document.querySelectorAll('details').forEach(details => details.open = true)";

/// Elements that reach beyond the window's right edge, and the page if it can be scrolled sideways.
const OVERFLOWING: &str = "(() => {
    const width = document.documentElement.clientWidth;
    const found = document.documentElement.scrollWidth > width ? ['the page: ' + document.documentElement.scrollWidth] : [];
    for (const element of document.body.querySelectorAll('*:not(.skip):not(.hidden)')) {
        const box = element.getBoundingClientRect();
        if (box.width > 0 && box.right > width + 1) found.push(element.outerHTML.slice(0, 120) + ' ends at ' + box.right);
    }
    return found;
})()";

/// Texts with too little contrast to what is behind them: WCAG 2.2, 1.4.3, level AA.
const PALE: &str = "(() => {
    const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = parse(getComputedStyle(element).backgroundColor);
            if (colour[3] > 0.99) return colour;
        }
        return [255, 255, 255];
    };
    const found = [], seen = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode();) {
        const element = node.parentElement, style = getComputedStyle(element);
        const box = element.getBoundingClientRect();
        if (!node.data.trim() || !box.width || style.visibility !== 'visible' || ['SCRIPT', 'STYLE'].includes(element.tagName)) continue;
        const colour = element.closest('svg') ? style.fill : style.color;
        const [a, b] = [luminance(parse(colour)), luminance(behind(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
        const key = colour + behind(element) + large;
        if (ratio < (large ? 3 : 4.5) && !seen.has(key)) found.push(node.data.trim().slice(0, 60) + ': ' + ratio.toFixed(2) + ' ' + key);
        seen.add(key);
    }
    return found;
})()";

/// Shapes of visible charts with too little contrast to the chart's ground: WCAG 2.2, 1.4.11.
const PALE_SHAPES: &str = "(() => {
    const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const ground = luminance(parse(getComputedStyle(document.querySelector('.figure')).backgroundColor));
    const found = new Set();
    for (const shape of document.querySelectorAll('.plot rect, .plot circle')) {
        const style = getComputedStyle(shape), colour = style.fill === 'none' ? style.stroke : style.fill;
        const own = luminance(parse(colour));
        const ratio = (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
        if (ratio < 3) found.add(colour + ': ' + ratio.toFixed(2));
    }
    return [...found];
})()";

#[test]
fn charts_are_drawn_and_nothing_is_complained_about() {
    let Some(mut browser) = Browser::start() else { return };
    let page = Page::of(&run());
    for (width, shown) in [(1440, "wide"), (360, "narrow")] {
        browser.window(width, 900, "light");
        browser.open(&page.path());
        let charts = browser.eval(
            "[...document.querySelectorAll('svg.plot')].map(chart => { const box = chart.getBoundingClientRect(); return {
                kind: chart.classList[1], width: box.width, height: box.height, shapes: chart.querySelectorAll('circle, rect, polyline').length,
                texts: [...chart.querySelectorAll('text')].filter(text => text.getBoundingClientRect().width > 0).length,
                label: chart.getAttribute('aria-label'), role: chart.getAttribute('role'),
                table: !!chart.closest('.figure').querySelector('tbody tr') } })",
        );
        let visible: Vec<_> =
            charts.as_array().unwrap().iter().filter(|chart| chart["width"].as_f64() > Some(0.0)).collect();
        // The verdict, start, stop, memory, timeline, one service, cost of operations.
        assert_eq!(visible.len(), 7, "{charts}");
        for chart in visible {
            assert_eq!(chart["kind"], shown);
            assert!(
                chart["width"].as_f64() > Some(250.0) && chart["height"].as_f64() > Some(100.0),
                "{chart}"
            );
            assert!(chart["shapes"].as_u64() > Some(5) && chart["texts"].as_u64() > Some(5), "{chart}");
            assert_eq!((&chart["role"], &chart["table"]), (&"img".into(), &true.into()), "{chart}");
            assert!(!chart["label"].as_str().unwrap().is_empty());
        }
        assert_eq!(browser.complaints(), Vec::<String>::new());
    }
}

#[test]
fn tables_sort_by_click_and_by_key() {
    let Some(mut browser) = Browser::start() else { return };
    let page = Page::of(&run());
    browser.window(1440, 900, "light");
    browser.open(&page.path());
    let button = |column: u32| format!("#verdict th:nth-child({column}) button");
    let column = |browser: &mut Browser, column: u32| -> Vec<f64> {
        let read = format!(
            "[...document.querySelectorAll('#verdict td:nth-child({column})')].map(cell => parseFloat(cell.dataset.sort))"
        );
        browser.eval(&read).as_array().unwrap().iter().filter_map(serde_json::Value::as_f64).collect()
    };
    let sort_of = |browser: &mut Browser| {
        browser.eval("document.querySelector('#verdict th:nth-child(2)').getAttribute('aria-sort')")
    };
    let before = column(&mut browser, 2);
    let mut sorted = before.clone();
    sorted.sort_by(f64::total_cmp);
    assert_ne!(before, sorted, "it is not sorted by this from the start");

    browser.click(&button(2));
    assert_eq!(column(&mut browser, 2), sorted);
    assert_eq!(sort_of(&mut browser), "ascending");

    browser.eval(&format!("document.querySelector({:?}).focus()", button(2)));
    browser.key("Enter", 13, "\r");
    sorted.reverse();
    assert_eq!(column(&mut browser, 2), sorted);
    assert_eq!(sort_of(&mut browser), "descending");

    // From there one key leads to the next heading, whose focus is seen.
    browser.key("Tab", 9, "");
    let focused =
        browser.eval(&format!("document.activeElement === document.querySelector({:?})", button(3)));
    assert_eq!(focused, true);
    assert_ne!(browser.eval("getComputedStyle(document.activeElement).outlineStyle"), "none");
    browser.key(" ", 32, " ");
    let third = column(&mut browser, 3);
    assert!(third.is_sorted(), "{third:?}");
    assert!(sort_of(&mut browser).is_null(), "one column at a time");
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn nothing_reaches_beyond_the_window_on_phone_and_desktop() {
    let Some(mut browser) = Browser::start() else { return };
    let mut long = run();
    let name = "averylongnamewithoutanyspaceinit".repeat(4);
    long.plan.image = format!("registry.example/{name}:latest");
    long.host.executors.iter_mut().for_each(|info| info.title = format!("{} {name}", info.title));
    for (what, results) in [("run", run()), ("long names", long)] {
        let page = Page::of(&results);
        for width in [360, 768, 1024, 1440] {
            browser.window(width, 900, "light");
            browser.open(&page.path());
            browser.eval(UNFOLD);
            let found = browser.eval(OVERFLOWING);
            assert!(is_empty(&found), "{what} at {width}: {found:#}");
        }
    }
}

#[test]
fn dark_mode_is_dark_and_both_keep_their_contrast() {
    let Some(mut browser) = Browser::start() else { return };
    let page = Page::of(&run());
    let pictures = support::project("target/test");
    fs::create_dir_all(&pictures).unwrap();
    let mut grounds = vec![];
    for scheme in ["light", "dark"] {
        for width in [360, 1440] {
            browser.window(width, 900, scheme);
            browser.open(&page.path());
            browser.screenshot(&pictures.join(format!("report-{width}-{scheme}.png")));
            browser.eval(UNFOLD);
            for check in [PALE, PALE_SHAPES] {
                let found = browser.eval(check);
                assert!(is_empty(&found), "{scheme} at {width}: {found:#}");
            }
        }
        grounds.push(browser.eval("['body', '.figure', '.plot text', '.plot circle'].map(s => { const style = getComputedStyle(document.querySelector(s)); return style.backgroundColor + style.fill; })"));
    }
    let [light, dark] = &grounds[..] else { panic!() };
    for (light, dark) in light.as_array().unwrap().iter().zip(dark.as_array().unwrap()) {
        assert_ne!(light, dark);
    }
}

#[test]
fn hostile_texts_run_nothing_and_show_as_they_are() {
    let Some(mut browser) = Browser::start() else { return };
    let attack = "\"'></title></script></style></svg><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>";
    let mut results = run();
    results.plan.image = attack.into();
    results.host.executors.iter_mut().for_each(|info| info.title = attack.into());
    results.plan.metrics.iter_mut().for_each(|metric| metric.title = attack.into());
    results.plan.probes.iter_mut().for_each(|probe| probe.title = attack.into());
    results.host.warnings =
        vec![Warning { code: attack.into(), text: attack.into(), probes: vec![], executors: vec![] }];
    for sample in &mut results.samples {
        if let Value::Text(text) | Value::Failed(text) = &mut sample.value {
            *text = attack.into();
        }
    }
    let page = Page::of(&results);
    browser.window(1440, 900, "light");
    browser.open(&page.path());
    assert!(browser.eval("window.attacked ?? null").is_null());
    assert_eq!(
        browser.eval("document.querySelectorAll('img, body script').length"),
        1,
        "the page's own script alone"
    );
    assert_eq!(browser.eval("document.querySelector('.lead b').textContent"), attack);
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn raw_samples_are_in_the_page() {
    let Some(mut browser) = Browser::start() else { return };
    let results = run();
    let page = Page::of(&results);
    browser.open(&page.path());
    let lines = browser.eval(
        "(async () => {
            const link = document.querySelector('a[download=\"samples.jsonl.gz\"]').href.split(',')[1];
            const bytes = Uint8Array.from(atob(link), c => c.charCodeAt(0));
            const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
            return text.trim().split('\\n').map(line => JSON.parse(line).metric);
        })()",
    );
    let metrics: Vec<&str> = results.samples.iter().map(|sample| sample.metric.as_str()).collect();
    assert_eq!(lines, serde_json::json!(metrics));
}

#[test]
fn run_without_figures_is_a_page_too() {
    let Some(mut browser) = Browser::start() else { return };
    let page = Page::of(&Results { samples: vec![], end: None, ..run() });
    browser.window(360, 900, "dark");
    browser.open(&page.path());
    assert_eq!(browser.eval("document.querySelectorAll('#claims tbody tr').length"), 25);
    assert!(is_empty(&browser.eval(OVERFLOWING)) && is_empty(&browser.eval(PALE)));
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

#[test]
fn command_makes_every_report_of_a_folder() {
    let folder = support::project("tests/bench/fixture");
    let directory = support::directory();
    let page = directory.path().join("page.html");
    let report = |arguments: &[&str]| {
        let output = Command::new(support::binary())
            .args(["compare", "report", folder.to_str().unwrap()])
            .args(arguments)
            .env("RVMM_ROOT", directory.path().join("data"))
            .env("RVMM_RUN_ROOT", directory.path().join("run"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let table = report(&["--html", page.to_str().unwrap(), "--advise=untrusted"]);
    assert!(table.contains("Verdict\n") && table.contains("Take rvmm, microVM."), "{table}");
    assert!(!table.contains('\x1b'), "no colour where there is no terminal");
    assert!(fs::read_to_string(&page).unwrap().starts_with("<!DOCTYPE html>"));
    assert!(report(&["--format", "csv"]).starts_with("probe,metric,executor,"));
    assert!(report(&["--format", "markdown"]).contains("| --- |"));
    let json: serde_json::Value = serde_json::from_str(&report(&["--format", "json", "--advise"])).unwrap();
    assert_eq!(json["complete"], true);
    let folder = folder.to_str().unwrap();
    let diff = Command::new(support::binary()).args(["compare", "diff", folder, folder]).output().unwrap();
    let diff = String::from_utf8(diff.stdout).unwrap();
    assert!(diff.contains("No difference found in") && !diff.contains("Worse"), "{diff}");
}

/// What the README shows of a comparison is what the results beside it say.
#[test]
fn readme_shows_the_table_of_the_results() {
    let results = fs::read_dir(support::project("docs/results")).unwrap().flatten();
    let mut folders: Vec<PathBuf> =
        results.map(|entry| entry.path()).filter(|path| path.join("plan.json").exists()).collect();
    folders.sort();
    let readme = fs::read_to_string(support::project("README.md")).unwrap();
    let is_shown = |folder: &&PathBuf| {
        let name = folder.file_name().and_then(|name| name.to_str()).unwrap();
        readme.contains(&format!("](docs/results/{name}/"))
    };
    let Some(shown) = folders.iter().find(is_shown) else {
        support::skip("the README shows no results: scripts/compare-results");
        return;
    };
    let text = report::markdown(&summarise(&Results::open(shown).unwrap()));
    let verdict = text.split("## ").find(|part| part.starts_with("Verdict")).unwrap();
    let rows: Vec<&str> = verdict.lines().filter(|line| line.starts_with('|')).collect();
    assert!(rows.len() > 3, "{verdict}");
    for row in rows {
        assert!(readme.contains(row), "README.md has no {row}");
    }
}
