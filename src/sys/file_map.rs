//! Finds the bytes of its device that a file uses (FS_IOC_FIEMAP).
//!
//! Structures, numbers, flags and the continuation: Linux `include/uapi/linux/fiemap.h`,
//! `Documentation/filesystems/fiemap.rst`; FS_IOC_FSGETXATTR: `include/uapi/linux/fs.h`.
//!
//! Only an extent of which the kernel says nothing but where it is counts as the file's own. One that it calls shared,
//! not allocated yet, encoded or within other data does not.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::base::{Bytes, Extent};

// _IOWR('f', 11, struct fiemap), the head without extents.
const FIEMAP: libc::c_ulong = nix::request_code_readwrite!(b'f', 11, HEAD_BYTES);
const HEAD_BYTES: usize = 32;
// _IOR('X', 31, struct fsxattr)
const FSGETXATTR: libc::c_ulong = nix::request_code_read!(b'X', 31, 28);

const LAST: u32 = 1;
const NOT_ALIGNED: u32 = 0x100;
const INLINE: u32 = 0x200;
const UNWRITTEN: u32 = 0x800;
const MERGED: u32 = 0x1000;
const SHARED: u32 = 0x2000;

/// `FS_XFLAG_REALTIME`: the file's data is on another device of its filesystem.
const REALTIME: u32 = 1;

/// Extents in one reply.
const EXTENTS: usize = 512;
/// Most replies for one file: half a million extents. The rest does not count as the file's own.
const ANSWERS_MAX: usize = 1024;

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    records: [Record; EXTENTS],
}

const _: () = assert!(std::mem::size_of::<Record>() == 56);
const _: () = assert!(std::mem::size_of::<Request>() == HEAD_BYTES + EXTENTS * 56);

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    others: [u32; 6],
}

const _: () = assert!(std::mem::size_of::<Attributes>() == 28);

/// Bytes of a file that are not in an extent of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotOwn {
    /// Bytes that other files use too.
    pub shared: Bytes,
    /// Bytes without a place of their own.
    pub other: Bytes,
    /// There are more extents than can be asked for.
    pub is_cut: bool,
}

/// Reads the maps of files. Allocates its memory when it is created, as it is used while filesystems are frozen.
pub struct FileMapReader {
    request: Box<Request>,
}

impl Default for FileMapReader {
    fn default() -> Self {
        Self::new()
    }
}

impl FileMapReader {
    /// Allocates the memory.
    #[must_use]
    pub fn new() -> Self {
        let records = [Record::default(); EXTENTS];
        let request = Request { start: 0, length: 0, flags: 0, mapped: 0, count: 0, reserved: 0, records };
        Self { request: Box::new(request) }
    }

    /// Passes every extent of the data device on which bytes of `file` are, whichever other files use it too.
    ///
    /// # Errors
    /// As [`FileMapReader::read`]; [`io::ErrorKind::Unsupported`] also for bytes without a known place. Bytes within an
    /// inode are on the extent of that.
    pub fn read_all(&mut self, file: &File, found: &mut dyn FnMut(Extent)) -> io::Result<()> {
        if attributes(file)?.flags & REALTIME != 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let not_own = walk(
            &mut self.request,
            SHARED | INLINE | NOT_ALIGNED,
            &mut |request| call(file, request),
            found,
        )?;
        if not_own == NotOwn::default() { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    /// Passes every extent of the data device that only `file` uses to `found`, in the order of the file. Preallocated
    /// extents, also after the file's end, are among them.
    ///
    /// # Errors
    /// The errno; [`io::ErrorKind::Unsupported`] if the file's data is on another device of its filesystem. After an
    /// error, what `found` received is invalid.
    pub fn read(&mut self, file: &File, found: &mut dyn FnMut(Extent)) -> io::Result<NotOwn> {
        if attributes(file)?.flags & REALTIME != 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        walk(&mut self.request, 0, &mut |request| call(file, request), found)
    }
}

fn attributes(file: &File) -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the descriptor is open while `file` is borrowed. The kernel writes one `struct fsxattr`, which
    // `Attributes` has room for (asserted above); any bit pattern is a valid one.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FSGETXATTR, &raw mut attributes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(attributes) }
}

fn call(file: &File, request: &mut Request) -> io::Result<()> {
    // SAFETY: the descriptor is open while `file` is borrowed. The kernel reads the head, and writes the head and at most
    // `count` extents after it; `walk` sets `count` to the number of extents that `request` has, and the layout is the
    // kernel's (asserted above). Any bit pattern is a valid Request.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP, std::ptr::from_mut(request)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the requests; `ask` is the kernel. An extent with one of the flags `more` counts as the file's own, too.
fn walk(
    request: &mut Request,
    more: u32,
    ask: &mut dyn FnMut(&mut Request) -> io::Result<()>,
    found: &mut dyn FnMut(Extent),
) -> io::Result<NotOwn> {
    let contradiction = || io::Error::from(io::ErrorKind::InvalidData);
    let mut not_own = NotOwn::default();
    let mut at = 0;
    for _ in 0..ANSWERS_MAX {
        (request.start, request.length) = (at, u64::MAX - at);
        (request.flags, request.mapped, request.reserved) = (0, 0, 0);
        request.count = u32::try_from(EXTENTS).expect("a small constant");
        ask(request)?;
        let count = usize::try_from(request.mapped).unwrap_or(usize::MAX);
        let records = request.records.get(..count).ok_or_else(contradiction)?;
        let Some(last) = records.last() else { return Ok(not_own) };
        for record in records {
            let end = record.logical.checked_add(record.length).filter(|end| *end > at);
            at = end.ok_or_else(contradiction)?;
            match record.flags & !(LAST | UNWRITTEN | MERGED | more) {
                0 => {
                    let extent = Extent::with_length(Bytes(record.physical), Bytes(record.length));
                    found(extent.ok_or_else(contradiction)?);
                }
                flags if flags & SHARED != 0 => not_own.shared += Bytes(record.length),
                _ => not_own.other += Bytes(record.length),
            }
        }
        if last.flags & LAST != 0 {
            return Ok(not_own);
        }
    }
    not_own.is_cut = true;
    Ok(not_own)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn record(logical: u64, physical: u64, length: u64, flags: u32) -> Record {
        Record { logical, physical, length, flags, ..Record::default() }
    }

    /// A kernel that replies with `at_once` of `records` at a time, from the requested start on.
    fn read(records: &[Record], at_once: usize) -> io::Result<(Vec<(u64, u64)>, NotOwn)> {
        let mut reader = FileMapReader::new();
        let mut extents = Vec::new();
        let mut ask = |request: &mut Request| {
            let after = records.iter().filter(|record| record.logical + record.length > request.start);
            let reply: Vec<Record> = after.copied().take(at_once).collect();
            request.mapped = u32::try_from(reply.len()).unwrap();
            request.records[..reply.len()].copy_from_slice(&reply);
            Ok(())
        };
        let mut found = |extent: Extent| extents.push((extent.start().get(), extent.end().get()));
        let not_own = walk(&mut reader.request, 0, &mut ask, &mut found)?;
        Ok((extents, not_own))
    }

    #[test]
    fn extents_are_read_over_several_replies() {
        let records: Vec<Record> =
            (0..10).map(|at| record(at * 8192, at * 65536, 4096, if at == 9 { LAST } else { 0 })).collect();
        let expected: Vec<(u64, u64)> = (0..10).map(|at| (at * 65536, at * 65536 + 4096)).collect();
        for at_once in [1, 3, 10] {
            assert_eq!(read(&records, at_once).unwrap(), (expected.clone(), NotOwn::default()));
        }
        assert_eq!(read(&[], 1).unwrap().0, []);
    }

    #[test]
    fn an_extent_with_any_other_flag_is_not_the_files_own() {
        let flags: Vec<u32> = (1..32).map(|bit| 1 << bit).collect();
        let records: Vec<Record> =
            (0..).zip(&flags).map(|(at, flag)| record(at * 4096, at * 4096, 4096, *flag)).collect();
        let (extents, not_own) = read(&records, 100).unwrap();
        let own: Vec<u32> =
            extents.iter().map(|(start, _)| flags[usize::try_from(start / 4096).unwrap()]).collect();
        assert_eq!(own, [UNWRITTEN, MERGED]);
        assert_eq!(not_own, NotOwn { shared: Bytes(4096), other: Bytes(4096 * 28), is_cut: false });
    }

    #[test]
    fn more_extents_than_can_be_asked_for_are_noted() {
        let mut reader = FileMapReader::new();
        let mut endless = |request: &mut Request| {
            (request.records[0], request.mapped) = (record(request.start, request.start, 4096, SHARED), 1);
            Ok(())
        };
        let mut count = 0;
        let not_own = walk(&mut reader.request, SHARED, &mut endless, &mut |_| count += 1).unwrap();
        assert_eq!((not_own, count), (NotOwn { is_cut: true, ..NotOwn::default() }, ANSWERS_MAX));
    }

    #[test]
    fn contradictions_are_errors() {
        let repeated = [record(0, 0, 4096, 0), record(0, 4096, 4096, LAST)];
        let endless = [record(4096, u64::MAX - 10, 4096, LAST)];
        let empty = [record(4096, 0, 0, LAST)];
        for records in [&repeated[..], &endless, &empty] {
            let mut reader = FileMapReader::new();
            let mut ask = |request: &mut Request| {
                request.mapped = u32::try_from(records.len()).unwrap();
                request.records[..records.len()].copy_from_slice(records);
                Ok(())
            };
            walk(&mut reader.request, 0, &mut ask, &mut |_| ()).unwrap_err();
        }
        let mut reader = FileMapReader::new();
        let mut too_many = |request: &mut Request| {
            request.mapped = u32::MAX;
            Ok(())
        };
        walk(&mut reader.request, 0, &mut too_many, &mut |_| ()).unwrap_err();
    }

    #[test]
    fn the_kernels_answer_is_understood() {
        // Not every filesystem answers; one that does reports the whole file.
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&[1; 1 << 20]).unwrap();
        file.sync_all().unwrap();
        let mut total = Bytes::ZERO;
        match FileMapReader::new().read(&file, &mut |extent| total += extent.length()) {
            Ok(not_own) => assert!(total + not_own.shared + not_own.other >= Bytes::mib(1)),
            Err(error) => {
                assert!(error.raw_os_error().is_some() || error.kind() == io::ErrorKind::Unsupported)
            }
        }
    }
}
