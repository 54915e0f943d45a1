//! Verbs on containers, through the command line. They need root and a statically linked busybox.

mod damage;
mod files;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use rvmm::image::layers::testing::Archive;
use rvmm::image::store::Store;
use rvmm::image::testing;

use crate::support::{binary, directory, has_tool, is_root, tool};

/// Roots of their own, with an image `busybox` in them.
pub struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    /// `None` where containers cannot be made, which is said.
    pub fn new() -> Option<Place> {
        if !is_root() || !has_tool("busybox") {
            return None;
        }
        let place = Place { directory: directory() };
        let mut layer = Archive::new().directory("bin/", 0o755).directory("tmp/", 0o1777).entry(
            tar::EntryType::Regular,
            b"bin/busybox",
            b"",
            &fs::read("/bin/busybox").expect("busybox"),
            |header| header.set_mode(0o755),
            &[],
        );
        for applet in tool("/bin/busybox", &["--list"]).lines().filter(|applet| *applet != "busybox") {
            layer = layer.symlink(&format!("bin/{applet}"), "busybox");
        }
        let layer = layer.directory("etc/", 0o755).file("etc/kept", "kept\n").file("etc/gone", "gone\n");
        let store = Store::open(&place.data().join("images")).expect("a store");
        testing::image(&store, "busybox", &[layer.finish()]).expect("an image");
        Some(place)
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn run(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// A directory of the host.
    pub fn host(&self) -> PathBuf {
        let path = self.directory.path().join("host");
        fs::create_dir_all(&path).expect("a directory");
        path
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("RVMM_ROOT", self.data()).env("RVMM_RUN_ROOT", self.run());
        command.current_dir(self.host());
        command
    }

    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().expect("rvmm")
    }

    /// What a command prints that must succeed.
    pub fn rvmm(&self, arguments: &[&str]) -> String {
        succeeded(arguments, self.output(arguments))
    }

    /// What a command says that must fail.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(!output.status.success(), "{arguments:?} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A command that must succeed, with input.
    pub fn feed(&self, arguments: &[&str], input: &[u8]) -> String {
        let mut command = self.command(arguments);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("rvmm");
        child.stdin.take().expect("an input").write_all(input).expect("input");
        succeeded(arguments, child.wait_with_output().expect("an end"))
    }

    /// A container of busybox that runs until it is removed. Its id comes back.
    pub fn sleeper(&self, options: &[&str], script: &str) -> String {
        let script = format!("{script}\necho ready; exec sleep 100000");
        let mut arguments = vec!["run", "-d", "--network", "none", "--init"];
        arguments.extend(options);
        arguments.extend(["busybox", "sh", "-c", &script]);
        let id = self.rvmm(&arguments).trim().to_owned();
        while !self.rvmm(&["logs", &id]).contains("ready") {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        id
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let output = self.output(&["ps", "-aq", "--no-trunc"]);
        for id in String::from_utf8_lossy(&output.stdout).lines() {
            self.output(&["rm", "-f", id]);
        }
    }
}

fn succeeded(arguments: &[&str], output: Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{arguments:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}
