//! `rvmm commit`.

use std::process::ExitCode;

use anyhow::{Context, bail};

use crate::container::changes::Changes;
use crate::container::config::ContainerConfig;
use crate::container::records::Records;
use crate::container::state::Status;
use crate::container::supervisor::protocol::Request;
use crate::container::{life, native, prepare};
use crate::image::{Change, Commit, Image, Reference, commit};

/// Make an image of a container's changes
#[derive(clap::Args)]
#[command(after_help = "What is in volumes does not belong to the image.

Examples:
  rvmm commit web my/web:2
  rvmm commit --change 'CMD [\"nginx\", \"-g\", \"daemon off;\"]' --message 'with a page' web my/web")]
pub struct CommitArguments {
    /// Who made it
    #[arg(short, long)]
    author: Option<String>,
    /// Why
    #[arg(short, long)]
    message: Option<String>,
    /// Change the image's configuration by a Dockerfile's CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or
    /// WORKDIR
    #[arg(short, long, value_name = "INSTRUCTION", value_parser = change)]
    change: Vec<Change>,
    /// Stop the container's processes meanwhile [default: true, where that can be done]
    #[arg(short, long, value_name = "BOOL", action = clap::ArgAction::Set)]
    pause: Option<bool>,
    /// The container
    container: String,
    /// The image's name
    name: Option<String>,
}

fn change(text: &str) -> Result<Change, String> {
    text.parse().map_err(|wanted: String| format!("it must be {wanted}"))
}

/// Makes the image, and prints its id.
pub fn run(arguments: &CommitArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let id = records.find(&arguments.container)?;
    let record = records.read(&id)?;
    let config = &record.config;
    let names = match &arguments.name {
        Some(name) => {
            let name = Reference::parse(name).with_context(|| format!("{name:?} is no image's name"))?;
            if name.digest().is_some() {
                bail!("an image cannot be given a digest: it has one");
            }
            vec![name.or_latest()]
        }
        None => vec![],
    };
    let (store, image, _) = prepare::image_of(records, config)?;
    let what = Commit {
        author: arguments.author.clone(),
        message: arguments.message.clone(),
        created_by: Some(config.process.args.join(" ")),
        created: None,
        changes: changes(config, &image).into_iter().chain(arguments.change.iter().cloned()).collect(),
    };
    let mut pauses = arguments.pause.unwrap_or(true) && record.state.status == Status::Running;
    if pauses && let Err(error) = life::call(records, &id, &Request::Pause) {
        if arguments.pause.is_some() || !native::is_user_namespace() {
            return Err(error.into());
        }
        // A user without control groups.
        tracing::warn!("the container goes on meanwhile: {}", crate::error_chain(&error));
        pauses = false;
    }
    let made = Changes::of(records, &record)
        .map_err(anyhow::Error::from)
        .and_then(|changes| Ok(commit(&store, &image, changes.path(), &what, &names)?));
    if pauses {
        match life::call(records, &id, &Request::Resume) {
            // It was killed meanwhile.
            Err(error) if !records.is_supervised(&id) => tracing::debug!("{}", crate::error_chain(&error)),
            result => result?,
        }
    }
    println!("{}", made?.id);
    Ok(ExitCode::SUCCESS)
}

/// What the container's user has said otherwise than the image.
fn changes(config: &ContainerConfig, image: &Image) -> Vec<Change> {
    let empty = Default::default();
    let of_image = image.config.config().as_ref().unwrap_or(&empty);
    let process = &config.process;
    let entrypoint = of_image.entrypoint().clone().unwrap_or_default();
    let mut changes = match process.args.strip_prefix(entrypoint.as_slice()) {
        Some(command) => vec![Change::Cmd(command.to_vec())],
        None => vec![Change::Entrypoint(process.args.clone()), Change::Cmd(vec![])],
    };
    let variables = process.env.iter().filter_map(|line| line.split_once('='));
    changes.extend(variables.map(|(name, value)| Change::Env(name.into(), value.into())));
    let labels = config.labels.iter();
    changes.extend(labels.map(|(name, value)| Change::Label(name.clone(), value.clone())));
    if !process.user.is_empty() {
        changes.push(Change::User(process.user.clone()));
    }
    if !process.cwd.is_empty() {
        changes.push(Change::WorkingDir(process.cwd.clone()));
    }
    let ports = config.network.ports.iter();
    changes.extend(ports.map(|port| Change::Expose(format!("{}/{}", port.container, port.protocol))));
    changes.push(Change::StopSignal(config.stop_signal.clone()));
    changes
}
