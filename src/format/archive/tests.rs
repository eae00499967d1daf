//! Round trips, single-byte corruption of each block, and the map compared with a slow oracle.

use proptest::prelude::*;
use uuid::Uuid;

use super::control::{decode, encode};
use super::map::{MapCursor, entries, entries_per_frame, fill};
use super::*;
use crate::base::{Bytes, ChunkSize, Extent, SegmentIx, SegmentSize};

const SEGMENT: u64 = 64 * 1024;

fn segment() -> SegmentSize {
    SegmentSize::new(Bytes(SEGMENT)).unwrap()
}

fn layout(origin_size: u64) -> Layout {
    Layout {
        version: Version::CURRENT,
        archive: Uuid::from_u128(7),
        origin_size: Bytes(origin_size),
        segment: segment(),
        is_increment: false,
    }
}

fn superblock(name: &str) -> Superblock {
    Superblock {
        version: Version::CURRENT,
        archive: Uuid::from_u128(7),
        parent: Uuid::nil(),
        snapshot: Uuid::nil(),
        base: Uuid::nil(),
        origin_name: name.to_owned(),
        origin_path: format!("/dev/mapper/{name}"),
        origin_size: Bytes(5 * SEGMENT + 700),
        instant_utc_ns: 1_700_000_000_123_456_789,
        chunk: ChunkSize::default(),
        segment: segment(),
        originals: OriginalsMode::Append,
        tool: "tidemark test".to_owned(),
    }
}

fn extent(start: u64, end: u64) -> Extent {
    Extent::new(Bytes(start), Bytes(end)).unwrap()
}

#[test]
fn frames_lie_where_the_format_says() {
    assert_eq!(frame_offset(0, segment()), Some(Bytes(4096)));
    assert_eq!(frame_offset(2, segment()), Some(Bytes(4096 + 2 * (SEGMENT + 8192))));
    assert_eq!(frame_offset(u64::MAX, segment()), None);
    let layout = layout(1);
    assert_eq!(layout.frame_count(Bytes(8192)).unwrap(), 0);
    assert_eq!(layout.frame_count(Bytes(8192 + 3 * (SEGMENT + 8192))).unwrap(), 3);
    for bad in [0, 4096, 8191, 8193, SEGMENT] {
        assert!(layout.frame_count(Bytes(bad)).is_err(), "{bad}");
    }
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let mut block = [0u8; BLOCK_BYTES];
    let mut facts = superblock("x");
    facts.origin_name = "ä".repeat(200);
    facts.encode_head(&mut block).unwrap();
    let decoded = Superblock::decode_head(&block).unwrap();
    assert_eq!(decoded.origin_name, "ä".repeat(127));
}

#[test]
fn an_increment_is_not_taken_for_a_whole_copy() {
    let mut block = [0u8; BLOCK_BYTES];
    let (parent, base) = (Uuid::from_u128(3), Uuid::from_u128(4));
    for version in [Version::V1, Version::V2] {
        let facts = Superblock { version, parent, base, ..superblock("data") };
        facts.encode_head(&mut block).unwrap();
        let error = Superblock::decode_head(&block).unwrap_err();
        assert_eq!(error, ArchiveError::Padding { what: "the parent in a superblock" });
    }
    // Older programs read versions 1 and 2 only.
    let facts = Superblock { version: Version::NAMING, parent, base, ..superblock("data") };
    facts.encode_head(&mut block).unwrap();
    assert!(Superblock::decode_head(&block).unwrap().is_increment());
    assert_eq!(block[8], 3);
}

#[test]
fn every_corrupted_byte_of_a_superblock_is_found() {
    let (facts, totals) = (superblock("data"), Totals { data_frames: 3, map_frames: 1, ..Totals::default() });
    let mut head = [0u8; BLOCK_BYTES];
    let mut tail = [0u8; BLOCK_BYTES];
    facts.encode_head(&mut head).unwrap();
    facts.encode_tail(&totals, &mut tail).unwrap();
    assert!(Superblock::decode_head(&tail).is_err());
    assert!(Superblock::decode_tail(&head).is_err());
    for at in 0..BLOCK_BYTES {
        for flip in [0x01, 0x80, 0xff] {
            head[at] ^= flip;
            tail[at] ^= flip;
            assert!(Superblock::decode_head(&head).is_err(), "byte {at}");
            assert!(Superblock::decode_tail(&tail).is_err(), "byte {at}");
            head[at] ^= flip;
            tail[at] ^= flip;
        }
    }
    Superblock::decode_head(&head).unwrap();
}

#[test]
fn a_future_version_is_named() {
    let mut block = [0u8; BLOCK_BYTES];
    superblock("x").encode_head(&mut block).unwrap();
    block[8] = 4;
    let crc = crate::base::checksum::crc32c_salted(b"tidemark superblock head", &block[..4092]);
    block[4092..].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Superblock::decode_head(&block), Err(ArchiveError::Version { found: 4 }));
}

fn data_facts(layout: &Layout, ix: u64, payload: &[u8]) -> FrameFacts {
    let origin_offset = Bytes(ix * SEGMENT);
    let payload_length = Bytes(SEGMENT).min(layout.origin_size - origin_offset);
    assert_eq!(Bytes::from_len(payload.len()), payload_length);
    FrameFacts {
        sequence: 4,
        kind: FrameKind::Data,
        origin_offset,
        payload_length,
        payload_checksum: layout.version.payload_checksum(payload),
    }
}

#[test]
fn every_corrupted_byte_of_a_frame_is_found() {
    for version in [Version::V1, Version::V2] {
        corrupt_every_byte(&Layout { version, ..layout(SEGMENT + 5000) });
    }
}

fn corrupt_every_byte(layout: &Layout) {
    let payload = vec![0x5a; 5000];
    let facts = data_facts(layout, 1, &payload);
    let mut memory = vec![0xee; layout.frame_bytes().as_len()];
    memory[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 5000].copy_from_slice(&payload);
    frame::seal(layout, &facts, &[extent(SEGMENT, SEGMENT + 5000)], &mut memory).unwrap();
    let opened = frame::open(layout, 4, &memory).unwrap();
    assert_eq!(opened.control.facts, facts);
    assert_eq!(opened.payload, payload);
    assert_eq!(opened.control.extents().collect::<Vec<_>>(), [extent(SEGMENT, SEGMENT + 5000)]);
    assert_eq!(frame::open(layout, 5, &memory).unwrap_err(), ArchiveError::Sequence { found: 4 });
    let foreign = Layout { archive: Uuid::from_u128(8), ..*layout };
    assert!(matches!(frame::open(&foreign, 4, &memory), Err(ArchiveError::Foreign { .. })));
    for at in 0..memory.len() {
        memory[at] ^= 0x10;
        assert!(frame::open(layout, 4, &memory).is_err(), "byte {at}");
        memory[at] ^= 0x10;
    }
}

#[test]
fn a_stale_superblock_of_ext4_in_a_frame_is_found() {
    use crate::base::checksum::with_ext4_superblock;
    let (old, new) = (with_ext4_superblock(65536, 1), with_ext4_superblock(65536, 2));
    let stale = |version| {
        let layout = Layout { version, ..layout(SEGMENT) };
        let mut memory = vec![0; layout.frame_bytes().as_len()];
        frame::seal(&layout, &data_facts(&layout, 0, &new), &[extent(0, SEGMENT)], &mut memory).unwrap();
        memory[PAYLOAD_OFFSET..][..old.len()].copy_from_slice(&old);
        frame::open(&layout, 4, &memory).map(|_| ())
    };
    assert_eq!(stale(Version::V1), Ok(()), "why there is a version 2");
    assert!(matches!(stale(Version::V2), Err(ArchiveError::PayloadChecksum { algorithm: "XXH3-64", .. })));
}

#[test]
fn a_checksum_in_the_field_of_the_other_version_is_refused() {
    let (old, new) = (Layout { version: Version::V1, ..layout(SEGMENT) }, layout(SEGMENT));
    let payload = vec![1; Bytes(SEGMENT).as_len()];
    for (written, read) in [(old, new), (new, old)] {
        let mut block = [0u8; BLOCK_BYTES];
        let facts = data_facts(&written, 0, &payload);
        encode(&written, &facts, &[extent(0, SEGMENT)], Side::Head, &mut block).unwrap();
        let error = decode(&read, Side::Head, &block).unwrap_err();
        assert_eq!(error, ArchiveError::Padding { what: "the reserved part of a control block" });
    }
    let wide = FrameFacts { payload_checksum: 1 << 32, ..data_facts(&old, 0, &payload) };
    assert!(encode(&old, &wide, &[extent(0, SEGMENT)], Side::Head, &mut [0u8; BLOCK_BYTES]).is_err());
}

#[test]
fn a_torn_frame_is_detected() {
    let layout = layout(SEGMENT);
    let payload = vec![1; Bytes(SEGMENT).as_len()];
    let facts = data_facts(&layout, 0, &payload);
    let mut memory = vec![1; layout.frame_bytes().as_len()];
    frame::seal(&layout, &facts, &[extent(0, SEGMENT)], &mut memory).unwrap();
    let end = memory.len() - BLOCK_BYTES;
    encode(&layout, &facts, &[extent(0, SEGMENT - 512)], Side::Tail, &mut memory[end..]).unwrap();
    assert_eq!(frame::open(&layout, 4, &memory).unwrap_err(), ArchiveError::Torn);
    let (head, tail) = memory.split_at_mut(BLOCK_BYTES);
    let tail_at = tail.len() - BLOCK_BYTES;
    tail[tail_at..].copy_from_slice(head);
    assert!(frame::open(&layout, 4, &memory).is_err(), "a head block at the tail");
}

#[test]
fn what_would_not_decode_is_not_encoded() {
    let layout = layout(3 * SEGMENT);
    let mut block = [0u8; BLOCK_BYTES];
    let payload = vec![0; Bytes(SEGMENT).as_len()];
    let data = data_facts(&layout, 1, &payload);
    let mut refused = |facts: &FrameFacts, extents: &[Extent]| {
        encode(&layout, facts, extents, Side::Head, &mut block).expect_err("must be refused");
    };
    refused(&data, &[]);
    refused(&data, &[extent(SEGMENT - 512, SEGMENT)]);
    refused(&data, &[extent(SEGMENT, 2 * SEGMENT + 512)]);
    refused(&data, &[extent(SEGMENT + 1, 2 * SEGMENT)]);
    refused(&data, &[extent(SEGMENT, 2 * SEGMENT - 1)]);
    refused(&data, &[extent(SEGMENT + 512, 2 * SEGMENT), extent(SEGMENT, SEGMENT + 512)]);
    let many: Vec<Extent> = (0..=EXTENTS_MAX as u64).map(|i| extent(i * 512, i * 512 + 512)).collect();
    let originals = FrameFacts { kind: FrameKind::Originals, origin_offset: Bytes::ZERO, ..data };
    refused(&originals, &many);
    refused(&originals, &[extent(0, 512)]);
    refused(&FrameFacts { origin_offset: Bytes(3 * SEGMENT), ..data }, &[extent(0, 512)]);
    refused(&FrameFacts { kind: FrameKind::Map, payload_length: Bytes(25), ..data }, &[]);
}

/// The state of every page, determined page by page.
fn slow_map(pages: &[bool], frames: &[bool], size: u64) -> Vec<MapEntry> {
    let mut map: Vec<MapEntry> = Vec::new();
    for (page, listed) in pages.iter().enumerate() {
        let start = page as u64 * 4096;
        let state = match (listed, frames[Bytes(start / SEGMENT).as_len()]) {
            (false, _) => MapState::Absent,
            (true, true) => MapState::Present,
            (true, false) => MapState::Zero,
        };
        let end = size.min(start + 4096);
        match map.last_mut() {
            Some(last) if last.state == state => last.extent = extent(last.extent.start().get(), end),
            _ => map.push(MapEntry { extent: extent(start, end), state }),
        }
    }
    map
}

fn runs(pages: &[bool], size: u64) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for (page, _) in pages.iter().enumerate().filter(|(_, listed)| **listed) {
        let (start, end) = (page as u64 * 4096, size.min(page as u64 * 4096 + 4096));
        match runs.last_mut() {
            Some(last) if last.end() == Bytes(start) => *last = extent(last.start().get(), end),
            _ => runs.push(extent(start, end)),
        }
    }
    runs
}

proptest! {
    #[test]
    fn superblocks_round_trip(old: bool, name in ".{0,80}", ns: u64, size in 0u64..1 << 38, path in ".{0,200}", data in 0u64..5, originals in 0u64..9, map in 0u64..9) {
        let mut facts = superblock("x");
        facts.version = if old { Version::V1 } else { Version::V2 };
        facts.origin_name = name;
        facts.origin_path = path;
        facts.instant_utc_ns = ns;
        facts.origin_size = Bytes(size + 5 * SEGMENT);
        let mut block = [0xaau8; BLOCK_BYTES];
        facts.encode_head(&mut block).unwrap();
        let decoded = Superblock::decode_head(&block).unwrap();
        prop_assert!(facts.origin_name.starts_with(&decoded.origin_name));
        facts.origin_name = decoded.origin_name.clone();
        facts.origin_path = decoded.origin_path.clone();
        prop_assert_eq!(&decoded, &facts);
        let totals = Totals {
            data_frames: data, originals_frames: originals, map_frames: map,
            present_bytes: Bytes(data * 512), originals_bytes: Bytes(originals), map_offset: Bytes::ZERO,
        };
        facts.encode_tail(&totals, &mut block).unwrap();
        prop_assert_eq!(Superblock::decode_tail(&block).unwrap(), (facts, totals));
    }

    #[test]
    fn control_blocks_round_trip(
        cuts in prop::collection::btree_set(0u64..1 << 31, 2..400),
        checksum: u64, old: bool, sequence: u64, tail in 1u64..512,
    ) {
        // The origin ends in the middle of a sector, with the last extent.
        let mut cuts: Vec<u64> = cuts.into_iter().map(|cut| cut * 512).collect();
        cuts.truncate(cuts.len() / 2 * 2);
        let size = *cuts.last().unwrap() - 512 + tail;
        *cuts.last_mut().unwrap() = size;
        let segment = SegmentSize::new(SegmentSize::MAX).unwrap();
        let version = if old { Version::V1 } else { Version::V2 };
        let layout = Layout { version, archive: Uuid::from_u128(9), origin_size: Bytes(size), segment, is_increment: false };
        let checksum = if old { checksum & 0xffff_ffff } else { checksum };
        let mut extents: Vec<Extent> = cuts.chunks(2)
            .map(|cut| extent(cut[0], cut[1].min(cut[0] + 32768)))
            .collect();
        if extents.last().unwrap().end() < Bytes(size) {
            extents.pop();
        }
        prop_assume!(!extents.is_empty());
        let facts = FrameFacts {
            sequence, kind: FrameKind::Originals, origin_offset: extents[0].start(),
            payload_length: extents.iter().map(|extent| extent.length()).sum(), payload_checksum: checksum,
        };
        let mut block = [0x11u8; BLOCK_BYTES];
        for side in [Side::Head, Side::Tail] {
            encode(&layout, &facts, &extents, side, &mut block).unwrap();
            let control = decode(&layout, side, &block).unwrap();
            prop_assert_eq!(control.facts, facts);
            prop_assert_eq!(control.extents().collect::<Vec<_>>(), extents.clone());
        }
        prop_assert!(decode(&layout, Side::Head, &block).is_err());
    }

    #[test]
    fn decoders_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..9000), good_magic: bool) {
        let mut bytes = bytes;
        if good_magic && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"TDMFRAME");
        }
        let layout = layout(SEGMENT * 3);
        let _ = decode(&layout, Side::Head, &bytes);
        let _ = Superblock::decode_head(&bytes);
        let _ = Superblock::decode_tail(&bytes);
        let _ = frame::open(&layout, 0, &bytes);
        let _ = MapCursor::new(Bytes(SEGMENT), false).read(Bytes::ZERO, &bytes, |_| {});
    }

    #[test]
    fn maps_match_the_oracle(pages in prop::collection::vec(any::<bool>(), 1..100), frames in prop::collection::vec(any::<bool>(), 7), tail in 1u64..=4096) {
        let size = (pages.len() as u64 - 1) * 4096 + tail;
        let layout = layout(size);
        let list = runs(&pages, size);
        let expected = slow_map(&pages, &frames, size);
        let made = entries(&layout, &list, |SegmentIx(ix)| frames[Bytes(ix).as_len()]);
        prop_assert_eq!(made.collect::<Vec<_>>(), expected.clone());
        // Through frames of five entries.
        let mut entries = expected.iter().copied();
        let mut cursor = MapCursor::new(Bytes(size), false);
        let mut back = Vec::new();
        let mut payload = [0xffu8; 5 * 24 + 23];
        while let Some((start, length)) = fill(&mut entries, &mut payload) {
            prop_assert!(cursor.finish().is_err());
            cursor.read(start, &payload[..length.as_len()], |entry| back.push(entry)).unwrap();
        }
        cursor.finish().unwrap();
        prop_assert_eq!(back, expected);
    }
}

#[test]
fn a_map_with_a_gap_is_refused() {
    let entry = |start, end| MapEntry { extent: extent(start, end), state: MapState::Zero };
    let mut payload = vec![0u8; entries_per_frame(segment()) * map::ENTRY_BYTES];
    for bad in [
        [entry(0, 4096), entry(8192, 12288)],
        [entry(0, 4096), entry(0, 4096)],
        [entry(0, 4096), entry(4096, 1 << 40)],
    ] {
        let (start, length) = fill(&mut bad.into_iter(), &mut payload).unwrap();
        let mut cursor = MapCursor::new(Bytes(1 << 20), false);
        let read = cursor.read(start, &payload[..length.as_len()], |_| {});
        assert!(matches!(read, Err(ArchiveError::MapOrder { .. })), "{read:?}");
    }
}
