//! aardvark-dns, which answers for the names of containers: whether it answers, and what makes it forget a container.
//!
//! netavark starts it and tells it by a signal that its files have changed. It reads them some time later, so it is asked
//! after each change: a container that runs is known, and one that is gone is not.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::Error;
use super::netavark::process;
use crate::container::files;

/// The name server's own domain: it asks nobody else for names below it.
const DOMAIN: &str = "dns.podman";
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The directory of the name server: a file for each network.
fn files(directory: &Path) -> PathBuf {
    directory.join("aardvark-dns")
}

/// The name server, if it runs.
fn server(directory: &Path) -> Option<u32> {
    let pid = fs::read_to_string(files(directory).join("aardvark.pid")).ok()?;
    let pid = pid.trim().parse().ok()?;
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (process(pid).is_some() && name.trim() == "aardvark-dns").then_some(pid)
}

/// netavark signals whatever has the number that the name server had, so it must not find the number of a dead one.
pub(super) fn forget_dead(directory: &Path) -> Result<(), Error> {
    if server(directory).is_none() {
        files::remove_file(&files(directory).join("aardvark.pid"))?;
    }
    Ok(())
}

/// Takes a container's names away from the name server.
pub(super) fn forget(directory: &Path, id: &str) -> Result<(), Error> {
    let servers = files(directory);
    let mut changed = false;
    for name in files::names(&servers)? {
        let path = servers.join(&name);
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let others = |line: &&str| line.split(' ').next() != Some(id);
        let kept: Vec<&str> = text.lines().filter(others).collect();
        if name == "aardvark.pid" || kept.len() == text.lines().count() {
            continue;
        }
        changed = true;
        // The first line has the addresses to listen at; without a container there is nothing to tell.
        let failed = |source| Error::Run { program: "aardvark-dns", source };
        if kept.iter().filter(|line| !line.is_empty()).count() <= 1 {
            files::remove_file(&path)?;
        } else {
            fs::write(&path, kept.join("\n") + "\n").map_err(failed)?;
        }
    }
    if changed && let Some(pid) = server(directory) {
        // It reads its files anew, and ends when there is none.
        signal(pid, rustix::process::Signal::HUP);
    }
    Ok(())
}

/// Ends the name server when no container is left.
pub(super) fn end(directory: &Path) -> Result<(), Error> {
    if let Some(pid) = server(directory) {
        signal(pid, rustix::process::Signal::TERM);
    }
    forget_dead(directory)
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// What is asked after a change, at the gateway of a network.
#[derive(Debug)]
pub(super) struct Question<'a> {
    pub(super) gateway: IpAddr,
    /// A name of a container.
    pub(super) name: &'a str,
    /// Its address; `None` if it must not be known any more.
    pub(super) address: Option<Ipv4Addr>,
}

/// Waits until the name server answers these questions. A container can do without names, so that a server which does not is
/// no error.
pub(super) fn settle(questions: &[Question<'_>]) {
    let end = Instant::now() + PATIENCE;
    if !questions.iter().all(|question| question.is_answered(end)) {
        tracing::warn!("the name server of containers does not answer: they find each other by address only");
    }
}

impl Question<'_> {
    fn is_answered(&self, end: Instant) -> bool {
        let Some(query) = query(&format!("{}.{DOMAIN}", self.name)) else { return true };
        // The first tries are close to each other, since most servers answer at once.
        let mut wait = Duration::from_millis(3);
        while Instant::now() < end {
            let started = Instant::now();
            let is_right = |found: Vec<Ipv4Addr>| match self.address {
                Some(address) => found.contains(&address),
                None => found.is_empty(),
            };
            if ask(self.gateway, &query, wait).is_some_and(is_right) {
                return true;
            }
            std::thread::sleep(wait.saturating_sub(started.elapsed()));
            wait = (wait * 2).min(Duration::from_millis(100));
        }
        false
    }
}

/// Addresses that the server knows for a name; `None` without an answer.
fn ask(server: IpAddr, query: &[u8], wait: Duration) -> Option<Vec<Ipv4Addr>> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).ok()?;
    socket.set_read_timeout(Some(wait)).ok()?;
    socket.connect((server, 53)).ok()?;
    socket.send(query).ok()?;
    let mut answer = [0; 512];
    let len = socket.recv(&mut answer).ok()?;
    addresses(answer.get(..len)?, query)
}

/// A question for the IPv4 address of a name, RFC 1035 §4.1.
fn query(name: &str) -> Option<Vec<u8>> {
    const ID: [u8; 2] = *b"rv";
    // Recursion is wanted; one question.
    let mut query = vec![ID[0], ID[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..64).contains(len))?;
        query.push(len);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    Some(query)
}

/// The addresses in an answer to `query`; `None` if it is no answer to it.
fn addresses(answer: &[u8], query: &[u8]) -> Option<Vec<Ipv4Addr>> {
    if answer.get(..2)? != query.get(..2)? || answer.get(2)? & 0x80 == 0 {
        return None;
    }
    let count = u16::from_be_bytes([*answer.get(6)?, *answer.get(7)?]);
    let mut rest = answer.get(query.len()..).unwrap_or_default();
    let mut found = vec![];
    for _ in 0..count {
        rest = skip_name(rest)?;
        let fixed: [u8; 10] = rest.get(..10)?.try_into().ok()?;
        let len = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let data = rest.get(10..10 + len)?;
        rest = rest.get(10 + len..)?;
        // Type A.
        if let (1, Ok(address)) = (u16::from_be_bytes([fixed[0], fixed[1]]), <[u8; 4]>::try_from(data)) {
            found.push(Ipv4Addr::from(address));
        }
    }
    Some(found)
}

/// What follows a name: labels up to an empty one, or up to a pointer.
fn skip_name(mut bytes: &[u8]) -> Option<&[u8]> {
    loop {
        let len = usize::from(*bytes.first()?);
        bytes = match len {
            0 => return bytes.get(1..),
            0xc0.. => return bytes.get(2..),
            _ => bytes.get(1 + len..)?,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_container_are_forgotten_and_others_stay() {
        let directory = tempfile::tempdir().unwrap();
        let servers = files(directory.path());
        fs::create_dir(&servers).unwrap();
        fs::write(servers.join("web"), "10.88.0.1\naaa 10.88.0.2  a,b \nbbb 10.88.0.3  c \n").unwrap();
        fs::write(servers.join("db"), "10.89.0.1\naaa 10.89.0.2  a \n").unwrap();
        forget(directory.path(), "aaa").unwrap();
        assert_eq!(files::names(&servers).unwrap(), ["web"]);
        assert_eq!(fs::read_to_string(servers.join("web")).unwrap(), "10.88.0.1\nbbb 10.88.0.3  c \n");
    }

    #[test]
    fn addresses_are_read_from_answers_only() {
        let query = query("db").unwrap();
        let mut answer = query.clone();
        answer[2] = 0x81;
        assert_eq!(addresses(&answer, &query), Some(vec![]));
        answer[7] = 2;
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 3, 1, b'a', 0]);
        answer.extend([1, b'a', 0, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 88, 0, 2]);
        assert_eq!(addresses(&answer, &query), Some(vec![Ipv4Addr::new(10, 88, 0, 2)]));
        for len in 0..answer.len() {
            let found = addresses(&answer[..len], &query);
            assert!(found.is_none(), "{len}: {found:?}");
        }
        assert_eq!(addresses(&query, &query), None);
        assert_eq!(super::query("a..b"), None);
        assert_eq!(super::query(&"x".repeat(64)), None);
    }

    #[test]
    fn silent_server_is_given_up() {
        // Nothing listens at port 53 of this address.
        let gateway = IpAddr::V4(Ipv4Addr::new(127, 53, 53, 53));
        settle(&[Question { gateway, name: "a", address: None }]);
    }
}
