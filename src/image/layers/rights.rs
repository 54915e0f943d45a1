//! What this process may give a file.

use std::fs;

/// What of a layer can be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Owners other than the user itself.
    pub owners: bool,
    /// Device files.
    pub devices: bool,
    /// Attributes of the `trusted` and `security` namespaces.
    pub trusted: bool,
}

impl Rights {
    /// All of it: root of the host.
    pub const ALL: Self = Self { owners: true, devices: true, trusted: true };
    /// Root of a user namespace.
    pub const NAMESPACE: Self = Self { owners: true, devices: false, trusted: false };
    /// A user.
    pub const USER: Self = Self { owners: false, devices: false, trusted: false };

    /// What this process has.
    pub fn detect() -> Self {
        if !rustix::process::geteuid().is_root() {
            return Self::USER;
        }
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        match () {
            () if is_initial(&map) => Self::ALL,
            // All files are that user's, as without a namespace.
            () if has_one_user(&map) => Self::USER,
            () => Self::NAMESPACE,
        }
    }

    /// The attribute by which overlayfs knows an opaque directory. Without rights it wants the `userxattr` mount option.
    pub fn opaque(self) -> &'static str {
        if self.trusted { "trusted.overlay.opaque" } else { "user.overlay.opaque" }
    }
}

/// Whether a `uid_map` is that of the initial user namespace: every number is itself.
fn is_initial(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Whether a `uid_map` has a single user.
fn has_one_user(map: &str) -> bool {
    let mut lines = map.lines();
    lines.next().and_then(|line| line.split_whitespace().nth(2)) == Some("1") && lines.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initial_namespace_is_told_from_others() {
        assert!(is_initial("         0          0 4294967295\n"));
        assert!(!is_initial("         0       1000          1\n         1     100000      65536\n"));
        assert!(!is_initial(""));
        assert!(has_one_user("         0       1000          1\n"));
        assert!(!has_one_user("         0       1000          1\n         1     100000      65536\n"));
        assert!(!has_one_user(""));
    }
}
