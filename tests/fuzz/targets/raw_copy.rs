//! The record of a raw copy from any bytes with corrected checksums: no panic, every field within its bounds, and a
//! decoded record encodes to one that decodes to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::base::checksum::crc32c_salted;
use tidemark::format::raw_copy::{HEADER_BYTES, RawCopy};

static GOLDEN: &[u8] = include_bytes!("../../golden/raw_copy/v1.copy");

fuzz_target!(|input: (bool, &[u8])| {
    let (golden_header, data) = input;
    let _ = RawCopy::decode(data);
    let mut bytes = if golden_header { GOLDEN[..HEADER_BYTES].to_vec() } else { GOLDEN[..12].to_vec() };
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().max(HEADER_BYTES + 4), 0);
    let crc = crc32c_salted(b"tidemark raw copy header", &bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    let end = bytes.len() - 4;
    let salt = [&b"tidemark raw copy body"[..], &bytes[..HEADER_BYTES - 4]].concat();
    let crc = crc32c_salted(&salt, &bytes[HEADER_BYTES..end]);
    bytes[end..].copy_from_slice(&crc.to_le_bytes());
    let Ok(copy) = RawCopy::decode(&bytes) else { return };
    assert!(copy.absent.iter().all(|extent| extent.end() <= copy.size));
    assert_eq!(copy.checksums.len() as u64, copy.segment_count());
    // Fields of the description that this program does not know are not kept, so the bytes may differ.
    let again = copy.encode().expect("what was decoded can be encoded");
    assert_eq!(RawCopy::decode(&again).expect("what was encoded can be decoded"), copy);
});
