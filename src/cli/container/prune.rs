//! `rvmm container`: the verbs by their long names, and `prune`.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::bail;

use super::format::decimal_size;
use crate::container::records::Records;
use crate::container::{life, volume};

/// Remove all containers that do not run
#[derive(clap::Args)]
#[command(after_help = "Example:\n  rvmm container prune --force --filter label=stage=test")]
pub struct PruneArguments {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Only those with label=NAME[=VALUE], or without one: label!=NAME[=VALUE]
    #[arg(long, value_name = "FILTER")]
    filter: Vec<String>,
}

/// Asks on a terminal, then removes.
pub fn run(arguments: &PruneArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let filters = arguments.filter.iter().map(|text| parse(text)).collect::<anyhow::Result<Vec<_>>>()?;
    if !arguments.force {
        if !io::stdin().is_terminal() {
            bail!("this removes all containers that do not run; there is no terminal to ask on: use --force");
        }
        write!(io::stderr(), "This removes all containers that do not run. Go on? [y/N] ")?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !answer.trim().eq_ignore_ascii_case("y") {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let (mut removed, mut bytes, mut code) = (vec![], 0u64, ExitCode::SUCCESS);
    for record in records.all()? {
        let config = &record.config;
        if record.state.status.is_live() || !filters.iter().all(|filter| filter.matches(&config.labels)) {
            continue;
        }
        let size = volume::size(&records.roots().container(&config.id));
        match life::remove(records, &config.id, false) {
            Ok(_) => {
                bytes = bytes.saturating_add(size);
                removed.push(config.id.clone());
            }
            // Started or removed by somebody else meanwhile.
            Err(life::Error::Running(_) | life::Error::Records(_)) => {}
            Err(error) => {
                crate::cli::report(&error.into(), false);
                code = ExitCode::FAILURE;
            }
        }
    }
    if !removed.is_empty() {
        println!("Deleted Containers:\n{}\n", removed.join("\n"));
    }
    println!("Total reclaimed space: {}", decimal_size(bytes));
    Ok(code)
}

/// A filter by label.
struct Filter<'a> {
    name: &'a str,
    value: Option<&'a str>,
    wanted: bool,
}

fn parse(text: &str) -> anyhow::Result<Filter<'_>> {
    let (wanted, label) = match (text.strip_prefix("label="), text.strip_prefix("label!=")) {
        (Some(label), _) => (true, label),
        (_, Some(label)) => (false, label),
        _ => bail!("there is no filter {text:?}: it is label=NAME[=VALUE] or label!=NAME[=VALUE]"),
    };
    let (name, value) = label.split_once('=').map_or((label, None), |(name, value)| (name, Some(value)));
    Ok(Filter { name, value, wanted })
}

impl Filter<'_> {
    fn matches(&self, labels: &std::collections::BTreeMap<String, String>) -> bool {
        let has = labels.get(self.name).is_some_and(|found| self.value.is_none_or(|value| value == found));
        has == self.wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_match_labels_and_their_absence() {
        let labels = [("stage".to_owned(), "test".to_owned())].into();
        for (text, matches) in [
            ("label=stage", true),
            ("label=stage=test", true),
            ("label=stage=live", false),
            ("label!=stage", false),
            ("label!=stage=live", true),
            ("label!=other", true),
        ] {
            assert_eq!(parse(text).unwrap().matches(&labels), matches, "{text}");
        }
        assert!(parse("name=x").is_err());
    }
}
