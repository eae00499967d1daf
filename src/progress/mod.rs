//! Events that a running copy reports to its observer. Plain values: `cli` draws them, scripts read them as
//! JSON.

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
    /// Originals are applied to the fuzzy copy, or appended to it.
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
    /// Exceptions, as far as the count is known.
    pub exceptions: u64,
    /// Measured fill rate, bytes per second.
    pub fill_bytes_per_second: u64,
    /// Exceptions per second, measured likewise.
    pub exceptions_per_second: u64,
}

/// How many segments of a copy are on the secondary or being written to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SegmentCount {
    /// Segments done.
    #[serde(rename = "segments_done")]
    pub done: u64,
    /// Segments to be copied in all.
    #[serde(rename = "segments_total")]
    pub total: u64,
}

/// One progress message.
#[allow(missing_docs)] // the variants say what their fields are
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins; `total`: its bytes of work, if known.
    Phase { phase: Phase, total: Option<Bytes> },
    /// Bytes of the current phase done so far.
    Progress {
        phase: Phase,
        done: Bytes,
        total: Option<Bytes>,
        /// In the data phase only.
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
    /// A region was released: `released` of `total` regions so far, `released_bytes` in all. This release
    /// held the origin for `stall`; no release held it for longer than `longest_stall`.
    Regions {
        released: u64,
        total: u64,
        released_bytes: Bytes,
        #[serde(rename = "stall_seconds", serialize_with = "clock::seconds")]
        stall: Duration,
        #[serde(rename = "longest_stall_seconds", serialize_with = "clock::seconds")]
        longest_stall: Duration,
    },
    /// `origin`: mean latency of the applications' reads and writes of the origin now. `baseline`: what it is
    /// compared with, their latency without the copier. `rate`: bytes per second that the copier may read as
    /// a result. None: unknown, or for `rate` no limit.
    Latency {
        #[serde(rename = "origin_seconds", serialize_with = "clock::seconds_if_known")]
        origin: Option<Duration>,
        #[serde(rename = "baseline_seconds", serialize_with = "clock::seconds_if_known")]
        baseline: Option<Duration>,
        #[serde(rename = "allowed_bytes_per_second")]
        rate: Option<Bytes>,
    },
    /// A message that needs no action.
    Note { text: String },
    /// Something that may need attention.
    Warning { text: String },
}

/// Receives events; called from the copying thread and from the store's monitor.
pub trait Observer: Send + Sync {
    /// Receives one event. Must not block for long.
    fn event(&self, event: &Event);

    /// As [`Observer::event`], for one origin of several that are copied together.
    fn event_of(&self, _origin: &str, event: &Event) {
        self.event(event);
    }
}

/// Passes events on as those of one origin of several.
pub struct OfOrigin<'a> {
    /// The origin's path.
    pub origin: &'a str,
    /// Receives them.
    pub inner: &'a dyn Observer,
}

impl Observer for OfOrigin<'_> {
    fn event(&self, event: &Event) {
        self.inner.event_of(self.origin, event);
    }
}

/// An observer that drops everything.
#[derive(Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _event: &Event) {}
}
