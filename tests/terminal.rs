//! The terminal: rvmm in tmux, typed into, ended by each way out. Afterwards the terminal must be as it was.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rvmm::boot::testing::Program;

use crate::support::guest::{More, Tiny};
use crate::support::{LINUX_PATIENCE, PATIENCE, binary, has_fast_kvm, has_kvm, has_tool, linux, tiny};

/// A tmux server of its own, with one window in which a shell runs.
struct Screen {
    guest: Tiny,
    socket: PathBuf,
}

/// Whether the tests of this module can run; says so if not.
fn can_run() -> bool {
    has_kvm() && has_tool("tmux") && has_tool("stty")
}

impl Screen {
    /// Starts tmux in the directory of `guest`, whose kernel file is `kernel` there.
    fn start(guest: Tiny) -> Screen {
        let screen = Screen { socket: guest.path("tmux"), guest };
        let status = screen
            .tmux()
            .args(["-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "40", "env", "PS1=$ ", "sh"])
            .current_dir(screen.guest.directory.path())
            .env("RVMM", binary())
            .stdin(Stdio::null())
            .status()
            .expect("tmux");
        assert!(status.success());
        // Settings that are not the usual ones, so that a fixed set put back is seen.
        screen.type_line("stty -ixon quit '^X' && stty -a >before && echo prepared=$?");
        screen.expect("prepared=0", PATIENCE);
        screen
    }

    fn tmux(&self) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.socket);
        command
    }

    /// Types text and Enter.
    fn type_line(&self, line: &str) {
        self.keys(&["-l", line]);
        self.keys(&["Enter"]);
    }

    fn keys(&self, keys: &[&str]) {
        let status = self.tmux().arg("send-keys").args(keys).status().expect("tmux");
        assert!(status.success());
    }

    /// What the window shows, with what has scrolled out of it.
    fn contents(&self) -> String {
        let output = self.tmux().args(["capture-pane", "-p", "-J", "-S", "-200"]).output().expect("tmux");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[track_caller]
    fn expect(&self, text: &str, patience: Duration) {
        let deadline = Instant::now() + patience;
        while !self.contents().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not on the screen:\n{}", self.contents());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts rvmm with the guest and waits for its greeting.
    fn start_rvmm(&self, options: &str) {
        self.type_line(&format!(
            "\"$RVMM\" --kernel kernel --memory 16M {options} & echo $! >pid; fg; echo code=$?"
        ));
        self.expect("READY", PATIENCE);
        let while_running = self.settings_of_terminal();
        assert!(
            while_running.contains("-icanon"),
            "the terminal is not raw while the guest runs: {while_running}"
        );
    }

    fn settings_of_terminal(&self) -> String {
        let output = self.tmux().args(["display-message", "-p", "#{pane_tty}"]).output().expect("tmux");
        let tty = String::from_utf8(output.stdout).expect("a name");
        let output = Command::new("stty").args(["-a", "-F", tty.trim()]).output().expect("stty");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn signal(&self, signal: &str) {
        let pid = fs::read_to_string(self.guest.path("pid")).expect("a process id");
        let status = Command::new("kill").args([signal, pid.trim()]).status().expect("kill");
        assert!(status.success());
    }

    /// rvmm must have ended with `code`, and the terminal must be as it was.
    #[track_caller]
    fn is_as_before(&self, code: i32, patience: Duration) {
        self.expect(&format!("code={code}"), patience);
        self.type_line("stty -a >after; cmp before after && echo terminal=same");
        let deadline = Instant::now() + PATIENCE;
        while !self.contents().contains("\nterminal=same") {
            if Instant::now() > deadline {
                let read = |name| fs::read_to_string(self.guest.path(name)).unwrap_or_default();
                panic!(
                    "before:\n{}\nafter:\n{}\nscreen:\n{}",
                    read("before"),
                    read("after"),
                    self.contents()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.tmux().arg("kill-server").stderr(Stdio::null()).status();
    }
}

/// A guest that sends back what is typed, until `!`.
fn echo() -> Tiny {
    tiny(&Program::new().listen().print("READY\r\n").echo_until(b'!').exit_status(17).power_off())
}

#[test]
fn typing_reaches_the_guest_and_its_power_off_restores_the_terminal() {
    if !can_run() {
        return;
    }
    let screen = Screen::start(echo());
    screen.start_rvmm("");
    screen.keys(&["-l", "typed to the guest"]);
    screen.expect("typed to the guest", PATIENCE);
    screen.keys(&["-l", "!"]);
    screen.is_as_before(17, PATIENCE);
}

#[test]
fn ctrl_a_x_quits_and_restores_the_terminal() {
    if !can_run() {
        return;
    }
    let screen = Screen::start(echo());
    screen.start_rvmm("");
    screen.keys(&["C-a", "h"]);
    screen.expect("Ctrl-A x  end the VM", PATIENCE);
    screen.keys(&["C-a", "x"]);
    screen.is_as_before(0, PATIENCE);
}

#[test]
fn ctrl_c_goes_to_the_guest() {
    if !can_run() {
        return;
    }
    let screen = Screen::start(tiny(
        &Program::new()
            .listen()
            .print("READY\r\n")
            .echo_until(0x03)
            .print("got it")
            .exit_status(3)
            .power_off(),
    ));
    screen.start_rvmm("");
    screen.keys(&["C-c"]);
    screen.is_as_before(3, PATIENCE);
    screen.expect("got it", PATIENCE);
}

#[test]
fn sigint_does_not_end_an_interactive_guest() {
    if !can_run() {
        return;
    }
    let screen = Screen::start(echo());
    screen.start_rvmm("--shutdown-timeout 1");
    screen.signal("-INT");
    std::thread::sleep(Duration::from_secs(2));
    screen.keys(&["-l", "alive"]);
    screen.expect("alive", PATIENCE);
    screen.keys(&["-l", "!"]);
    screen.is_as_before(17, PATIENCE);
}

#[test]
fn signals_that_end_rvmm_restore_the_terminal() {
    if !can_run() {
        return;
    }
    for (signal, code) in [("-TERM", 143), ("-HUP", 129)] {
        let screen = Screen::start(echo());
        screen.start_rvmm("--shutdown-timeout 1");
        screen.signal(signal);
        screen.is_as_before(code, PATIENCE);
    }
    // As by a fault of rvmm's own.
    for (signal, code) in [("-ABRT", 134), ("-SEGV", 139), ("-QUIT", 131), ("-ILL", 132), ("-FPE", 136)] {
        let screen = Screen::start(echo());
        screen.start_rvmm("");
        screen.signal(signal);
        screen.is_as_before(code, PATIENCE);
    }
}

#[test]
fn reset_triple_fault_and_panic_restore_the_terminal() {
    if !can_run() {
        return;
    }
    let greet = || Program::new().listen().print("READY\r\n").await_byte();
    let panic = rvmm::platform::PVPANIC.start;
    for (program, code) in
        [(greet().reset(), 122), (greet().triple_fault(), 121), (greet().out(panic, 1).reset(), 120)]
    {
        let screen = Screen::start(tiny(&program));
        screen.start_rvmm("");
        screen.keys(&["-l", "x"]);
        screen.is_as_before(code, PATIENCE);
    }
}

#[test]
fn error_at_the_start_leaves_the_terminal_alone() {
    if !can_run() {
        return;
    }
    let screen = Screen::start(echo());
    screen.type_line("\"$RVMM\" --kernel missing; echo code=$?");
    screen.is_as_before(125, PATIENCE);
    screen.expect("rvmm: cannot open kernel missing", PATIENCE);
}

#[test]
fn stopping_and_continuing_gives_the_terminal_back_and_takes_it_again() {
    if !can_run() {
        return;
    }
    let screen = Screen::start(echo());
    screen.start_rvmm("");
    screen.signal("-TSTP");
    screen.expect("Stopped", PATIENCE);
    screen.type_line("stty -a >stopped; cmp before stopped && echo stopped=same");
    screen.expect("\nstopped=same", PATIENCE);
    screen.type_line("fg; echo code=$?");
    screen.keys(&["-l", "on again"]);
    screen.expect("on again", PATIENCE);
    let deadline = Instant::now() + PATIENCE;
    while !screen.settings_of_terminal().contains("-icanon") {
        assert!(Instant::now() < deadline, "the terminal is not raw again");
        std::thread::sleep(Duration::from_millis(50));
    }
    screen.keys(&["-l", "!"]);
    screen.is_as_before(17, PATIENCE);
}

#[test]
fn shell_of_a_linux_guest_works_on_the_terminal() {
    if !can_run() || !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let screen = Screen::start(echo());
    let (kernel, rootfs) = (linux.kernel.display(), linux.rootfs.display());
    screen.type_line(&format!(
        "\"$RVMM\" --kernel {kernel} --rootfs {rootfs},readonly --memory 128M --cmdline quiet; echo code=$?"
    ));
    screen.expect("\n~ # ", LINUX_PATIENCE);
    screen.type_line("echo product=$((6 * 7))");
    screen.expect("\nproduct=42", PATIENCE);
    // Ctrl-C ends a command in the guest, not the guest.
    screen.type_line("sleep 1000");
    std::thread::sleep(Duration::from_secs(1));
    screen.keys(&["C-c"]);
    screen.type_line("echo interrupted=$?");
    screen.expect("\ninterrupted=130", PATIENCE);
    screen.type_line("poweroff");
    screen.is_as_before(0, LINUX_PATIENCE);
}

// With an init that leads the session on hvc0 itself, the guest sees no size at its first look.
#[test]
fn size_of_the_terminal_reaches_a_virtio_console() {
    if !can_run() || !has_fast_kvm() {
        return;
    }
    let Some(linux) = linux() else { return };
    let screen = Screen::start(echo());
    let (kernel, rootfs) = (linux.kernel.display(), linux.rootfs.display());
    screen.type_line(&format!(
        "\"$RVMM\" --kernel {kernel} --rootfs {rootfs},readonly --memory 128M --cmdline quiet --console stdio; \
         echo code=$?"
    ));
    screen.expect(" # ", LINUX_PATIENCE);
    let size = || {
        let output = screen.tmux().args(["display-message", "-p", "#{pane_height} #{pane_width}"]).output();
        String::from_utf8(output.expect("tmux").stdout).expect("a size").trim().to_owned()
    };
    let before = size();
    screen.type_line("echo size=$(stty size)");
    screen.expect(&format!("\nsize={before}"), PATIENCE);
    let resize = |columns, rows| {
        let status = screen.tmux().args(["resize-window", "-x", columns, "-y", rows]).status().expect("tmux");
        assert!(status.success());
    };
    resize("100", "30");
    let after = size();
    assert_ne!(after, before);
    std::thread::sleep(Duration::from_secs(1));
    screen.type_line("echo size=$(stty size)");
    screen.expect(&format!("\nsize={after}"), PATIENCE);
    resize("120", "40");
    screen.type_line("poweroff");
    screen.is_as_before(0, LINUX_PATIENCE);
}
