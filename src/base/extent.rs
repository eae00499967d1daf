//! A byte range of a device, never empty: what formats, block lists and engines all speak of.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::units::Bytes;

/// A half-open byte range `start..end` of a device, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    start: Bytes,
    end: Bytes,
}

impl Extent {
    /// `start..end`, or None where that is empty or reversed.
    #[must_use]
    pub fn new(start: Bytes, end: Bytes) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }
    /// `start..start + length`, or None where that is empty or does not fit 64 bits.
    #[must_use]
    pub fn with_length(start: Bytes, length: Bytes) -> Option<Self> {
        Self::new(start, start.checked_add(length)?)
    }
    /// First byte.
    #[must_use]
    pub fn start(self) -> Bytes {
        self.start
    }
    /// The byte behind the last one.
    #[must_use]
    pub fn end(self) -> Bytes {
        self.end
    }
    /// Bytes covered.
    #[must_use]
    pub fn length(self) -> Bytes {
        self.end - self.start
    }
    /// The part shared with `other`, if any.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
    /// True where the two share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }
    /// True where every byte of `other` is in this one.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start.get(), self.end.get())
    }
}
