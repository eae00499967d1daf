use proptest::prelude::*;

use super::*;
use crate::base::{DeviceNumber, ErrorKind};
use crate::format::state::DeviceRecord;

const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/raw_copy/v1.copy");

fn extent(start: u64, end: u64) -> Extent {
    Extent::new(Bytes(start), Bytes(end)).unwrap()
}

/// The content that tests/golden/raw_copy/README.md describes.
fn sample() -> RawCopy {
    let device = DeviceRecord {
        number: DeviceNumber { major: 8, minor: 16 },
        size_bytes: 1 << 20,
        sequence: Some(5),
        uuid: None,
        wwid: Some("naa.600a0b80".to_owned()),
        serial: Some("S1".to_owned()),
        backing: None,
        partition_start_bytes: None,
        partition_uuid: None,
        doubtful: false,
    };
    RawCopy {
        id: Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
        state: RawCopyState::Updating,
        base: Uuid::from_u128(0x7465_7374_0000_4000_8000_0000_0000_0001),
        shown: Shown {
            snapshot: Some(Uuid::from_u128(0x7465_7374_0000_4000_8000_0000_0000_0002)),
            instant_ns: 1_700_000_000_123_456_789,
        },
        size: Bytes(3 * 65536 + 8192),
        segment: SegmentSize::new(SegmentSize::MIN).unwrap(),
        description: Description {
            path: "/dev/sdb".to_owned(),
            base: "data@mon".to_owned(),
            shown: Some("data@tue".to_owned()),
            target: TargetRecord { boot: "b".to_owned(), file: None, devices: vec![device] },
        },
        absent: vec![extent(4096, 8192), extent(65536, 3 * 65536 + 8192)],
        checksums: vec![1, u64::MAX, 0x72dc_b18b_67a1_7dff, 0],
    }
}

#[test]
fn the_golden_file_of_version_1_is_read_and_written_the_same() {
    assert_eq!(crc32c(GOLDEN), 0xb582_4844, "a golden file is never regenerated");
    assert_eq!(RawCopy::decode(GOLDEN).unwrap(), sample());
    assert_eq!(sample().encode().unwrap(), GOLDEN);
}

#[test]
fn every_changed_or_missing_byte_is_detected() {
    let good = sample().encode().unwrap();
    for at in 0..good.len() {
        for flip in [0x01, 0x20, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            assert_eq!(RawCopy::decode(&bytes).unwrap_err().kind(), ErrorKind::BadData, "{at} xor {flip:#x}");
        }
        assert_eq!(RawCopy::decode(&good[..at]).unwrap_err().kind(), ErrorKind::BadData, "cut at {at}");
    }
    assert!(RawCopy::decode(&[&good[..], &[0]].concat()).is_err());
}

#[test]
fn the_body_of_another_record_is_refused() {
    let (one, other) = (sample().encode().unwrap(), RawCopy { base: Uuid::from_u128(9), ..sample() });
    let other = other.encode().unwrap();
    assert!(RawCopy::decode(&[&one[..HEADER_BYTES], &other[HEADER_BYTES..]].concat()).is_err());
}

#[test]
fn every_field_is_bounded() {
    let good = sample();
    for wrong in [
        RawCopy { id: Uuid::nil(), ..good.clone() },
        RawCopy { base: Uuid::nil(), ..good.clone() },
        RawCopy { size: Bytes::ZERO, checksums: Vec::new(), absent: Vec::new(), ..good.clone() },
        RawCopy { size: Bytes(u64::MAX), ..good.clone() },
        RawCopy { checksums: vec![0; 3], ..good.clone() },
        RawCopy { checksums: vec![0; 5], ..good.clone() },
        RawCopy { absent: vec![extent(0, 3 * 65536 + 8193)], ..good.clone() },
        RawCopy { absent: vec![extent(8192, 12288), extent(0, 4096)], ..good.clone() },
        RawCopy { absent: vec![extent(0, 4096), extent(4096, 8192)], ..good.clone() },
    ] {
        assert_eq!(wrong.encode().unwrap_err().kind(), ErrorKind::BadData, "{wrong:?}");
    }
    // A header with a right checksum: only the bounds can refuse it.
    for (at, value) in
        [(8, 2), (12, 0), (12, 3), (80, 4096), (84, 1 << 21), (88, u32::MAX), (92, u32::MAX), (96, 1)]
    {
        let mut bytes = good.encode().unwrap();
        put_u32(&mut bytes, at, value);
        let crc = crc32c_salted(HEADER_SALT, &bytes[..HEADER_CRC_AT]);
        put_u32(&mut bytes, HEADER_CRC_AT, crc);
        let body = bytes.len() - CRC_BYTES;
        let crc = body_crc(&bytes[..HEADER_BYTES], &bytes[HEADER_BYTES..body]);
        put_u32(&mut bytes, body, crc);
        assert_eq!(RawCopy::decode(&bytes).unwrap_err().kind(), ErrorKind::BadData, "{value} at {at}");
    }
}

proptest! {
    #[test]
    fn any_record_round_trips(
        (segments, tail) in (1u64..40, 1u64..=65536), ids: (u128, u128, u128), instant: u64, updating: bool,
        cuts in prop::collection::btree_set(0u64..640, 0..40), path: String
    ) {
        let size = (segments - 1) * 65536 + tail;
        let cuts: Vec<u64> = cuts.into_iter().map(|cut| cut * 4096).filter(|cut| *cut <= size).collect();
        let mut record = sample();
        record.id = Uuid::from_u128(ids.0 | 1);
        record.base = Uuid::from_u128(ids.1 | 1);
        record.shown = Shown { snapshot: (ids.2 != 0).then_some(Uuid::from_u128(ids.2)), instant_ns: instant };
        record.state = if updating { RawCopyState::Updating } else { RawCopyState::Complete };
        record.size = Bytes(size);
        record.description.path = path;
        record.description.shown = None;
        record.absent = cuts.chunks_exact(2).map(|pair| extent(pair[0], pair[1])).collect();
        record.checksums = (0..segments).map(|at| at.wrapping_mul(instant)).collect();
        prop_assert_eq!(RawCopy::decode(&record.encode().unwrap()).unwrap(), record);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = RawCopy::decode(&bytes);
        let good = sample().encode().unwrap();
        prop_assert!(RawCopy::decode(&[&good[..HEADER_BYTES], &bytes].concat()).is_err());
    }
}
