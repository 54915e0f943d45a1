//! Runs the table.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cases::{Case, Want, all};
use super::home::{Home, IMAGE, Ran, Wall, can_run, finish};
use crate::support::{announce, has_fast_kvm};

/// The first container of a VM that others are put into.
const POD: &str = "pod";
/// A filter that allows all but making directories.
const FILTER: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}"#;

/// Where a case runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Native,
    /// In a VM that runs already.
    Shared,
    /// In a VM of its own.
    Own,
}

/// Makes a case's directory.
pub fn prepare(dir: &Path) {
    std::fs::create_dir_all(dir.join("bind")).expect("a directory");
    for (name, text) in [
        ("env", "# a comment\n\nONE=1\nTWO=two = 2\nLAST=file\nHASH=a#b\n"),
        ("secret", "hidden\n"),
        ("bind/file", "of the host\n"),
        ("filter.json", FILTER),
    ] {
        std::fs::write(dir.join(name), text).expect("a file");
    }
}

fn run(home: &Home, case: &Case, at: usize, place: Place) -> Ran {
    let wall = if place == Place::Native { Wall::Native } else { Wall::Microvm };
    let dir = format!("{}/{at}", if wall == Wall::Native { "native" } else { "microvm" });
    let dir = home.path(&dir);
    prepare(&dir);
    let options: Vec<String> =
        case.options.iter().map(|option| option.replace("{DIR}", dir.to_str().expect("a path"))).collect();
    let network =
        if place == Place::Shared { format!("--network=container:{POD}") } else { "--network=none".into() };
    let mut arguments = vec!["run", "--rm", wall.flag(), &network];
    arguments.extend(options.iter().map(String::as_str));
    arguments.push(IMAGE);
    arguments.extend(&case.command);
    let mut command = home.command(&arguments);
    command.env("TABLE_TEST", "from the caller").env_remove("OF_IMAGE");
    let pipe = std::process::Stdio::piped;
    command.stdin(pipe()).stdout(pipe()).stderr(pipe());
    finish(command.spawn().expect("rvmm"), &case.stdin, &arguments)
}

/// Whether an output is what is wanted.
pub fn meets(text: &str, want: &Want) -> bool {
    match want {
        Want::Any => true,
        Want::Is(wanted) => text == wanted,
        Want::Has(wanted) => text.contains(wanted),
        Want::Holds(check) => check(text),
    }
}

fn judge(case: &Case, ran: &Ran) -> Result<(), String> {
    let good = ran.code == case.code && meets(&ran.stdout, &case.stdout) && meets(&ran.stderr, &case.stderr);
    let wanted = |want: &Want| match want {
        Want::Is(text) => format!("{text:?}"),
        Want::Has(text) => format!("…{text:?}…"),
        Want::Any | Want::Holds(_) => "something".into(),
    };
    let shorten = |text: &str| text.chars().take(400).collect::<String>();
    if good {
        return Ok(());
    }
    Err(format!(
        "code {} for {}, output {:?} for {}, errors {:?} for {}",
        ran.code,
        case.code,
        shorten(&ran.stdout),
        wanted(&case.stdout),
        shorten(&ran.stderr),
        wanted(&case.stderr)
    ))
}

/// Runs cases, some at once, and names all that fail.
fn run_all(home: &Home, cases: &[(usize, &Case, Place)], at_once: usize) -> Vec<(usize, Ran)> {
    let (next, failures, results) = (AtomicUsize::new(0), Mutex::new(vec![]), Mutex::new(vec![]));
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some((at, case, place)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let ran = run(home, case, *at, *place);
                    if let Err(why) = judge(case, &ran) {
                        failures.lock().expect("a lock").push(format!("{}: {why}", case.name));
                    }
                    results.lock().expect("a lock").push((*at, ran));
                }
            });
        }
    });
    let failures = failures.into_inner().expect("a lock");
    assert!(failures.is_empty(), "{} of {} cases:\n{}", failures.len(), cases.len(), failures.join("\n"));
    results.into_inner().expect("a lock")
}

#[test]
fn every_case_natively() {
    if !can_run(Wall::Native) {
        return;
    }
    let home = Home::new();
    let cases = all();
    assert!(cases.len() >= 100);
    let wanted: Vec<_> = cases.iter().enumerate().map(|(at, case)| (at, case, Place::Native)).collect();
    run_all(&home, &wanted, 2);
    home.run(&["volume", "rm", "table-fill", "table-read"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
    assert!(entries(&home.path("data/volumes")).is_empty(), "{:?}", entries(&home.path("data/volumes")));
    announce(&format!("{} cases natively", wanted.len()));
}

#[test]
fn refusals_are_the_same_for_microvms() {
    if !can_run(Wall::Microvm) {
        return;
    }
    let home = Home::new();
    let cases = all();
    // What is refused only after a boot is for machines where that is quick.
    let early = [
        "a directory that --mount does not make",
        "a kernel parameter of the host",
        "a filter that is not there",
    ];
    let wanted = cases.iter().enumerate().filter(|(_, case)| case.refused && !early.contains(&case.name));
    let wanted: Vec<_> = wanted.map(|(at, case)| (at, case, Place::Own)).collect();
    run_all(&home, &wanted, 2);
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
fn every_case_in_a_microvm_that_they_share() {
    if !can_run(Wall::Microvm) || !has_fast_kvm() {
        return;
    }
    let home = Home::new();
    home.start(Wall::Microvm, POD, &["--memory=512M"], "sleep 100000");
    let cases = all();
    let wanted = cases.iter().enumerate().filter(|(_, case)| !case.alone && !case.refused);
    let wanted: Vec<_> = wanted.map(|(at, case)| (at, case, Place::Shared)).collect();
    run_all(&home, &wanted, 1);
    home.run(&["rm", "-f", POD]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
    announce(&format!("{} cases in one microVM", wanted.len()));
}

#[test]
fn cases_about_the_machine_in_microvms_of_their_own() {
    if !can_run(Wall::Microvm) || !has_fast_kvm() {
        return;
    }
    let home = Home::new();
    let cases = all();
    let wanted = cases.iter().enumerate().filter(|(_, case)| case.alone);
    let wanted: Vec<_> = wanted.map(|(at, case)| (at, case, Place::Own)).collect();
    run_all(&home, &wanted, 1);
    assert_eq!(home.left(), [] as [String; 0]);
}

#[test]
#[ignore = "long: a boot for each case"]
fn every_case_in_a_microvm_of_its_own_as_natively() {
    if !can_run(Wall::Microvm) || !has_fast_kvm() {
        return;
    }
    let home = Home::new();
    let cases = all();
    let at = |place| cases.iter().enumerate().map(|(at, case)| (at, case, place)).collect::<Vec<_>>();
    let mut native = run_all(&home, &at(Place::Native), 2);
    let mut microvm = run_all(&home, &at(Place::Own), 1);
    native.sort_by_key(|(at, _)| *at);
    microvm.sort_by_key(|(at, _)| *at);
    for ((at, native), (_, microvm)) in native.iter().zip(&microvm) {
        let case = &cases[*at];
        // What a predicate judges may differ in words.
        if matches!(case.stdout, Want::Is(_)) {
            assert_eq!((native.code, &native.stdout), (microvm.code, &microvm.stdout), "{}", case.name);
        }
    }
    assert_eq!(home.left(), [] as [String; 0]);
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter(|entry| entry.path().is_dir());
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
