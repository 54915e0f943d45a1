//! The walls around a VM, from flags.

use std::path::Path;

use anyhow::Context;

use super::boot::BootArguments;
use crate::sandbox::{self, keeper};
use crate::vm::Vm;
use crate::vm::config::VmConfig;

/// Starts the keeper, if there is something to keep: images that a client may change, sockets that are to go away, or a
/// jail's processes.
pub fn start_keeper(arguments: &BootArguments, config: &VmConfig) -> anyhow::Result<Option<keeper::Side>> {
    let sockets = arguments.api_socket.is_some() || arguments.metrics.is_some() || config.vsock.is_some();
    if arguments.no_sandbox || !(sockets || arguments.jail.is_some()) {
        return Ok(None);
    }
    Ok(Some(keeper::start(arguments.jail.as_ref())?))
}

/// Closes the doors behind a VM that is built.
pub fn put_up(
    arguments: &BootArguments,
    config: &VmConfig,
    keeper: Option<keeper::Keeper>,
    vm: &mut Vm,
) -> anyhow::Result<()> {
    let vsock = config.vsock.as_ref().map(|vsock| vsock.socket.as_path());
    if let Some(keeper) = keeper {
        for path in arguments.api_socket.as_deref().into_iter().chain(vsock) {
            if let Err(error) = keeper.remember(path) {
                tracing::warn!(%error, "the socket {path:?} will not be removed");
            }
        }
        if let Some(page) = &arguments.metrics {
            keeper.write_pages_to(page).with_context(|| format!("cannot write metrics to {page:?}"))?;
        }
        keeper.seal()?;
        vm.set_keeper(keeper);
    }
    let parent =
        |path: &'_ Path| path.parent().filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned);
    let beside = vsock.map(|path| parent(path).unwrap_or_else(|| Path::new(".").to_owned()));
    sandbox::turn_on(arguments.jail.as_ref().map(|jail| (jail, beside.as_deref())))?;
    Ok(())
}
