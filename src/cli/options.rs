//! Options that several commands have.

use std::time::Duration;

use clap::Args;

use crate::base::{Error, Result};
use crate::copy::sample::Sample;

/// Options of commands that destroy something.
#[derive(Clone, Copy, Debug, Args)]
pub struct Consent {
    /// Make all checks, show the plan and what it would overwrite, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Replace a file or overwrite a device without asking
    #[arg(long, short)]
    pub yes: bool,
}

/// Parses a share of a secondary: a fraction above 0 and up to 1, or "all".
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for anything else.
pub fn parse_sample(text: &str) -> Result<Sample> {
    Sample::parse(text).ok_or_else(|| {
        Error::usage(format!("'{text}' is not a share: write a fraction such as 0.05, or all"))
    })
}

/// Parses "2s", "500ms", "1.5s", "1m"; a unit is required, and zero is refused.
///
/// # Errors
/// [`ErrorKind::Usage`](crate::base::ErrorKind::Usage) for anything else, and for more than a day.
pub fn parse_time(text: &str) -> Result<Duration> {
    const TIME_MAX: Duration = Duration::from_secs(24 * 60 * 60);
    let bad = || Error::usage(format!("'{text}' is not a time: write it as 500ms, 2s or 1m"));
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(bad)?;
    let (number, unit) = trimmed.split_at(split);
    if !number.starts_with(|c: char| c.is_ascii_digit()) || number.ends_with('.') {
        return Err(bad());
    }
    let unit_seconds = match unit.trim() {
        "ms" => 0.001,
        "s" => 1.0,
        "m" | "min" => 60.0,
        _ => return Err(bad()),
    };
    let number: f64 = number.parse().map_err(|_| bad())?;
    let time = Duration::try_from_secs_f64(number * unit_seconds).map_err(|_| bad())?;
    if time < Duration::from_millis(1) || time > TIME_MAX {
        return Err(Error::usage(format!("'{text}' is not between 1ms and one day")));
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_parse() {
        for (text, ms) in [("2s", 2000), ("500ms", 500), ("1.5s", 1500), (" 1m ", 60_000), ("1 min", 60_000)]
        {
            assert_eq!(parse_time(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in
            ["", "2", "s", "-1s", ".5s", "1.s", "1..2s", "0s", "0.1ms", "25h", "1441m", "1e3s", "2sec"]
        {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }
}
