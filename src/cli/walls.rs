//! The walls around a VM, from flags.

use std::path::Path;

use anyhow::Context;

use crate::sandbox::jail::Jail;
use crate::sandbox::{self, keeper};
use crate::vm::config::VmConfig;
use crate::vm::{Timeline, Vm};

/// What flags say of them.
pub struct Walls<'a> {
    /// There are none.
    pub no_sandbox: bool,
    /// A jail around it all.
    pub jail: Option<&'a Jail>,
    /// The control socket.
    pub api_socket: Option<&'a Path>,
    /// The page for Prometheus.
    pub metrics: Option<&'a Path>,
}

impl Walls<'_> {
    /// Starts the keeper, if there is something to keep: images that a client may change, sockets that are to go away, or
    /// a jail's processes.
    pub fn start_keeper(&self, has_vsock: bool) -> anyhow::Result<Option<keeper::Side>> {
        let sockets = self.api_socket.is_some() || self.metrics.is_some() || has_vsock;
        if self.no_sandbox || !(sockets || self.jail.is_some()) {
            return Ok(None);
        }
        Ok(Some(keeper::start(self.jail, self.api_socket)?))
    }

    /// Closes the doors behind a VM that is built.
    pub fn put_up(
        &self,
        config: &VmConfig,
        keeper: Option<keeper::Keeper>,
        vm: &mut Vm,
        timeline: &mut Timeline,
    ) -> anyhow::Result<()> {
        if self.no_sandbox {
            return Ok(());
        }
        let vsock = config.vsock.as_ref().map(|vsock| vsock.socket.as_path());
        if let Some(keeper) = keeper {
            for path in self.api_socket.into_iter().chain(vsock) {
                if let Err(error) = keeper.remember(path) {
                    tracing::warn!(%error, "the socket {path:?} will not be removed");
                }
            }
            if let Some(page) = self.metrics {
                keeper.write_pages_to(page).with_context(|| format!("cannot write metrics to {page:?}"))?;
            }
            keeper.seal(self.api_socket.is_some())?;
            vm.set_keeper(keeper);
        }
        let parent =
            |path: &'_ Path| path.parent().filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned);
        let beside = vsock.map(|path| parent(path).unwrap_or_else(|| Path::new(".").to_owned()));
        sandbox::turn_on(self.jail.map(|jail| (jail, beside.as_deref())))?;
        timeline.mark("sandbox closed");
        Ok(())
    }
}
