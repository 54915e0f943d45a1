//! Images of a Docker or Podman on this host, through their own programs.

use std::io::Read;
use std::process::{Command, Stdio};

use crate::image::error::Error;
use crate::image::reference::Reference;
use crate::image::store::{Image, Store};

/// Bytes of what a program says that are kept.
const OUTPUT_MAX: u64 = 4096;

/// Another program that keeps images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// Docker's daemon.
    Docker,
    /// Podman's storage.
    Podman,
}

impl Daemon {
    /// `docker-daemon:NAME`, `podman:NAME` and `containers-storage:NAME`, as other tools write it.
    pub fn split(text: &str) -> Option<(Self, &str)> {
        let (transport, name) = text.split_once(':')?;
        match transport {
            "docker-daemon" => Some((Self::Docker, name)),
            "podman" | "containers-storage" => Some((Self::Podman, name)),
            _ => None,
        }
    }

    fn command(self, name: &str) -> Command {
        let program = match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
        };
        let mut command = Command::new(program);
        command.arg("save");
        if self == Self::Podman {
            command.args(["--quiet", "--format", "docker-archive"]);
        }
        command.args(["--", name]);
        command
    }
}

/// Takes an image over.
pub fn import(store: &Store, daemon: Daemon, name: &str) -> Result<Image, Error> {
    let is_id = name.len() >= 2 && name.len() <= 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    if !is_id {
        Reference::parse(name)?;
    }
    let mut command = daemon.command(name);
    let program = command.get_program().to_string_lossy().into_owned();
    let no_program = |source| Error::NoProgram { program: program.clone(), source };
    let pipes = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().map_err(no_program)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // What it says is read beside what it saves, or it might wait for us and we for it.
    let said = std::thread::spawn(move || {
        let mut said = vec![];
        if let Some(mut stderr) = stderr {
            let _ = (&mut stderr).take(OUTPUT_MAX).read_to_end(&mut said);
            let _ = std::io::copy(&mut stderr, &mut std::io::sink());
        }
        String::from_utf8_lossy(&said).trim().replace('\n', "; ")
    });
    let loaded = match stdout {
        Some(mut stdout) => {
            let loaded = super::load(store, &mut stdout, &format!("of {program} save"));
            // It may still have something to write, and would fail for our going away.
            if loaded.is_ok() {
                let _ = std::io::copy(&mut stdout, &mut std::io::sink());
            }
            loaded
        }
        None => Ok(vec![]),
    };
    let status = child.wait().map_err(no_program)?;
    let said = said.join().unwrap_or_default();
    // Its own failure says more than what its broken archive leads to; unless it only lost its reader.
    if !status.success() && (loaded.is_ok() || !said.is_empty()) {
        let output = if said.is_empty() { status.to_string() } else { said };
        return Err(Error::Program { program: format!("{program} save"), output });
    }
    let mut images = loaded?;
    images.pop().ok_or_else(|| Error::NotFound(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::Daemon;

    #[test]
    fn transports_are_told_from_names() {
        assert_eq!(Daemon::split("docker-daemon:a:1"), Some((Daemon::Docker, "a:1")));
        assert_eq!(Daemon::split("podman:a"), Some((Daemon::Podman, "a")));
        assert_eq!(Daemon::split("containers-storage:a"), Some((Daemon::Podman, "a")));
        assert_eq!(Daemon::split("localhost:5000/a"), None);
        assert_eq!(Daemon::split("a"), None);
    }
}
