//! Finds the bytes of its device that a mounted filesystem reports as free (FS_IOC_GETFSMAP).
//!
//! Structures, numbers and the continuation (the last record of a reply is the low key of the next request):
//! Linux `include/uapi/linux/fsmap.h`; ioctl_getfsmap(2). Supported by ext4 and xfs.
//!
//! Rejects a reply that contradicts itself: an impossible record, or a free one that shares a byte with
//! another. What is missing, because time or records ran out, counts as used: a reply that is cut short is
//! right as far as it goes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use crate::base::{Bytes, DeviceNumber, Extent};

// _IOWR('X', 59, struct fsmap_head), the head without records.
const GETFSMAP: libc::c_ulong = nix::request_code_readwrite!(b'X', 59, HEAD_BYTES);
const HEAD_BYTES: usize = 192;

/// `FMH_OF_DEV_T`: `fmr_device` is a device number.
const OUT_DEVICE_NUMBERS: u32 = 1;
/// `FMR_OF_SPECIAL_OWNER`.
const SPECIAL_OWNER: u32 = 0x10;
/// `FMR_OF_LAST`.
const LAST: u32 = 0x20;
/// `FMR_OWN_FREE`, if the owner is a special one.
const OWNER_FREE: u64 = 1;

/// Records in one reply; the kernel gathers about as many at a time (xfs: 128 KiB of them).
const RECORDS: usize = 2048;
/// Most replies: 8 million records. The map of a filesystem with more is incomplete.
const ANSWERS_MAX: usize = 4096;

/// `struct fsmap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

/// `struct fsmap_head` with room for records.
#[repr(C)]
struct Request {
    flags_in: u32,
    flags_out: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    low: Record,
    high: Record,
    records: [Record; RECORDS],
}

const _: () = assert!(std::mem::size_of::<Record>() == 64);
const _: () = assert!(std::mem::size_of::<Request>() == HEAD_BYTES + RECORDS * 64);

/// Why there is no map.
#[derive(Debug, thiserror::Error)]
pub enum NoMap {
    /// The filesystem does not support the call.
    #[error("its filesystem does not report free space ({0})")]
    Unsupported(io::Error),
    /// The filesystem supports it, but does not report device numbers.
    #[error("its filesystem does not report the device of its free space")]
    NoDevice,
    /// The reply contradicts itself.
    #[error("its filesystem reports contradictory free space at byte {0}")]
    Contradiction(u64),
    /// The call failed.
    #[error("reading the free space of its filesystem failed: {0}")]
    Failed(io::Error),
}

impl From<io::Error> for NoMap {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOTTY | libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => Self::Unsupported(error),
            _ => Self::Failed(error),
        }
    }
}

/// The result of reading a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeMap {
    /// The device to which the extents refer: the filesystem's data device.
    pub device: DeviceNumber,
    /// False if time or records ran out before the end.
    pub complete: bool,
}

/// Reads the maps of filesystems. Allocates its memory when it is created, as it is used while they are
/// frozen.
pub struct FreeReader {
    request: Box<Request>,
}

impl Default for FreeReader {
    fn default() -> Self {
        Self::new()
    }
}

impl FreeReader {
    /// Allocates the memory.
    #[must_use]
    pub fn new() -> Self {
        let none = Record::default();
        let request = Request {
            flags_in: 0,
            flags_out: 0,
            count: 0,
            entries: 0,
            reserved: [0; 6],
            low: none,
            high: none,
            records: [none; RECORDS],
        };
        Self { request: Box::new(request) }
    }

    /// Passes every free extent of the data device of `file`'s filesystem to `found`, in ascending order.
    /// Makes no call after `deadline`. After an error, what `found` received is invalid.
    ///
    /// # Errors
    /// [`NoMap`].
    pub fn read(
        &mut self,
        file: &File,
        deadline: Instant,
        found: &mut dyn FnMut(Extent),
    ) -> Result<FreeMap, NoMap> {
        // ext4 and xfs report the number of their data device in every file (s_dev).
        let device = DeviceNumber::from_dev(file.metadata().map_err(NoMap::Failed)?.dev());
        walk(&mut self.request, device, &mut |request| call(file, request), deadline, found)
    }
}

fn call(file: &File, request: &mut Request) -> io::Result<()> {
    // SAFETY: the descriptor is open while `file` is borrowed. The kernel reads the head and both keys, and
    // writes the head and at most `count` records after the keys; `walk` sets `count` to the number of
    // records that `request` has, and the layout is the kernel's (asserted above). Any bit pattern is a valid
    // Request.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), GETFSMAP, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the requests and checks the replies; `ask` is the kernel.
fn walk(
    request: &mut Request,
    device: DeviceNumber,
    ask: &mut dyn FnMut(&mut Request) -> io::Result<()>,
    deadline: Instant,
    found: &mut dyn FnMut(Extent),
) -> Result<FreeMap, NoMap> {
    let everything = Record {
        device: u32::MAX,
        flags: u32::MAX,
        physical: u64::MAX,
        owner: u64::MAX,
        offset: u64::MAX,
        ..Record::default()
    };
    let mut low = Record::default();
    let mut checker = RecordChecker { device, records_end: Bytes::ZERO, free_end: Bytes::ZERO, seen: false };
    for _ in 0..ANSWERS_MAX {
        if Instant::now() >= deadline {
            return checker.result(false);
        }
        request.flags_in = 0;
        request.flags_out = 0;
        request.count = u32::try_from(RECORDS).expect("a small constant");
        request.entries = 0;
        request.reserved = [0; 6];
        request.low = low;
        request.high = everything;
        ask(request)?;
        let count = usize::try_from(request.entries).unwrap_or(usize::MAX);
        let records = request.records.get(..count).ok_or(NoMap::Contradiction(low.physical))?;
        let Some(last) = records.last() else { return checker.result(true) };
        if request.flags_out & OUT_DEVICE_NUMBERS == 0 {
            return Err(NoMap::NoDevice);
        }
        for record in records {
            if let Some(free) = checker.record(record)? {
                found(free);
            }
        }
        if last.flags & LAST != 0 {
            return checker.result(true);
        }
        if *last == low {
            return Err(NoMap::Contradiction(low.physical));
        }
        low = *last;
    }
    checker.result(false)
}

/// The state after the records so far.
struct RecordChecker {
    device: DeviceNumber,
    /// The highest end of all records so far.
    records_end: Bytes,
    /// The end of the last free record.
    free_end: Bytes,
    /// True if a record of the device has been seen.
    seen: bool,
}

impl RecordChecker {
    /// Returns the extent if the record is free space of the device. Records arrive in ascending order; those
    /// of shared blocks overlap each other, and none overlaps a free one.
    fn record(&mut self, record: &Record) -> Result<Option<Extent>, NoMap> {
        // Skips records of the log and realtime devices of xfs: their free space does not matter here.
        if DeviceNumber::from_dev(libc::dev_t::from(record.device)) != self.device {
            return Ok(None);
        }
        self.seen = true;
        let contradiction = || NoMap::Contradiction(record.physical);
        let extent =
            Extent::with_length(Bytes(record.physical), Bytes(record.length)).ok_or_else(contradiction)?;
        let is_free = record.flags & SPECIAL_OWNER != 0 && record.owner == OWNER_FREE;
        let at_least = if is_free { self.records_end } else { self.free_end };
        if extent.start() < at_least {
            return Err(contradiction());
        }
        self.records_end = self.records_end.max(extent.end());
        if !is_free {
            return Ok(None);
        }
        self.free_end = extent.end();
        Ok(Some(extent))
    }

    fn result(&self, complete: bool) -> Result<FreeMap, NoMap> {
        // A complete reply without a record of the device: then s_dev is not the number in the records.
        if complete && !self.seen {
            Err(NoMap::NoDevice)
        } else {
            Ok(FreeMap { device: self.device, complete })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const DEVICE: DeviceNumber = DeviceNumber { major: 253, minor: 300 };

    fn record(device: DeviceNumber, start: u64, length: u64, owner: Option<u64>) -> Record {
        let device = u32::try_from(device.to_dev()).unwrap();
        let (flags, owner) = owner.map_or((0, 4711), |owner| (SPECIAL_OWNER, owner));
        Record { device, flags, physical: start, length, owner, ..Record::default() }
    }

    fn free(start: u64, length: u64) -> Record {
        record(DEVICE, start, length, Some(OWNER_FREE))
    }

    fn used(start: u64, length: u64) -> Record {
        record(DEVICE, start, length, None)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// Replies from a list, `batch` records at a time, by the documented continuation.
    fn answer(all: &[Record], batch: usize, flags_out: u32) -> Result<(FreeMap, Vec<(u64, u64)>), NoMap> {
        let mut ask = |request: &mut Request| {
            let at = match all.iter().position(|record| *record == request.low) {
                Some(last) => last + 1,
                None => 0,
            };
            let end = all.len().min(at + batch.min(RECORDS));
            request.records[..end - at].copy_from_slice(&all[at..end]);
            request.entries = u32::try_from(end - at).unwrap();
            request.flags_out = flags_out;
            Ok(())
        };
        let mut found = Vec::new();
        let mut reader = FreeReader::new();
        let result = walk(&mut reader.request, DEVICE, &mut ask, soon(), &mut |extent| {
            found.push((extent.start().get(), extent.length().get()));
        })?;
        Ok((result, found))
    }

    proptest! {
        #[test]
        fn every_free_record_is_found_for_any_batch_size(
            kinds in prop::collection::vec((0u8..4, 1u64..9), 1..60), batch in 1usize..9, last_is_marked: bool,
        ) {
            let log = DeviceNumber { major: 8, minor: 1 };
            let (mut all, mut expected, mut at) = (Vec::new(), Vec::new(), 0);
            for (kind, blocks) in kinds {
                let length = blocks * 4096;
                all.push(match kind {
                    0 => free(at, length),
                    1 => used(at, length),
                    // A special owner other than "free".
                    2 => record(DEVICE, at, length, Some(3)),
                    // Free, but on the log's device.
                    _ => record(log, at, length, Some(OWNER_FREE)),
                });
                if kind == 0 { expected.push((at, length)); }
                at += length;
            }
            if last_is_marked { all.last_mut().unwrap().flags |= LAST; }
            let is_known = all.iter().any(|record| record.device == u32::try_from(DEVICE.to_dev()).unwrap());
            match answer(&all, batch, OUT_DEVICE_NUMBERS) {
                Ok((result, found)) => {
                    prop_assert!(result.complete && is_known);
                    prop_assert_eq!(result.device, DEVICE);
                    prop_assert_eq!(found, expected);
                }
                Err(error) => prop_assert!(!is_known && matches!(error, NoMap::NoDevice), "{}", error),
            }
        }

        #[test]
        fn no_answer_makes_it_panic_or_loop(
            numbers in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..20), batch in 1usize..5,
        ) {
            let all: Vec<Record> = numbers.iter().map(|(start, length, is_free)| {
                if *is_free { free(*start, *length) } else { used(*start, *length) }
            }).collect();
            let _ = answer(&all, batch, OUT_DEVICE_NUMBERS);
        }
    }

    #[test]
    fn shared_blocks_overlap_and_free_ones_do_not() {
        let shared = [used(0, 8192), used(4096, 8192), free(12288, 4096)];
        assert_eq!(answer(&shared, 1, OUT_DEVICE_NUMBERS).unwrap().1, [(12288, 4096)]);
        for (name, bad) in [
            ("free within used", vec![used(0, 8192), free(4096, 4096)]),
            (
                "free within a longer one before the last",
                vec![used(0, 16384), used(0, 4096), free(8192, 4096)],
            ),
            ("used within free", vec![free(0, 8192), used(4096, 4096)]),
            ("free twice", vec![free(0, 8192), free(4096, 8192)]),
            ("out of order", vec![free(8192, 4096), free(0, 4096)]),
            ("empty", vec![free(0, 0)]),
            ("past the end of all numbers", vec![free(u64::MAX, 2)]),
        ] {
            for batch in [1, 9] {
                let result = answer(&bad, batch, OUT_DEVICE_NUMBERS);
                assert!(matches!(result, Err(NoMap::Contradiction(_))), "{name}: {result:?}");
            }
        }
    }

    #[test]
    fn a_device_that_is_no_number_is_no_device() {
        assert!(matches!(answer(&[free(0, 4096)], 1, 0), Err(NoMap::NoDevice)));
    }

    #[test]
    fn an_answer_that_repeats_itself_or_is_too_long_ends() {
        let mut reader = FreeReader::new();
        let mut again = |request: &mut Request| {
            request.records[0] = used(0, 4096);
            (request.entries, request.flags_out) = (1, OUT_DEVICE_NUMBERS);
            Ok(())
        };
        let result = walk(&mut reader.request, DEVICE, &mut again, soon(), &mut |_| {});
        assert!(matches!(result, Err(NoMap::Contradiction(_))), "{result:?}");
        let mut over = |request: &mut Request| {
            (request.entries, request.flags_out) = (request.count + 1, OUT_DEVICE_NUMBERS);
            Ok(())
        };
        let result = walk(&mut reader.request, DEVICE, &mut over, soon(), &mut |_| {});
        assert!(matches!(result, Err(NoMap::Contradiction(_))), "{result:?}");
        let mut at = 0;
        let mut endless = |request: &mut Request| {
            request.records[0] = free(at, 4096);
            at += 4096;
            (request.entries, request.flags_out) = (1, OUT_DEVICE_NUMBERS);
            Ok(())
        };
        let mut count = 0;
        let result = walk(&mut reader.request, DEVICE, &mut endless, soon(), &mut |_| count += 1).unwrap();
        assert_eq!((result.complete, count), (false, ANSWERS_MAX));
        let result =
            walk(&mut reader.request, DEVICE, &mut endless, Instant::now(), &mut |_| count += 1).unwrap();
        assert_eq!((result.complete, count), (false, ANSWERS_MAX), "no call is made after the deadline");
    }

    #[test]
    fn codes_are_those_of_the_header() {
        assert_eq!(GETFSMAP, 0xc0c0_583b);
    }

    #[test]
    fn an_unsupported_filesystem_is_distinguished_from_a_failed_call() {
        let file = File::open("/proc").unwrap();
        let result = FreeReader::new().read(&file, soon(), &mut |_| {});
        assert!(matches!(result, Err(NoMap::Unsupported(_))), "{result:?}");
        let failed = NoMap::from(io::Error::from_raw_os_error(libc::EIO));
        assert!(matches!(failed, NoMap::Failed(_)));
    }
}
