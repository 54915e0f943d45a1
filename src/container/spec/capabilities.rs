//! Capabilities: their names, Docker's default set, and what a user's list makes of it.

use oci_spec::runtime::{Capabilities, Capability};

use super::Error;
use crate::container::config::Security;

/// By number, which is the bit in a set (capabilities(7)).
const ALL: [(&str, Capability); 41] = [
    ("CHOWN", Capability::Chown),
    ("DAC_OVERRIDE", Capability::DacOverride),
    ("DAC_READ_SEARCH", Capability::DacReadSearch),
    ("FOWNER", Capability::Fowner),
    ("FSETID", Capability::Fsetid),
    ("KILL", Capability::Kill),
    ("SETGID", Capability::Setgid),
    ("SETUID", Capability::Setuid),
    ("SETPCAP", Capability::Setpcap),
    ("LINUX_IMMUTABLE", Capability::LinuxImmutable),
    ("NET_BIND_SERVICE", Capability::NetBindService),
    ("NET_BROADCAST", Capability::NetBroadcast),
    ("NET_ADMIN", Capability::NetAdmin),
    ("NET_RAW", Capability::NetRaw),
    ("IPC_LOCK", Capability::IpcLock),
    ("IPC_OWNER", Capability::IpcOwner),
    ("SYS_MODULE", Capability::SysModule),
    ("SYS_RAWIO", Capability::SysRawio),
    ("SYS_CHROOT", Capability::SysChroot),
    ("SYS_PTRACE", Capability::SysPtrace),
    ("SYS_PACCT", Capability::SysPacct),
    ("SYS_ADMIN", Capability::SysAdmin),
    ("SYS_BOOT", Capability::SysBoot),
    ("SYS_NICE", Capability::SysNice),
    ("SYS_RESOURCE", Capability::SysResource),
    ("SYS_TIME", Capability::SysTime),
    ("SYS_TTY_CONFIG", Capability::SysTtyConfig),
    ("MKNOD", Capability::Mknod),
    ("LEASE", Capability::Lease),
    ("AUDIT_WRITE", Capability::AuditWrite),
    ("AUDIT_CONTROL", Capability::AuditControl),
    ("SETFCAP", Capability::Setfcap),
    ("MAC_OVERRIDE", Capability::MacOverride),
    ("MAC_ADMIN", Capability::MacAdmin),
    ("SYSLOG", Capability::Syslog),
    ("WAKE_ALARM", Capability::WakeAlarm),
    ("BLOCK_SUSPEND", Capability::BlockSuspend),
    ("AUDIT_READ", Capability::AuditRead),
    ("PERFMON", Capability::Perfmon),
    ("BPF", Capability::Bpf),
    ("CHECKPOINT_RESTORE", Capability::CheckpointRestore),
];

/// What Docker gives a container.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// A set of capabilities, one bit for each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySet(pub u64);

impl CapabilitySet {
    /// All that there are.
    pub fn all() -> CapabilitySet {
        CapabilitySet((1 << ALL.len()) - 1)
    }

    /// Those of an OCI list.
    pub fn of(list: &Capabilities) -> CapabilitySet {
        let bit = |(number, (_, capability)): (usize, &(_, Capability))| {
            if list.contains(capability) { 1 << number } else { 0 }
        };
        CapabilitySet(ALL.iter().enumerate().map(bit).sum())
    }

    /// As an OCI list.
    pub fn to_oci(self) -> Capabilities {
        self.members().map(|(_, capability)| *capability).collect()
    }

    /// Names with `CAP_`.
    pub fn names(self) -> impl Iterator<Item = String> {
        self.members().map(|(name, _)| format!("CAP_{name}"))
    }

    fn members(self) -> impl Iterator<Item = &'static (&'static str, Capability)> {
        ALL.iter().enumerate().filter(move |(number, _)| self.0 & (1 << number) != 0).map(|(_, one)| one)
    }

    /// Whether a capability is in it, by its name with or without `CAP_`.
    pub fn has(self, name: &str) -> bool {
        number(name).is_some_and(|number| self.0 & (1 << number) != 0)
    }
}

/// A capability's number.
fn number(name: &str) -> Option<usize> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    ALL.iter().position(|(name, _)| *name == short)
}

/// The set that a container gets, of those that are available.
pub fn of_container(security: &Security, available: CapabilitySet) -> Result<CapabilitySet, Error> {
    if security.privileged {
        return Ok(available);
    }
    let is_all = |name: &String| name.eq_ignore_ascii_case("ALL");
    let set_of = |names: &[String]| -> Result<u64, Error> {
        let mut set = 0;
        for name in names.iter().filter(|name| !is_all(name)) {
            let number = number(name).ok_or_else(|| Error::Capability { name: name.clone() })?;
            set |= 1 << number;
        }
        Ok(set)
    };
    let (add, drop) = (set_of(&security.cap_add)?, set_of(&security.cap_drop)?);
    let base = if security.cap_add.iter().any(is_all) {
        available.0
    } else if security.cap_drop.iter().any(is_all) {
        0
    } else {
        let names: Vec<String> = DEFAULT.iter().map(|name| (*name).to_owned()).collect();
        set_of(&names)? & available.0
    };
    // Dropping all leaves what was added; dropping one by name is stronger than adding it.
    let wanted = (base | add) & !drop;
    let missing = CapabilitySet(wanted & !available.0);
    match missing.names().next() {
        Some(name) => Err(Error::CapabilityMissing { name }),
        None => Ok(CapabilitySet(wanted)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(add: &[&str], drop: &[&str]) -> Result<CapabilitySet, Error> {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let security = Security { cap_add: list(add), cap_drop: list(drop), ..Security::default() };
        of_container(&security, CapabilitySet::all())
    }

    #[test]
    fn default_set_is_that_of_docker() {
        // The value that `CapEff` of /proc/self/status shows in a container of Docker.
        assert_eq!(of(&[], &[]).unwrap().0, 0xa804_25fb);
    }

    #[test]
    fn names_go_with_and_without_prefix_in_any_case() {
        assert!(of(&["cap_net_admin"], &[]).unwrap().has("NET_ADMIN"));
        assert!(!of(&[], &["chown"]).unwrap().has("CAP_CHOWN"));
        assert!(matches!(of(&["FLY"], &[]), Err(Error::Capability { name }) if name == "FLY"));
    }

    #[test]
    fn drop_all_leaves_what_is_added() {
        let set = of(&["NET_BIND_SERVICE"], &["ALL"]).unwrap();
        assert_eq!(set.names().collect::<Vec<_>>(), ["CAP_NET_BIND_SERVICE"]);
    }

    #[test]
    fn add_all_takes_what_is_available_without_what_is_dropped() {
        let set = of(&["ALL"], &["SYS_ADMIN"]).unwrap();
        assert_eq!(set.0, CapabilitySet::all().0 & !(1 << 21));
    }

    #[test]
    fn what_the_host_lacks_is_an_error_only_if_named() {
        let few = CapabilitySet(CapabilitySet::all().0 & !(1 << 24) & !1);
        let security = Security { cap_add: vec!["SYS_RESOURCE".into()], ..Security::default() };
        let error = of_container(&security, few).unwrap_err();
        assert!(matches!(error, Error::CapabilityMissing { name } if name == "CAP_SYS_RESOURCE"));
        assert!(!of_container(&Security::default(), few).unwrap().has("CHOWN"));
        let privileged = Security { privileged: true, ..Security::default() };
        assert_eq!(of_container(&privileged, few).unwrap(), few);
    }

    #[test]
    fn oci_lists_go_there_and_back() {
        let set = CapabilitySet(0xa804_25fb);
        assert_eq!(CapabilitySet::of(&set.to_oci()), set);
    }
}
