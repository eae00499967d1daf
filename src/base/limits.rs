//! The limits that belong to no format, each with its name and its reason.

use std::time::Duration;

use super::units::Bytes;

/// Alignment of buffers, offsets and lengths for direct I/O: the largest logical block in use
/// (zram, 4Kn disks).
pub const DIRECT_IO_ALIGN: Bytes = Bytes::kib(4);

/// Most bytes in one request of the copier to a live origin's disk, for each of its reads in flight. An
/// application's request, and the read that preserves the original of a first write, queue after that
/// request. 128 KiB is what the kernel itself reads ahead; most disks are as fast with it as with more.
pub const LIVE_READ_BYTES: Bytes = Bytes::kib(128);

/// The same for a rotating disk. Its time goes to seeks, one for each request as soon as an application's
/// requests come in between: eight small reads would cost the application eight seeks, one large read costs
/// it the transfer of a mebibyte.
pub const LIVE_READ_ROTATING_BYTES: Bytes = Bytes::mib(1);

/// Memory for copy buffers, whatever the device's size.
pub const COPY_BUFFER_BYTES_MAX: Bytes = Bytes::mib(32);

/// The same for a live origin, whose reads are small. Writers wait while the buffers are zeroed and pinned: a
/// tenth of a second in an emulated guest.
pub const LIVE_COPY_BUFFER_BYTES_MAX: Bytes = Bytes::mib(16);

/// Segments in one copy: the archive's index takes 4 bytes for each, the verifier's checksums 8. A larger
/// device gets larger segments by default (16 TiB: 4 MiB).
pub const SEGMENT_COUNT_MAX: u64 = 4 * 1024 * 1024;

/// Exceptions held in memory at once; a longer list is processed in batches of this size.
pub const EXCEPTION_BATCH_MAX: usize = 1 << 19;

/// Free ranges of an origin that are left out of a copy. Each can cost two runs of the origin's table, and
/// [`ORIGIN_TABLE_RUNS_MAX`] must leave room for the released ranges too.
pub const FREE_RANGES_MAX: usize = 2000;

/// The smallest free range that is left out. A smaller one costs more than it saves: a line of the table and
/// an extent of its data frame. It also bounds the extents of a frame: a segment of 16 MiB holds at most 257
/// extents between free ranges of this size.
pub const FREE_RANGE_BYTES_MIN: Bytes = Bytes::kib(64);

/// Free extents of one filesystem that are kept in memory while it is frozen (256 KiB): far more than
/// [`FREE_RANGES_MAX`], so that the largest ones are among them.
pub const FREE_EXTENTS_READ_MAX: usize = 16 * 1024;

/// Longest time for reading the free-space maps of all filesystems together, which are frozen meanwhile.
/// Space that no map has reported by then counts as used.
pub const FREE_MAP_TIME_MAX: Duration = Duration::from_millis(250);

/// Files that the user leaves out which are looked for while their filesystem is frozen: the largest. Each takes some
/// microseconds.
pub const OMITTED_FILES_MAX: usize = 65_536;

/// Ranges left out of a copy because the user does not want them, in addition to free ranges: the largest. The record of
/// a copy names all of them.
pub const OMITTED_RANGES_MAX: usize = 16_384;

/// Ranges that a kept snapshot leaves out: the largest. Each is two lines of the snapshot's table, and an entry of its
/// record.
pub const KEPT_OMITTED_RANGES_MAX: usize = 2000;

/// The share of the freeze budget in which files that are left out are looked for.
pub const OMISSION_BUDGET_SHARE: u32 = 2;

/// Runs of free ranges that get lines of their own in an origin's table. The other free ranges are not copied
/// either, but writes to them are preserved needlessly. Writers wait while a line is loaded: 0.04 ms each
/// in an emulated guest.
pub const ORIGIN_TABLE_FREE_RUNS_MAX: usize = 1000;

/// The same if every line of the table receives every flush. Measured in an emulated guest (6.12): 4 KiB
/// O_DSYNC writes, as a share of those with one line: 0.9 with 2 lines, 0.7 with 8, 0.5 with 32, 0.27 with
/// 128.
pub const ORIGIN_TABLE_FREE_RUNS_FLUSHED_MAX: usize = 32;

/// Runs of an origin's table during a copy. Measured: 4,000 lines load in 0.15 s, and suspend and resume in
/// 0.1 s each.
pub const ORIGIN_TABLE_RUNS_MAX: usize = 4000;
