//! A superblock from any bytes: no panic, and a decoded block survives encoding and decoding unchanged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidemark::base::checksum::crc32c_salted;
use tidemark::format::archive::{BLOCK_BYTES, Superblock};

/// Without a valid checksum every input would be rejected.
fn sign(block: &mut [u8], salt: &[u8]) {
    let crc = crc32c_salted(salt, &block[..BLOCK_BYTES - 4]);
    block[BLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
}

fuzz_target!(|data: &[u8]| {
    let _ = Superblock::decode_head(data);
    let _ = Superblock::decode_tail(data);
    let mut block = vec![0; BLOCK_BYTES];
    let length = data.len().min(BLOCK_BYTES);
    block[..length].copy_from_slice(&data[..length]);
    block[..8].copy_from_slice(b"TIDEMARK");
    let mut again = vec![0xff; BLOCK_BYTES];
    sign(&mut block, b"tidemark superblock head");
    if let Ok(facts) = Superblock::decode_head(&block) {
        facts.encode_head(&mut again).expect("what was decoded can be encoded");
        assert_eq!(again, block);
    }
    sign(&mut block, b"tidemark superblock tail");
    if let Ok((facts, totals)) = Superblock::decode_tail(&block) {
        facts.encode_tail(&totals, &mut again).expect("what was decoded can be encoded");
        assert_eq!(again, block);
    }
});
