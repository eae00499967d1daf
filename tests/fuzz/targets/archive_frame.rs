//! A control block from any bytes with a corrected checksum: no panic, extents within the origin, and the same bytes
//! again when encoded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::base::checksum::crc32c_salted;
use tidemark::base::{Bytes, Extent, SegmentSize};
use tidemark::format::archive::{BLOCK_BYTES, Layout, Side, Superblock, Version, control, frame};

/// The golden archive's identity, with a size that ends within a sector, or a large one.
fn layout(large: bool, version: Version, is_increment: bool) -> Layout {
    static GOLDEN: &[u8] = include_bytes!("../../golden/archive/v1.tdm");
    let head = Superblock::decode_head(GOLDEN).expect("the golden archive is good");
    let segment = SegmentSize::MIN;
    let size = if large { Bytes(SegmentSize::MAX.get() << 14) } else { Bytes(3 * segment.get() + 700) };
    let segment = SegmentSize::new(segment).expect("the smallest is in range");
    Layout { version, archive: head.archive, origin_size: size, segment, is_increment }
}

fuzz_target!(|data: &[u8]| {
    let Some((first, data)) = data.split_first() else { return };
    let version = match (first & 8, first & 16) {
        (0, 0) => Version::V2,
        (_, 0) => Version::V1,
        _ => Version::V3,
    };
    let layout = layout(first & 1 != 0, version, first & 16 != 0);
    let _ = control::decode(&layout, Side::Head, data);
    let _ = frame::open(&layout, 0, data);
    let mut block = vec![0; BLOCK_BYTES];
    let length = data.len().min(BLOCK_BYTES - 48);
    block[32..32 + length].copy_from_slice(&data[..length]);
    block[..8].copy_from_slice(b"TDMFRAME");
    block[8] = 1;
    block[12] = (first >> 1) % 4;
    block[16..32].copy_from_slice(layout.archive.as_bytes());
    let kind: &[u8] = match block[12] {
        1 => b"data",
        2 => b"originals",
        _ => b"map",
    };
    let salt = [b"tidemark control head ", kind].concat();
    let crc = crc32c_salted(&salt, &block[..BLOCK_BYTES - 4]);
    block[BLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    if let Ok(decoded) = control::decode(&layout, Side::Head, &block) {
        let extents: Vec<Extent> = decoded.extents().collect();
        assert!(extents.iter().all(|extent| extent.end() <= layout.origin_size));
        assert!(extents.windows(2).all(|pair| pair[0].end() <= pair[1].start()));
        let mut again = vec![0xff; BLOCK_BYTES];
        control::encode(&layout, &decoded.facts, &extents, Side::Head, &mut again)
            .expect("what was decoded can be encoded");
        assert_eq!(again, block);
    }
});
