//! Reading archives for `restore`, `verify` and `inspect`: delivers the frames of a file or a pipe, checked
//! and in order, while their consumer processes earlier ones.
//!
//! Invariants:
//! - the consumer gets a frame only after [`FrameChecker`] accepted it, in the order of the sequence;
//! - reading ahead takes at most half of the engine's buffers, so that the consumer always gets some;
//! - the interrupt is polled at least every [`POLL_INTERVAL`], also while a pipe is silent.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{IsTerminal as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::base::limits::COPY_BUFFER_BYTES_MAX;
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _};
use crate::format::archive::{
    ArchiveError, BLOCK, BLOCK_BYTES, Block, MapEntry, Superblock, Totals, control,
};
use crate::io::transfer::is_end_of_file;
use crate::io::{Buffer, Completion, Driver, EngineConfig, POLL_INTERVAL, Piece, Place};
use crate::secondary::archive_read::{ArchiveFile, CheckedFrame, FrameChecker, SegmentBits};
use crate::secondary::engine_config;

/// Fewest buffers: one for reading, one for writing.
const BUFFERS_MIN: u16 = 2;

/// Where an archive is read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArchiveSource {
    /// Standard input.
    Pipe,
    /// A file or a block device.
    Path(PathBuf),
}

/// Consumes the frames of an archive.
pub trait FrameConsumer {
    /// An entry of the map, passed after the map frame that holds it: all data has been passed by then.
    fn map(&mut self, entry: MapEntry);
    /// A checked frame, at the front of `buffer`, which the consumer keeps until it gives it back to the
    /// engine. `seen`: the segments whose data frames have been read.
    fn frame(
        &mut self,
        io: &mut Driver<'_>,
        frame: &CheckedFrame,
        seen: &SegmentBits,
        buffer: Buffer,
    ) -> Result<()>;
    /// A request of the consumer has completed.
    fn completed(&mut self, io: &mut Driver<'_>, completion: Completion) -> Result<()>;
    /// False while the consumer has enough requests in flight.
    fn has_room(&self) -> bool;
}

/// An open archive; its head superblock has been read.
pub enum Input {
    /// An archive that can be read at any offset.
    File(Box<ArchiveFile>),
    /// An archive that is read once, from front to back.
    Stream(Stream),
}

/// An archive that is read once, from front to back.
pub struct Stream {
    file: File,
    description: String,
    superblock: Superblock,
    /// Whatever follows the tail superblock is not a part of the archive.
    ends_with_tail: bool,
}

impl Input {
    /// Opens the archive and reads its head superblock; for a file, the tail superblock as well.
    pub fn open(source: &ArchiveSource, interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        match source {
            ArchiveSource::Path(path) => Ok(Self::File(Box::new(ArchiveFile::open(path)?))),
            ArchiveSource::Pipe => {
                let stdin = std::io::stdin();
                if stdin.is_terminal() {
                    return Err(Error::usage("standard input is a terminal, not an archive")
                        .next("connect a pipe or a file to standard input, or name the archive"));
                }
                let fd = stdin
                    .as_fd()
                    .try_clone_to_owned()
                    .io_context(|| "duplicate standard input".to_owned())?;
                Self::stream(fd, "standard input", interrupt)
            }
        }
    }

    /// Reads an archive from a pipe or anything else that is read from front to back.
    pub fn stream(fd: OwnedFd, description: &str, interrupt: &dyn Fn() -> Result<()>) -> Result<Self> {
        let file = File::from(fd);
        let mut block = [0u8; BLOCK_BYTES];
        let found = fill(&file, &mut block, description, interrupt)?;
        let head = if found < BLOCK_BYTES {
            Err(ArchiveError::Truncated { found, expected: BLOCK_BYTES })
        } else {
            Superblock::decode_head(&block)
        };
        let superblock = head.map_err(|error| error.at(Block::HeadSuperblock, Bytes::ZERO, description))?;
        let description = description.to_owned();
        Ok(Self::Stream(Stream { file, description, superblock, ends_with_tail: false }))
    }

    /// The archive's head superblock.
    pub fn superblock(&self) -> &Superblock {
        match self {
            Self::File(archive) => archive.superblock(),
            Self::Stream(stream) => &stream.superblock,
        }
    }

    /// Its name in messages.
    pub fn description(&self) -> String {
        match self {
            Self::File(archive) => archive.path().display().to_string(),
            Self::Stream(stream) => stream.description.clone(),
        }
    }

    /// The totals of the tail superblock, if they can be read beforehand.
    pub fn totals(&self) -> Option<Totals> {
        match self {
            Self::File(archive) => Some(*archive.totals()),
            Self::Stream(_) => None,
        }
    }

    /// Passes every frame of the archive to `consumer`. On success the archive is complete and every frame was
    /// passed; the consumer may still have requests in flight.
    pub fn read_all(
        &self,
        io: &mut Driver<'_>,
        checker: &mut FrameChecker,
        consumer: &mut dyn FrameConsumer,
    ) -> Result<Totals> {
        match self {
            Self::File(archive) => read_archive(archive, io, checker, consumer),
            Self::Stream(stream) => stream.read(io, checker, consumer),
        }
    }
}

/// Passes every frame of an archive file to `consumer`, as [`Input::read_all`].
///
/// # Errors
/// As [`Input::read_all`].
pub fn read_archive(
    archive: &ArchiveFile,
    io: &mut Driver<'_>,
    checker: &mut FrameChecker,
    consumer: &mut dyn FrameConsumer,
) -> Result<Totals> {
    if archive.superblock().is_increment() {
        // Its frames differ in length, so each is found by the one before.
        return Stream::over(archive)?.read(io, checker, consumer);
    }
    read_file(archive, io, checker, consumer)
}

fn deliver(
    io: &mut Driver<'_>,
    checker: &mut FrameChecker,
    consumer: &mut dyn FrameConsumer,
    buffer: Buffer,
) -> Result<()> {
    // At most as many entries as a segment holds.
    let mut entries = Vec::new();
    let frame = checker.accept(&buffer, &mut |entry| entries.push(entry))?;
    consumer.frame(io, &frame, checker.seen(), buffer)?;
    entries.into_iter().for_each(|entry| consumer.map(entry));
    Ok(())
}

/// Frames that are being read, or were read before their turn.
#[derive(Default)]
struct Ahead {
    next: u64,
    pending: HashMap<u64, u64>,
    ready: BTreeMap<u64, Buffer>,
}

fn read_file(
    archive: &ArchiveFile,
    io: &mut Driver<'_>,
    checker: &mut FrameChecker,
    consumer: &mut dyn FrameConsumer,
) -> Result<Totals> {
    let description = archive.path().display().to_string();
    let handle =
        archive.file().try_clone().io_context(|| format!("duplicate the handle of {description}"))?;
    let file = io.engine.add_file(handle.into(), &description)?;
    let layout = *checker.layout();
    let end = archive.totals().sequence_end();
    let length = layout.frame_bytes().as_len();
    // Half of the buffers; the consumer needs the rest.
    let ahead_max = usize::from(engine_config_for(archive.superblock()).buffer_count / 2).max(1);
    let mut ahead = Ahead::default();
    while checker.next_sequence() < end {
        while ahead.next < end && ahead.pending.len() + ahead.ready.len() < ahead_max {
            let Some(buffer) = io.engine.take_buffer() else { break };
            let offset = crate::format::archive::frame_offset(ahead.next, layout.segment)
                .expect("the tail superblock follows all frames");
            let pieces = vec![Piece { range: 0..length, place: Place::At(offset) }];
            let token = io.read(file, buffer, pieces)?;
            ahead.pending.insert(token, ahead.next);
            ahead.next += 1;
        }
        if consumer.has_room()
            && let Some(buffer) = ahead.ready.remove(&checker.next_sequence())
        {
            io.poll()?;
            deliver(io, checker, consumer, buffer)?;
            continue;
        }
        let Some(completion) = io.next_completion(None)? else { return Err(io.out_of_buffers()) };
        match ahead.pending.remove(&completion.token) {
            None => consumer.completed(io, completion)?,
            Some(sequence) => {
                completion.result.map_err(|error| read_failed(error, checker))?;
                ahead.ready.insert(sequence, completion.buffer.expect("a read gives its buffer back"));
            }
        }
    }
    checker.finish(archive.tail())
}

/// The archive had its right length when it was opened: if it ends now, it was truncated meanwhile.
fn read_failed(error: Error, checker: &FrameChecker) -> Error {
    if is_end_of_file(&error) { checker.truncated(0).with_source(error) } else { error }
}

impl Stream {
    fn read(
        &self,
        io: &mut Driver<'_>,
        checker: &mut FrameChecker,
        consumer: &mut dyn FrameConsumer,
    ) -> Result<Totals> {
        loop {
            let mut buffer = self.free_buffer(io, consumer)?;
            let found = self.fill(&mut buffer[..BLOCK_BYTES], io)?;
            if found < BLOCK_BYTES {
                return Err(checker.truncated(found));
            }
            if !control::has_magic(&buffer) {
                let totals = checker.finish(&buffer[..BLOCK_BYTES])?;
                let trailing = !self.ends_with_tail && self.fill(&mut buffer[..1], io)? > 0;
                io.engine.give_buffer(buffer);
                return if trailing { Err(self.trailing(checker)) } else { Ok(totals) };
            }
            let length = checker.next_length(&buffer)?.as_len();
            let rest = self.fill(&mut buffer[BLOCK_BYTES..length], io)?;
            if BLOCK_BYTES + rest < length {
                return Err(checker.truncated(BLOCK_BYTES + rest));
            }
            deliver(io, checker, consumer, buffer)?;
        }
    }

    /// An archive file, from its first frame on.
    fn over(archive: &ArchiveFile) -> Result<Self> {
        let description = archive.path().display().to_string();
        let what = || format!("open the archive {description}");
        // A file offset of its own, and no direct I/O, which a read of any length would not suit. Through /proc, because
        // the name may lead to another file by now.
        let path = format!("/proc/self/fd/{}", archive.file().as_raw_fd());
        let mut file = File::open(path).io_context(what)?;
        file.seek(SeekFrom::Start(BLOCK.get())).io_context(what)?;
        // A device is longer than its archive.
        let ends_with_tail = archive.is_device();
        Ok(Self { file, description, superblock: archive.superblock().clone(), ends_with_tail })
    }

    fn fill(&self, memory: &mut [u8], io: &Driver<'_>) -> Result<usize> {
        fill(&self.file, memory, &self.description, io.interrupt)
    }

    fn trailing(&self, checker: &FrameChecker) -> Error {
        ArchiveError::Trailing.at(Block::TailSuperblock, checker.next_offset(), &self.description)
    }

    /// A buffer for the next frame, once the consumer has room. Processes completions meanwhile, so that they
    /// do not accumulate.
    fn free_buffer(&self, io: &mut Driver<'_>, consumer: &mut dyn FrameConsumer) -> Result<Buffer> {
        while let Some(completion) = io.ended()? {
            consumer.completed(io, completion)?;
        }
        loop {
            if consumer.has_room()
                && let Some(buffer) = io.engine.take_buffer()
            {
                return Ok(buffer);
            }
            let Some(completion) = io.next_completion(None)? else { return Err(io.out_of_buffers()) };
            consumer.completed(io, completion)?;
        }
    }
}

/// Reads until `memory` is full or the stream ends; returns the number of bytes read.
fn fill(
    file: &File,
    memory: &mut [u8],
    description: &str,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<usize> {
    let timeout = PollTimeout::try_from(POLL_INTERVAL).expect("poll accepts a timeout of 50 ms");
    let mut done = 0;
    while done < memory.len() {
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(0) | Err(Errno::EINTR) => {
                interrupt()?;
                continue;
            }
            Ok(_) => {}
            Err(errno) => return Err(errno).io_context(|| format!("wait for {description}")),
        }
        match nix::unistd::read(file, &mut memory[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::EINTR | Errno::EAGAIN) => interrupt()?,
            Err(errno) => return Err(errno).io_context(|| format!("read {description}")),
        }
    }
    interrupt()?;
    Ok(done)
}

/// Appends `left` to the state of an error.
pub fn with_state(error: Error, left: String) -> Error {
    let state = match error.state_left() {
        Some(known) => format!("{known}; {left}"),
        None => left,
    };
    error.state(state)
}

/// The engine configuration for an archive: that of a copy, but with no more buffers than the origin has
/// segments.
pub fn engine_config_for(superblock: &Superblock) -> EngineConfig {
    let config = engine_config(superblock.segment, COPY_BUFFER_BYTES_MAX);
    let segments = superblock.segment.count_for(superblock.origin_size);
    let wanted = u16::try_from(segments).unwrap_or(u16::MAX).max(BUFFERS_MIN);
    EngineConfig { buffer_count: config.buffer_count.min(wanted), ..config }
}

/// The error for a limit of the reader itself.
pub fn too_many(what: String) -> Error {
    Error::new(ErrorKind::Refused, what)
}
