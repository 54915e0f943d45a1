//! Standard streams and terminals.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rvmm::guest::protocol::{ExitStatus, FIRST_PROCESS};
use rvmm::guest::spec::*;

use super::rig::Sandbox;
use crate::support::LINUX_PATIENCE;

const MIB: usize = 1 << 20;

fn with_input(sandbox: &Sandbox, process: &mut ProcessSpec) {
    if let Stdio::Streams { stdin, .. } = &mut process.stdio {
        *stdin = Some(sandbox.client.new_stream().unwrap());
    }
}

pub fn input_reaches_its_end(sandbox: &mut Sandbox) {
    let mut process = sandbox.program(&["sh", "-c", "cat; echo end"]);
    with_input(sandbox, &mut process);
    let spec = sandbox.container(process);
    let mut streams = sandbox.start(&spec);
    let mut stdin = streams.stdin.take().unwrap();
    stdin.write_all(b"first\n").unwrap();
    stdin.write_all(b"second\n").unwrap();
    stdin.shutdown(Shutdown::Write).unwrap();
    let ended = sandbox.finish(&spec.id, FIRST_PROCESS, streams);
    assert_eq!(ended.output(), "first\nsecond\nend");
    sandbox.client.delete(&spec.id, false).unwrap();
    // Without a stream the input is at its end at once.
    assert_eq!(sandbox.run_shell("cat; echo end", |_| {}).output(), "end");
}

pub fn output_comes_whole_before_the_exit(sandbox: &mut Sandbox) {
    let script = "dd if=/dev/zero bs=1024 count=1024 2>/dev/null | tr '\\0' x; echo last >&2";
    let ended = sandbox.run_shell(script, |_| {});
    assert_eq!(ended.status, ExitStatus::Code(0));
    assert_eq!(ended.stdout.len(), MIB);
    assert!(ended.stdout.bytes().all(|byte| byte == b'x'));
    assert_eq!(ended.stderr, "last\n");
}

pub fn reader_that_waits_holds_the_process_up(sandbox: &mut Sandbox) {
    let process = sandbox.shell("dd if=/dev/zero bs=65536 count=256 2>/dev/null; echo done >&2");
    let Stdio::Streams { stdout: Some(stdout), stderr, .. } = process.stdio else { unreachable!() };
    let spec = sandbox.container(process);
    sandbox.client.create(spec.clone()).unwrap();
    sandbox.client.start(&spec.id).unwrap();
    let mut stdout = sandbox.client.open_stream(stdout).unwrap();
    let rest = sandbox.open(&Stdio::Streams { stdin: None, stdout: None, stderr });
    std::thread::sleep(Duration::from_secs(2));
    // The agent answers still, and the process waits in a write.
    let listed = sandbox.client.processes(&spec.id).unwrap();
    assert_eq!(listed.len(), 2, "{listed:?}");
    let mut bytes = vec![];
    stdout.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 16 * MIB);
    let ended = sandbox.finish(&spec.id, FIRST_PROCESS, rest);
    assert_eq!(ended.stderr, "done\n");
    sandbox.client.delete(&spec.id, false).unwrap();
}

pub fn reader_that_leaves_is_a_closed_pipe(sandbox: &mut Sandbox) {
    let process = sandbox.program(&["yes"]);
    let Stdio::Streams { stdout: Some(stdout), .. } = process.stdio else { unreachable!() };
    let mut spec = sandbox.container(process);
    // Process 1 would get an error instead of the signal.
    spec.namespaces.pid = Namespace::Sandbox;
    sandbox.client.create(spec.clone()).unwrap();
    sandbox.client.start(&spec.id).unwrap();
    let mut stream = sandbox.client.open_stream(stdout).unwrap();
    stream.read_exact(&mut [0; 1000]).unwrap();
    drop(stream);
    assert_eq!(sandbox.wait_exit(&spec.id, FIRST_PROCESS).0, ExitStatus::Signal(libc::SIGPIPE as u8));
    sandbox.client.delete(&spec.id, false).unwrap();
}

/// Reads until `text` has come.
fn expect(stream: &mut UnixStream, text: &str) -> String {
    stream.set_read_timeout(Some(LINUX_PATIENCE)).unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(text) {
        let mut buffer = [0; 4096];
        let len = stream.read(&mut buffer).unwrap();
        let so_far = String::from_utf8_lossy(&seen).into_owned();
        assert!(len > 0, "the end came before {text:?}: {so_far:?}");
        seen.extend_from_slice(&buffer[..len]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

pub fn terminal_has_its_size_and_hangs_up(sandbox: &mut Sandbox) {
    let stream = sandbox.client.new_stream().unwrap();
    let mut process = sandbox.program(&["sh"]);
    process.stdio = Stdio::Terminal { stream, size: WindowSize { rows: 24, columns: 80 } };
    process.env.push("PS1=ready>".into());
    let spec = sandbox.container(process.clone());
    sandbox.client.create(spec.clone()).unwrap();
    sandbox.client.start(&spec.id).unwrap();
    let mut terminal = sandbox.client.open_stream(stream).unwrap();
    expect(&mut terminal, "ready>");
    terminal.write_all(b"stty size; tty; ls -l /dev/console | cut -c1\n").unwrap();
    let shown = expect(&mut terminal, "\nc");
    assert!(shown.contains("24 80\r\n") && shown.contains("/dev/pts/0\r\n"), "{shown:?}");
    sandbox.client.resize(&spec.id, FIRST_PROCESS, WindowSize { rows: 50, columns: 132 }).unwrap();
    terminal.write_all(b"stty size\n").unwrap();
    expect(&mut terminal, "50 132\r\n");
    // A key that is a signal.
    terminal.write_all(b"sleep 100000\n").unwrap();
    expect(&mut terminal, "sleep 100000\r\n");
    std::thread::sleep(Duration::from_millis(1500));
    terminal.write_all(b"\x03").unwrap();
    expect(&mut terminal, "^C");
    // Another terminal beside it, which its user leaves.
    let second = sandbox.client.new_stream().unwrap();
    process.stdio = Stdio::Terminal { stream: second, size: WindowSize { rows: 10, columns: 20 } };
    sandbox.client.exec(&spec.id, 1, process).unwrap();
    let mut other = sandbox.client.open_stream(second).unwrap();
    other.write_all(b"tty\n").unwrap();
    expect(&mut other, "/dev/pts/1");
    drop(other);
    let (status, _) = sandbox.wait_exit(&spec.id, 1);
    assert_ne!(status, ExitStatus::Code(0), "it was hung up");
    // The end of the first comes with all that it has said.
    terminal.write_all(b"echo last words; exit 5\n").unwrap();
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\nlast words\r\n"), "{rest:?}");
    assert_eq!(sandbox.wait_exit(&spec.id, FIRST_PROCESS).0, ExitStatus::Code(5));
    sandbox.client.delete(&spec.id, false).unwrap();
}

pub fn late_reader_misses_nothing(sandbox: &mut Sandbox) {
    let process = sandbox.shell("echo early");
    let spec = sandbox.container(process);
    sandbox.client.create(spec.clone()).unwrap();
    sandbox.client.start(&spec.id).unwrap();
    // Nobody has opened a stream, so nobody holds the news up.
    assert_eq!(sandbox.wait_exit(&spec.id, FIRST_PROCESS).0, ExitStatus::Code(0));
    let streams = sandbox.open(&spec.process.stdio);
    assert_eq!(streams.stdout.join().unwrap(), b"early\n");
    sandbox.client.delete(&spec.id, false).unwrap();
    // A stream that nobody has is at its end.
    let mut nothing = vec![];
    let mut stream = sandbox.client.open_stream(sandbox.client.new_stream().unwrap()).unwrap();
    let _ = stream.read_to_end(&mut nothing);
    assert!(nothing.is_empty());
}
