//! Is there KVM, may this user have it, and which kind is it?

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::Check;
use super::user::Account;
use crate::kvm::kind::{Kind, Names};
use crate::kvm::probe::{self, Finding};
use crate::kvm::{KVM_PATH, Kvm};

/// Device number of `/dev/kvm` (`Documentation/admin-guide/devices.txt`).
const DEVICE: (u32, u32) = (10, 232);

/// Capabilities that rvmm uses where they are there.
const LIKED: [(u32, &str); 5] = [
    (74, "KVM_CAP_SYNC_REGS"),
    (55, "KVM_CAP_XSAVE"),
    (CAP_EXIT_ON_EMULATION_FAILURE, "KVM_CAP_EXIT_ON_EMULATION_FAILURE"),
    (192, "KVM_CAP_DIRTY_LOG_RING"),
    (81, "KVM_CAP_READONLY_MEM"),
];
const CAP_EXIT_ON_EMULATION_FAILURE: u32 = 204;

/// What the checks tell others.
#[derive(Default)]
pub struct Found {
    /// The kind, if KVM could be asked.
    pub kind: Option<Kind>,
}

/// Runs all checks of KVM, as far as they get.
pub fn examine(checks: &mut Vec<Check>) -> Found {
    let device = device(&std::fs::metadata(KVM_PATH), Names::of_host());
    let usable = device.state != super::State::Fail;
    checks.push(device);
    if !usable {
        return Found::default();
    }
    let opened = OpenOptions::new().read(true).write(true).open(KVM_PATH);
    checks.push(access(&opened, &Account::current(), group_of_device()));
    if opened.is_err() {
        return Found::default();
    }
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            let fix = "a host kernel of version 5.10 or newer has all that is needed";
            checks.push(Check::fail("kvm-capabilities", "KVM capabilities", error.to_string()).with_fix(fix));
            return Found::default();
        }
    };
    let names = Names::of_host();
    let finding = probe::run(kvm.fd());
    let kind = names.kind_with(*finding.as_ref().unwrap_or(&Finding::Inconclusive));
    checks.push(capabilities(kind, &|number| kvm.fd().check_extension_raw(number.into()) > 0));
    checks.push(kind_check(names, &finding, kind));
    Found { kind: Some(kind) }
}

fn device(found: &io::Result<std::fs::Metadata>, names: Names) -> Check {
    let (id, title) = ("kvm-device", "KVM device");
    match found {
        Ok(metadata) => {
            let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
            if metadata.file_type().is_char_device() && number == DEVICE {
                return Check::ok(id, title, format!("{KVM_PATH} is device {}:{}", number.0, number.1));
            }
            let (major, minor) = DEVICE;
            Check::fail(id, title, format!("{KVM_PATH} is not KVM's device")).with_fix(format!(
                "sudo rm {KVM_PATH} && sudo mknod -m 660 {KVM_PATH} c {major} {minor} && sudo chgrp kvm {KVM_PATH}"
            ))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let fix = if names.hardware_module || names.pvm_module {
                "the module is loaded, but its node is missing: sudo mknod -m 660 /dev/kvm c 10 232"
            } else if names.virtualization {
                "sudo modprobe kvm_intel || sudo modprobe kvm_amd"
            } else if names.hypervisor {
                "this host is a virtual machine: let its hypervisor offer nested virtualization"
            } else {
                "turn on VT-x or SVM in the firmware"
            };
            Check::fail(id, title, format!("{KVM_PATH} does not exist")).with_fix(fix)
        }
        Err(error) => Check::fail(id, title, format!("{KVM_PATH}: {error}")),
    }
}

fn group_of_device() -> Option<u32> {
    std::fs::metadata(KVM_PATH).ok().map(|metadata| metadata.gid())
}

fn access<T>(opened: &io::Result<T>, account: &Account, group: Option<u32>) -> Check {
    let (id, title) = ("kvm-access", "access to KVM");
    let user = &account.name;
    let error = match opened {
        Ok(_) => return Check::ok(id, title, format!("{user} may open {KVM_PATH}")),
        Err(error) => error,
    };
    let check = Check::fail(id, title, format!("{user} cannot open {KVM_PATH}: {error}"));
    match error.kind() {
        ErrorKind::PermissionDenied => {
            let group_name = group.and_then(|gid| account.group_name(gid));
            check.with_fix(match group_name {
                // Root's own group is given to nobody.
                None => format!("sudo setfacl -m u:{user}:rw {KVM_PATH}"),
                Some("root") => format!("sudo setfacl -m u:{user}:rw {KVM_PATH}"),
                Some(name) if account.is_listed_in(name) => {
                    format!("{user} is in the group {name} since after this login: log in again, or run: newgrp {name}")
                }
                Some(name) => format!("sudo usermod -aG {name} {user} (then log in again)"),
            })
        }
        ErrorKind::NotFound => check.with_fix("sudo modprobe kvm_intel || sudo modprobe kvm_amd"),
        ErrorKind::ResourceBusy => check.with_fix("another hypervisor holds the processor: stop it"),
        _ => check,
    }
}

fn capabilities(kind: Kind, has: &dyn Fn(u32) -> bool) -> Check {
    let (id, title) = ("kvm-capabilities", "KVM capabilities");
    let missing: Vec<_> = LIKED.iter().filter(|(number, _)| !has(*number)).collect();
    if missing.is_empty() {
        return Check::ok(id, title, "API version 12, all that rvmm needs and likes");
    }
    let names: Vec<_> = missing.iter().map(|(_, name)| *name).collect();
    let seen = format!("API version 12, all that rvmm needs, without {}", names.join(", "));
    let must_have = kind == Kind::Pvm && !has(CAP_EXIT_ON_EMULATION_FAILURE);
    if must_have { Check::fail(id, title, seen) } else { Check::warn(id, title, seen) }
        .with_fix("a newer host kernel has them")
}

fn kind_check(names: Names, finding: &Result<Finding, probe::Error>, kind: Kind) -> Check {
    let (id, title) = ("kvm-kind", "kind of KVM");
    let probe = match finding {
        Ok(Finding::Native) => "a probe VM ran on the processor".to_owned(),
        Ok(Finding::Emulated) => "a probe VM's kernel code is emulated".to_owned(),
        Ok(Finding::Inconclusive) => "a probe VM ended in an unknown way".to_owned(),
        Err(error) => format!("no probe VM: {error}"),
    };
    let seen = format!("{kind}: {probe}");
    match (finding, kind) {
        (Err(_), _) => Check::fail(id, title, seen),
        (_, Kind::Hardware | Kind::Nested) => Check::ok(id, title, seen),
        (_, Kind::Pvm) => {
            let check =
                Check::warn(id, title, format!("{seen}; user code runs at full speed, kernel code slowly"));
            let fix = "hardware virtualization is faster by far; until then, boot rvmm's PVM kernel";
            if names.kind() == kind {
                check.with_fix(fix)
            } else {
                check.with_fix(format!("names say otherwise; {fix}"))
            }
        }
        (_, Kind::Unknown) => Check::warn(id, title, seen),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn account(groups: &[(&str, u32, bool)]) -> Account {
        Account::for_test("ann", groups)
    }

    fn denied() -> io::Result<()> {
        Err(ErrorKind::PermissionDenied.into())
    }

    #[test]
    fn missing_device_leads_to_what_the_host_lacks() {
        let missing = || Err(ErrorKind::NotFound.into());
        let fix = |names| device(&missing(), names).fix.unwrap();
        assert!(fix(Names { virtualization: true, ..Names::default() }).contains("modprobe"));
        assert!(fix(Names { hypervisor: true, ..Names::default() }).contains("nested"));
        assert!(fix(Names::default()).contains("firmware"));
        assert!(fix(Names { pvm_module: true, ..Names::default() }).contains("mknod"));
    }

    #[test]
    fn file_in_place_of_the_device_fails() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let check = device(&std::fs::metadata(file.path()), Names::default());
        assert_eq!(check.state, State::Fail);
        assert!(check.fix.unwrap().contains("mknod"));
    }

    #[test]
    fn denied_access_names_the_command_that_mends_it() {
        let fix = |account: Account, gid| access(&denied(), &account, Some(gid)).fix.unwrap();
        assert_eq!(fix(account(&[("kvm", 104, false)]), 104), "sudo usermod -aG kvm ann (then log in again)");
        assert!(fix(account(&[("kvm", 104, true)]), 104).contains("newgrp kvm"));
        assert_eq!(fix(account(&[("root", 0, false)]), 0), "sudo setfacl -m u:ann:rw /dev/kvm");
        assert_eq!(fix(account(&[]), 7), "sudo setfacl -m u:ann:rw /dev/kvm");
    }

    #[test]
    fn capability_of_pvm_hosts_is_needed_there_only() {
        let without = |number| number != CAP_EXIT_ON_EMULATION_FAILURE;
        assert_eq!(capabilities(Kind::Pvm, &without).state, State::Fail);
        assert_eq!(capabilities(Kind::Hardware, &without).state, State::Warn);
        assert_eq!(capabilities(Kind::Pvm, &|_| true).state, State::Ok);
    }

    #[test]
    fn kind_is_told_by_the_probe() {
        let state = |finding, kind| kind_check(Names::default(), &finding, kind).state;
        assert_eq!(state(Ok(Finding::Native), Kind::Nested), State::Ok);
        assert_eq!(state(Ok(Finding::Emulated), Kind::Pvm), State::Warn);
        assert_eq!(state(Err(io::Error::other("no").into()), Kind::Hardware), State::Fail);
    }
}
