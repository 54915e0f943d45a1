//! `scripts/nested-host` itself: what other tests stand on.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::{project, skip};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/nested-host");

/// Downloading a kernel is not a test's to start.
fn is_prepared() -> bool {
    if std::env::var_os("RVMM_NESTED_HOST").is_some() {
        skip("this is inside scripts/nested-host");
        return false;
    }
    let there = project("target/nested-host/kernel/version").exists();
    if !there {
        skip("nothing is prepared: run scripts/nested-host --prepare");
    }
    there
}

fn nested(args: &[&str]) -> Command {
    let mut command = Command::new(SCRIPT);
    command.args(["--timeout", "120"]).args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("output is text")
}

fn assert_ok(output: &Output) {
    assert!(output.status.success(), "{}: {}", output.status, text(&output.stderr));
}

#[test]
fn streams_status_environment_and_results_are_carried() {
    if !is_prepared() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let results = dir.path().join("results");
    let inside = r#"pwd; cat; echo "$1|$MARK|$RVMM_NESTED_HOST"; echo to stderr >&2
        test -c /dev/kvm && test "$RVMM_RESULTS" = "$2" && echo kept >"$RVMM_RESULTS/file" && echo lost >"$PWD/lost"
        exit 7"#;
    let mut child = nested(&["--results"])
        .arg(&results)
        .args(["--", "sh", "-c", inside, "sh", "two  words"])
        .arg(&results)
        .current_dir(dir.path())
        .env("MARK", "a\nb")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nested-host starts");
    child.stdin.take().expect("a pipe").write_all(b"typed\n").expect("input");
    let output = child.wait_with_output().expect("output");

    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    let expected = format!("{}\ntyped\ntwo  words|a\nb|1\n", dir.path().display());
    assert_eq!(text(&output.stdout), expected);
    assert_eq!(text(&output.stderr), "to stderr\n");
    assert_eq!(fs::read_to_string(results.join("file")).expect("a result"), "kept\n");
    assert!(!dir.path().join("lost").exists(), "a change came through to the host");
}

#[test]
fn large_streams_come_through_whole() {
    if !is_prepared() {
        return;
    }
    let data: Vec<u8> =
        (0..4_000_000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut child =
        nested(&["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("nested-host starts");
    let mut input = child.stdin.take().expect("a pipe");
    let sent = data.clone();
    let writer = std::thread::spawn(move || input.write_all(&sent));
    let output = child.wait_with_output().expect("output");
    writer.join().expect("the writer").expect("input");
    assert_ok(&output);
    assert!(output.stdout == data, "{} of {} bytes, or others", output.stdout.len(), data.len());
}

#[test]
fn terminal_is_carried_and_restored() {
    if !is_prepared() {
        return;
    }
    let line = format!(
        "stty rows 33 cols 101; stty -a >before; {SCRIPT} --timeout 120 sh -c 'tty; stty size'; stty -a >after; cmp before after"
    );
    let dir = tempfile::tempdir().expect("a directory");
    let output = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .output()
        .expect("script runs");
    assert_ok(&output);
    let seen = text(&output.stdout);
    assert!(seen.contains("/dev/pts/") && seen.contains("33 101\r\n"), "{seen}");
}

#[test]
fn time_limit_gives_124() {
    if !is_prepared() {
        return;
    }
    let output =
        Command::new(SCRIPT).args(["--timeout", "1", "sleep", "60"]).output().expect("nested-host runs");
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
}

#[test]
fn sigterm_leaves_no_machine() {
    if !is_prepared() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let pid_file = dir.path().join("pid");
    let mut child =
        nested(&["--qemu-pid"]).arg(&pid_file).args(["sleep", "60"]).spawn().expect("nested-host starts");
    let deadline = Instant::now() + Duration::from_secs(30);
    let qemu = loop {
        match fs::read_to_string(&pid_file) {
            Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
            _ => assert!(Instant::now() < deadline, "no QEMU"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(Path::new("/proc").join(&qemu).exists());
    let killed = Command::new("kill").arg(child.id().to_string()).status().expect("kill runs");
    assert!(killed.success());
    assert_eq!(child.wait().expect("an end").code(), Some(128 + 15));
    assert!(!Path::new("/proc").join(&qemu).exists(), "QEMU {qemu} lives on");
    assert!(!pid_file.exists());
}
