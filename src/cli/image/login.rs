//! `login`.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use super::{RegistryArguments, print};
use crate::image::reference::DEFAULT_REGISTRY;
use crate::image::registry;

/// A password is not longer.
const PASSWORD_MAX: u64 = 64 << 10;

/// Logs in to a registry, and keeps the credentials where Docker keeps them
#[derive(Args)]
pub struct LoginArguments {
    /// Host and port; Docker's registry if there is none
    #[arg(default_value = DEFAULT_REGISTRY)]
    server: String,
    /// The user's name
    #[arg(short, long)]
    username: Option<String>,
    /// The password; others on this host may see it, so --password-stdin is better
    #[arg(short, long, conflicts_with = "password_stdin")]
    password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    password_stdin: bool,
    #[command(flatten)]
    registry: RegistryArguments,
}

/// Logs in; what is not given is asked for on a terminal.
pub fn run(arguments: &LoginArguments) -> anyhow::Result<ExitCode> {
    let user = match &arguments.username {
        Some(user) => user.clone(),
        None if arguments.password_stdin => bail!("--password-stdin needs --username"),
        None => ask("Username: ", false)?,
    };
    let password = match &arguments.password {
        Some(password) => password.clone(),
        None if arguments.password_stdin => {
            let mut password = String::new();
            io::stdin()
                .take(PASSWORD_MAX)
                .read_to_string(&mut password)
                .context("cannot read the password")?;
            password.trim_end_matches(['\n', '\r']).to_owned()
        }
        None => ask("Password: ", true)?,
    };
    if user.is_empty() || password.is_empty() {
        bail!("a user and a password are needed");
    }
    let kept = registry::login(&arguments.server, &user, &password, &arguments.registry.options())?;
    print(&format!("Login Succeeded; the credentials are kept in {kept}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Asks on the terminal; what is secret is not shown while it is typed.
fn ask(question: &str, secret: bool) -> anyhow::Result<String> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        bail!("there is no terminal to ask on; use --username and --password-stdin");
    }
    write!(io::stderr(), "{question}")?;
    let before = tcgetattr(&stdin).context("cannot look at the terminal")?;
    if secret {
        let mut hidden = before.clone();
        hidden.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &hidden).context("cannot hide what is typed")?;
    }
    let mut answer = String::new();
    let read = stdin.lock().take(PASSWORD_MAX).read_line(&mut answer);
    if secret {
        let restored = tcsetattr(&stdin, SetArg::TCSAFLUSH, &before);
        writeln!(io::stderr())?;
        restored.context("cannot show again what is typed")?;
    }
    read.context("cannot read the answer")?;
    Ok(answer.trim_end_matches(['\n', '\r']).to_owned())
}
