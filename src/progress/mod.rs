//! What a running copy tells its observer. Plain values: `cli` draws them, scripts get them as JSON.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::{Bytes, clock};

/// A phase of a copy, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Store, devices and watchdog are being set up.
    Prepare,
    /// Freeze, suspend, switch, resume, thaw.
    Instant,
    /// The fuzzy copy: reading the origin below the snapshot.
    Data,
    /// Originals are laid over it or appended.
    Originals,
    /// Re-reading the secondary.
    Verify,
    /// Syncing, renaming, putting the origin's table back.
    Finish,
}

/// The COW store's state at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoreFill {
    /// Bytes allocated in the store, metadata included.
    pub used_bytes: Bytes,
    /// Bytes the store has now.
    pub total_bytes: Bytes,
    /// Of those, the RAM head.
    pub ram_bytes: Bytes,
    /// Bytes allocated in the RAM head.
    pub ram_used_bytes: Bytes,
    /// Bytes allocated in the tail, on disk.
    pub disk_used_bytes: Bytes,
    /// Exceptions, as far as known.
    pub exceptions: u64,
    /// Measured fill rate, bytes per second.
    pub fill_bytes_per_second: u64,
    /// Exceptions per second, measured likewise.
    pub exceptions_per_second: u64,
}

/// How many segments of a copy are on the secondary (or on their way).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SegmentCount {
    /// Those.
    #[serde(rename = "segments_done")]
    pub done: u64,
    /// All that are copied.
    #[serde(rename = "segments_total")]
    pub total: u64,
}

/// One progress message.
#[allow(missing_docs)] // the variants say what their fields are
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins; `total` bytes of work where known.
    Phase { phase: Phase, total: Option<Bytes> },
    /// Bytes of the current phase done so far.
    Progress {
        phase: Phase,
        done: Bytes,
        total: Option<Bytes>,
        /// Of the data phase.
        #[serde(flatten)]
        segments: Option<SegmentCount>,
    },
    /// The store's state.
    Store(StoreFill),
    /// How long filesystems were frozen and the origin was suspended at the instant.
    Instant {
        utc_ns: u64,
        #[serde(rename = "frozen_seconds", serialize_with = "clock::seconds")]
        frozen: Duration,
        #[serde(rename = "suspended_seconds", serialize_with = "clock::seconds")]
        suspended: Duration,
    },
    /// A region was released: `released` of `total` so far, `released_bytes` in all; this release held the
    /// origin for `stall`, none for longer than `longest_stall`.
    Regions {
        released: u64,
        total: u64,
        released_bytes: Bytes,
        #[serde(rename = "stall_seconds", serialize_with = "clock::seconds")]
        stall: Duration,
        #[serde(rename = "longest_stall_seconds", serialize_with = "clock::seconds")]
        longest_stall: Duration,
    },
    /// Mean latency of the applications' reads and writes of the origin now, what it is compared with
    /// (how it is without the copier), and the rate in bytes per second that the copier may have therefore;
    /// None: unknown, and no limit.
    Latency {
        #[serde(rename = "origin_seconds", serialize_with = "clock::seconds_if_known")]
        origin: Option<Duration>,
        #[serde(rename = "baseline_seconds", serialize_with = "clock::seconds_if_known")]
        baseline: Option<Duration>,
        #[serde(rename = "allowed_bytes_per_second")]
        rate: Option<Bytes>,
    },
    /// Something a person should read once.
    Note { text: String },
    /// Something a person should worry about.
    Warning { text: String },
}

/// Receives events; called from the copying thread and from the store's monitor.
pub trait Observer: Send + Sync {
    /// Must not block for long.
    fn event(&self, event: &Event);
}

/// An observer that drops everything.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _event: &Event) {}
}
