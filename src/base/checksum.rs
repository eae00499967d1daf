//! CRC-32C (Castagnoli), which x86-64 and aarch64 compute in hardware; salted by the kind of block.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_value_of_the_catalogue() {
        // RFC 3720 appendix B.4 / the CRC catalogue's check value.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_append(crc32c(b"1234"), b"56789"), 0xe306_9283);
        assert_ne!(crc32c_salted(b"a", b"x"), crc32c_salted(b"b", b"x"));
    }
}
