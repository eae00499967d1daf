//! Small archives in memory, for tests of every reader.

use uuid::Uuid;

use super::map::{entries, entries_per_frame, fill};
use super::{
    BLOCK_BYTES, FrameFacts, FrameKind, Layout, OriginalsMode, PAYLOAD_OFFSET, Superblock, Totals, Version,
    frame, map,
};
use crate::base::{Bytes, ChunkSize, Extent, SegmentIx, SegmentSize};

/// The content of a sample archive.
#[derive(Clone, Debug)]
pub struct Sample {
    pub superblock: Superblock,
    /// The content of the data frames: the fuzzy copy.
    pub fuzzy: Vec<u8>,
    /// The parts of the origin that were copied.
    pub block_list: Vec<Extent>,
    /// Originals frames: each a list of extents and their packed bytes.
    pub originals: Vec<(Vec<Extent>, Vec<u8>)>,
    /// Put the data frames in an order derived from this seed instead of ascending.
    pub shuffled: Option<u64>,
    /// Damage: derive the map from this block list instead.
    pub wrong_map_list: Option<Vec<Extent>>,
    /// Damage: write no data frame for this segment, whatever the map says.
    pub omitted_frame: Option<u64>,
}

impl Sample {
    /// A whole copy of `content`, without originals.
    pub fn new(content: Vec<u8>) -> Self {
        let size = Bytes::from_len(content.len());
        let superblock = Superblock {
            version: Version::CURRENT,
            archive: Uuid::from_u128(0x7465_7374_0000_4000_8000_0000_0000_0001),
            parent: Uuid::nil(),
            snapshot: Uuid::nil(),
            base: Uuid::nil(),
            origin_name: "sample".to_owned(),
            origin_path: "/dev/mapper/sample".to_owned(),
            origin_size: size,
            instant_utc_ns: 1_700_000_000_000_000_000,
            chunk: ChunkSize::default(),
            segment: SegmentSize::new(SegmentSize::MIN).unwrap(),
            originals: OriginalsMode::None,
            tool: "tidemark sample".to_owned(),
        };
        let block_list = Extent::new(Bytes::ZERO, size).into_iter().collect();
        Self {
            superblock,
            fuzzy: content,
            block_list,
            originals: Vec::new(),
            shuffled: None,
            wrong_map_list: None,
            omitted_frame: None,
        }
    }

    /// Appends one originals frame that fills `extents` with `byte`.
    pub fn with_originals(mut self, extents: &[Extent], byte: u8) -> Self {
        self.superblock.originals = OriginalsMode::Append;
        let length: Bytes = extents.iter().map(|extent| extent.length()).sum();
        self.originals.push((extents.to_vec(), vec![byte; length.as_len()]));
        self
    }

    pub fn layout(&self) -> Layout {
        self.superblock.layout()
    }

    /// The image that a restore must produce.
    pub fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.fuzzy.len()];
        for extent in &self.block_list {
            let range = extent.start().as_len()..extent.end().as_len();
            content[range.clone()].copy_from_slice(&self.fuzzy[range]);
        }
        for (extents, packed) in &self.originals {
            let mut at = 0;
            for extent in extents {
                let length = extent.length().as_len();
                content[extent.start().as_len()..][..length].copy_from_slice(&packed[at..at + length]);
                at += length;
            }
        }
        content
    }

    /// The present parts of a segment.
    fn valid(&self, segment: Extent) -> Vec<Extent> {
        self.block_list.iter().filter_map(|extent| extent.intersection(segment)).collect()
    }

    fn segment(&self, ix: u64) -> Extent {
        let bytes = self.layout().segment.bytes();
        let start = bytes * ix;
        Extent::new(start, self.layout().origin_size.min(start + bytes)).unwrap()
    }

    fn has_frame(&self, ix: u64) -> bool {
        let zero = |extent: &Extent| {
            self.fuzzy[extent.start().as_len()..extent.end().as_len()].iter().all(|byte| *byte == 0)
        };
        !self.valid(self.segment(ix)).iter().all(zero)
    }

    /// The archive's bytes.
    pub fn build(&self) -> Vec<u8> {
        let layout = self.layout();
        let mut out = vec![0; BLOCK_BYTES];
        self.superblock.encode_head(&mut out).unwrap();
        let mut totals = Totals::default();
        let mut data: Vec<u64> =
            (0..layout.segment.count_for(layout.origin_size)).filter(|ix| self.has_frame(*ix)).collect();
        if let Some(seed) = self.shuffled {
            // Sorted by the residues of an odd multiplier: every seed gives a valid order, and most seeds a
            // different one.
            let key = |ix: &u64| (ix + 1).wrapping_mul(seed | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7;
            data.sort_by_key(key);
        }
        let mut sequence = 0;
        for ix in data.into_iter().filter(|ix| self.omitted_frame != Some(*ix)) {
            let extent = self.segment(ix);
            let valid = self.valid(extent);
            let mut payload = vec![0x99; extent.length().as_len()];
            for part in &valid {
                let at = (part.start() - extent.start()).as_len();
                payload[at..at + part.length().as_len()]
                    .copy_from_slice(&self.fuzzy[part.start().as_len()..part.end().as_len()]);
            }
            push(&mut out, &layout, sequence, FrameKind::Data, extent.start(), &payload, &valid);
            totals.data_frames += 1;
            totals.present_bytes += valid.iter().map(|part| part.length()).sum();
            sequence += 1;
        }
        for (extents, packed) in &self.originals {
            push(&mut out, &layout, sequence, FrameKind::Originals, extents[0].start(), packed, extents);
            totals.originals_frames += 1;
            totals.originals_bytes += Bytes::from_len(packed.len());
            sequence += 1;
        }
        let list = self.wrong_map_list.as_ref().unwrap_or(&self.block_list);
        let mut map = entries(&layout, list, |SegmentIx(ix)| self.has_frame(ix));
        let mut payload = vec![0; entries_per_frame(layout.segment) * map::ENTRY_BYTES];
        while let Some((start, length)) = fill(&mut map, &mut payload) {
            push(&mut out, &layout, sequence, FrameKind::Map, start, &payload[..length.as_len()], &[]);
            totals.map_frames += 1;
            sequence += 1;
        }
        let end = out.len();
        out.resize(end + BLOCK_BYTES, 0);
        self.superblock.encode_tail(&totals, &mut out[end..]).unwrap();
        out
    }
}

fn push(
    out: &mut Vec<u8>,
    layout: &Layout,
    sequence: u64,
    kind: FrameKind,
    origin_offset: Bytes,
    payload: &[u8],
    extents: &[Extent],
) {
    let begin = out.len();
    out.resize(begin + layout.frame_bytes().as_len(), 0xdd);
    out[begin + PAYLOAD_OFFSET..][..payload.len()].copy_from_slice(payload);
    let payload_length = Bytes::from_len(payload.len());
    let payload_checksum = layout.version.payload_checksum(payload);
    let facts = FrameFacts { sequence, kind, origin_offset, payload_length, payload_checksum };
    frame::seal(layout, &facts, extents, &mut out[begin..]).unwrap();
}
