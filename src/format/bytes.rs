//! Little-endian fields at fixed positions of a block.
//!
//! The positions are constants of the formats. A position outside the block is a bug of this program, never a
//! fault of the medium, and panics.

/// A 4 KiB block, the unit of every format here.
pub const BLOCK_BYTES: usize = 4096;

/// A block of zeros to compare padding with.
static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

pub fn get_u16(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(get(block, at))
}

pub fn get_u32(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(get(block, at))
}

pub fn get_u64(block: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(get(block, at))
}

/// `N` bytes at `at`.
pub fn get<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    block[at..at + N].try_into().expect("the slice has N bytes")
}

pub fn put_u16(block: &mut [u8], at: usize, value: u16) {
    put(block, at, &value.to_le_bytes());
}

pub fn put_u32(block: &mut [u8], at: usize, value: u32) {
    put(block, at, &value.to_le_bytes());
}

pub fn put_u64(block: &mut [u8], at: usize, value: u64) {
    put(block, at, &value.to_le_bytes());
}

pub fn put(block: &mut [u8], at: usize, value: &[u8]) {
    block[at..at + value.len()].copy_from_slice(value);
}

/// True if every byte is zero.
pub fn is_zero(data: &[u8]) -> bool {
    data.chunks(BLOCK_BYTES).all(|part| part == &ZEROS[..part.len()])
}
