//! The two clocks: UTC for people and superblocks, monotonic time for durations.

use std::time::{Duration, Instant};

/// UTC now, as nanoseconds since 1970 (0 for a clock set before that).
#[must_use]
pub fn utc_now_ns() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(0)
}

/// RFC 3339 text of a UTC time in nanoseconds since 1970, or None if out of range.
#[must_use]
pub fn utc_text(ns: u64) -> Option<String> {
    jiff::Timestamp::from_nanosecond(i128::from(ns)).ok().map(|t| t.to_string())
}

/// Serializes a duration as seconds with a fraction, for JSON: `#[serde(serialize_with = ...)]`.
///
/// # Errors
/// The serializer's.
pub fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

/// As [`seconds`], null if there is none.
///
/// # Errors
/// The serializer's.
#[allow(clippy::ref_option)] // what serde calls
pub fn seconds_if_known<S: serde::Serializer>(
    time: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => seconds(time, serializer),
        None => serializer.serialize_none(),
    }
}

/// Measures a duration from its creation.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }
    /// Time since the start.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        self.0.elapsed()
    }
}
