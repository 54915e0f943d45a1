//! A real terminal, in tmux: keys that leave a session while the container goes on.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::home::{Home, IMAGE, Wall, can_run};
use crate::support::{PATIENCE, has_tool};

/// A tmux server of its own, with one window in which a shell runs.
struct Screen<'a> {
    home: &'a Home,
    socket: PathBuf,
}

impl Screen<'_> {
    fn start(home: &Home) -> Screen<'_> {
        let screen = Screen { home, socket: home.path("tmux") };
        let command = home.command(&[]);
        let status = screen
            .tmux()
            .args(["-f", "/dev/null", "new-session", "-d", "-x", "120", "-y", "40", "env", "PS1=$ ", "sh"])
            .env("RVMM", command.get_program())
            .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .stdin(Stdio::null())
            .status()
            .expect("tmux");
        assert!(status.success());
        screen.type_line("stty -a >before; echo prepared=$?");
        screen.expect("prepared=0");
        screen
    }

    fn tmux(&self) -> Command {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.socket).current_dir(self.home.path(""));
        command
    }

    fn type_line(&self, line: &str) {
        self.keys(&["-l", line]);
        self.keys(&["Enter"]);
    }

    fn keys(&self, keys: &[&str]) {
        assert!(self.tmux().arg("send-keys").args(keys).status().expect("tmux").success());
    }

    fn contents(&self) -> String {
        let output = self.tmux().args(["capture-pane", "-p", "-J", "-S", "-300"]).output().expect("tmux");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[track_caller]
    fn expect(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.contents().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not on the screen:\n{}", self.contents());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types a line until it is answered: what is typed before a client has the terminal is lost.
    #[track_caller]
    fn type_until(&self, line: &str, answer: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.contents().contains(answer) {
            assert!(Instant::now() < deadline, "{answer:?} is not on the screen:\n{}", self.contents());
            self.type_line(line);
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// After the end of a session, whose line prints its code: the terminal is as before.
    #[track_caller]
    fn is_back(&self, mark: &str, code: u8) {
        self.expect(&format!("{mark}={code}"));
        self.type_until(&format!("stty -a | cmp - before && echo {mark}-'same'"), &format!("{mark}-same"));
    }
}

impl Drop for Screen<'_> {
    fn drop(&mut self) {
        let _ = self.tmux().arg("kill-server").status();
    }
}

#[test]
fn keys_leave_sessions_and_containers_go_on() {
    if !can_run(Wall::Native) || !has_tool("tmux") || !has_tool("stty") {
        return;
    }
    let home = Home::new();
    let screen = Screen::start(&home);
    let shell = format!("{IMAGE} sh -c 'echo up-$((40 + 1)); exec sh'");
    screen.type_line(&format!("$RVMM run -it --name one --network none {shell}; echo left-run=$?"));
    screen.expect("up-41");
    // The first key alone is the container's, once it is known that the second does not come.
    screen.keys(&["-l", "echo fir"]);
    screen.keys(&["C-p"]);
    screen.keys(&["-l", "st"]);
    screen.keys(&["C-c"]);
    screen.type_line("echo one-$((40 + 2))");
    screen.expect("one-42");
    screen.keys(&["C-p", "C-q"]);
    screen.is_back("left-run", 0);
    assert_eq!(home.inspect("one")["State"]["Running"], true);

    screen.type_line("$RVMM attach --detach-keys ctrl-x,z one; echo left-attach=$?");
    screen.type_until("echo two-$((40 + 3))", "two-43");
    // The usual keys are the container's here.
    screen.keys(&["C-x", "z"]);
    screen.is_back("left-attach", 0);
    assert_eq!(home.inspect("one")["State"]["Running"], true);

    screen.type_line("$RVMM exec -it --detach-keys ctrl-a one sh -c 'echo in-$((40 + 4)); exec sleep 1000'; echo left-exec=$?");
    screen.expect("in-44");
    screen.keys(&["C-a"]);
    screen.is_back("left-exec", 0);
    screen.type_line("$RVMM exec -it one sh -c 'echo in-$((40 + 5)); exec sleep 1000'; echo again-exec=$?");
    screen.expect("in-45");
    screen.keys(&["C-p", "C-q"]);
    screen.is_back("again-exec", 0);

    screen.type_line("$RVMM attach one; echo ended=$?");
    screen.type_until("echo three-$((40 + 6))", "three-46");
    screen.type_line("exit 7");
    screen.is_back("ended", 7);
    assert_eq!(home.inspect("one")["State"]["ExitCode"], 7);
    drop(screen);
    let bad = home.run(&["run", "--rm", "--detach-keys=ctrl-1", IMAGE, "true"]);
    assert!(bad.code == 125 && bad.stderr.contains("ctrl-1"), "{bad:?}");
    home.run(&["rm", "one"]).ok();
    assert_eq!(home.left(), [] as [String; 0]);
}
