//! What a VM's commands write to and tell from the start, as flags and clients want it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::logging::{self, LogFormat, LogLevel};
use crate::api::Setup;
use crate::metrics;
use crate::mmds::{SIZE_LIMIT, Store};

/// The log and lines of metrics.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// How much is logged.
    pub level: LogLevel,
    /// What it looks like.
    pub format: LogFormat,
    /// Where it goes instead of standard error.
    pub log: Option<&'a Path>,
    /// Where lines of metrics go.
    pub metrics: Option<&'a Path>,
}

impl Outputs<'_> {
    /// Starts the log; what clients have said of it comes first.
    pub fn start_log(&self, setup: &Setup) -> anyhow::Result<()> {
        let logger = setup.logger.as_ref();
        let level = logger.and_then(|logger| logger.level.as_deref());
        let level = level.and_then(|level| LogLevel::from_str(level, true).ok()).unwrap_or(self.level);
        let path = logger.and_then(|logger| logger.log_path.as_deref()).or(self.log);
        let file =
            path.map(|path| logging::open(path).with_context(|| format!("cannot open the log {path:?}")));
        logging::start_as(level, self.format, file.transpose()?);
        Ok(())
    }

    /// Opens the file for lines of JSON, if there is to be one.
    pub fn open_metrics(&self, setup: &Setup) -> anyhow::Result<()> {
        let path = setup.metrics.as_ref().map(|metrics| metrics.metrics_path.as_path()).or(self.metrics);
        if let Some(path) = path {
            let file =
                logging::open(path).with_context(|| format!("cannot open the file for metrics {path:?}"))?;
            metrics::set_output(file);
        }
        Ok(())
    }
}

/// What the metadata service tells to begin with.
#[derive(Args, Debug)]
pub struct MetadataArguments {
    /// Metadata to begin with: a file of JSON
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// How many bytes of metadata there may be
    #[arg(long, value_name = "BYTES", default_value_t = SIZE_LIMIT)]
    mmds_size_limit: usize,
}

impl MetadataArguments {
    /// Reads them.
    pub fn read(&self) -> anyhow::Result<Store> {
        let store = Store::new(self.mmds_size_limit);
        if let Some(path) = &self.metadata {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the metadata {path:?}"))?;
            let value =
                serde_json::from_str(&text).with_context(|| format!("the metadata {path:?} are no JSON"))?;
            store.put(value).with_context(|| format!("cannot take the metadata {path:?}"))?;
        }
        Ok(store)
    }
}
