//! A set of bytes, held as sorted, disjoint, coalesced extents.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::Extent;
use crate::base::Bytes;

/// A set of bytes. Memory: one entry for each run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtentSet {
    /// Start and end of each run; no two touch.
    runs: BTreeMap<Bytes, Bytes>,
}

impl ExtentSet {
    /// The empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// True if no byte is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Runs in the set.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// Bytes in the set.
    #[must_use]
    pub fn total(&self) -> Bytes {
        self.iter().map(Extent::length).sum()
    }

    /// The runs in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Extent> + '_ {
        self.runs.iter().map(|(start, end)| Extent::new(*start, *end).expect("runs are never empty"))
    }

    /// The whole runs that share a byte with `extent`, in order.
    fn touching(&self, extent: Extent) -> impl Iterator<Item = (Bytes, Bytes)> + '_ {
        let first = self.runs.range(..=extent.start()).next_back().filter(move |run| *run.1 > extent.start());
        let rest = (Bound::Excluded(extent.start()), Bound::Excluded(extent.end()));
        first.into_iter().chain(self.runs.range(rest)).map(|(start, end)| (*start, *end))
    }

    /// Adds every byte of `extent`.
    pub fn insert(&mut self, extent: Extent) {
        let (mut start, mut end) = (extent.start(), extent.end());
        if let Some((before, until)) = self.runs.range(..=start).next_back().map(|run| (*run.0, *run.1))
            && until >= start
        {
            start = before;
            end = end.max(until);
        }
        // Each run is removed once: amortized over the inserts that made it.
        while let Some((absorbed, until)) = self.runs.range(start..=end).next().map(|run| (*run.0, *run.1)) {
            self.runs.remove(&absorbed);
            end = end.max(until);
        }
        self.runs.insert(start, end);
    }

    /// Removes every byte of `extent`.
    pub fn remove(&mut self, extent: Extent) {
        let touched: Vec<(Bytes, Bytes)> = self.touching(extent).collect();
        for (start, end) in touched {
            self.runs.remove(&start);
            if start < extent.start() {
                self.runs.insert(start, extent.start());
            }
            if extent.end() < end {
                self.runs.insert(extent.end(), end);
            }
        }
    }

    /// True if every byte of `extent` is in the set.
    #[must_use]
    #[cfg(test)]
    pub fn contains(&self, extent: Extent) -> bool {
        self.intersection_with(extent).next() == Some(extent)
    }

    /// The parts of `extent` that are in the set, in order.
    pub fn intersection_with(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.touching(extent).filter_map(move |(start, end)| Extent::new(start, end)?.intersection(extent))
    }

    /// The parts of `extent` that are not in the set, in order.
    pub fn gaps_in(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let mut at = extent.start();
        let ends = std::iter::once((extent.end(), extent.end()));
        self.touching(extent).chain(ends).filter_map(move |(start, end)| {
            let gap = Extent::new(at, start);
            at = at.max(end);
            gap
        })
    }

    /// What is in both sets.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.iter().flat_map(|extent| other.intersection_with(extent)).collect()
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.iter().flat_map(|extent| other.gaps_in(extent)).collect()
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::new();
        extents.into_iter().for_each(|extent| set.insert(extent));
        set
    }
}

impl Extend<Extent> for ExtentSet {
    fn extend<I: IntoIterator<Item = Extent>>(&mut self, extents: I) {
        extents.into_iter().for_each(|extent| self.insert(extent));
    }
}
