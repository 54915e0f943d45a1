//! The log: lines on standard error or in a file, for people or as JSON.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, stderr};
use std::path::Path;
use std::str::FromStr;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What went wrong.
    Error,
    /// Also what may go wrong.
    #[value(alias = "warning")]
    Warn,
    /// Also what rvmm decided by itself, and how the VM ended.
    Info,
    /// Also each step.
    Debug,
    /// Also what the guest does.
    Trace,
}

/// What a line of the log looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object with time, level, message and fields.
    Json,
}

/// Starts logging to standard error.
pub fn start(level: LogLevel) {
    start_as(level, LogFormat::Text, None);
}

/// Opens a file for the log, or a FIFO.
pub fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// Starts logging.
pub fn start_as(level: LogLevel, format: LogFormat, file: Option<File>) {
    let name = format!("{level:?}");
    let filter = LevelFilter::from_str(&name).unwrap_or(LevelFilter::WARN);
    let lines = tracing_subscriber::fmt().with_max_level(filter).with_target(false);
    match (format, file) {
        (LogFormat::Text, None) => {
            lines.with_writer(stderr).with_ansi(stderr().is_terminal()).without_time().init();
        }
        (LogFormat::Text, Some(file)) => {
            lines.with_writer(Mutex::new(file)).with_ansi(false).without_time().init();
        }
        (LogFormat::Json, None) => lines.with_writer(stderr).event_format(Json).init(),
        (LogFormat::Json, Some(file)) => lines.with_writer(Mutex::new(file)).event_format(Json).init(),
    }
}

/// One object for each line.
struct Json;

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>, N: for<'a> FormatFields<'a> + 'static> FormatEvent<S, N>
    for Json
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64);
        let mut fields = Fields(Map::new());
        fields.0.insert("time_ms".into(), now.into());
        fields.0.insert("level".into(), event.metadata().level().as_str().into());
        event.record(&mut fields);
        writeln!(writer, "{}", Value::Object(fields.0))
    }
}
