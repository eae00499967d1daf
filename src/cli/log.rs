//! Logging to standard error: text, or JSON lines of type `log` with `--json`.

use std::fmt::{self, Write as _};
use std::io;

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::args::Global;
use super::output::{json_line, stderr_has_colour, write_stderr};
use crate::base::{Error, Result};

/// Overrides `-v` and `--quiet`: "debug", or "tidemark::dm=trace,info".
pub const ENV: &str = "TIDEMARK_LOG";

/// Starts logging according to the options and the environment; a second call has no effect.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for an invalid `TIDEMARK_LOG`.
pub fn init(global: Global) -> Result<()> {
    let level = match (global.quiet, global.verbose) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, 2) => "debug",
        (false, _) => "trace",
    };
    let directives = std::env::var(ENV).ok().filter(|text| !text.is_empty());
    let filter = EnvFilter::try_new(directives.as_deref().unwrap_or(level)).map_err(|source| {
        Error::usage(format!("{ENV} is not a log filter"))
            .with_source(source)
            .next("set it to error, warn, info, debug or trace")
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(StderrWriter);
    // Fails if a test in the same process has set it already, whose subscriber serves as well.
    let _ = if global.json {
        builder.event_format(Json).try_init()
    } else {
        builder.with_ansi(stderr_has_colour()).with_target(false).without_time().try_init()
    };
    Ok(())
}

/// Writes to standard error, above the progress bar.
struct StderrWriter;

impl io::Write for StderrWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_stderr(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for StderrWriter {
    type Writer = StderrWriter;

    fn make_writer(&'a self) -> Self::Writer {
        StderrWriter
    }
}

/// Formats each event as one JSON line.
struct Json;

#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let space = if self.0.is_empty() { "" } else { " " };
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{space}{value:?}"),
            name => write!(self.0, "{space}{name}={value:?}"),
        };
    }
}

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        #[derive(Serialize)]
        struct Body<'a> {
            level: &'a str,
            target: &'a str,
            message: &'a str,
        }
        let mut message = Message::default();
        event.record(&mut message);
        let metadata = event.metadata();
        let body = Body { level: metadata.level().as_str(), target: metadata.target(), message: &message.0 };
        writer.write_str(&json_line("log", body))
    }
}
