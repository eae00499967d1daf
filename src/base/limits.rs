//! Every bound that is not a format's own, by name, with its reason.

use super::units::Bytes;

/// Alignment of buffers, offsets and lengths for direct I/O: the largest logical block in use
/// (zram, 4Kn disks).
pub const DIRECT_IO_ALIGN: Bytes = Bytes::kib(4);

/// Memory for copy buffers, whatever the device's size.
pub const COPY_BUFFER_BYTES_MAX: Bytes = Bytes::mib(32);

/// Segments in one copy: the archive's index and the verifier's checksums take 4 bytes for each.
/// A larger device gets a larger segment by default (16 TiB at 4 MiB).
pub const SEGMENT_COUNT_MAX: u64 = 4 * 1024 * 1024;

/// Exceptions held in memory at once; a longer list is worked through in batches of this size.
pub const EXCEPTION_BATCH_MAX: usize = 1 << 19;
