//! What ext4 notes on its device at every mount: any other host or boot that mounts it leaves a trace there.
//!
//! A mount for writing increments a count and writes its time. While it is mounted for writing, a flag says that its
//! journal has to be replayed; a replay, also by a mount that is read-only, clears it. Programs such as e2fsck and
//! tune2fs write the time of the superblock's last change, which counts while the filesystem is not mounted.
//!
//! Pure: the caller reads. Decoding never panics.
//!
//! Source: Linux `fs/ext4/ext4.h` (`struct ext4_super_block`), `ext4_setup_super`, `ext4_clear_journal_err` and
//! `ext4_mark_recovery_complete` in `fs/ext4/super.c`.

use super::bytes::{get, get_u16, get_u32};

/// Bytes needed from the beginning of a filesystem.
pub const HEAD_BYTES: usize = 4096;

/// Offset of the superblock.
const SUPER: usize = 1024;
const MAGIC: u16 = 0xef53;
/// `EXT4_FEATURE_INCOMPAT_RECOVER`.
const RECOVER: u32 = 4;

/// The trace of mounts, as text: equal if no mount for writing and no replay came in between. None for anything but
/// ext4.
#[must_use]
pub fn trace(head: &[u8]) -> Option<String> {
    let head = head.get(..HEAD_BYTES)?;
    let block = &head[SUPER..];
    if get_u16(block, 0x38) != MAGIC {
        return None;
    }
    let uuid: String = get::<16>(block, 0x68).iter().map(|byte| format!("{byte:02x}")).collect();
    let time = |low: usize, high: usize| {
        let [high] = get::<1>(block, high);
        (u64::from(high) << 32) | u64::from(get_u32(block, low))
    };
    let (mounted, written) = (time(0x2c, 0x275), time(0x30, 0x274));
    let state = match get_u32(block, 0x60) & RECOVER {
        // It is not mounted for writing, so the time of its last change stays.
        0 => format!("dirty 0 written {written}"),
        _ => "dirty 1".to_owned(),
    };
    Some(format!("ext4 {uuid} mounts {} last {mounted} {state}", get_u16(block, 0x34)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mark_of_a_mount_changes_the_trace_and_nothing_else_does() {
        let mut head = vec![0u8; HEAD_BYTES];
        assert_eq!(trace(&head), None);
        head[SUPER + 0x38..SUPER + 0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        head[SUPER + 0x34] = 7;
        let first = trace(&head).unwrap();
        assert_eq!(first, format!("ext4 {} mounts 7 last 0 dirty 0 written 0", "0".repeat(32)));
        for at in 0..HEAD_BYTES {
            let mut other = head.clone();
            other[at] ^= 4;
            let is_mark = [0x2c..0x36, 0x68..0x78, 0x274..0x276, 0x60..0x61]
                .iter()
                .any(|marks| at >= SUPER && marks.contains(&(at - SUPER)));
            let is_magic = (SUPER + 0x38..SUPER + 0x3a).contains(&at);
            let found = trace(&other);
            assert_eq!(found.is_none(), is_magic, "{at}");
            assert_eq!(found.as_ref() != Some(&first), is_mark || is_magic, "{at}");
        }
        assert_eq!(trace(&head[..HEAD_BYTES - 1]), None);
    }
}
