//! netavark: the program that makes bridges, pairs of devices, routes and rules; and aardvark-dns, which it starts and
//! which answers for the names of containers.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Seek, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::nameserver;
use crate::container::files;

/// Where Debian and others put programs that only container engines call.
const DIRECTORIES: [&str; 5] = [
    "/usr/lib/podman",
    "/usr/libexec/podman",
    "/usr/local/lib/podman",
    "/usr/local/libexec/podman",
    "/usr/lib/rvmm",
];
/// How long a netavark whose engine was killed may still take.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(30);

/// What netavark is told.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Input {
    pub(super) container_id: String,
    pub(super) container_name: String,
    pub(super) networks: BTreeMap<String, Joined>,
    pub(super) network_info: BTreeMap<String, Info>,
    pub(super) port_mappings: Vec<PortMapping>,
    pub(super) dns_servers: Vec<IpAddr>,
}

/// A network from the container's side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Joined {
    pub(super) static_ips: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) static_mac: Option<String>,
    pub(super) interface_name: String,
    pub(super) aliases: Vec<String>,
}

/// A network from the host's side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Info {
    pub(super) name: String,
    pub(super) id: String,
    pub(super) driver: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) network_interface: Option<String>,
    pub(super) subnets: Vec<InfoSubnet>,
    pub(super) ipv6_enabled: bool,
    pub(super) internal: bool,
    pub(super) dns_enabled: bool,
    pub(super) options: BTreeMap<String, String>,
    pub(super) ipam_options: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct InfoSubnet {
    pub(super) subnet: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gateway: Option<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PortMapping {
    pub(super) container_ip: String,
    pub(super) container_port: u16,
    pub(super) host_ip: String,
    pub(super) host_port: u16,
    pub(super) protocol: String,
    pub(super) range: u16,
}

/// What netavark answers for one network.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Answer {
    pub(super) dns_server_ips: Vec<IpAddr>,
    pub(super) interfaces: BTreeMap<String, AnswerInterface>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct AnswerInterface {
    pub(super) mac_address: String,
    pub(super) subnets: Vec<AnswerSubnet>,
}

#[derive(Debug, Deserialize)]
pub(super) struct AnswerSubnet {
    pub(super) ipnet: IpNet,
    pub(super) gateway: Option<IpAddr>,
}

#[derive(Deserialize)]
struct Failure {
    error: String,
}

/// A process by its number and the time when it started, so that another of the same number is not taken for it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pid: u32,
    started: u64,
}

/// The two programs, and the directory of their files.
#[derive(Debug)]
pub(super) struct Netavark {
    program: PathBuf,
    aardvark: PathBuf,
    directory: PathBuf,
}

/// netavark at work.
pub(super) struct Running {
    child: Child,
    output: fs::File,
    errors: fs::File,
    what: String,
    helper: PathBuf,
}

impl Netavark {
    /// Finds the programs; their files go to `directory`, which exists.
    pub(super) fn find(directory: &Path) -> Result<Netavark, Error> {
        Ok(Netavark {
            program: find("netavark", "RVMM_NETAVARK")?,
            aardvark: find("aardvark-dns", "RVMM_AARDVARK_DNS")?,
            directory: directory.to_path_buf(),
        })
    }

    /// Begins to connect the namespace as `input` says.
    pub(super) fn setup(&self, netns: &Path, input: &Input) -> Result<Running, Error> {
        nameserver::forget_dead(&self.directory)?;
        self.start("setup", netns, input)
    }

    /// Undoes [`Self::setup`].
    pub(super) fn teardown(&self, netns: &Path, input: &Input) -> Result<(), Error> {
        self.start("teardown", netns, input)?.finish().map(drop)
    }

    fn start(&self, verb: &str, netns: &Path, input: &Input) -> Result<Running, Error> {
        let failed = |source| Error::Run { program: "netavark", source };
        let bytes = serde_json::to_vec(input).map_err(|error| failed(error.into()))?;
        // Files and not pipes: the name server inherits the ends, and would keep a pipe open.
        let mut stdin = tempfile::tempfile().map_err(failed)?;
        stdin.write_all(&bytes).and_then(|()| stdin.rewind()).map_err(failed)?;
        let [output, errors] = [tempfile::tempfile().map_err(failed)?, tempfile::tempfile().map_err(failed)?];
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        let child = Command::new(&self.program)
            .arg("--config")
            .arg(&self.directory)
            .arg("--aardvark-binary")
            .arg(&self.aardvark)
            .arg(verb)
            .arg(netns)
            .env("PATH", path)
            .current_dir("/")
            .stdin(stdin)
            .stdout(Stdio::from(output.try_clone().map_err(failed)?))
            .stderr(Stdio::from(errors.try_clone().map_err(failed)?))
            .spawn()
            .map_err(failed)?;
        let helper = self.directory.join("helper.json");
        let what = format!("{verb} the network of container {}", input.container_name);
        let running = Running { child, output, errors, what, helper };
        if let Some(process) = process(running.child.id()) {
            files::write_json(&running.helper, &process)?;
        }
        Ok(running)
    }
}

impl Running {
    /// Waits for the end, and reads the answer for each network.
    pub(super) fn finish(mut self) -> Result<BTreeMap<String, Answer>, Error> {
        let status = self.wait()?;
        let output = text(&mut self.output);
        if status.success() {
            let output = if output.trim().is_empty() { "{}" } else { &output };
            return serde_json::from_str(output)
                .map_err(|error| Error::Run { program: "netavark", source: error.into() });
        }
        let said = serde_json::from_str(&output).map(|Failure { error }| error);
        let message = said.unwrap_or_else(|_| format!("{status} {}", text(&mut self.errors)));
        let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
        Err(Error::Failed { program: "netavark", what: self.what, message })
    }

    fn wait(&mut self) -> Result<ExitStatus, Error> {
        let status = self.child.wait().map_err(|source| Error::Run { program: "netavark", source })?;
        files::remove_file(&self.helper)?;
        Ok(status)
    }
}

fn text(file: &mut fs::File) -> String {
    const BYTES_MAX: u64 = 1 << 20;
    let mut bytes = vec![];
    let _ = file.rewind().and_then(|()| file.take(BYTES_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn find(program: &'static str, variable: &'static str) -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = DIRECTORIES.iter().map(PathBuf::from).chain(std::env::split_paths(&path));
    directories.map(|directory| directory.join(program)).find(|path| path.is_file()).ok_or(Error::Program {
        program,
        package: program,
        variable,
    })
}

/// Waits for a netavark that outlived its engine, so that nobody works against it.
pub(super) fn wait_for_orphan(directory: &Path) -> Result<(), Error> {
    let path = directory.join("helper.json");
    let Some(orphan): Option<Process> = files::find_json(&path)? else { return Ok(()) };
    let end = std::time::Instant::now() + ORPHAN_PATIENCE;
    while process(orphan.pid).is_some_and(|process| process == orphan) {
        if std::time::Instant::now() > end {
            let source = io::Error::from(io::ErrorKind::TimedOut);
            return Err(Error::Run { program: "netavark", source });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(files::remove_file(&path)?)
}

/// A process that runs; not one that has ended and was not yet waited for.
pub(super) fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split(' ');
    let runs = !matches!(fields.next()?, "Z" | "X");
    // The 22nd field of proc_pid_stat(5); the state is the third.
    let started = fields.nth(18)?.parse().ok()?;
    runs.then_some(Process { pid, started })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_read() {
        let text = r#"{"bridge":{"dns_search_domains":["dns.podman"],"dns_server_ips":["10.88.0.1"],"interfaces":{"eth0":
            {"mac_address":"56:01:90:50:99:37","subnets":[{"gateway":"10.88.0.1","ipnet":"10.88.0.2/16"}]}}}}"#;
        let answers: BTreeMap<String, Answer> = serde_json::from_str(text).unwrap();
        let interface = &answers["bridge"].interfaces["eth0"];
        assert_eq!(interface.subnets[0].ipnet.to_string(), "10.88.0.2/16");
    }

    #[test]
    fn process_is_told_from_another_of_its_number() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = process(child.id()).unwrap();
        assert!(process.started > 0);
        child.kill().unwrap();
        // Ended, and not waited for.
        while super::process(child.id()).is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.wait().unwrap();
        let directory = tempfile::tempdir().unwrap();
        files::write_json(&directory.path().join("helper.json"), &process).unwrap();
        wait_for_orphan(directory.path()).unwrap();
        assert!(files::names(directory.path()).unwrap().is_empty());
    }
}
