//! Finds the log (the journal) of a filesystem from the first bytes of ext4 and XFS.
//!
//! It is a hint for the order of a copy: the log is what every filesystem writes most. The exactness of a
//! copy does not depend on it, so a log that is not understood, or contradicts itself, counts as absent.
//! Pure: the caller reads. Decoding never panics.
//!
//! Sources: Linux `fs/ext4/ext4.h` (`struct ext4_super_block`: `s_jnl_blocks` keeps a copy of the journal
//! inode's `i_block`), `fs/ext4/ext4_extents.h`, `fs/xfs/libxfs/xfs_format.h` (`struct xfs_dsb`).

use super::bytes::{get, get_u16, get_u32};
use crate::base::{Bytes, Extent};

/// Bytes needed from the beginning of a filesystem.
pub const HEAD_BYTES: usize = 4096;

/// Most extents of a log; mkfs creates it with few.
pub const EXTENTS_MAX: usize = 64;

/// Offset of ext4's superblock.
const EXT4_SUPER: usize = 1024;
const EXT4_MAGIC: u16 = 0xef53;
const EXT4_COMPAT_HAS_JOURNAL: u32 = 4;
/// `s_jnl_blocks` holds the journal inode's `i_block`.
const EXT4_BACKED_UP: u8 = 1;
const EXT4_EXTENTS_MAGIC: u16 = 0xf30a;
/// Greatest depth of a journal's extent tree: its root, and one level of blocks below.
const EXT4_DEPTH_MAX: u16 = 1;
/// Length of a header and of an entry of an extent tree.
const EXT4_ENTRY_BYTES: usize = 12;
/// Longest initialized extent; a larger value marks an uninitialized one.
const EXT4_LENGTH_MAX: u16 = 32768;
const BLOCK_BYTES_MAX: u64 = 65536;

/// Reads this many bytes of the filesystem's device at an offset; None if that fails.
pub type Read<'a> = &'a mut dyn FnMut(Bytes, usize) -> Option<Vec<u8>>;

/// The log's extents on the filesystem's device, in the log's order; none if the log is elsewhere or is
/// not understood.
#[must_use]
pub fn find(read: Read<'_>) -> Vec<Extent> {
    let Some(head) = read(Bytes::ZERO, HEAD_BYTES).filter(|head| head.len() >= HEAD_BYTES) else {
        return Vec::new();
    };
    let found = if head.starts_with(b"XFSB") { xfs(&head).into_iter().collect() } else { ext4(&head, read) };
    if found.len() <= EXTENTS_MAX { found } else { Vec::new() }
}

fn xfs(head: &[u8]) -> Option<Extent> {
    let be32 = |at| u64::from(u32::from_be_bytes(get(head, at)));
    let (block, ag_blocks, log_blocks) = (be32(4), be32(84), be32(96));
    let start = u64::from_be_bytes(get(head, 48));
    let ag_bits = u32::from(head[124]);
    // An external log has no start.
    if start == 0 || block > BLOCK_BYTES_MAX || !(1..=32).contains(&ag_bits) {
        return None;
    }
    let (group, within) = (start >> ag_bits, start & ((1 << ag_bits) - 1));
    let first = group.checked_mul(ag_blocks)?.checked_add(within)?;
    extent(first, log_blocks, block)
}

fn ext4(head: &[u8], read: Read<'_>) -> Vec<Extent> {
    let superblock = &head[EXT4_SUPER..];
    let block_bits = get_u32(superblock, 0x18);
    let is_known = get_u16(superblock, 0x38) == EXT4_MAGIC
        && get_u32(superblock, 0x5c) & EXT4_COMPAT_HAS_JOURNAL != 0
        // Otherwise the journal is on a device of its own.
        && get_u32(superblock, 0xe0) != 0
        && superblock[0xfd] == EXT4_BACKED_UP
        && block_bits <= 6;
    if !is_known {
        return Vec::new();
    }
    let block = 1024u64 << block_bits;
    let root = &superblock[0x10c..0x10c + 60];
    let mut found = Vec::new();
    match ext4_node(root, block, read, EXT4_DEPTH_MAX, &mut found) {
        Some(()) => found,
        None => Vec::new(),
    }
}

/// Adds the extents below a node of a tree; None if the node is invalid.
fn ext4_node(node: &[u8], block: u64, read: Read<'_>, depth_max: u16, found: &mut Vec<Extent>) -> Option<()> {
    let (entries, depth) = (usize::from(get_u16(node, 2)), get_u16(node, 6));
    let fits = (entries + 1) * EXT4_ENTRY_BYTES <= node.len();
    if get_u16(node, 0) != EXT4_EXTENTS_MAGIC || !fits || depth > depth_max {
        return None;
    }
    for entry in node[EXT4_ENTRY_BYTES..].chunks_exact(EXT4_ENTRY_BYTES).take(entries) {
        if found.len() > EXTENTS_MAX {
            return None;
        }
        if depth == 0 {
            let length = get_u16(entry, 4);
            let length = if length > EXT4_LENGTH_MAX { length - EXT4_LENGTH_MAX } else { length };
            let start = u64::from(get_u16(entry, 6)) << 32 | u64::from(get_u32(entry, 8));
            found.push(extent(start, u64::from(length), block)?);
        } else {
            let leaf = u64::from(get_u16(entry, 8)) << 32 | u64::from(get_u32(entry, 4));
            let length = Bytes(block).as_len();
            let below = read(Bytes(leaf.checked_mul(block)?), length).filter(|it| it.len() >= length)?;
            ext4_node(&below, block, read, depth - 1, found)?;
        }
    }
    Some(())
}

fn extent(first: u64, count: u64, block: u64) -> Option<Extent> {
    Extent::with_length(Bytes(first.checked_mul(block)?), Bytes(count.checked_mul(block)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::bytes::{put, put_u16, put_u32};

    fn read_from(disk: &[u8], at: Bytes, length: usize) -> Option<Vec<u8>> {
        disk.get(at.as_len()..at.as_len().checked_add(length)?).map(<[u8]>::to_vec)
    }

    fn found(disk: &[u8]) -> Vec<(u64, u64)> {
        let extents = find(&mut |at, length| read_from(disk, at, length));
        extents.iter().map(|it| (it.start().get(), it.length().get())).collect()
    }

    fn header(node: &mut [u8], entries: u16, depth: u16) {
        put_u16(node, 0, EXT4_EXTENTS_MAGIC);
        put_u16(node, 2, entries);
        put_u16(node, 6, depth);
    }

    fn leaf_entry(node: &mut [u8], index: usize, start: u64, length: u16) {
        let entry = &mut node[EXT4_ENTRY_BYTES * (index + 1)..];
        put_u16(entry, 4, length);
        put_u16(entry, 6, u16::try_from(start >> 32).unwrap());
        put_u32(entry, 8, u32::try_from(start & 0xffff_ffff).unwrap());
    }

    /// An ext4 with blocks of 4 KiB; the root of its journal's extent tree is still empty.
    fn ext4_disk() -> Vec<u8> {
        let mut disk = vec![0; 64 << 10];
        let superblock = &mut disk[EXT4_SUPER..];
        put_u32(superblock, 0x18, 2);
        put_u16(superblock, 0x38, EXT4_MAGIC);
        put_u32(superblock, 0x5c, EXT4_COMPAT_HAS_JOURNAL);
        put_u32(superblock, 0xe0, 8);
        superblock[0xfd] = EXT4_BACKED_UP;
        disk
    }

    #[test]
    fn an_ext4_journal_is_found_by_the_copy_of_its_inode() {
        let mut disk = ext4_disk();
        let root = &mut disk[EXT4_SUPER + 0x10c..];
        header(root, 2, 0);
        leaf_entry(root, 0, 1 << 33, 4096);
        leaf_entry(root, 1, 77, EXT4_LENGTH_MAX + 5);
        assert_eq!(found(&disk), [(1 << 45, 16 << 20), (77 * 4096, 5 * 4096)]);
        // With more than four extents the root refers to blocks of them.
        header(&mut disk[EXT4_SUPER + 0x10c..], 1, 1);
        let index = EXT4_SUPER + 0x10c + EXT4_ENTRY_BYTES;
        put_u32(&mut disk[index..], 4, 3);
        put_u16(&mut disk[index..], 8, 0);
        let leaf = &mut disk[3 * 4096..];
        header(leaf, 5, 0);
        (0..5).for_each(|at| leaf_entry(leaf, at, 1000 * u64::try_from(at + 1).unwrap(), 10));
        let expected: Vec<_> = (1..=5u64).map(|at| (at * 1000 * 4096, 40960)).collect();
        assert_eq!(found(&disk), expected);
    }

    #[test]
    fn an_xfs_log_is_in_its_group() {
        let mut disk = vec![0; HEAD_BYTES];
        put(&mut disk, 0, b"XFSB");
        put(&mut disk, 4, &4096u32.to_be_bytes());
        put(&mut disk, 48, &((2u64 << 15) + 6).to_be_bytes());
        put(&mut disk, 84, &19456u32.to_be_bytes());
        put(&mut disk, 96, &4096u32.to_be_bytes());
        disk[124] = 15;
        assert_eq!(found(&disk), [((2 * 19456 + 6) * 4096, 16 << 20)]);
        put(&mut disk, 48, &0u64.to_be_bytes());
        assert_eq!(found(&disk), [], "an external log");
    }

    #[test]
    fn what_is_not_understood_has_no_log() {
        assert_eq!(found(&[]), []);
        assert_eq!(found(&[0; 8192]), []);
        for (at, value) in
            [(0x5c, 0), (0xe0, 0), (0xfd, 0), (0x18, 9), (0x38, 0), (0x10c, 0), (0x10e, 99), (0x112, 2)]
        {
            let mut disk = ext4_disk();
            header(&mut disk[EXT4_SUPER + 0x10c..], 1, 0);
            leaf_entry(&mut disk[EXT4_SUPER + 0x10c..], 0, 8, 8);
            assert_eq!(found(&disk).len(), 1);
            disk[EXT4_SUPER + at] = value;
            assert_eq!(found(&disk), [], "byte {at:#x}");
        }
    }

    proptest! {
        #[test]
        fn decoding_never_panics(
            changes in prop::collection::vec((0usize..HEAD_BYTES, any::<u8>()), 0..40), is_xfs in any::<bool>(),
        ) {
            let mut disk = ext4_disk();
            header(&mut disk[EXT4_SUPER + 0x10c..], 4, 1);
            if is_xfs {
                put(&mut disk, 0, b"XFSB");
            }
            for (at, value) in changes {
                disk[at] = value;
            }
            prop_assert!(found(&disk).len() <= EXTENTS_MAX);
        }
    }
}
