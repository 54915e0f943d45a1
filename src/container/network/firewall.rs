//! What netavark leaves in the host's packet filter: the chains that all its networks share, and everything of a container
//! when it was stopped half way.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use super::error::Error;

/// What is no longer wanted.
#[derive(Debug, Default)]
pub(super) struct Unwanted<'a> {
    /// Containers whose ports are published no more.
    pub(super) ids: Vec<&'a str>,
    /// Their addresses.
    pub(super) addresses: Vec<IpAddr>,
    /// Subnets of networks without a container.
    pub(super) subnets: Vec<String>,
    /// Bridges of such networks.
    pub(super) bridges: Vec<&'a str>,
    /// Whether there is no container at all, so that chains without rules of others go too.
    pub(super) everything: bool,
}

/// Removes what is unwanted. A host without iptables has none of it.
pub(super) fn clean(unwanted: &Unwanted<'_>) -> Result<(), Error> {
    for (save, restore) in [("iptables-save", "iptables-restore"), ("ip6tables-save", "ip6tables-restore")] {
        let Ok(output) = command(save).stdin(Stdio::null()).stderr(Stdio::null()).output() else { continue };
        let changes = changes(&String::from_utf8_lossy(&output.stdout), unwanted);
        if changes.is_empty() {
            continue;
        }
        let failed = |source| Error::Run { program: "iptables-restore", source };
        let mut child = command(restore)
            .args(["--noflush", "--wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(changes.as_bytes()).map_err(failed)?;
        }
        let output = child.wait_with_output().map_err(failed)?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
            let what = "remove rules".into();
            return Err(Error::Failed { program: "iptables-restore", what, message });
        }
    }
    Ok(())
}

fn command(program: &str) -> Command {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    let mut command = Command::new(program);
    command.env("PATH", path);
    command
}

/// A table of iptables-save's output.
#[derive(Default)]
struct Table<'a> {
    name: &'a str,
    chains: Vec<&'a str>,
    rules: Vec<&'a str>,
}

/// What iptables-restore is told, from what iptables-save said; nothing if there is nothing to remove.
fn changes(saved: &str, unwanted: &Unwanted<'_>) -> String {
    let mut all = String::new();
    let mut table = Table::default();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = Table { name, ..Table::default() };
        } else if let Some(chain) = line.strip_prefix(':') {
            table.chains.extend(chain.split(' ').next());
        } else if line.starts_with("-A ") {
            table.rules.push(line);
        } else if line == "COMMIT" {
            table.add_changes(unwanted, &mut all);
        }
    }
    all
}

impl<'a> Table<'a> {
    fn add_changes(&mut self, unwanted: &Unwanted<'_>, all: &mut String) {
        let mut removed: Vec<&str> = vec![];
        self.rules.retain(|rule| {
            let unwanted = unwanted.has(rule);
            if unwanted {
                removed.push(rule);
            }
            !unwanted
        });
        let mut emptied: Vec<&str> = vec![];
        loop {
            let before = emptied.len();
            self.find_loose_chains(unwanted, &mut emptied, &mut removed);
            if emptied.len() == before {
                break;
            }
        }
        if removed.is_empty() && emptied.is_empty() {
            return;
        }
        all.push_str(&format!("*{}\n", self.name));
        for rule in removed {
            all.push_str(&format!("-D {}\n", rule.trim_start_matches("-A ")));
        }
        // A chain goes when no rule of another leads to it.
        for verb in ["-F", "-X"] {
            for chain in &emptied {
                all.push_str(&format!("{verb} {chain}\n"));
            }
        }
        all.push_str("COMMIT\n");
    }

    /// Chains of netavark that serve nobody: those of a network to which nothing leads any more, and the shared ones
    /// when no rule is left in them but its own plumbing.
    fn find_loose_chains(
        &mut self,
        unwanted: &Unwanted<'_>,
        emptied: &mut Vec<&'a str>,
        removed: &mut Vec<&'a str>,
    ) {
        for chain in &self.chains {
            if !chain.starts_with("NETAVARK") || emptied.contains(chain) {
                continue;
            }
            let shared = SHARED_CHAINS.contains(chain);
            let targets = |rule: &&&str| target(rule) == Some(chain);
            let is_needed = if shared {
                // Marks are set by networks' chains, and everything else holds rules of networks or containers.
                !unwanted.everything
                    || self.chains.iter().any(|other| {
                        !SHARED_CHAINS.contains(other)
                            && other.starts_with("NETAVARK")
                            && !emptied.contains(other)
                    })
                    || self.rules.iter().any(|rule| source(rule) == Some(chain) && !is_plumbing(rule))
            } else {
                self.rules.iter().any(|rule| targets(&rule))
            };
            if is_needed {
                continue;
            }
            emptied.push(chain);
            self.rules.retain(|rule| {
                let leads_there = target(rule) == Some(chain);
                if leads_there && source(rule).is_none_or(|source| !source.starts_with("NETAVARK")) {
                    removed.push(rule);
                }
                !leads_there && source(rule) != Some(chain)
            });
        }
    }
}

/// Chains that all networks share.
const SHARED_CHAINS: [&str; 6] = [
    "NETAVARK_FORWARD",
    "NETAVARK_ISOLATION_1",
    "NETAVARK_ISOLATION_2",
    "NETAVARK-HOSTPORT-DNAT",
    "NETAVARK-HOSTPORT-MASQ",
    "NETAVARK-HOSTPORT-SETMARK",
];

/// The chain that a rule is in.
fn source(rule: &str) -> Option<&str> {
    rule.split(' ').nth(1)
}

/// The chain to which a rule leads.
fn target(rule: &str) -> Option<&str> {
    let mut words = rule.split(' ').skip_while(|word| *word != "-j");
    words.nth(1)
}

/// Whether a rule sends packets to this address.
fn leads_to(words: &[&str], address: IpAddr) -> bool {
    let mut words = words.iter().skip_while(|word| **word != "--to-destination");
    words.nth(1).and_then(|to| to.parse::<SocketAddr>().ok()).is_some_and(|to| to.ip() == address)
}

/// Whether a rule is part of a shared chain whoever uses it.
fn is_plumbing(rule: &str) -> bool {
    matches!(target(rule), Some("MARK" | "MASQUERADE")) && rule.contains("0x2000")
}

impl Unwanted<'_> {
    fn has(&self, rule: &str) -> bool {
        let is_ours = source(rule).is_some_and(|chain| chain.starts_with("NETAVARK"))
            || target(rule).is_some_and(|chain| chain.starts_with("NETAVARK"));
        let words: Vec<&str> = rule.split(' ').collect();
        let pair = |flags: [&str; 2], value: &str| {
            words.windows(2).any(|pair| flags.contains(&pair[0]) && pair[1] == value)
        };
        is_ours
            && (self.ids.iter().any(|id| rule.contains(&format!(" id: {id}\"")))
                || self.addresses.iter().any(|address| leads_to(&words, *address))
                || self.bridges.iter().any(|bridge| pair(["-i", "-o"], bridge))
                || self.subnets.iter().any(|subnet| pair(["-s", "-d"], subnet)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = r#"# Generated
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:NETAVARK_FORWARD - [0:0]
:NETAVARK_ISOLATION_1 - [0:0]
:NETAVARK_ISOLATION_2 - [0:0]
-A FORWARD -j NETAVARK_ISOLATION_1
-A FORWARD -m comment --comment "netavark firewall plugin rules" -j NETAVARK_FORWARD
-A FORWARD -s 10.88.0.0/16 -j ACCEPT
-A NETAVARK_FORWARD -d 10.88.0.0/16 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A NETAVARK_FORWARD -s 10.88.0.0/16 -j ACCEPT
-A NETAVARK_ISOLATION_1 -i rvmm0 ! -o rvmm0 -j NETAVARK_ISOLATION_2
-A NETAVARK_ISOLATION_2 -o rvmm0 -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:NETAVARK-7D24D33E39064 - [0:0]
:NETAVARK-DN-7D24D33E39064 - [0:0]
:NETAVARK-HOSTPORT-DNAT - [0:0]
:NETAVARK-HOSTPORT-MASQ - [0:0]
:NETAVARK-HOSTPORT-SETMARK - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A POSTROUTING -j NETAVARK-HOSTPORT-MASQ
-A POSTROUTING -s 10.88.0.0/16 -j NETAVARK-7D24D33E39064
-A NETAVARK-7D24D33E39064 -d 10.88.0.0/16 -j ACCEPT
-A NETAVARK-7D24D33E39064 ! -d 224.0.0.0/4 -j MASQUERADE
-A NETAVARK-DN-7D24D33E39064 -s 10.88.0.0/16 -p tcp -m tcp --dport 8080 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-7D24D33E39064 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.88.0.2:80
-A NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 8080 -m comment --comment "dnat name: bridge id: abc" -j NETAVARK-DN-7D24D33E39064
-A NETAVARK-HOSTPORT-MASQ -m comment --comment "netavark portfw masq mark" -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A NETAVARK-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000
COMMIT
"#;

    #[test]
    fn everything_of_the_last_container_goes_and_rules_of_others_stay() {
        let unwanted = Unwanted {
            ids: vec!["abc"],
            subnets: vec!["10.88.0.0/16".into()],
            bridges: vec!["rvmm0"],
            everything: true,
            ..Unwanted::default()
        };
        let changes = changes(SAVED, &unwanted);
        for chain in
            ["7D24D33E39064", "DN-7D24D33E39064", "HOSTPORT-DNAT", "HOSTPORT-MASQ", "HOSTPORT-SETMARK"]
        {
            assert!(changes.contains(&format!("-X NETAVARK-{chain}\n")), "{chain}: {changes}");
        }
        for chain in ["FORWARD", "ISOLATION_1", "ISOLATION_2"] {
            assert!(changes.contains(&format!("-X NETAVARK_{chain}\n")), "{chain}: {changes}");
        }
        assert!(changes.contains("-D FORWARD -j NETAVARK_ISOLATION_1\n"));
        assert!(changes.contains("-D POSTROUTING -s 10.88.0.0/16 -j NETAVARK-7D24D33E39064\n"));
        assert!(!changes.contains("-j ACCEPT\n-D FORWARD -s") && !changes.contains("-D FORWARD -s 10.88"));
    }

    #[test]
    fn chains_that_others_use_stay() {
        // Somebody else's container is on another network.
        let unwanted = Unwanted { everything: true, ..Unwanted::default() };
        assert_eq!(changes(SAVED, &unwanted), "");
    }

    #[test]
    fn one_of_several_containers_takes_only_its_port_along() {
        let address = "10.88.0.2".parse().unwrap();
        let unwanted = Unwanted { ids: vec!["abc"], addresses: vec![address], ..Unwanted::default() };
        let changes = changes(SAVED, &unwanted);
        assert!(changes.contains("-D NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 8080"));
        assert!(changes.contains("-X NETAVARK-DN-7D24D33E39064\n"));
        assert!(changes.contains("--to-destination 10.88.0.2:80\n"));
        assert!(!changes.contains("-X NETAVARK-7D24D33E39064\n") && !changes.contains("filter"), "{changes}");
    }

    #[test]
    fn shared_chains_without_users_go() {
        let saved: String = SAVED
            .lines()
            .filter(|line| !line.contains("10.88") && !line.contains("rvmm0") && !line.contains("7D24"))
            .fold(String::new(), |text, line| text + line + "\n");
        let unwanted = Unwanted { everything: true, ..Unwanted::default() };
        let changes = changes(&saved, &unwanted);
        assert_eq!(changes.matches("-X ").count(), 6, "{changes}");
        assert_eq!(self::changes(&saved, &Unwanted::default()), "");
        assert_eq!(self::changes("", &unwanted), "");
        assert_eq!(self::changes("*nat\nCOMMIT\ngarbage\n-A\n:\n*", &unwanted), "");
    }
}
