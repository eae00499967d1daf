//! The map: for each byte of the origin, whether the archive's data frames hold it.
//!
//! Entries cover the origin from 0 to its end, in order, without gaps, in as many map frames as needed. They
//! are created and read lazily: no memory grows with the origin.

use serde::Serialize;

use super::{ArchiveError, Layout};
use crate::base::{Bytes, Extent, SegmentIx, SegmentSize};
use crate::format::bytes::{get_u32, get_u64, put_u32, put_u64};

/// Bytes of one entry.
pub const ENTRY_BYTES: usize = 24;

/// What the archive holds of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MapState {
    /// Data frames hold it.
    Present,
    /// It was copied and is zero; no data frame holds it.
    Zero,
    /// It was not copied; it reads as zeros.
    Absent,
    /// It is as in the parent. In increments only.
    Inherited,
}

impl MapState {
    fn code(self) -> u32 {
        match self {
            Self::Present => 1,
            Self::Zero => 2,
            Self::Absent => 3,
            Self::Inherited => 4,
        }
    }

    /// The state's name, for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Zero => "zero",
            Self::Absent => "absent",
            Self::Inherited => "inherited",
        }
    }
}

/// One range and its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MapEntry {
    /// The range on the origin.
    pub extent: Extent,
    /// Its state.
    pub state: MapState,
}

/// Entries that fit one frame.
#[must_use]
pub fn entries_per_frame(segment: SegmentSize) -> usize {
    segment.bytes().as_len() / ENTRY_BYTES
}

/// Fills `payload` with as many of `entries` as fit. Returns where the first one begins and how many bytes
/// were used, or None if no entries are left.
pub fn fill(entries: &mut impl Iterator<Item = MapEntry>, payload: &mut [u8]) -> Option<(Bytes, Bytes)> {
    let mut first = None;
    let mut used = 0;
    for slot in payload.chunks_exact_mut(ENTRY_BYTES) {
        let Some(entry) = entries.next() else { break };
        first.get_or_insert(entry.extent.start());
        put_u64(slot, 0, entry.extent.start().get());
        put_u64(slot, 8, entry.extent.end().get());
        put_u32(slot, 16, entry.state.code());
        put_u32(slot, 20, 0);
        used += ENTRY_BYTES;
    }
    first.map(|start| (start, Bytes::from_len(used)))
}

/// Checks a map while it is read, across its frames.
#[derive(Clone, Copy, Debug)]
pub struct MapCursor {
    at: Bytes,
    size: Bytes,
    is_increment: bool,
}

impl MapCursor {
    /// A cursor at the beginning of the map of an origin of `size` bytes. `is_increment`: ranges may be inherited.
    #[must_use]
    pub fn new(size: Bytes, is_increment: bool) -> Self {
        Self { at: Bytes::ZERO, size, is_increment }
    }

    /// Reads the entries of one map frame; `origin_offset` is that of the frame.
    ///
    /// # Errors
    /// An entry that does not continue the map, or whose state is invalid.
    pub fn read(
        &mut self,
        origin_offset: Bytes,
        payload: &[u8],
        mut take: impl FnMut(MapEntry),
    ) -> Result<(), ArchiveError> {
        if origin_offset != self.at {
            return Err(ArchiveError::Field { field: "the map frame's offset", value: origin_offset.get() });
        }
        for slot in payload.chunks_exact(ENTRY_BYTES) {
            take(self.entry(slot)?);
        }
        Ok(())
    }

    fn entry(&mut self, slot: &[u8]) -> Result<MapEntry, ArchiveError> {
        let (start, end) = (Bytes(get_u64(slot, 0)), Bytes(get_u64(slot, 8)));
        let extent = Extent::new(start, end).filter(|_| start == self.at && end <= self.size).ok_or(
            ArchiveError::MapOrder {
                start: start.get(),
                end: end.get(),
                expected: self.at.get(),
                size: self.size.get(),
            },
        )?;
        let state = match get_u32(slot, 16) {
            1 => MapState::Present,
            2 => MapState::Zero,
            3 => MapState::Absent,
            4 if self.is_increment => MapState::Inherited,
            other => return Err(ArchiveError::Field { field: "a map entry's state", value: other.into() }),
        };
        if get_u32(slot, 20) != 0 {
            return Err(ArchiveError::Padding { what: "the reserved part of a map entry" });
        }
        self.at = end;
        Ok(MapEntry { extent, state })
    }

    /// Checks that the map covers the whole origin.
    ///
    /// # Errors
    /// [`ArchiveError::MapEnd`].
    pub fn finish(&self) -> Result<(), ArchiveError> {
        if self.at == self.size {
            Ok(())
        } else {
            Err(ArchiveError::MapEnd { end: self.at.get(), size: self.size.get() })
        }
    }
}

/// The map of an archive for which `block_list` (sorted, disjoint, within the origin) was copied; `has_frame`
/// tells which segments got a data frame. Created lazily; neighbours with the same state are merged.
pub fn entries<'a>(
    layout: &Layout,
    block_list: &'a [Extent],
    has_frame: impl Fn(SegmentIx) -> bool + 'a,
) -> impl Iterator<Item = MapEntry> + 'a {
    let (size, segment) = (layout.origin_size, layout.segment);
    let mut at = Bytes::ZERO;
    let mut rest = block_list;
    let parts = std::iter::from_fn(move || {
        while let Some((first, others)) = rest.split_first()
            && first.end() <= at
        {
            rest = others;
        }
        let (end, state) = match rest.first() {
            None => (size, MapState::Absent),
            Some(next) if at < next.start() => (next.start().min(size), MapState::Absent),
            Some(next) => {
                let ix = segment.index_of(at);
                let segment_end = at.align_down(segment.bytes()) + segment.bytes();
                let state = if has_frame(ix) { MapState::Present } else { MapState::Zero };
                (next.end().min(segment_end).min(size), state)
            }
        };
        let extent = Extent::new(at, end)?;
        at = end;
        Some(MapEntry { extent, state })
    });
    merge(parts)
}

/// The map of an increment: `present` is in its data frames, `inherited` is as in the parent, the rest is absent. Both
/// are sorted and disjoint, also from each other, and within the origin.
pub fn increment_entries<'a>(
    size: Bytes,
    present: &'a [Extent],
    inherited: &'a [Extent],
) -> impl Iterator<Item = MapEntry> + 'a {
    let (mut present, mut inherited) = (present.iter().peekable(), inherited.iter().peekable());
    let mut at = Bytes::ZERO;
    merge(std::iter::from_fn(move || {
        let next_of = |list: &mut std::iter::Peekable<std::slice::Iter<'a, Extent>>| {
            list.peek().map_or(size, |extent| extent.start())
        };
        let (next_present, next_inherited) = (next_of(&mut present), next_of(&mut inherited));
        let (end, state) = match at {
            at if at == next_present && at < size => (present.next()?.end(), MapState::Present),
            at if at == next_inherited && at < size => (inherited.next()?.end(), MapState::Inherited),
            _ => (next_present.min(next_inherited), MapState::Absent),
        };
        let extent = Extent::new(at, end)?;
        at = end;
        Some(MapEntry { extent, state })
    }))
}

fn merge(parts: impl Iterator<Item = MapEntry>) -> impl Iterator<Item = MapEntry> {
    let mut parts = parts.peekable();
    std::iter::from_fn(move || {
        let mut entry = parts.next()?;
        while let Some(next) = parts.next_if(|next| next.state == entry.state) {
            entry.extent = Extent::new(entry.extent.start(), next.extent.end()).expect("neighbours in order");
        }
        Some(entry)
    })
}
