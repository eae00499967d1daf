use proptest::prelude::*;

use super::*;
use crate::base::ErrorKind;

const GOLDEN: &[u8] = include_bytes!("../../../tests/golden/segment_log/v2.segments");
const GOLDEN_V1: &[u8] = include_bytes!("../../../tests/golden/segment_log/v1.segments");

fn header(form: SecondaryForm) -> Header {
    Header {
        job: Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
        form,
        archive: (form == SecondaryForm::Archive)
            .then(|| Uuid::from_u128(0x7465_7374_0000_4000_8000_0000_0000_0001)),
        origin_size: Bytes(5 * 65536 + 700),
        segment: SegmentSize::new(SegmentSize::MIN).unwrap(),
        instant_ns: 1_700_000_000_123_456_789,
    }
}

fn placed(ix: u64, frame: Option<u64>, checksum: Option<u64>, zero: bool) -> Record {
    Record::Placed(PlacedSegment { ix: SegmentIx(ix), frame, checksum, zero })
}

/// The content that tests/golden/segment_log/README.md describes.
fn sample() -> (Header, Vec<Record>) {
    let records = vec![
        placed(3, Some(0), Some(0x72dc_b18b_67a1_7dff), false),
        placed(0, Some(2), Some(1), false),
        placed(5, None, None, true),
        placed(1, Some(1), Some(u64::MAX), true),
        placed(0, Some(2), Some(2), false),
        Record::OriginalsBegun,
        Record::OriginalsBegun,
    ];
    (header(SecondaryForm::Archive), records)
}

fn encode(header: &Header, records: &[Record]) -> Vec<u8> {
    let mut bytes = header.encode().unwrap().to_vec();
    for (number, record) in (0..).zip(records) {
        bytes.extend(header.encode_record(number, record).unwrap());
    }
    bytes
}

#[test]
fn the_golden_file_of_version_2_is_read_and_written_the_same() {
    let (header, records) = sample();
    assert_eq!(crate::base::checksum::crc32c(GOLDEN), 0x8982_7673, "a golden file is never regenerated");
    assert_eq!(decode(GOLDEN).unwrap(), (header.clone(), records.clone(), GOLDEN.len()));
    assert_eq!(encode(&header, &records), GOLDEN);
}

#[test]
fn a_log_of_version_1_is_refused_by_name() {
    assert_eq!(crate::base::checksum::crc32c(GOLDEN_V1), 0x58bf_71b0, "a golden file is never regenerated");
    let error = decode(GOLDEN_V1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("an older Tidemark"), "{error}");
}

#[test]
fn every_changed_byte_is_detected_and_only_the_end_may_be_torn() {
    let (header, records) = sample();
    let good = encode(&header, &records);
    let last = good.len() - RECORD_BYTES;
    for at in 0..good.len() {
        for flip in [0x01, 0x20, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            match decode(&bytes) {
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::BadData);
                    assert!(at < last, "byte {at} xor {flip:#x}: {error}");
                }
                Ok((_, read, length)) => {
                    assert!(at >= last, "byte {at} xor {flip:#x} was not noticed");
                    assert_eq!((read.as_slice(), length), (&records[..records.len() - 1], last));
                    // If anything follows the bad record, even a part of a record, it was not caused by
                    // truncation.
                    bytes.push(0);
                    assert!(decode(&bytes).is_err());
                }
            }
        }
    }
}

#[test]
fn a_truncated_file_keeps_its_whole_records() {
    let (header, records) = sample();
    let good = encode(&header, &records);
    for cut in 0..good.len() {
        match decode(&good[..cut]) {
            Err(_) => assert!(cut < HEADER_BYTES, "cut at {cut}"),
            Ok((found, read, length)) => {
                let whole = (cut - HEADER_BYTES) / RECORD_BYTES;
                assert_eq!(found, header);
                assert_eq!(
                    (read.as_slice(), length),
                    (&records[..whole], HEADER_BYTES + whole * RECORD_BYTES)
                );
            }
        }
    }
}

#[test]
fn records_of_another_place_or_job_are_bad() {
    let (header, records) = sample();
    let good = encode(&header, &records);
    let record = |n: usize| &good[HEADER_BYTES + n * RECORD_BYTES..][..RECORD_BYTES];
    let head = &good[..HEADER_BYTES];
    for wrong in [
        [head, record(1), record(0), record(2)].concat(),
        [head, record(0), record(0), record(2)].concat(),
        [head, record(0), record(2), record(3)].concat(),
    ] {
        assert!(decode(&wrong).is_err());
    }
    let other = Header { job: Uuid::from_u128(9), ..header };
    let mixed = [&other.encode().unwrap()[..], record(0), record(1)].concat();
    assert!(decode(&mixed).is_err());
}

/// A record with these words and a right check: only the bounds can refuse it.
fn signed(header: &Header, words: [u32; 4]) -> Vec<u8> {
    let mut block = [0; RECORD_BYTES];
    for (at, word) in words.into_iter().enumerate() {
        put_u32(&mut block, at * 4, word);
    }
    let check = header.record_check(0, &block);
    put_u32(&mut block, RECORD_CHECK_AT, check);
    [&header.encode().unwrap()[..], &block].concat()
}

#[test]
fn every_field_is_bounded() {
    let archive = header(SecondaryForm::Archive);
    let (data, zero, mark) = (1u32 << 24, 2u32 << 24, 3u32 << 24);
    let (frame, checksum) = (1u32 << 24, 2u32 << 24);
    assert!(decode(&signed(&archive, [data | 5, frame | 5, 0, 0])).is_ok());
    for words in [
        [data | 6, frame, 0, 0],
        [data, frame | 6, 0, 0],
        [data, 0, 0, 0],
        [data, frame | 4 << 24, 0, 0],
        [zero, 1, 0, 0],
        [zero, 0, 1, 0],
        [zero, 0, 0, 1],
        [mark | 1, 0, 0, 0],
        [mark, 1, 0, 0],
        [mark, checksum, 0, 0],
        [mark, 0, 1, 0],
        [mark, 0, 0, 1],
        [0, 0, 0, 0],
        [4 << 24, 0, 0, 0],
    ] {
        assert_eq!(decode(&signed(&archive, words)).unwrap_err().kind(), ErrorKind::BadData, "{words:x?}");
    }
    let raw = header(SecondaryForm::Raw);
    assert!(decode(&signed(&raw, [data, checksum, 7, 7])).is_ok());
    assert!(decode(&signed(&raw, [data, frame, 0, 0])).is_err());
    for wrong in [
        Header { archive: None, ..archive.clone() },
        Header { archive: Some(Uuid::nil()), ..archive.clone() },
        Header { archive: archive.archive, ..raw },
        Header { origin_size: Bytes(u64::MAX), ..archive.clone() },
    ] {
        assert!(wrong.encode().is_err(), "{wrong:?}");
    }
    let (_, records) = sample();
    let bytes = encode(&archive, &[&records[5..6], &records[..1]].concat());
    assert!(decode(&bytes).unwrap_err().to_string().contains("after the originals"));
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let record = (0u64..6, prop::option::of(0u64..6), any::<Option<u64>>(), any::<bool>()).prop_map(
        |(ix, frame, checksum, zero)| {
            placed(ix, if zero { frame } else { frame.or(Some(ix)) }, checksum, zero)
        },
    );
    (prop::collection::vec(record, 0..60), any::<bool>()).prop_map(|(mut records, begun)| {
        records.extend(begun.then_some(Record::OriginalsBegun));
        records
    })
}

proptest! {
    #[test]
    fn any_records_round_trip(records in records(), instant: u64, job: u128) {
        let header = Header { job: Uuid::from_u128(job), instant_ns: instant, ..header(SecondaryForm::Archive) };
        let bytes = encode(&header, &records);
        prop_assert_eq!(decode(&bytes).unwrap(), (header, records, bytes.len()));
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes);
        let header = header(SecondaryForm::Raw).encode().unwrap();
        let _ = decode(&[&header[..], &bytes].concat());
    }
}
