//! Log lines on standard output: JSON, or text on a terminal.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Starts logging. `filter` is in the syntax of `RUST_LOG` (`info`, `strowger=debug`); lines before
/// this call are lost, a second call does nothing.
pub fn init_logging(format: Format, filter: &str) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let json = match format {
        Format::Auto => !std::io::stdout().is_terminal(),
        Format::Json => true,
        Format::Text => false,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    let _already = if json {
        builder.json().flatten_event(true).with_current_span(false).try_init()
    } else {
        builder.compact().try_init()
    };
}
