//! Checks whether an archive is complete, and whether it equals a device or a file.
//!
//! Every block is read and checked. With `--against`, the content is compared byte for byte in one pass, from
//! a pipe as well. Sectors that differ from a data frame are recorded. An original for them replaces the
//! data, so it is compared when it arrives and its result replaces the recorded one. Ranges that the map
//! marks as absent were not copied and are not compared: a file's map is read beforehand; a pipe's map comes
//! last, and then the recorded differences in absent ranges are dropped.
//!
//! Invariants:
//! - nothing is written anywhere;
//! - memory: the engine's buffers, one segment of the device or file that is compared, and at most
//!   [`DIFFERENCE_RUNS_MAX`] runs of sectors that differ.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::chain::{Chain, Link, engine_config_for_chain};
use super::map::read_map;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, Error, Extent, Result, ResultExt as _, SegmentIx, SegmentSize};
use crate::extent::{ExtentSet, cut};
use crate::format::archive::{FrameKind, Layout, MapEntry, MapState, OriginalsMode, Superblock, Totals};
use crate::io::open::{EnginePreference, open_engine};
use crate::io::{Buffer, Completion, Driver};
use crate::progress::{Observer, Phase};
use crate::restore::input::{engine_config_for, read_archive, too_many};
use crate::restore::{FrameConsumer, Input};
use crate::secondary::PAYLOAD_OFFSET;
use crate::secondary::archive_read::{ArchiveFile, CheckedFrame, FrameChecker, SegmentBits};
use crate::sys::aligned::AlignedBuffer;

/// Most runs of differing sectors that are recorded: some 40 MiB.
pub const DIFFERENCE_RUNS_MAX: usize = 1 << 20;

/// Most differing runs that an error lists.
const DIFFERENCES_SHOWN: usize = 4;

/// The result of a verification. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The archive's name.
    pub archive: String,
    /// Its superblock.
    pub superblock: Superblock,
    /// Its totals: counted, and equal to those in its tail superblock.
    pub totals: Totals,
    /// The archives that it continues, the whole one first; none for a whole archive.
    pub parents: Vec<String>,
    /// The device or file that it was compared with.
    pub against: Option<String>,
    /// Bytes of the origin that were compared.
    pub compared_bytes: Bytes,
    /// Bytes of the origin that the archive does not hold, and so could not be compared.
    pub absent_bytes: Bytes,
    /// Duration of the whole verification.
    pub seconds: f64,
}

/// Verifies the archive that `input` reads.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive, and for a difference;
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the device or file cannot be compared, or
/// too many differences would have to be recorded; I/O errors; any error that the interrupt returns.
pub fn verify(
    input: &Input,
    against: Option<&Path>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<VerifyReport> {
    let superblock = input.superblock().clone();
    let is_stream = matches!(input, Input::Stream(_));
    let mut against =
        against.map(|path| Against::open(path, &superblock, superblock.segment, is_stream)).transpose()?;
    let config = engine_config_for(&superblock);
    let mut engine = open_engine(config, EnginePreference::Auto)?;
    let mut io = Driver::new(engine.as_mut(), observer, interrupt);
    let mut checker = FrameChecker::new(superblock.clone(), &input.description());
    let total = input.totals().map(|totals| totals.present_bytes + totals.originals_bytes);
    io.begin_phase(Phase::Verify, total);
    let map = match input {
        Input::File(archive) => Some(archive.as_ref()),
        Input::Stream(_) => None,
    };
    let mut user = Comparer {
        against: against.as_mut(),
        map,
        owned: None,
        absent: Bytes::ZERO,
        last_kind: FrameKind::Data,
    };
    let read = input.read_all(&mut io, &mut checker, &mut user);
    let read = read.and_then(|totals| user.finish(&mut io, checker.seen()).map(|()| totals));
    if read.is_err() {
        io.drain(Duration::MAX, true);
    }
    let absent_bytes = user.absent;
    let totals = read?;
    io.report();
    let compared_bytes = match &against {
        Some(_) => superblock.origin_size - absent_bytes,
        None => Bytes::ZERO,
    };
    let report = VerifyReport {
        archive: input.description(),
        superblock,
        totals,
        parents: Vec::new(),
        against: against.as_ref().map(|against| against.description.clone()),
        compared_bytes,
        absent_bytes,
        seconds: io.now().as_secs_f64(),
    };
    match against {
        Some(against) => against.judge(&report.archive).map(|()| report),
        None => Ok(report),
    }
}

/// Verifies every archive of a chain, the whole one first. The content of the last one is compared.
///
/// # Errors
/// As [`verify`].
pub fn verify_chain(
    chain: &Chain,
    against: Option<&Path>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<VerifyReport> {
    let superblock = chain.last().superblock().clone();
    let longest = chain.largest_segment();
    let mut against = against.map(|path| Against::open(path, &superblock, longest, false)).transpose()?;
    if let Some(against) = &mut against {
        let appends = |link: &Link| link.archive.superblock().originals == OriginalsMode::Append;
        against.may_be_resolved = chain.links.iter().any(appends);
    }
    let mut engine = open_engine(engine_config_for_chain(chain), EnginePreference::Auto)?;
    let mut io = Driver::new(engine.as_mut(), observer, interrupt);
    let total = |link: &Link| link.archive.totals().present_bytes + link.archive.totals().originals_bytes;
    io.begin_phase(Phase::Verify, Some(chain.links.iter().map(total).sum()));
    // Before the originals, which may be over zeros: the later comparison of a range counts.
    if let Some(against) = &mut against {
        let zeros = AlignedBuffer::zeroed(longest.bytes().as_len());
        for part in chain.zero.iter().flat_map(|extent| extent.split(longest.bytes())) {
            io.poll()?;
            against.compare(part, &zeros[..part.length().as_len()])?;
        }
    }
    for link in &chain.links {
        let shown = link.archive.path().display().to_string();
        let mut checker = FrameChecker::new(link.archive.superblock().clone(), &shown);
        let mut user = Comparer {
            against: against.as_mut(),
            map: None,
            owned: Some(&link.owned),
            absent: Bytes::ZERO,
            last_kind: FrameKind::Data,
        };
        if let Err(error) = read_archive(&link.archive, &mut io, &mut checker, &mut user) {
            io.drain(Duration::MAX, true);
            return Err(error);
        }
    }
    io.report();
    let absent_bytes = chain.absent.total();
    let report = VerifyReport {
        archive: chain.last().path().display().to_string(),
        totals: *chain.last().totals(),
        parents: chain.parents(),
        against: against.as_ref().map(|against| against.description.clone()),
        compared_bytes: against.as_ref().map_or(Bytes::ZERO, |_| superblock.origin_size - absent_bytes),
        absent_bytes,
        superblock,
        seconds: io.now().as_secs_f64(),
    };
    against.map_or(Ok(()), |against| against.judge(&report.archive)).map(|()| report)
}

struct Comparer<'a> {
    against: Option<&'a mut Against>,
    /// Set if the map can be read beforehand.
    map: Option<&'a ArchiveFile>,
    /// Of a chain: the only parts that are compared.
    owned: Option<&'a ExtentSet>,
    /// Bytes that the map marks as absent, so far.
    absent: Bytes,
    last_kind: FrameKind,
}

impl FrameConsumer for Comparer<'_> {
    fn map(&mut self, entry: MapEntry) {
        if entry.state != MapState::Absent {
            return;
        }
        if self.owned.is_some() {
            return;
        }
        self.absent += entry.extent.length();
        if let Some(against) = &mut self.against {
            against.differences.remove(entry.extent);
        }
    }

    fn frame(
        &mut self,
        io: &mut Driver<'_>,
        frame: &CheckedFrame,
        seen: &SegmentBits,
        buffer: Buffer,
    ) -> Result<()> {
        if self.owned.is_none() && self.last_kind == FrameKind::Data && frame.facts.kind != FrameKind::Data {
            self.end_data(io, seen)?;
        }
        self.last_kind = frame.facts.kind;
        for (extent, at) in frame.parts() {
            if let Some(against) = &mut self.against {
                let owned: Vec<Extent> = match self.owned {
                    Some(owned) => owned.intersection_with(extent).collect(),
                    None => vec![extent],
                };
                for part in owned {
                    let at = PAYLOAD_OFFSET + (at + (part.start() - extent.start())).as_len();
                    against.compare(part, &buffer[at..at + part.length().as_len()])?;
                }
            }
            io.advance(extent.length());
            io.poll()?;
        }
        io.engine.give_buffer(buffer);
        Ok(())
    }

    fn completed(&mut self, _io: &mut Driver<'_>, completion: Completion) -> Result<()> {
        unreachable!("verify has no requests of its own, and {} is not the reader's", completion.token)
    }

    fn has_room(&self) -> bool {
        true
    }
}

impl Comparer<'_> {
    /// A segment without a data frame is zero. From a pipe the map comes last; it then drops the differences
    /// found in ranges that were not copied.
    fn end_data(&mut self, io: &mut Driver<'_>, seen: &SegmentBits) -> Result<()> {
        let Some(against) = &mut self.against else { return Ok(()) };
        let Layout { origin_size, segment, .. } = against.layout;
        let zeros = AlignedBuffer::zeroed(segment.bytes().as_len());
        if let Some(archive) = self.map {
            return read_map(archive, io.interrupt, &mut |entry| {
                if entry.state != MapState::Zero {
                    return Ok(());
                }
                cut(entry.extent, segment).try_for_each(|(_, part)| {
                    io.poll()?;
                    against.compare(part, &zeros[..part.length().as_len()])
                })
            });
        }
        for ix in (0..segment.count_for(origin_size)).map(SegmentIx).filter(|ix| !seen.get(*ix)) {
            io.poll()?;
            let start = segment.offset_of(ix).expect("a segment is within the origin");
            let end = origin_size.min(start + segment.bytes());
            let extent = Extent::new(start, end).expect("a segment is never empty");
            against.compare(extent, &zeros[..extent.length().as_len()])?;
        }
        Ok(())
    }

    /// Ends the comparison of an archive without any frame after the data.
    fn finish(&mut self, io: &mut Driver<'_>, seen: &SegmentBits) -> Result<()> {
        if self.last_kind == FrameKind::Data { self.end_data(io, seen) } else { Ok(()) }
    }
}

/// The device or file that the archive is compared with.
struct Against {
    file: File,
    description: String,
    size: Bytes,
    layout: Layout,
    /// Originals, or a pipe's map, are still to come and may resolve differences.
    may_be_resolved: bool,
    memory: AlignedBuffer,
    differences: ExtentSet,
}

impl Against {
    /// `longest`: the longest extent that is compared at once.
    fn open(path: &Path, superblock: &Superblock, longest: SegmentSize, is_stream: bool) -> Result<Self> {
        let shown = path.display();
        let kind = std::fs::metadata(path).io_context(|| format!("stat of {shown}"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::refused(format!("{shown} is neither a file nor a block device"))
                .next("compare with a device or a raw file"));
        }
        // Read a device past the page cache, which may differ from the device. Read a file through it,
        // because a file may end anywhere.
        let flags = if kind.is_block_device() { libc::O_DIRECT } else { 0 };
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(flags | libc::O_CLOEXEC)
            .open(path)
            .io_context(|| format!("open {shown}"))?;
        let size = file.seek(SeekFrom::End(0)).io_context(|| format!("find the size of {shown}"))?;
        let (size, origin) = (Bytes(size), superblock.origin_size);
        if size < origin || (kind.is_file() && size != origin) {
            return Err(Error::bad_data(format!(
                "{shown} has {} bytes, the archive's origin has {}",
                size.get(),
                origin.get()
            ))
            .next("compare with the device that was copied, or that the archive was restored to"));
        }
        let room = longest.bytes() + DIRECT_IO_ALIGN + DIRECT_IO_ALIGN;
        Ok(Self {
            file,
            description: shown.to_string(),
            size,
            layout: superblock.layout(),
            may_be_resolved: is_stream || superblock.originals == OriginalsMode::Append,
            memory: AlignedBuffer::zeroed(room.as_len()),
            differences: ExtentSet::new(),
        })
    }

    /// Compares `extent`, at most a segment, with what the archive holds of it. The result replaces an
    /// earlier one for that range.
    fn compare(&mut self, extent: Extent, expected: &[u8]) -> Result<()> {
        let start = extent.start().align_down(DIRECT_IO_ALIGN);
        let end = extent.end().align_up(DIRECT_IO_ALIGN).min(self.size);
        let memory = &mut self.memory[..(end - start).as_len()];
        self.file.read_exact_at(memory, start.get()).io_context(|| {
            format!("read {} bytes at {} of {}", memory.len(), start.get(), self.description)
        })?;
        let found = &memory[(extent.start() - start).as_len()..][..expected.len()];
        self.differences.remove(extent);
        if found == expected {
            return Ok(());
        }
        let step = Bytes(SECTOR_BYTES);
        let sectors = found.chunks(step.as_len()).zip(expected.chunks(step.as_len()));
        let mut at = extent.start();
        for (found, expected) in sectors {
            let end = at + Bytes::from_len(found.len());
            if found != expected {
                self.differences.insert(Extent::new(at, end).expect("chunks are never empty"));
            }
            at = end;
        }
        self.check_limit()
    }

    fn check_limit(&self) -> Result<()> {
        if self.differences.run_count() <= DIFFERENCE_RUNS_MAX {
            return Ok(());
        }
        let what =
            format!("{} differs from the data in more than {DIFFERENCE_RUNS_MAX} places", self.description);
        if self.may_be_resolved {
            return Err(too_many(what).next("restore the archive to a file and compare that"));
        }
        Err(Error::bad_data(what).state("nothing was changed"))
    }

    fn judge(&self, archive: &str) -> Result<()> {
        let count = self.differences.run_count();
        if count == 0 {
            return Ok(());
        }
        let shown: Vec<String> =
            self.differences.iter().take(DIFFERENCES_SHOWN).map(|run| run.to_string()).collect();
        let more = if count > DIFFERENCES_SHOWN { ", ..." } else { "" };
        Err(Error::bad_data(format!(
            "{} differs from {archive} in {count} ranges, {} bytes: {}{more}",
            self.description,
            self.differences.total().get(),
            shown.join(", ")
        ))
        .state("the archive itself is complete; nothing was changed")
        .next("if the device has been in use since the instant, differences are to be expected"))
    }
}
