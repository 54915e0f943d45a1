//! pasta: the way out of a network namespace for users without privileges. It carries what the container sends by
//! sockets of the user's own, and published ports by sockets that listen on the host.

use std::fs;
use std::io::{Read, Seek};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::definition::DEFAULT_NETWORK;
use super::error::Error;
use super::relay;
use super::status::{Interface, Status};
use crate::container::config::Port;
use crate::container::files;
use crate::container::native;

/// Every container has these: none sees another's. pasta answers for the gateway and for the name server.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const PREFIX: u8 = 24;
/// Nothing is sent on a wire, so packets may be as large as they can be.
const MTU: u16 = 65520;
const DEVICE: &str = "eth0";
/// The program that has the relay in it.
const ENGINE: &str = "rvmm-engine";
/// How long pasta may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether this process has no privileges over the host's network: it is not root, or root only in a user namespace.
pub(super) fn is_needed() -> bool {
    !rustix::process::geteuid().is_root() || native::is_user_namespace()
}

/// The container's side.
pub(super) struct Side<'a> {
    pub(super) netns: &'a Path,
    /// For a microVM: passt's socket.
    pub(super) socket: Option<PathBuf>,
    /// Hardware address of the container's device.
    pub(super) mac: &'a str,
    pub(super) pid_file: &'a Path,
}

/// Gives a namespace a way out.
pub(super) fn start(side: &Side<'_>, ports: &[Port], dns: &[IpAddr]) -> Result<Status, Error> {
    let program = if side.socket.is_some() { "passt" } else { "pasta" };
    let failed = |source| Error::Run { program, source };
    let mut command = Command::new(program);
    command.args(["--quiet", "--ipv4-only", "--no-dhcp", "--mtu", &MTU.to_string()]);
    command.args(["--address", &ADDRESS.to_string(), "--netmask", &PREFIX.to_string()]);
    command.args(["--gateway", &GATEWAY.to_string(), "--dns-forward", &NAME_SERVER.to_string()]);
    for server in dns {
        command.args(["--dns", &server.to_string()]);
    }
    for (option, protocol) in [("--tcp-ports", "tcp"), ("--udp-ports", "udp")] {
        let mut specs: Vec<String> =
            ports.iter().filter(|port| port.protocol == protocol).map(specification).collect();
        if specs.is_empty() {
            specs.push("none".into());
        }
        for spec in specs {
            command.args([option, &spec]);
        }
    }
    let mut said = tempfile::tempfile().map_err(failed)?;
    if let Some(socket) = &side.socket {
        let _ = fs::remove_file(socket);
        command.arg("--one-off").arg("--socket").arg(socket);
    } else {
        command.args(["--config-net", "--ns-ifname", DEVICE, "--ns-mac-addr", side.mac]);
        command.args(["--tcp-ns", "none", "--udp-ns", "none", "--netns-only", "--netns"]).arg(side.netns);
    }
    let status = command
        .arg("--pid")
        .arg(side.pid_file)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(said.try_clone().map_err(failed)?)
        .stderr(said.try_clone().map_err(failed)?)
        .status();
    let status = status.map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::Program { program, package: "passt", variable: "PATH" },
        _ => failed(source),
    })?;
    if !status.success() {
        let mut message = String::new();
        let _ = said.rewind().and_then(|()| said.read_to_string(&mut message));
        let lines: Vec<&str> = message.lines().filter(|line| !line.contains("syslog")).collect();
        let what = "connect a container's network namespace".into();
        return Err(Error::Failed { program, what, message: lines.join("; ") });
    }
    if let Some(socket) = &side.socket
        && let Err(error) = start_relay(side, socket)
    {
        let _ = stop(side.pid_file, socket);
        return Err(error);
    }
    let address = Ipv4Net::new(ADDRESS, PREFIX).map(IpNet::V4);
    let interface = Interface {
        name: DEVICE.into(),
        network: DEFAULT_NETWORK.into(),
        mac: side.mac.into(),
        addresses: address.into_iter().collect(),
        gateways: vec![IpAddr::V4(GATEWAY)],
        metric: 0,
        mtu: MTU,
    };
    let dns_servers = vec![IpAddr::V4(NAME_SERVER)];
    Ok(Status { interfaces: vec![interface], ports: ports.to_vec(), dns_servers, search: vec![] })
}

/// Starts the process between passt and the namespace's device, which ends when passt does.
fn start_relay(side: &Side<'_>, socket: &Path) -> Result<(), Error> {
    let program = "the relay to passt";
    let failed = |source| Error::Run { program, source };
    let options = relay::Options {
        netns: side.netns.into(),
        device: DEVICE.into(),
        mtu: MTU,
        socket: socket.into(),
        mac: relay::parse_mac(side.mac)?,
    };
    let engine = crate::program::directory().map_err(failed)?.join(ENGINE);
    let output = Command::new(engine)
        .args(relay::arguments(&options))
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
    Err(Error::Failed { program, what: "connect a microVM".into(), message })
}

/// `ADDRESS/HOST:CONTAINER`.
fn specification(port: &Port) -> String {
    let address = port.host_ip.filter(|address| !address.is_unspecified());
    let address = address.map_or_else(String::new, |address| format!("{address}/"));
    format!("{address}{}:{}", port.host, port.container)
}

/// Ends the pasta or passt of a pid file, if there is one.
pub(super) fn stop(pid_file: &Path, socket: &Path) -> Result<(), Error> {
    let pid = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok());
    let open = |pid| pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok();
    // Its name is looked at with the descriptor open, when the number cannot become another's.
    if let Some((pid, process)) = pid.and_then(|pid| Some((pid, open(pid)?)))
        && is_pasta(pid)
    {
        // It keeps nothing that it would have to bring in order, and other signals are held up by its supervisor's mask.
        let _ = pidfd_send_signal(&process, Signal::KILL);
        let patience = Timespec::try_from(PATIENCE).ok();
        let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], patience.as_ref());
    }
    files::remove_file(socket)?;
    Ok(files::remove_file(pid_file)?)
}

/// Whether a process is pasta, whose name is that of the variant for this processor.
fn is_pasta(pid: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.starts_with("pasta") || name.starts_with("passt")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_written_as_pasta_reads_them() {
        let port = |host_ip: Option<&str>| Port {
            host_ip: host_ip.and_then(|address| address.parse().ok()),
            host: 8080,
            container: 80,
            protocol: "tcp".into(),
        };
        assert_eq!(specification(&port(None)), "8080:80");
        assert_eq!(specification(&port(Some("0.0.0.0"))), "8080:80");
        assert_eq!(specification(&port(Some("127.0.0.1"))), "127.0.0.1/8080:80");
    }

    #[test]
    fn stopping_what_is_not_there_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        stop(&path, &directory.path().join("socket")).unwrap();
        // The number of somebody else.
        fs::write(&path, std::process::id().to_string()).unwrap();
        stop(&path, &directory.path().join("socket")).unwrap();
        assert!(!path.exists());
    }
}
