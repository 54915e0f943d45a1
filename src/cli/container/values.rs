//! Values of container flags, in the forms that Docker has.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::container::config::{Device, Mount, MountSource, Port, Restart, Rlimit, Secret};

/// Most ports of one range.
const RANGE_MAX: u16 = 10_000;

/// A number of bytes; `-1` is `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Bytes, String> {
        if text == "-1" {
            return Ok(Bytes(u64::MAX));
        }
        let bad = || format!("{text:?} is no size: a number with b, k, m, g or t behind it");
        let lower = text.to_ascii_lowercase();
        let number = lower.trim_end_matches("ib").trim_end_matches('b');
        let digits = number.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &number[digits.len()..] {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(bad()),
        };
        let value: f64 = digits.parse().map_err(|_| bad())?;
        let bytes = value * (1u64 << shift) as f64;
        if !(0.0..9.0e18).contains(&bytes) {
            return Err(bad());
        }
        Ok(Bytes(bytes as u64))
    }
}

/// Processor time in thousandths of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(pub u64);

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Cpus, String> {
        let value: f64 = text.parse().map_err(|_| format!("{text:?} is no number of processors"))?;
        if !(0.01..=1_000_000.0).contains(&value) {
            return Err(format!("{text} processors: at least 0.01"));
        }
        Ok(Cpus((value * 1000.0).round() as u64))
    }
}

/// `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair(pub String, pub String);

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Pair, String> {
        let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
        Ok(Pair(name.into(), value.into()))
    }
}

/// `NAME=VALUE`, or `NAME` for the value that it has here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvVariable(pub String, pub Option<String>);

impl FromStr for EnvVariable {
    type Err = String;

    fn from_str(text: &str) -> Result<EnvVariable, String> {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        if name.is_empty() || name.chars().any(char::is_whitespace) || text.contains('\0') {
            return Err(format!("{text:?} is no environment variable"));
        }
        Ok(EnvVariable(name.into(), value.map(Into::into)))
    }
}

/// `DEVICE:RATE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRate(pub PathBuf, pub u64);

impl FromStr for DeviceRate {
    type Err = String;

    fn from_str(text: &str) -> Result<DeviceRate, String> {
        let (path, rate) = text.rsplit_once(':').ok_or_else(|| format!("{text:?} is not DEVICE:RATE"))?;
        Ok(DeviceRate(path.into(), rate.parse::<Bytes>()?.0))
    }
}

/// A time as Go writes it: `1m30s`, `500ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthDuration(pub Duration);

impl FromStr for HealthDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<HealthDuration, String> {
        let bad = || format!("{text:?} is no time: numbers with h, m, s or ms behind them");
        let mut rest = text;
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(bad)?;
            let (number, unit) = rest.split_at(digits);
            let end = unit.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(unit.len());
            let factor = match &unit[..end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(bad()),
            };
            seconds += number.parse::<f64>().map_err(|_| bad())? * factor;
            rest = &unit[end..];
        }
        if text.is_empty() {
            return Err(bad());
        }
        Duration::try_from_secs_f64(seconds).map(HealthDuration).map_err(|_| bad())
    }
}

/// `no`, `on-failure[:N]`, `always`, `unless-stopped`.
pub fn restart(text: &str) -> Result<Restart, String> {
    match text.split_once(':').unwrap_or((text, "")) {
        ("no" | "", "") => Ok(Restart::No),
        ("always", "") => Ok(Restart::Always),
        ("unless-stopped", "") => Ok(Restart::UnlessStopped),
        ("on-failure", "") => Ok(Restart::OnFailure(0)),
        ("on-failure", count) => {
            count.parse().map(Restart::OnFailure).map_err(|_| format!("{count:?} is no number of restarts"))
        }
        _ => Err(format!("{text:?}: there are no, on-failure[:N], always and unless-stopped")),
    }
}

/// `NAME=SOFT[:HARD]`; -1 for no limit.
pub fn rlimit(text: &str) -> Result<Rlimit, String> {
    const NAMES: [&str; 15] = [
        "AS",
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NICE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTPRIO",
        "SIGPENDING",
        "STACK",
    ];
    let bad = || format!("{text:?} is not NAME=SOFT[:HARD]");
    let (name, value) = text.split_once('=').ok_or_else(bad)?;
    let name = name.to_ascii_uppercase();
    if !NAMES.contains(&name.as_str()) {
        return Err(format!("there is no limit {name:?}"));
    }
    let number = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        _ => text.parse().map_err(|_| bad()),
    };
    let (soft, hard) = value.split_once(':').unwrap_or((value, value));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(format!("{text:?}: the soft limit is above the hard one"));
    }
    Ok(Rlimit { name, soft, hard })
}

fn absolute_target(target: &str) -> Result<PathBuf, String> {
    if !target.starts_with('/') {
        return Err(format!("the target {target:?} is not an absolute path"));
    }
    Ok(target.into())
}

fn source(text: &str, propagation: Option<String>, copy: bool) -> Result<MountSource, String> {
    if text.contains('/') || text.starts_with('.') {
        let path = std::path::absolute(text).map_err(|error| format!("{text:?}: {error}"))?;
        return Ok(MountSource::Bind { path, propagation });
    }
    if !crate::container::records::is_name(text) {
        return Err(format!("{text:?} is neither a path (with a '/') nor a volume's name"));
    }
    Ok(MountSource::Volume { name: text.into(), copy })
}

/// `[SOURCE:]TARGET[:OPTIONS]`. Without a source, a volume of its own with a name that is made up (empty here).
pub fn volume(text: &str) -> Result<Mount, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (from, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [from, target] if target.starts_with('/') => (Some(from), target, ""),
        [target, options] => (None, target, options),
        [from, target, options] => (Some(from), target, options),
        _ => return Err(format!("{text:?} is not [SOURCE:]TARGET[:OPTIONS]")),
    };
    let (mut read_only, mut propagation, mut copy) = (false, None, true);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" | "readonly" => read_only = true,
            "rw" => read_only = false,
            // Labels of SELinux, which this project does not set; Docker ignores them where there is none.
            "z" | "Z" => {}
            "nocopy" => copy = false,
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" => {
                propagation = Some(option.into());
            }
            _ => return Err(format!("{text:?}: unknown option {option:?}")),
        }
    }
    let source = match from {
        Some(from) => source(from, propagation, copy)?,
        None => MountSource::Volume { name: String::new(), copy },
    };
    Ok(Mount { source, target: absolute_target(target)?, read_only })
}

/// `type=bind|volume|tmpfs,source=…,target=…`.
pub fn mount(text: &str) -> Result<Mount, String> {
    let (mut kind, mut from, mut target, mut read_only) = ("volume", None, None, false);
    let (mut propagation, mut copy, mut size_bytes, mut mode) = (None, true, None, None);
    for part in text.split(',') {
        let (key, value) = part.split_once('=').map_or((part, None), |(key, value)| (key, Some(value)));
        match (key, value) {
            ("type", Some(value @ ("bind" | "volume" | "tmpfs"))) => kind = value,
            ("source" | "src", Some(value)) => from = Some(value),
            ("target" | "dst" | "destination", Some(value)) => target = Some(value),
            ("readonly" | "ro", None | Some("true" | "1")) => read_only = true,
            ("readonly" | "ro", Some("false" | "0")) => read_only = false,
            ("bind-propagation", Some(value)) => propagation = Some(value.to_owned()),
            ("volume-nocopy", None | Some("true" | "1")) => copy = false,
            ("tmpfs-size", Some(value)) => size_bytes = Some(value.parse::<Bytes>()?.0),
            ("tmpfs-mode", Some(value)) => {
                mode = Some(u32::from_str_radix(value, 8).map_err(|_| format!("{part:?} is no mode"))?);
            }
            _ => return Err(format!("unknown mount option {part:?}")),
        }
    }
    let target = absolute_target(target.ok_or("the mount has no target")?)?;
    let source = match (kind, from) {
        ("tmpfs", None) => MountSource::Tmpfs { size_bytes, mode, options: vec![] },
        ("tmpfs", Some(_)) => return Err("a tmpfs has no source".into()),
        ("bind", None) => return Err("a bind mount needs a source".into()),
        ("bind", Some(path)) => {
            let path = Path::new(path);
            if !path.is_absolute() {
                return Err(format!("the source {path:?} is not an absolute path"));
            }
            MountSource::Bind { path: path.into(), propagation }
        }
        (_, None) => MountSource::Volume { name: String::new(), copy },
        (_, Some(name)) if crate::container::records::is_name(name) => {
            MountSource::Volume { name: name.into(), copy }
        }
        (_, Some(name)) => return Err(format!("{name:?} is no volume's name")),
    };
    Ok(Mount { source, target, read_only })
}

/// `TARGET[:OPTIONS]`.
pub fn tmpfs(text: &str) -> Result<Mount, String> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    let (mut read_only, mut size_bytes, mut mode, mut others) = (false, None, None, vec![]);
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", value)) if !value.ends_with('%') => size_bytes = Some(value.parse::<Bytes>()?.0),
            Some(("mode", value)) => {
                mode = Some(u32::from_str_radix(value, 8).map_err(|_| format!("{option:?} is no mode"))?);
            }
            None if option == "ro" => read_only = true,
            None if option == "rw" => read_only = false,
            _ => others.push(option.to_owned()),
        }
    }
    let source = MountSource::Tmpfs { size_bytes, mode, options: others };
    Ok(Mount { source, target: absolute_target(target)?, read_only })
}

/// `HOST[:CONTAINER[:ACCESS]]`.
pub fn device(text: &str) -> Result<Device, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let is_access = |text: &str| !text.is_empty() && text.bytes().all(|byte| b"rwm".contains(&byte));
    let (host, container, access) = match parts[..] {
        [host] => (host, host, "rwm"),
        [host, access] if is_access(access) => (host, host, access),
        [host, container] => (host, container, "rwm"),
        [host, container, access] if is_access(access) => (host, container, access),
        _ => return Err(format!("{text:?} is not HOST[:CONTAINER[:rwm]]")),
    };
    if !host.starts_with('/') || !container.starts_with('/') {
        return Err(format!("{text:?}: paths of devices are absolute"));
    }
    Ok(Device { host: host.into(), container: container.into(), access: access.into() })
}

/// `NAME:ADDRESS`.
pub fn host(text: &str) -> Result<(String, String), String> {
    let (name, address) = text
        .split_once([':', '='])
        .filter(|(name, address)| !name.is_empty() && !address.is_empty())
        .ok_or_else(|| format!("{text:?} is not NAME:ADDRESS"))?;
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if address != "host-gateway" && address.parse::<std::net::IpAddr>().is_err() {
        return Err(format!("{address:?} is no address"));
    }
    Ok((name.into(), address.into()))
}

/// `[id=NAME,]src=FILE[,uid=N][,gid=N][,mode=M]`.
pub fn secret(text: &str) -> Result<Secret, String> {
    let (mut name, mut from, mut uid, mut gid, mut mode) = (None, None, 0, 0, 0o444);
    for part in text.split(',') {
        let bad = |_| format!("{part:?}: not a number");
        match part.split_once('=') {
            Some(("id" | "target", value)) => name = Some(value.to_owned()),
            Some(("src" | "source", value)) => from = Some(value),
            Some(("uid", value)) => uid = value.parse().map_err(bad)?,
            Some(("gid", value)) => gid = value.parse().map_err(bad)?,
            Some(("mode", value)) => mode = u32::from_str_radix(value, 8).map_err(bad)? & 0o7777,
            None if from.is_none() => from = Some(part),
            _ => return Err(format!("unknown option {part:?} of a secret")),
        }
    }
    let from =
        std::path::absolute(from.ok_or("a secret needs src=FILE")?).map_err(|error| error.to_string())?;
    let name = name
        .or_else(|| Some(from.file_name()?.to_str()?.to_owned()))
        .filter(|name| crate::container::records::is_name(name))
        .ok_or("a secret needs id=NAME")?;
    Ok(Secret { name, source: from, uid, gid, mode })
}

/// Ports of one flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(pub Vec<Port>);

/// `[[IP:]HOST:]CONTAINER[/PROTOCOL]`; both may be ranges of one length.
pub fn ports(text: &str) -> Result<Ports, String> {
    let bad = || format!("{text:?} is not [[IP:]HOST:]CONTAINER[/PROTOCOL]");
    let (rest, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    if !["tcp", "udp", "sctp"].contains(&protocol) {
        return Err(format!("{protocol:?} is not tcp, udp or sctp"));
    }
    let (rest, container) = rest.rsplit_once(':').unwrap_or(("", rest));
    // An address of version 6 stands in brackets.
    let (ip, host) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((ip, host)) => (ip, host.strip_prefix(':').unwrap_or("")),
        None => rest.rsplit_once(':').unwrap_or(("", rest)),
    };
    let host_ip = match ip {
        "" => None,
        ip => Some(ip.parse().map_err(|_| bad())?),
    };
    let range = |text: &str| -> Result<(u16, u16), String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last): (u16, u16) = (first.parse().map_err(|_| bad())?, last.parse().map_err(|_| bad())?);
        if first == 0 && text != "0" || last < first || last - first >= RANGE_MAX {
            return Err(bad());
        }
        Ok((first, last))
    };
    let (first, last) = range(container)?;
    if first == 0 {
        return Err(bad());
    }
    let (host_first, host_last) = if host.is_empty() { (0, 0) } else { range(host)? };
    if host_first != 0 && host_last - host_first != last - first {
        return Err(format!("{text:?}: the ranges have different lengths"));
    }
    let ports = (0..=last - first).map(|index| Port {
        host_ip,
        host: if host_first == 0 { 0 } else { host_first + index },
        container: first + index,
        protocol: protocol.into(),
    });
    Ok(Ports(ports.collect()))
}

#[cfg(test)]
#[path = "values_tests.rs"]
mod tests;
