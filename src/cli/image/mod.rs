//! Verbs about images: as Docker's, with its output.

mod images;
mod inspect;
mod load;
mod login;
mod logout;
mod prune;
mod pull;
mod push;
mod rmi;
mod save;
mod table;
mod tag;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::container::native::has_one_user;
use crate::image::Store;
use crate::image::registry::Options;

pub use inspect::describe;

/// Where images come from, go to, and what they are.
#[derive(Subcommand)]
#[allow(missing_docs)] // What clap shows stands at each verb's arguments.
pub enum ImageCommand {
    Pull(pull::PullArguments),
    Push(push::PushArguments),
    Login(login::LoginArguments),
    Logout(logout::LogoutArguments),
    Images(images::ImagesArguments),
    Rmi(rmi::RmiArguments),
    Load(load::LoadArguments),
    Save(save::SaveArguments),
    Tag(tag::TagArguments),
    /// Manages images
    #[command(subcommand)]
    Image(ManageCommand),
}

/// `image VERB`.
#[derive(Subcommand)]
#[allow(missing_docs)] // As above.
pub enum ManageCommand {
    #[command(alias = "list")]
    Ls(images::ImagesArguments),
    #[command(alias = "remove")]
    Rm(rmi::RmiArguments),
    Prune(prune::PruneArguments),
    Inspect(inspect::InspectArguments),
    Pull(pull::PullArguments),
    Push(push::PushArguments),
    Load(load::LoadArguments),
    Save(save::SaveArguments),
    Tag(tag::TagArguments),
}

/// How registries are talked to.
#[derive(Args)]
pub struct RegistryArguments {
    /// Require right certificates; with false, plain HTTP is tried too
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    tls_verify: bool,
}

impl RegistryArguments {
    /// As the library wants it.
    pub fn options(&self) -> Options {
        Options { tls_verify: self.tls_verify, ..Options::default() }
    }
}

/// Does what a verb says, with the image store at `place`.
pub fn run(command: ImageCommand, place: &Path) -> anyhow::Result<ExitCode> {
    use ImageCommand::{Image, Load, Pull};
    if matches!(command, Pull(_) | Load(_) | Image(ManageCommand::Pull(_) | ManageCommand::Load(_))) {
        warn_of_one_user();
    }
    let store = &Store::open(place)?;
    match command {
        ImageCommand::Pull(arguments) | ImageCommand::Image(ManageCommand::Pull(arguments)) => {
            pull::run(&arguments, store)
        }
        ImageCommand::Push(arguments) | ImageCommand::Image(ManageCommand::Push(arguments)) => {
            push::run(&arguments, store)
        }
        ImageCommand::Images(arguments) | ImageCommand::Image(ManageCommand::Ls(arguments)) => {
            images::run(&arguments, store)
        }
        ImageCommand::Rmi(arguments) | ImageCommand::Image(ManageCommand::Rm(arguments)) => {
            rmi::run(&arguments, store)
        }
        ImageCommand::Load(arguments) | ImageCommand::Image(ManageCommand::Load(arguments)) => {
            load::run(&arguments, store)
        }
        ImageCommand::Save(arguments) | ImageCommand::Image(ManageCommand::Save(arguments)) => {
            save::run(&arguments, store)
        }
        ImageCommand::Tag(arguments) | ImageCommand::Image(ManageCommand::Tag(arguments)) => {
            tag::run(&arguments, store)
        }
        ImageCommand::Image(ManageCommand::Prune(arguments)) => prune::run(&arguments, store),
        ImageCommand::Image(ManageCommand::Inspect(arguments)) => inspect::run(&arguments, store),
        ImageCommand::Login(arguments) => login::run(&arguments),
        ImageCommand::Logout(arguments) => logout::run(&arguments),
    }
}

/// Says what is missing to a user whom the host has given no others, before an image is unpacked.
fn warn_of_one_user() {
    if has_one_user() {
        tracing::warn!(
            "/etc/subuid and /etc/subgid set no users aside for you: all files of images will be root's in a container, and it \
             has no other user (an administrator can run `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER`)"
        );
    }
}

/// Prints a line; a reader that is gone is told by the exit code.
fn print(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}
