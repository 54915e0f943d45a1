//! `rvmm run` and `rvmm create`.

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::configure::{ImageFacts, configure};
use super::options::{ContainerOptions, Pull};
use super::session::{self, Options, Outcome};
use crate::cli::engine_program;
use crate::container::client::Connection;
use crate::container::config::ContainerConfig;
use crate::container::life;
use crate::container::records::Records;
use crate::container::roots;
use crate::image;
use crate::image::store::{Image, Store};

const EXAMPLES: &str = "\
Examples:
  rvmm run --rm -it debian bash
      a shell in a container
  rvmm run --rm -it --isolation microvm debian bash
      the same in a virtual machine of its own
  rvmm run -d --name web -p 8080:80 -v data:/srv nginx
      a service in the background
  rvmm run --rm --memory 256M --cpus 0.5 --network none busybox sh -c 'free; nproc'
      with limits, and without a network

Exit codes: that of the container's process, or
  125  rvmm failed        126  the program cannot be run        127  there is no such program
  128+N  ended by signal N";

/// Run a command in a new container
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES, disable_help_flag = true)]
pub struct RunArguments {
    /// Run in the background, and print the container's id
    #[arg(short, long)]
    detach: bool,
    /// Keep signals from the container's process
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    sig_proxy: bool,
    /// Keys that leave a terminal's session, while the container goes on
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    detach_keys: String,
    #[command(flatten)]
    container: ContainerOptions,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
}

/// Make a container without starting it
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct CreateArguments {
    #[command(flatten)]
    container: ContainerOptions,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
}

/// Makes and starts a container.
pub fn run(arguments: &RunArguments, records: &Records) -> anyhow::Result<ExitCode> {
    let options = &arguments.container;
    let keys = session::detach_keys(&arguments.detach_keys).map_err(anyhow::Error::msg)?;
    if !arguments.detach {
        session::check_terminal(options.tty, options.interactive)?;
    }
    let config = make(options, records)?;
    let attach = (!arguments.detach).then_some(options.interactive);
    let window = session::window_size().filter(|_| options.tty);
    let mut starting = life::start(records, &config.id, attach, window)?;
    let started = start(&mut starting, &config.id, arguments.detach, |connection| {
        let session = Options {
            stdin: options.interactive,
            terminal: options.tty,
            pass_signals: arguments.sig_proxy,
            detach_keys: keys,
        };
        session::follow(connection, &session)
    });
    super::start::finish(started?)
}

fn start(
    starting: &mut life::Starting,
    id: &str,
    detach: bool,
    follow: impl FnOnce(&mut Connection) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Outcome> {
    if !detach {
        return follow(&mut starting.connection);
    }
    Ok(match starting.wait()? {
        Ok(()) => {
            println!("{id}");
            Outcome::Detached
        }
        Err((code, message)) => Outcome::Failed { code, message },
    })
}

/// Makes a container.
pub fn create(arguments: &CreateArguments, records: &Records) -> anyhow::Result<ExitCode> {
    println!("{}", make(&arguments.container, records)?.id);
    Ok(ExitCode::SUCCESS)
}

fn make(options: &ContainerOptions, records: &Records) -> anyhow::Result<ContainerConfig> {
    let store = Store::open(&records.roots().images())?;
    let image = find_image(&store, options, records)?;
    let facts = ImageFacts {
        name: options.image(),
        id: &image.id.to_string(),
        config: image.config.config().as_ref(),
        health: image.health.as_ref().map(super::configure::health_of_image),
    };
    let config = configure(options, &facts, records)?;
    if config.isolation == crate::container::config::Isolation::Microvm
        && config.network.mode == crate::container::config::NetworkMode::Host
    {
        bail!(
            "--network host is not for microVMs: a guest has network devices of its own, so it cannot be in the host's \
             network; publish ports with -p instead"
        );
    }
    let mut cidfile = match &options.cidfile {
        Some(path) => Some(
            std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(path)
                .with_context(|| format!("cannot make the file {path:?} for the container's id"))?,
        ),
        None => None,
    };
    // The record first: an image that is held for a container without one is let go by the next command.
    records.create(&config)?;
    if let Err(error) = store.hold(&image.id, &config.id) {
        let _ = records.remove(&config.id);
        return Err(error.into());
    }
    if let Some(file) = &mut cidfile {
        file.write_all(config.id.as_bytes()).context("cannot write the container's id")?;
    }
    Ok(config)
}

/// The image, fetched if need be by a process of its own: fetching takes threads, and what follows must have one.
fn find_image(store: &Store, options: &ContainerOptions, records: &Records) -> anyhow::Result<Image> {
    let found = match options.pull {
        Pull::Always => None,
        Pull::Missing | Pull::Never => find(store, options.image())?,
    };
    match found {
        Some(image) => Ok(image),
        None if options.pull == Pull::Never => {
            bail!(
                "there is no image {:?} here, and --pull never keeps it from being fetched",
                options.image()
            )
        }
        None => {
            let roots = records.roots();
            let status = std::process::Command::new(engine_program::path()?)
                .env(roots::DATA_VARIABLE, &roots.data)
                .env(roots::RUN_VARIABLE, &roots.run)
                .args(["pull", "--", options.image()])
                .stdout(std::process::Stdio::null())
                .status()
                .context("cannot start the engine to fetch the image")?;
            if !status.success() {
                bail!("cannot fetch the image {:?}", options.image());
            }
            find(store, options.image())?.with_context(|| format!("there is no image {:?}", options.image()))
        }
    }
}

/// The image of that name, if it is here.
pub fn find(store: &Store, name: &str) -> anyhow::Result<Option<Image>> {
    match store.resolve(name) {
        Ok(image) => Ok(Some(image)),
        Err(image::Error::NotFound(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
