//! A system call filter in Docker's form, and what it says for one container.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompBuilder, LinuxSeccompFilterFlag,
    LinuxSyscall, LinuxSyscallBuilder,
};
use serde::Deserialize;

use super::capabilities::CapabilitySet;

/// Docker's default.
const DEFAULT: &str = include_str!("../../../resources/seccomp.json");
/// Largest profile that is read, in bytes.
pub(super) const BYTES_MAX: u64 = 1 << 20;
/// How Docker calls this architecture.
const ARCHITECTURE: &str = "amd64";

/// A profile: rules, some of which hold only for some containers.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    default_action: LinuxSeccompAction,
    default_errno_ret: Option<u32>,
    architectures: Option<Vec<Arch>>,
    arch_map: Option<Vec<ArchMap>>,
    flags: Option<Vec<LinuxSeccompFilterFlag>>,
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    sub_architectures: Option<Vec<Arch>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    /// The form before lists of names.
    name: Option<String>,
    #[serde(default)]
    names: Vec<String>,
    action: LinuxSeccompAction,
    errno_ret: Option<u32>,
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    min_kernel: Option<String>,
}

/// Why a profile is not one.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// It is no JSON of the right form.
    #[error("it is not a profile in Docker's form")]
    Form(#[source] serde_json::Error),
    /// It hands calls to another process.
    #[error("it has SCMP_ACT_NOTIFY or a listener, and rvmm has no one to notify")]
    Notify,
    /// Its rules cannot be put together.
    #[error("its rules cannot be put together")]
    Rules(#[source] oci_spec::OciSpecError),
}

impl Profile {
    /// Docker's default.
    pub fn default_of_docker() -> Result<Profile, ProfileError> {
        Profile::parse(DEFAULT.as_bytes())
    }

    /// From a file's contents.
    pub fn parse(bytes: &[u8]) -> Result<Profile, ProfileError> {
        let profile: Profile = serde_json::from_slice(bytes).map_err(ProfileError::Form)?;
        let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
        if notifies(profile.default_action)
            || profile.syscalls.iter().any(|rule| notifies(rule.action))
            || profile.listener_path.as_ref().is_some_and(|path| !path.is_empty())
        {
            return Err(ProfileError::Notify);
        }
        Ok(profile)
    }

    /// What it says for a container with these capabilities on a kernel of this version.
    pub fn apply(
        self,
        capabilities: CapabilitySet,
        kernel: (u32, u32),
    ) -> Result<LinuxSeccomp, ProfileError> {
        let mut syscalls = vec![];
        for rule in self.syscalls {
            if rule.includes.holds(capabilities, kernel) && !rule.excludes.excludes(capabilities, kernel) {
                syscalls.push(rule.into_oci().map_err(ProfileError::Rules)?);
            }
        }
        let mut architectures = self.architectures.unwrap_or_default();
        let native = |map: &&ArchMap| map.architecture == Arch::ScmpArchX86_64;
        if let Some(map) = self.arch_map.iter().flatten().find(native) {
            architectures.push(map.architecture);
            architectures.extend(map.sub_architectures.iter().flatten());
        }
        let mut seccomp = LinuxSeccompBuilder::default()
            .default_action(self.default_action)
            .architectures(architectures)
            .syscalls(syscalls)
            .build()
            .map_err(ProfileError::Rules)?;
        seccomp.set_default_errno_ret(self.default_errno_ret);
        seccomp.set_flags(self.flags);
        Ok(seccomp)
    }
}

impl Rule {
    fn into_oci(self) -> Result<LinuxSyscall, oci_spec::OciSpecError> {
        let mut names = self.names;
        names.extend(self.name);
        let mut call = LinuxSyscallBuilder::default().names(names).action(self.action).build()?;
        call.set_errno_ret(self.errno_ret);
        call.set_args(self.args.filter(|args| !args.is_empty()));
        Ok(call)
    }
}

impl Condition {
    /// As what must be: all of the capabilities, one of the architectures, the kernel.
    fn holds(&self, capabilities: CapabilitySet, kernel: (u32, u32)) -> bool {
        let caps = self.caps.iter().flatten().all(|name| capabilities.has(name));
        let arches =
            self.arches.as_ref().is_none_or(|all| all.is_empty() || all.iter().any(|a| a == ARCHITECTURE));
        caps && arches && self.min_kernel.as_deref().is_none_or(|version| kernel >= version_of(version))
    }

    /// As what must not be: any of it.
    fn excludes(&self, capabilities: CapabilitySet, kernel: (u32, u32)) -> bool {
        self.caps.iter().flatten().any(|name| capabilities.has(name))
            || self.arches.iter().flatten().any(|arch| arch == ARCHITECTURE)
            || self.min_kernel.as_deref().is_some_and(|version| kernel >= version_of(version))
    }
}

/// Major and minor number of a kernel's release; what is no number counts as 0.
pub fn version_of(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules_for(seccomp: &LinuxSeccomp, name: &str) -> Vec<LinuxSyscall> {
        let calls = seccomp.syscalls().as_ref().unwrap();
        calls.iter().filter(|call| call.names().iter().any(|n| n == name)).cloned().collect()
    }

    fn default_with(capabilities: u64) -> LinuxSeccomp {
        Profile::default_of_docker().unwrap().apply(CapabilitySet(capabilities), (6, 1)).unwrap()
    }

    #[test]
    fn default_profile_depends_on_capabilities() {
        let few = default_with(0xa804_25fb);
        assert!(rules_for(&few, "mount").is_empty());
        assert_eq!(rules_for(&few, "chroot").len(), 1);
        let clone3 = rules_for(&few, "clone3");
        assert_eq!((clone3.len(), clone3[0].errno_ret()), (1, Some(38)));
        let clone = rules_for(&few, "clone");
        assert_eq!(clone[0].args().as_ref().unwrap()[0].value(), 0x7e02_0000);

        let admin = default_with(1 << 21);
        assert_eq!(rules_for(&admin, "mount").len(), 1);
        assert!(rules_for(&admin, "chroot").is_empty());
        assert_eq!(rules_for(&admin, "clone3")[0].action(), LinuxSeccompAction::ScmpActAllow);
        assert_eq!(rules_for(&admin, "clone")[0].args(), &None);
    }

    #[test]
    fn default_profile_is_for_three_architectures() {
        let arches = [Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32];
        assert_eq!(default_with(0).architectures().as_deref(), Some(&arches[..]));
        assert_eq!(rules_for(&default_with(0), "arch_prctl").len(), 1);
    }

    #[test]
    fn default_profile_names_no_call_twice_in_a_row_of_allowed_ones() {
        let profile = Profile::default_of_docker().unwrap();
        let plain = profile.syscalls.iter().filter(|rule| {
            rule.args.is_none() && rule.includes.caps.is_none() && rule.includes.arches.is_none()
        });
        let mut names: Vec<&String> = plain.flat_map(|rule| &rule.names).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        for risky in
            ["io_uring_setup", "keyctl", "add_key", "userfaultfd", "kexec_load", "bpf", "mount", "setns"]
        {
            assert!(!names.iter().any(|name| *name == risky), "{risky}");
        }
    }

    #[test]
    fn old_kernels_get_no_ptrace() {
        let old = Profile::default_of_docker().unwrap().apply(CapabilitySet(0), (4, 4)).unwrap();
        assert!(rules_for(&old, "ptrace").is_empty());
    }

    #[test]
    fn profile_of_a_user_with_the_old_form_is_read() {
        let text = br#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
            "syscalls":[{"name":"mkdir","action":"SCMP_ACT_ERRNO","args":[]},
                        {"names":["read"],"action":"SCMP_ACT_KILL","excludes":{"arches":["amd64"]}}]}"#;
        let seccomp = Profile::parse(text).unwrap().apply(CapabilitySet(0), (6, 1)).unwrap();
        assert_eq!(rules_for(&seccomp, "mkdir")[0].args(), &None);
        assert!(rules_for(&seccomp, "read").is_empty());
    }

    #[test]
    fn notifying_profile_and_rubbish_are_refused() {
        let text =
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}]}"#;
        assert!(matches!(Profile::parse(text), Err(ProfileError::Notify)));
        assert!(matches!(Profile::parse(b"{}"), Err(ProfileError::Form(_))));
        assert!(matches!(Profile::parse(b"\xff"), Err(ProfileError::Form(_))));
    }

    #[test]
    fn kernel_versions_are_numbers() {
        assert_eq!(version_of("6.18.44-fc"), (6, 18));
        assert_eq!(version_of("4.8"), (4, 8));
        assert_eq!(version_of("x"), (0, 0));
    }
}
