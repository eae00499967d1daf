//! Is an archive whole, and does it hold what a device or a file holds?
//!
//! Every block is read and checked. With `--against`, the content is compared byte for byte in one
//! pass, from a pipe as well: what differs from a data frame is remembered as sectors; an original for
//! them, which wins over the data, is compared when it comes and settles the question anew. What the archive
//! calls absent was not copied, and is not compared: a file's map is read beforehand, a pipe's comes last
//! and takes back what was remembered of absent ranges.
//!
//! Invariants:
//! - nothing is written anywhere;
//! - memory: the engine's buffers, one segment of the other side, and at most
//!   [`DIFFERENCE_RUNS_MAX`] runs of sectors that differ.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::map::read_map;
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::units::SECTOR_BYTES;
use crate::base::{Bytes, Error, Extent, Result, ResultExt as _, SegmentIx};
use crate::extent::{ExtentSet, cut};
use crate::format::archive::{FrameKind, Layout, MapEntry, MapState, OriginalsMode, Superblock, Totals};
use crate::io::open::{EnginePreference, open_engine};
use crate::io::{Buffer, Completion, Driver};
use crate::progress::{Observer, Phase};
use crate::restore::input::{engine_config_for, too_many};
use crate::restore::{FrameUser, Input};
use crate::secondary::PAYLOAD_OFFSET;
use crate::secondary::archive_read::{ArchiveFile, CheckedFrame, FrameChecker, SegmentBits};
use crate::sys::aligned::AlignedBuffer;

/// Runs of differing sectors that are remembered: some 40 MiB.
pub const DIFFERENCE_RUNS_MAX: usize = 1 << 20;

/// Differing runs that an error names.
const DIFFERENCES_SHOWN: usize = 4;

/// What was verified. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The archive's name.
    pub archive: String,
    /// What it says of itself.
    pub superblock: Superblock,
    /// What it holds; counted, and equal to what its tail superblock says.
    pub totals: Totals,
    /// What it was compared with.
    pub against: Option<String>,
    /// Bytes of the origin that were compared.
    pub compared_bytes: Bytes,
    /// Bytes of the origin that the archive does not hold, and so could not be compared.
    pub absent_bytes: Bytes,
    /// The whole verification.
    pub seconds: f64,
}

/// Verifies what `input` holds.
///
/// # Errors
/// [`ErrorKind::BadData`](crate::base::ErrorKind::BadData) for a bad archive, and for a difference;
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) where there is nothing to compare with, or too
/// much differs to be remembered; I/O errors; whatever the interrupt answers.
pub fn verify(
    input: &Input,
    against: Option<&Path>,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<VerifyReport> {
    let superblock = input.superblock().clone();
    let is_stream = matches!(input, Input::Stream(_));
    let mut against = against.map(|path| Against::open(path, &superblock, is_stream)).transpose()?;
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
    let mut user = Comparer { against: against.as_mut(), map, absent: Bytes::ZERO, stage: FrameKind::Data };
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

struct Comparer<'a> {
    against: Option<&'a mut Against>,
    /// Where the map can be read beforehand.
    map: Option<&'a ArchiveFile>,
    /// What the map calls absent, as far as it has come.
    absent: Bytes,
    stage: FrameKind,
}

impl FrameUser for Comparer<'_> {
    fn map(&mut self, entry: MapEntry) {
        if entry.state != MapState::Absent {
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
        if self.stage == FrameKind::Data && frame.facts.kind != FrameKind::Data {
            self.end_data(io, seen)?;
        }
        self.stage = frame.facts.kind;
        let mut packed = PAYLOAD_OFFSET;
        for extent in &frame.extents {
            let at = match frame.facts.kind {
                FrameKind::Data => PAYLOAD_OFFSET + (extent.start() - frame.facts.origin_offset).as_len(),
                FrameKind::Originals | FrameKind::Map => packed,
            };
            packed += extent.length().as_len();
            if let Some(against) = &mut self.against {
                against.compare(*extent, &buffer[at..at + extent.length().as_len()])?;
            }
            io.advance(extent.length());
            io.poll()?;
        }
        io.engine.give_buffer(buffer);
        Ok(())
    }

    fn completed(&mut self, _io: &mut Driver<'_>, completion: Completion) -> Result<()> {
        unreachable!("verify has no requests of its own, and {} is none of the reader's", completion.token)
    }

    fn has_room(&self) -> bool {
        true
    }
}

impl Comparer<'_> {
    /// What no data frame holds is zero, as far as the data goes. From a pipe the map comes last, and
    /// takes back what was not copied at all.
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
            let start = segment.offset_of(ix).expect("a segment lies within the origin");
            let end = origin_size.min(start + segment.bytes());
            let extent = Extent::new(start, end).expect("a segment is never empty");
            against.compare(extent, &zeros[..extent.length().as_len()])?;
        }
        Ok(())
    }

    /// An archive without a frame ends here.
    fn finish(&mut self, io: &mut Driver<'_>, seen: &SegmentBits) -> Result<()> {
        if self.stage == FrameKind::Data { self.end_data(io, seen) } else { Ok(()) }
    }
}

/// The other side of a comparison.
struct Against {
    file: File,
    description: String,
    size: Bytes,
    layout: Layout,
    /// What is still to come may explain differences: originals, or a pipe's map.
    may_be_explained: bool,
    memory: AlignedBuffer,
    differences: ExtentSet,
}

impl Against {
    fn open(path: &Path, superblock: &Superblock, is_stream: bool) -> Result<Self> {
        let shown = path.display();
        let kind = std::fs::metadata(path).io_context(|| format!("look at {shown}"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::refused(format!("{shown} is neither a file nor a block device"))
                .next("compare with a device or a raw file"));
        }
        // A device past the page cache, which may hold what the device does not; a file through it,
        // because it may end anywhere.
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
            .next("compare with the device that the archive was made of or restored to"));
        }
        let room = superblock.segment.bytes() + DIRECT_IO_ALIGN + DIRECT_IO_ALIGN;
        Ok(Self {
            file,
            description: shown.to_string(),
            size,
            layout: superblock.layout(),
            may_be_explained: is_stream || superblock.originals == OriginalsMode::Append,
            memory: AlignedBuffer::zeroed(room.as_len()),
            differences: ExtentSet::new(),
        })
    }

    /// Compares `extent`, at most a segment, with what the archive holds of it; what was found about
    /// it before is void.
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
        if self.may_be_explained {
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
        .state("the archive itself is whole; nothing was changed")
        .next("if the device has been in use since the instant, differences are to be expected"))
    }
}
