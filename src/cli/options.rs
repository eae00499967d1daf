//! Options that several commands have.

use std::time::Duration;

use clap::{Args, ValueHint};

use crate::base::{Error, Result};
use crate::copy::sample::Sample;
use crate::op::request::Hooks;

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

/// The hooks of commands that take an instant.
#[derive(Clone, Debug, Args)]
pub struct HookOptions {
    /// Command to run before anything is frozen; if it fails, there is no instant
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString, help_heading = "Hooks")]
    pub hook_before: Option<String>,
    /// Command to run at the instant; a copy's can read the device TIDEMARK_ORIGIN_BELOW
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString, help_heading = "Hooks")]
    pub hook_frozen: Option<String>,
    /// Command to run after the thaw, and also if --hook-before or the instant failed; if it fails, that is reported
    /// and the command continues
    #[arg(long, value_name = "CMD", value_hint = ValueHint::CommandString, help_heading = "Hooks")]
    pub hook_after: Option<String>,
    /// Longest time for --hook-before and for --hook-after; then the hook is killed. (--hook-frozen has the freeze
    /// budget) [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = parse_time, help_heading = "Hooks")]
    pub hook_timeout: Option<Duration>,
}

impl HookOptions {
    /// These, and those of `group` that are not given here.
    #[must_use]
    pub fn or(&self, group: &Hooks) -> Hooks {
        let or = |own: &Option<String>, other: &Option<String>| own.clone().or_else(|| other.clone());
        Hooks {
            before: or(&self.hook_before, &group.before),
            frozen: or(&self.hook_frozen, &group.frozen),
            after: or(&self.hook_after, &group.after),
            timeout: self.hook_timeout.unwrap_or(group.timeout),
        }
    }
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
