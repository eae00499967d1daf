//! The id of a filesystem: its UUID, or a FAT volume's serial number, from the first bytes of its device. For
//! filesystems whose id the kernel does not report.
//!
//! Pure: the caller reads. Decoding never panics; an unknown filesystem has no id.
//!
//! Sources: Linux `fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h`, `include/linux/f2fs_fs.h`,
//! `include/uapi/linux/msdos_fs.h`, `fs/exfat/exfat_raw.h`.

use super::bytes::{get, get_u16, get_u32};

/// Bytes needed from the beginning of a filesystem.
pub const HEAD_BYTES: usize = 4096;

/// Offset of the superblock of ext4 and f2fs.
const SUPER: usize = 1024;
const EXT4_MAGIC: u16 = 0xef53;
const F2FS_MAGIC: u32 = 0xf2f5_2010;
/// The end of a FAT boot sector.
const BOOT_MAGIC: u16 = 0xaa55;
/// The extended boot signature of FAT: a volume serial number follows.
const FAT_HAS_SERIAL: u8 = 0x29;

/// The filesystem's id in hexadecimal digits, as [`text`] formats it.
#[must_use]
pub fn find(head: &[u8]) -> Option<String> {
    let head = head.get(..HEAD_BYTES)?;
    let uuid = |at: usize| text(&get::<16>(head, at));
    if head.starts_with(b"XFSB") {
        return uuid(32);
    }
    if get_u16(head, SUPER + 0x38) == EXT4_MAGIC {
        return uuid(SUPER + 0x68);
    }
    if get_u32(head, SUPER) == F2FS_MAGIC {
        return uuid(SUPER + 108);
    }
    if get_u16(head, 510) != BOOT_MAGIC {
        return None;
    }
    let serial = |at: usize| text(&get::<4>(head, at));
    if head[3..].starts_with(b"EXFAT   ") {
        return serial(100);
    }
    // FAT32, then FAT12 and FAT16.
    let is = |at: usize, name: &[u8], signature: usize| {
        head[at..].starts_with(name) && head[signature] == FAT_HAS_SERIAL
    };
    if is(82, b"FAT32", 66) {
        return serial(67);
    }
    if is(54, b"FAT", 38) { serial(39) } else { None }
}

/// `id` in hexadecimal digits. None for zeros, which are not an id.
#[must_use]
pub fn text(id: &[u8]) -> Option<String> {
    let is_none = id.iter().all(|byte| *byte == 0);
    (!is_none).then(|| id.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        for (at, bytes) in parts {
            head[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn ids_are_where_each_filesystem_has_them() {
        let uuid: Vec<u8> = (1..=16).collect();
        let hex = Some("0102030405060708090a0b0c0d0e0f10".to_owned());
        assert_eq!(find(&head(&[(0, b"XFSB"), (32, &uuid)])), hex);
        assert_eq!(find(&head(&[(1024 + 0x38, &[0x53, 0xef]), (1024 + 0x68, &uuid)])), hex);
        assert_eq!(find(&head(&[(1024, &[0x10, 0x20, 0xf5, 0xf2]), (1024 + 108, &uuid)])), hex);
        let boot: (usize, &[u8]) = (510, &[0x55, 0xaa]);
        let serial = Some("01020304".to_owned());
        assert_eq!(find(&head(&[boot, (3, b"EXFAT   "), (100, &uuid[..4])])), serial);
        assert_eq!(find(&head(&[boot, (82, b"FAT32   "), (66, &[0x29]), (67, &uuid[..4])])), serial);
        assert_eq!(find(&head(&[boot, (54, b"FAT16   "), (38, &[0x29]), (39, &uuid[..4])])), serial);
        for none in [head(&[]), head(&[boot]), head(&[(0, b"XFSB")]), vec![0; 100]] {
            assert_eq!(find(&none), None);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_not(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            let _ = find(&bytes);
        }
    }
}
