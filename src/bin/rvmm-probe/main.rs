//! `rvmm-probe`: what `rvmm compare` runs inside instances, and beside them on the host.
//!
//! The same static program runs everywhere, so that the same instructions are compared. It says what it found in lines of
//! JSON behind a marker, since a guest's console may carry other lines. docs/compare.md says who asks for what.

mod disk;
mod escape;
mod facts;
mod filters;
mod micro;
mod net;
mod persist;
mod start;
mod system;

use std::io::Write;
use std::process::ExitCode;

/// What begins a line of this program.
const MARKER: &str = "rvmm-probe ";

/// Why it could not do what it was asked for.
type Failure = Box<dyn std::error::Error>;

/// Says something, whole and at once.
fn say(value: &serde_json::Value) {
    let line = format!("{MARKER}{value}\n");
    let mut out = std::io::stdout().lock();
    // Nobody may be listening any more, and then nothing can be said about it either.
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

fn run(verb: &str, arguments: &[&str]) -> Result<(), Failure> {
    match (verb, arguments) {
        ("true", []) => Ok(()),
        ("start", []) => start::answer_clock(),
        ("idle", []) => start::idle(0),
        ("idle", [bytes]) => start::idle(bytes.parse()?),
        ("spend", [seconds]) => start::spend(seconds.parse()?),
        ("http", [port]) => net::serve_http(port.parse()?),
        ("serve", [port]) => net::serve(port.parse()?),
        ("client", [host, port, seconds]) => net::client(host, port.parse()?, seconds.parse()?),
        ("resolve", [name]) => net::resolve(name),
        ("micro", [names, milliseconds]) => micro::run(names, milliseconds.parse()?),
        ("disk", [directory, mebibytes, milliseconds]) => {
            disk::run(directory, mebibytes.parse()?, milliseconds.parse()?)
        }
        ("inspect", []) => facts::run().and_then(|()| escape::run()),
        ("grow", [bytes]) => escape::grow(bytes.parse()?),
        ("multiply", [count]) => escape::multiply(count.parse()?),
        ("filters", pids) => filters::run(pids),
        ("burn", [count]) => start::burn(count.parse()?),
        ("crash", [boot]) => escape::crash(boot),
        ("persist", directories) => persist::run(directories),
        _ => Err(format!("what is {verb:?} with {} arguments?", arguments.len()).into()),
    }
}

fn main() -> ExitCode {
    // The first thing of all: this is the first instruction that counts.
    start::note_entry();
    start::prepare_terminal();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (verb, rest) = match arguments.split_first() {
        Some((verb, rest)) => (*verb, rest),
        None => ("", &[][..]),
    };
    match run(verb, rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&serde_json::json!({ "error": error.to_string() }));
            ExitCode::FAILURE
        }
    }
}
