//! Every bound that is not a format's own, by name, with its reason.

use std::time::Duration;

use super::units::Bytes;

/// Alignment of buffers, offsets and lengths for direct I/O: the largest logical block in use
/// (zram, 4Kn disks).
pub const DIRECT_IO_ALIGN: Bytes = Bytes::kib(4);

/// What the copier asks a live origin's disk for at once, for each of its reads in flight: an application's
/// request, and the read by which a first write is preserved, wait behind it. 128 KiB is what the kernel
/// itself reads ahead; most disks are as fast with it as with more.
pub const LIVE_READ_BYTES: Bytes = Bytes::kib(128);

/// The same for a disk that rotates. Its time goes to seeks, one for each request once an application's come in between:
/// eight small reads would cost the application eight seeks, and one large read costs it the transfer of a mebibyte.
pub const LIVE_READ_ROTATING_BYTES: Bytes = Bytes::mib(1);

/// Memory for copy buffers, whatever the device's size.
pub const COPY_BUFFER_BYTES_MAX: Bytes = Bytes::mib(32);

/// The same for a live origin, which is asked for little at a time: it waits while they are zeroed and pinned, a tenth of
/// a second in an emulated guest.
pub const LIVE_COPY_BUFFER_BYTES_MAX: Bytes = Bytes::mib(16);

/// Segments in one copy: the archive's index and the verifier's checksums take 4 bytes for each.
/// A larger device gets a larger segment by default (16 TiB at 4 MiB).
pub const SEGMENT_COUNT_MAX: u64 = 4 * 1024 * 1024;

/// Exceptions held in memory at once; a longer list is worked through in batches of this size.
pub const EXCEPTION_BATCH_MAX: usize = 1 << 19;

/// Free ranges of an origin that are left out of a copy: each can cost two runs of its table, and
/// [`ORIGIN_TABLE_RUNS_MAX`] has to hold the released ranges too.
pub const FREE_RANGES_MAX: usize = 2000;

/// The smallest free range that is left out. Below it a range costs more, as a line of the table and
/// as an extent of its data frame, than it saves; and it bounds the extents of a frame: a segment of
/// 16 MiB holds at most 257 extents between free ranges of this size.
pub const FREE_RANGE_BYTES_MIN: Bytes = Bytes::kib(64);

/// Free extents of one filesystem that are remembered while it is frozen: far more than
/// [`FREE_RANGES_MAX`], so that the largest are among them; 256 KiB.
pub const FREE_EXTENTS_READ_MAX: usize = 16 * 1024;

/// Longest time for reading the maps of all filesystems together: they are frozen meanwhile. What was
/// not told by then passes for used.
pub const FREE_MAP_TIME_MAX: Duration = Duration::from_millis(250);

/// Runs of free ranges that are lines of their own in an origin's table; the others are not copied all the same,
/// but what is written there is preserved, for nobody. A line costs its loading, for which writers wait: 0.04 ms each in
/// an emulated guest.
pub const ORIGIN_TABLE_FREE_RUNS_MAX: usize = 1000;

/// The same where every line is sent every flush. Measured in an emulated guest (6.12), 4 KiB O_DSYNC writes beside
/// one line: 0.9 of them with 2 lines, 0.7 with 8, 0.5 with 32, 0.27 with 128.
pub const ORIGIN_TABLE_FREE_RUNS_FLUSHED_MAX: usize = 32;

/// Runs of an origin's table while it is being copied: 4,000 lines have been measured to load in 0.15 s, and to
/// suspend and resume in 0.1 s each.
pub const ORIGIN_TABLE_RUNS_MAX: usize = 4000;
