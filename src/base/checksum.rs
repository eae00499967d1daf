//! Checksums. CRC-32C (Castagnoli), salted by the kind of block, covers the blocks that Tidemark itself lays out.
//! XXH3-64 covers the user's data.
//!
//! Why user data needs another one: a CRC is linear. A block that ends with its own CRC-32C adds the same value to the
//! CRC-32C of everything around it, whatever the block holds. ext4 ends its superblock and other metadata that way, so
//! CRC-32C cannot tell two versions of them apart. XXH3 is not linear, and no filesystem ends its blocks with it.

/// CRC-32C of `data`.
#[must_use]
pub fn crc32c(data: &[u8]) -> u32 {
    ::crc32c::crc32c(data)
}

/// CRC-32C of the data that `crc` covers, followed by `data`.
#[must_use]
pub fn crc32c_append(crc: u32, data: &[u8]) -> u32 {
    ::crc32c::crc32c_append(crc, data)
}

/// CRC-32C of `salt` followed by `data`. The salt keeps a block of one kind from passing for a block of
/// another.
#[must_use]
pub fn crc32c_salted(salt: &[u8], data: &[u8]) -> u32 {
    crc32c_append(crc32c(salt), data)
}

/// XXH3-64 of `data`, seed 0, default secret (xxHash specification, version 0.2.0 of XXH3). It detects accidents,
/// not forgery.
#[must_use]
pub fn xxh3_64(data: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(data)
}

/// A payload of `length` bytes, at least 2048, of which the bytes 1024 to 2048 are like a superblock of ext4 with
/// metadata checksums: they end with their own CRC-32C, not inverted, as ext4 stores it. `change` is the part that a
/// mount changes.
#[cfg(test)]
pub(crate) fn with_ext4_superblock(length: usize, change: u64) -> Vec<u8> {
    let mut payload: Vec<u8> =
        (0u32..).flat_map(|word| word.wrapping_mul(0x9e37_79b9).to_le_bytes()).take(length).collect();
    let block = &mut payload[1024..2048];
    block[0x2c..0x34].copy_from_slice(&change.to_le_bytes());
    block[0x38..0x3a].copy_from_slice(&0xef53u16.to_le_bytes());
    // ext4_superblock_csum: crc32c(~0, superblock up to s_checksum), without the final inversion.
    let checksum = !crc32c(&block[..1020]);
    block[1020..].copy_from_slice(&checksum.to_le_bytes());
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_value_of_the_catalogue() {
        // RFC 3720 appendix B.4 / the CRC catalogue's check value.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_append(crc32c(b"1234"), b"56789"), 0xe306_9283);
        assert_ne!(crc32c_salted(b"a", b"x"), crc32c_salted(b"b", b"x"));
        // XXH3_64bits of the reference implementation: `xxhsum -H3`, and its sanity check of an empty input.
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(xxh3_64(b"123456789"), 0x72dc_b18b_67a1_7dff);
    }

    #[test]
    fn a_block_that_ends_with_its_own_crc_hides_from_crc32c_alone() {
        let (old, new) = (with_ext4_superblock(65536, 1), with_ext4_superblock(65536, 2));
        assert!(old != new);
        assert_eq!(crc32c(&old), crc32c(&new), "the hole that XXH3 closes");
        assert_ne!(xxh3_64(&old), xxh3_64(&new));
    }
}
