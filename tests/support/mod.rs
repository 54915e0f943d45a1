//! What the tests stand on: the rvmm binary as a child process, guests, and honest skipping.

pub mod api;
pub mod guest;
pub mod monitor;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use rvmm::kvm::kind::{self, Kind};

pub use guest::{Script, linux, tiny};
pub use monitor::{Monitor, Outcome};

/// How long anything may take that a healthy machine does at once. Only a hang should meet it: no test asserts a time.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a Linux guest may take, on the slowest kind of KVM and a busy host.
pub const LINUX_PATIENCE: Duration = Duration::from_secs(300);

/// Writes past the test harness's capture, so that it is seen although the test passes.
pub fn announce(text: &str) {
    // In one piece, so that lines of other threads do not come between.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Says that the running test is skipped. `scripts/test` counts these lines.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    announce(&format!("skipped: {}: {why}", thread.name().unwrap_or("a test")));
}

/// A path in the project.
pub fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A directory that goes away with the value.
pub fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// The binary under test.
pub fn binary() -> PathBuf {
    std::env::var_os("RVMM_TEST_BIN").map_or_else(|| env!("CARGO_BIN_EXE_rvmm").into(), PathBuf::from)
}

/// The kind of this host's KVM, or `None` without KVM; said once in a run.
///
/// `RVMM_TEST_KVM` names the kind that is expected here: another one, or none, is an error then and no reason to skip.
pub fn kvm_kind() -> Option<Kind> {
    static KIND: OnceLock<Option<Kind>> = OnceLock::new();
    *KIND.get_or_init(|| {
        let found = kvm_ioctls::Kvm::new().ok().map(|kvm| kind::detect(&kvm));
        let name = found.map_or("none".to_owned(), |kind| kind.to_string());
        announce(&format!("KVM kind: {name}"));
        if let Ok(expected) = std::env::var("RVMM_TEST_KVM") {
            assert_eq!(name, expected, "RVMM_TEST_KVM names another kind of KVM than this host has");
        }
        found
    })
}

/// Whether the test can use KVM; says so if not.
pub fn has_kvm() -> bool {
    let there = kvm_kind().is_some();
    if !there {
        skip("no usable /dev/kvm");
    }
    there
}

/// Whether KVM runs guest kernels at full speed, so that many guests can be booted; says so if not.
pub fn has_fast_kvm() -> bool {
    match kvm_kind() {
        Some(Kind::Hardware | Kind::Nested) => true,
        Some(kind) => {
            skip(&format!(
                "needs hardware or nested KVM, and this is {kind}; scripts/test runs it in nested-host"
            ));
            false
        }
        None => has_kvm(),
    }
}

/// Whether the test runs as root; says so if not.
pub fn is_root() -> bool {
    let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    if !root {
        skip("needs root");
    }
    root
}

/// Whether a program is installed; says so if not.
pub fn has_tool(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&path).any(|directory| directory.join(name).is_file());
    if !there {
        skip(&format!("needs the program {name}"));
    }
    there
}

/// Whether mount namespaces can be made here; says so if not.
pub fn can_unshare() -> bool {
    let works = Command::new("unshare")
        .args(["-m", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !works {
        skip("cannot make a mount namespace");
    }
    works
}

/// Makes a sparse file of `len` bytes.
pub fn image(path: &Path, len: u64) {
    fs::File::create(path).and_then(|file| file.set_len(len)).expect("an image");
}

/// Runs a host program that must succeed, and returns what it printed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().expect(program);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}
