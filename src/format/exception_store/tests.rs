//! Round trips, arbitrary bytes, and stores written by real kernels.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

fn chunk(bytes: u64) -> ChunkSize {
    ChunkSize::new(Bytes(bytes)).unwrap()
}

#[test]
fn areas_and_data_chunks_partition_the_store() {
    for size in [4096, 8192, 65536] {
        let chunk = chunk(size);
        let areas: HashSet<u64> = (0..5).map(|area| area_chunk(area, chunk).unwrap().get()).collect();
        let end = area_chunk(4, chunk).unwrap().get();
        for index in 0..=end {
            let expected = index != 0 && !areas.contains(&index);
            assert_eq!(is_data_chunk(ChunkIx(index), chunk), expected, "chunk {index} of {size} bytes");
        }
    }
    assert_eq!(area_chunk(0, chunk(4096)), Some(ChunkIx(1)));
    assert_eq!(area_chunk(1, chunk(4096)), Some(ChunkIx(258)));
    assert_eq!(area_chunk(u64::MAX / 2, chunk(4096)), None);
    assert_eq!(area_offset(u64::MAX / 1000, chunk(1 << 20)), None);
}

#[test]
fn every_corrupted_byte_changes_the_decoded_header() {
    let header = Header { valid: true, chunk: chunk(4096) };
    let mut block = [0u8; HEADER_BYTES];
    header.encode(&mut block).unwrap();
    assert_eq!(block, *b"SnAp\x01\0\0\0\x01\0\0\0\x08\0\0\0");
    for at in 0..HEADER_BYTES {
        for flip in 1..=255 {
            block[at] ^= flip;
            let decoded = Header::decode(&block);
            block[at] ^= flip;
            // The format has no checksum. A changed byte may give another valid header, but never the same
            // one.
            assert_ne!(decoded, Ok(header), "byte {at}");
        }
    }
    assert_eq!(Header::decode(&block), Ok(header));
    assert!(Header::decode(&block[..15]).is_err());
}

#[test]
fn entries_out_of_bounds_are_refused() {
    let bounds =
        Bounds { chunk: chunk(4096), origin_size: Bytes(10 * 4096 - 512), store_size: Bytes(300 * 4096) };
    let decode = |old, new| {
        let mut block = [0u8; 4096];
        let entries =
            [Entry { old: ChunkIx(0), new: ChunkIx(2) }, Entry { old: ChunkIx(old), new: ChunkIx(new) }];
        encode_area(&entries, &mut block).unwrap();
        decode_area(&block, 0, &bounds)
    };
    assert_eq!(decode(9, 299).unwrap().entries.len(), 2);
    assert_eq!(decode(10, 3), Err(StoreError::OldChunk { index: 1, old: 10 }));
    assert_eq!(decode(u64::MAX, 3), Err(StoreError::OldChunk { index: 1, old: u64::MAX }));
    for new in [1, 258, 300, u64::MAX] {
        assert_eq!(decode(1, new), Err(StoreError::NewChunk { index: 1, new }));
    }
    let last = Entry { old: ChunkIx(9), new: ChunkIx(3) }.place(&bounds).unwrap();
    assert_eq!(last, (Extent::new(Bytes(9 * 4096), Bytes(10 * 4096 - 512)).unwrap(), Bytes(3 * 4096)));
}

proptest! {
    #[test]
    fn areas_round_trip(olds in prop::collection::vec(0u64..1000, 0..=256), skip in 0usize..300) {
        let bounds = Bounds { chunk: chunk(4096), origin_size: Bytes(1000 * 4096), store_size: Bytes(1 << 30) };
        let entries: Vec<Entry> = olds.iter().enumerate()
            .map(|(index, old)| Entry { old: ChunkIx(*old), new: ChunkIx(index as u64 % 256 + 2) })
            .collect();
        let mut block = vec![0xffu8; 4096];
        encode_area(&entries, &mut block).unwrap();
        let area = decode_area(&block, skip, &bounds).unwrap();
        prop_assert_eq!(area.full, entries.len() == 256 || skip >= 256);
        prop_assert_eq!(&area.entries[..], entries.get(skip..).unwrap_or(&[]));
    }

    #[test]
    fn decoders_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..5000), shift in 12u32..21, skip: usize, origin: u64, store: u64) {
        let bounds = Bounds { chunk: chunk(1 << shift), origin_size: Bytes(origin), store_size: Bytes(store) };
        let _ = Header::decode(&bytes);
        if let Ok(area) = decode_area(&bytes, skip, &bounds) {
            for entry in area.entries {
                let (extent, at) = entry.place(&bounds).unwrap();
                prop_assert!(extent.end() <= bounds.origin_size && at < bounds.store_size);
            }
        }
    }
}

/// A golden store: the image, and what must be found in it (see tests/golden/exception_store/README.md).
struct Golden {
    image: Vec<u8>,
    chunk: ChunkSize,
    origin_size: Bytes,
    used: Bytes,
    olds: Vec<u64>,
}

fn golden_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/exception_store")
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("'{text}' is a number"))
}

fn image(text: &str) -> Vec<u8> {
    let mut image = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            ["bytes", length] => image.resize(Bytes(number(length)).as_len(), 0),
            [offset, count, unit] => {
                let unit = u128::from_str_radix(unit, 16).unwrap().to_be_bytes();
                let offset = Bytes(number(offset)).as_len();
                for index in 0..Bytes(number(count)).as_len() {
                    image[offset + index * 16..][..16].copy_from_slice(&unit);
                }
            }
            _ => panic!("line '{line}' of a golden image"),
        }
    }
    image
}

fn golden(path: &Path) -> Golden {
    let mut golden = Golden {
        image: image(&fs::read_to_string(path).unwrap()),
        chunk: ChunkSize::default(),
        origin_size: Bytes::ZERO,
        used: Bytes::ZERO,
        olds: Vec::new(),
    };
    for line in fs::read_to_string(path.with_extension("expect")).unwrap().lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            ["chunk_sectors", sectors] => golden.chunk = chunk(number(sectors) * 512),
            ["origin_bytes", bytes] => golden.origin_size = Bytes(number(bytes)),
            ["status", ratio, ..] => golden.used = Bytes(number(ratio.split('/').next().unwrap())) * 512,
            [old] => golden.olds.push(number(old)),
            _ => panic!("line '{line}' of {}", path.display()),
        }
    }
    golden
}

/// Walks all areas as a reader of a store does.
fn walk(golden: &Golden, bounds: &Bounds) -> Vec<Entry> {
    let mut all = Vec::new();
    for area in 0.. {
        let at = area_offset(area, golden.chunk).unwrap().as_len();
        let decoded = decode_area(&golden.image[at..], 0, bounds).unwrap();
        all.extend(decoded.entries);
        if !decoded.full {
            return all;
        }
    }
    unreachable!("the loop has no end of its own")
}

#[test]
fn stores_of_real_kernels_are_read() {
    let mut seen = Vec::new();
    for file in fs::read_dir(golden_directory()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "cow") {
            continue;
        }
        let golden = golden(&path);
        assert_eq!(Header::decode(&golden.image), Ok(Header { valid: true, chunk: golden.chunk }));
        let bounds = Bounds { chunk: golden.chunk, origin_size: golden.origin_size, store_size: golden.used };
        let entries = walk(&golden, &bounds);
        let olds: Vec<u64> = entries.iter().map(|entry| entry.old.get()).collect();
        assert_eq!(olds, golden.olds, "{}", path.display());
        for entry in entries {
            let (extent, store_offset) = entry.place(&bounds).unwrap();
            let original = &golden.image[store_offset.as_len()..][..extent.length().as_len()];
            for (index, page) in original.chunks(4096).enumerate() {
                let number = extent.start().get() / 4096 + index as u64;
                let unit = format!("orig{number:012}");
                assert!(
                    page.chunks(16).all(|part| part == unit.as_bytes()),
                    "page {number} of {}",
                    path.display()
                );
            }
        }
        seen.push(path.file_stem().unwrap().to_string_lossy().into_owned());
    }
    for series in ["6.1", "6.12"] {
        for case in ["8x0", "8x256", "8x600", "16x540"] {
            assert!(seen.contains(&format!("{series}-{case}")), "{series}-{case} is missing: {seen:?}");
        }
    }
}
