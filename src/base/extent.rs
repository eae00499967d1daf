//! A byte range of a device, never empty. Formats, block lists and engines all use it.

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
    /// `start..end`, or None if that is empty or reversed.
    #[must_use]
    pub fn new(start: Bytes, end: Bytes) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }
    /// `start..start + length`, or None if that is empty or does not fit 64 bits.
    #[must_use]
    pub fn with_length(start: Bytes, length: Bytes) -> Option<Self> {
        Self::new(start, start.checked_add(length)?)
    }
    /// First byte.
    #[must_use]
    pub fn start(self) -> Bytes {
        self.start
    }
    /// The byte after the last one.
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
    /// True if the two have a byte in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.intersection(other).is_some()
    }
    /// Cut into parts of at most `length` bytes (at least 1), in order.
    pub fn split(self, length: Bytes) -> impl Iterator<Item = Self> {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let Self { start, end } = rest?;
            let cut = start.checked_add(length.max(Bytes(1))).map_or(end, |cut| cut.min(end));
            rest = Self::new(cut, end);
            Some(Self { start, end: cut })
        })
    }
    /// True if every byte of `other` is in this one.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_follow_each_other_and_are_the_whole() {
        let split = |start, end, length| -> Vec<(u64, u64)> {
            let parts = Extent::new(Bytes(start), Bytes(end)).unwrap().split(Bytes(length));
            parts.map(|part| (part.start().get(), part.end().get())).collect()
        };
        assert_eq!(split(3, 10, 4), [(3, 7), (7, 10)]);
        assert_eq!(split(0, 8, 4), [(0, 4), (4, 8)]);
        assert_eq!(split(5, 6, 100), [(5, 6)]);
        assert_eq!(split(0, 2, 0), [(0, 1), (1, 2)]);
        assert_eq!(split(u64::MAX - 3, u64::MAX, 100), [(u64::MAX - 3, u64::MAX)]);
    }
}
