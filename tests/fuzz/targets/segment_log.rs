//! The segment log from any bytes with corrected checksums: no panic, every field within its bounds, and a decoded log
//! encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::base::checksum::crc32c_salted;
use tidemark::format::segment_log::{HEADER_BYTES, Header, RECORD_BYTES, Record, decode};

static GOLDEN: &[u8] = include_bytes!("../../golden/segment_log/v2.segments");

fuzz_target!(|input: (bool, &[u8])| {
    let (golden_header, data) = input;
    let _ = decode(data);
    let mut bytes = if golden_header { GOLDEN[..HEADER_BYTES].to_vec() } else { vec![0; HEADER_BYTES] };
    let from = if golden_header { HEADER_BYTES } else { 12 };
    bytes.truncate(from);
    bytes.extend_from_slice(data);
    if bytes.len() < HEADER_BYTES {
        bytes.resize(HEADER_BYTES, 0);
    }
    bytes[..8].copy_from_slice(b"TDMPROGR");
    bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
    let crc = crc32c_salted(b"tidemark progress header", &bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    let job: [u8; 16] = bytes[16..32].try_into().expect("the slice has 16 bytes");
    for (number, block) in (0u64..).zip(bytes[HEADER_BYTES..].chunks_exact_mut(RECORD_BYTES)) {
        let salt = [&b"tidemark progress record"[..], &job, &number.to_le_bytes()].concat();
        let check = crc32c_salted(&salt, &block[..RECORD_BYTES - 4]);
        block[RECORD_BYTES - 4..].copy_from_slice(&check.to_le_bytes());
    }
    let Ok((header, records, length)) = decode(&bytes) else { return };
    let mut again = header.encode().expect("what was decoded can be encoded").to_vec();
    for (number, record) in (0..).zip(&records) {
        if let Record::Placed(placed) = record {
            assert!(placed.ix.get() < header.segment_count());
            assert!(placed.frame.is_none_or(|frame| frame < header.segment_count()));
        }
        again.extend(Header::encode_record(&header, number, record).expect("what was decoded can be encoded"));
    }
    assert_eq!(again, bytes[..length]);
});
