//! A raw device or a raw file: every byte of the origin at its own offset.
//!
//! Invariants:
//! - a device is opened exclusively (O_EXCL: it is neither mounted nor held by another device), after the
//!   checks of [`guard`](super::guard), which name its user;
//! - a file is sparse, and has no final name until it is finished ([`partial`]). Until
//!   [`RawTarget::seal`] truncates it, its length is that of the origin rounded up to [`DIRECT_IO_ALIGN`];
//! - a copy that is updated in place ([`RawRequest::in_place`]) keeps what is not written, its name and its length;
//! - before a device is overwritten as a whole, the record of what it holds is removed
//!   ([`raw_copies`](super::raw_copies));
//! - a device is left unchanged past the origin's end, except for the rest of the last logical block, which
//!   becomes zero.
//!
//! Restore uses it as well: it writes segments in the same way.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::identity::{Recognition, identify, recognize};
use super::partial::{self, Deadline, PartialFile};
use super::raw_copies::RawCopies;
use super::{
    PAYLOAD_OFFSET, Placement, Resumed, Secondary, SecondaryRequest, Segment, is_zero, zero_padding,
};
use crate::base::limits::DIRECT_IO_ALIGN;
use crate::base::{Bytes, DeviceNumber, Error, Result, ResultExt as _, directory_of};
use crate::extent::Extent;
use crate::format::SecondaryForm;
use crate::format::state::TargetRecord;
use crate::io::{Engine, FileIx, Piece, Place};
use crate::topology::{self, Topology};

/// Granularity at which runs of zeros are found, aligned: small enough for the holes of real files, large
/// enough to keep writes from being split into tiny pieces.
pub const ZERO_GRAIN: Bytes = Bytes::kib(64);

/// The arguments of [`RawTarget::open`].
#[derive(Clone, Debug)]
pub struct RawRequest {
    /// Bytes that will be written, from offset 0.
    pub size: Bytes,
    /// An existing file may be replaced, a device overwritten.
    pub replace: bool,
    /// As [`SecondaryRequest::forbidden`].
    pub forbidden: Vec<DeviceNumber>,
    /// As [`SecondaryRequest::in_place`].
    pub in_place: bool,
}

impl From<&SecondaryRequest> for RawRequest {
    fn from(request: &SecondaryRequest) -> Self {
        debug_assert_eq!(request.form, SecondaryForm::Raw);
        Self {
            size: request.origin.size,
            replace: request.replace,
            forbidden: request.forbidden.clone(),
            in_place: request.in_place,
        }
    }
}

#[derive(Debug)]
enum Kind {
    Device {
        file: File,
        identity: TargetRecord,
    },
    File(PartialFile),
    /// A file that is updated in place.
    Existing {
        file: File,
        identity: Box<TargetRecord>,
    },
}

/// An open raw device or file.
#[derive(Debug)]
pub struct RawTarget {
    kind: Kind,
    description: String,
    size: Bytes,
    /// Alignment of the end of the last write.
    block: Bytes,
    written: bool,
    /// Any part may have been written before: see [`RawTarget::reopen`]; or all of it was, and it is updated in place.
    reopened: bool,
    in_place: bool,
    recognition: Recognition,
}

impl RawTarget {
    /// Opens and checks the target. A device is not written yet; a file exists under its partial name.
    ///
    /// # Errors
    /// Refusals (see [`guard`](super::guard)), I/O errors.
    pub fn open(path: &Path, request: &RawRequest) -> Result<Self> {
        match (is_block_device(path)?, request.in_place) {
            (true, false) => Self::open_device(path, request),
            (true, true) => Self::open_device_once_idle(path, request),
            (false, false) => Self::open_file(path, request),
            (false, true) => Self::open_existing(path, request),
        }
    }

    /// Opens the target of a copy that was killed, to resume it: its content stays.
    ///
    /// A segment whose write was in flight may be partly present, and may be all zero when it is copied
    /// again. So zeros are written to a file too, instead of being left out.
    ///
    /// # Errors
    /// As [`RawTarget::open`]; a refusal if the partial file is missing or was not created by Tidemark.
    pub fn reopen(path: &Path, request: &RawRequest, state: &Resumed) -> Result<Self> {
        let device = is_block_device(path)?;
        if device != state.partial.is_none() || state.archive.is_some() {
            let was = if state.partial.is_none() { "a device" } else { "a file" };
            return Err(Error::refused(format!(
                "{} is not the copy's target, which was {was}",
                path.display()
            ))
            .state("nothing was written")
            .next("connect the copy's target, or run 'tidemark recover' and copy again"));
        }
        let mut target = if device {
            Self::reopen_device(path, request, state.target.as_ref())?
        } else {
            Topology::default().check_file(directory_of(path), &request.forbidden)?;
            let mut partial =
                PartialFile::reopen(state.partial.as_deref(), path, request.replace, state.target.as_ref())?;
            // The file already has its exact length if the process died between the seal and the rename.
            let needed = if state.placed.is_empty() { Bytes::ZERO } else { request.size };
            let long_enough = partial.check_length(needed);
            if let Err(error) = long_enough.and_then(|()| set_rounded_length(&partial, request.size)) {
                partial.leave();
                return Err(error);
            }
            Self::over_partial(partial, path, request)
        };
        target.written = true;
        target.reopened = true;
        Ok(target)
    }

    /// Waits for the last writes of a killed process, which keep the device open.
    fn open_device_once_idle(path: &Path, request: &RawRequest) -> Result<Self> {
        let deadline = Deadline::new();
        loop {
            match Self::open_device(path, request) {
                Err(error) if error.errno() == Some(libc::EBUSY) && deadline.pause() => {}
                opened => return opened,
            }
        }
    }

    fn reopen_device(path: &Path, request: &RawRequest, recorded: Option<&TargetRecord>) -> Result<Self> {
        let mut target = Self::open_device_once_idle(path, request)?;
        let Kind::Device { identity, .. } = &target.kind else { unreachable!("it was opened as a device") };
        target.recognition = recognize(recorded, identity, path)?;
        Ok(target)
    }

    /// The checks of [`RawTarget::open`], without creating or touching anything.
    ///
    /// # Errors
    /// As [`RawTarget::open`].
    pub fn check(path: &Path, request: &RawRequest) -> Result<()> {
        if is_block_device(path)? {
            check_device(path, request)?;
            // Opened read-only: udev scans a device again when a writer closes it.
            open_exclusively(path, OpenOptions::new().read(true), request.size).map(drop)
        } else if request.in_place {
            check_existing(path, request).map(drop)
        } else {
            Topology::default().check_file(directory_of(path), &request.forbidden)?;
            PartialFile::check(path, request.replace)
        }
    }

    fn open_device(path: &Path, request: &RawRequest) -> Result<Self> {
        let device = check_device(path, request)?;
        let file = open_exclusively(path, OpenOptions::new().read(true).write(true), request.size)?;
        let topology = Topology::default();
        // Checked again: the exclusive open does not keep away a process that opened it between the check and the
        // open.
        topology.check_unused(path)?;
        let identity = identify(&file, path)?;
        Ok(Self {
            kind: Kind::Device { file, identity },
            description: path.display().to_string(),
            size: request.size,
            block: Bytes(topology.logical_block_bytes(device)),
            written: false,
            reopened: request.in_place,
            in_place: request.in_place,
            recognition: Recognition::Uninterrupted,
        })
    }

    fn open_existing(path: &Path, request: &RawRequest) -> Result<Self> {
        let path = check_existing(path, request)?;
        let file = partial::open_existing(&path)?;
        let identity = Box::new(identify(&file, &path)?);
        let length = file.metadata().io_context(|| format!("stat of {}", path.display()))?.len();
        if Bytes(length) != request.size {
            return Err(Error::bad_data(format!(
                "{} has {length} bytes, the origin {}",
                path.display(),
                request.size.get()
            ))
            .state("nothing was written"));
        }
        Ok(Self {
            kind: Kind::Existing { file, identity },
            description: path.display().to_string(),
            size: request.size,
            block: DIRECT_IO_ALIGN,
            written: false,
            reopened: true,
            in_place: true,
            recognition: Recognition::Uninterrupted,
        })
    }

    fn open_file(path: &Path, request: &RawRequest) -> Result<Self> {
        Topology::default().check_file(directory_of(path), &request.forbidden)?;
        let partial = PartialFile::create(path, request.replace)?;
        set_rounded_length(&partial, request.size)?;
        Ok(Self::over_partial(partial, path, request))
    }

    fn over_partial(partial: PartialFile, path: &Path, request: &RawRequest) -> Self {
        Self {
            description: path.display().to_string(),
            recognition: partial.recognition(),
            kind: Kind::File(partial),
            size: request.size,
            block: DIRECT_IO_ALIGN,
            written: false,
            reopened: false,
            in_place: false,
        }
    }

    /// True for a block device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        matches!(self.kind, Kind::Device { .. })
    }

    fn file(&self) -> &File {
        match &self.kind {
            Kind::Device { file, .. } | Kind::Existing { file, .. } => file,
            Kind::File(partial) => partial.file(),
        }
    }

    /// The end of a transfer: the origin's end is rounded up to the alignment of direct I/O.
    fn rounded_end(&self, end: Bytes) -> Bytes {
        if end == self.size { end.align_up(self.block) } else { end }
    }

    /// Lays out `extents` of the target. Their bytes are in `memory`, where offset `memory_offset` of the
    /// target is at [`PAYLOAD_OFFSET`]. Runs of zeros become holes or zeroed ranges. `fresh`: nothing has
    /// been written there before, so a file needs no hole. Zeroes the padding past the origin's end.
    pub fn lay_out(
        &mut self,
        extents: &[Extent],
        memory_offset: Bytes,
        fresh: bool,
        memory: &mut [u8],
    ) -> Placement {
        self.written = true;
        let mut placement = Placement::default();
        for extent in extents {
            if extent.end() == self.size {
                zero_padding(memory, position(memory_offset, extent.end()));
            }
            for (run, zero) in ZeroRuns::new(*extent, memory_offset, memory) {
                let end = self.rounded_end(run.end());
                if !zero {
                    placement.pieces.push(Piece {
                        range: position(memory_offset, run.start())..position(memory_offset, end),
                        place: Place::At(run.start()),
                    });
                } else if self.is_device() || !fresh || self.reopened {
                    placement.zeros.extend(Extent::new(run.start(), end));
                }
            }
        }
        placement
    }

    /// The range to be zeroed so that `extent` reads as zeros; its end is rounded up like that of a write.
    pub fn zeroed(&mut self, extent: Extent) -> Extent {
        self.written = true;
        Extent::new(extent.start(), self.rounded_end(extent.end())).expect("rounding up keeps a range")
    }

    /// What to read to get `extents` back in the same layout.
    #[must_use]
    pub fn read_back(&self, extents: &[Extent], memory_offset: Bytes) -> Vec<Piece> {
        let piece = |extent: &Extent| Piece {
            range: position(memory_offset, extent.start())
                ..position(memory_offset, self.rounded_end(extent.end())),
            place: Place::At(extent.start()),
        };
        extents.iter().map(piece).collect()
    }
}

/// Checks a file that is to be updated in place; returns its full path.
fn check_existing(path: &Path, request: &RawRequest) -> Result<PathBuf> {
    let path = partial::resolve(path)?;
    Topology::default().check_file(directory_of(&path), &request.forbidden)?;
    if !request.replace {
        return Err(Error::refused(format!("the copy in {} would be updated in place", path.display()))
            .state("it was not touched")
            .next("pass --yes if that is what you want"));
    }
    partial::check_existing(&path)?;
    Ok(path)
}

/// The facts that identify the device or file at `path` now.
///
/// # Errors
/// I/O errors.
pub fn identity_of(path: &Path) -> Result<TargetRecord> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let file = options.open(path).io_context(|| format!("open {}", path.display()))?;
    identify(&file, path)
}

fn check_device(path: &Path, request: &RawRequest) -> Result<DeviceNumber> {
    let shown = path.display();
    let device = topology::device_number(path)?
        .ok_or_else(|| Error::refused(format!("{shown} is no longer a block device")))?;
    Topology::default().check_device(device, path, &request.forbidden)?;
    if !request.replace {
        return Err(Error::refused(format!("the copy would overwrite everything on {shown}"))
            .state("it was not touched")
            .next("pass --yes if that is what you want"));
    }
    Ok(device)
}

fn open_exclusively(path: &Path, how: &mut OpenOptions, size: Bytes) -> Result<File> {
    let shown = path.display();
    let mut file =
        how.custom_flags(libc::O_DIRECT | libc::O_EXCL | libc::O_CLOEXEC).open(path).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EBUSY) => Error::refused(format!("{shown} is in use"))
                    .with_source(error)
                    .state("it was not touched")
                    .next("find its user (lsblk, fuser), or name another device"),
                _ => Error::io(format!("open {shown}"), error),
            }
        })?;
    let found = file.seek(SeekFrom::End(0)).io_context(|| format!("find the size of {shown}"))?;
    if Bytes(found) < size {
        return Err(Error::refused(format!(
            "{shown} is too small: {found} bytes, the origin has {}",
            size.get()
        ))
        .state("it was not touched")
        .next("name a device at least as large as the origin"));
    }
    Ok(file)
}

fn set_rounded_length(partial: &PartialFile, size: Bytes) -> Result<()> {
    let length = size.align_up(DIRECT_IO_ALIGN).get();
    let what = || format!("stat of {}", partial.partial().display());
    if partial.file().metadata().io_context(what)?.len() == length {
        return Ok(());
    }
    partial
        .file()
        .set_len(length)
        .io_context(|| format!("set the length of {} to {length}", partial.partial().display()))
}

fn is_block_device(path: &Path) -> Result<bool> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(metadata.file_type().is_block_device()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(format!("stat of {}", path.display()), error)),
    }
}

/// Drops a file's clean pages from the page cache. It is an optimization: a failure is only logged.
pub(super) fn forget_cache(file: &File, description: &str) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    if let Err(errno) = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED) {
        tracing::debug!(%errno, description, "the page cache was not dropped");
    }
}

/// Where byte `offset` of the target is in a buffer whose payload begins at `memory_offset`.
fn position(memory_offset: Bytes, offset: Bytes) -> usize {
    PAYLOAD_OFFSET + (offset - memory_offset).as_len()
}

/// Splits an extent into maximal runs of zero and non-zero grains.
struct ZeroRuns<'a> {
    rest: Option<Extent>,
    memory_offset: Bytes,
    memory: &'a [u8],
}

impl<'a> ZeroRuns<'a> {
    fn new(extent: Extent, memory_offset: Bytes, memory: &'a [u8]) -> Self {
        Self { rest: Some(extent), memory_offset, memory }
    }

    /// The grain that begins at `start`, and whether it is zero.
    fn grain(&self, start: Bytes, limit: Bytes) -> (Bytes, bool) {
        let end = limit.min(start.align_down(ZERO_GRAIN) + ZERO_GRAIN);
        let range = position(self.memory_offset, start)..position(self.memory_offset, end);
        (end, is_zero(&self.memory[range]))
    }
}

impl Iterator for ZeroRuns<'_> {
    type Item = (Extent, bool);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.rest?;
        let (mut end, zero) = self.grain(rest.start(), rest.end());
        while end < rest.end() {
            let (grain_end, grain_zero) = self.grain(end, rest.end());
            if grain_zero != zero {
                break;
            }
            end = grain_end;
        }
        self.rest = Extent::new(end, rest.end());
        Extent::new(rest.start(), end).map(|run| (run, zero))
    }
}

impl Secondary for RawTarget {
    fn description(&self) -> &str {
        &self.description
    }

    fn set_instant(&mut self, _instant_ns: u64) {}

    fn attach(&mut self, engine: &mut dyn Engine) -> Result<FileIx> {
        if let Kind::Device { identity, .. } = &self.kind
            && !self.in_place
        {
            RawCopies::default().forget(Path::new(&self.description), identity)?;
        }
        let file =
            self.file().try_clone().io_context(|| format!("duplicate the handle of {}", self.description))?;
        engine.add_file(file.into(), &self.description)
    }

    fn place(&mut self, segment: &Segment<'_>, memory: &mut [u8]) -> Result<Placement> {
        Ok(self.lay_out(segment.valid, segment.extent.start(), true, memory))
    }

    fn stored(&self, segment: &Segment<'_>) -> Option<Vec<Piece>> {
        Some(self.read_back(segment.valid, segment.extent.start()))
    }

    fn overlay(&mut self, segment: &Segment<'_>, changed: &[Extent], memory: &mut [u8]) -> Result<Placement> {
        Ok(self.lay_out(changed, segment.extent.start(), false, memory))
    }

    fn partial_path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Device { .. } | Kind::Existing { .. } => None,
            Kind::File(partial) => Some(partial.partial()),
        }
    }

    fn recognition(&self) -> Recognition {
        self.recognition
    }

    fn target(&self) -> Option<&TargetRecord> {
        Some(match &self.kind {
            Kind::Device { identity, .. } => identity,
            Kind::Existing { identity, .. } => identity,
            Kind::File(partial) => partial.identity(),
        })
    }

    /// A device, or a file that is updated, keeps its old content, so it is zeroed; a new file reads as zeros where
    /// nothing is written.
    fn absent(&mut self, extents: &[Extent]) -> Placement {
        if !self.is_device() && !self.in_place {
            return Placement::default();
        }
        let zeros = extents.iter().map(|extent| self.zeroed(*extent)).collect();
        Placement { pieces: Vec::new(), zeros }
    }

    fn forget_cache(&self) {
        forget_cache(self.file(), &self.description);
    }

    fn seal(&mut self) -> Result<()> {
        match &self.kind {
            Kind::Device { .. } | Kind::Existing { .. } => Ok(()),
            Kind::File(partial) => partial.file().set_len(self.size.get()).io_context(|| {
                format!("set the length of {} to {}", partial.partial().display(), self.size.get())
            }),
        }
    }

    fn finish(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Device { file, .. } | Kind::Existing { file, .. } => {
                file.sync_all().io_context(|| format!("sync {}", self.description))
            }
            Kind::File(file) => {
                file.publish()?;
                let path = partial::resolve(Path::new(&self.description))?;
                RawCopies::default().forget(&path, file.identity())
            }
        }
    }

    fn leave(&mut self) {
        if let Kind::File(partial) = &mut self.kind {
            partial.leave();
        }
    }

    fn abandon(&mut self) -> Result<String> {
        match &mut self.kind {
            Kind::Device { .. } | Kind::Existing { .. } if self.written && self.in_place => {
                Ok(format!("{} is partly updated: it is a copy of nothing", self.description))
            }
            Kind::Device { .. } if self.written => Ok(format!(
                "{} is partly overwritten: neither the copy nor its previous content is complete",
                self.description
            )),
            Kind::Device { .. } | Kind::Existing { .. } => {
                Ok(format!("{} was not touched", self.description))
            }
            Kind::File(partial) => partial.abandon(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ErrorKind;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::new(Bytes(start), Bytes(end)).unwrap()
    }

    #[test]
    fn zero_runs_are_cut_at_aligned_grains() {
        let mut memory = vec![0u8; 4096 + (1 << 20)];
        memory[4096 + 100_000] = 1;
        let runs: Vec<_> = ZeroRuns::new(extent(1 << 20, 2 << 20), Bytes(1 << 20), &memory).collect();
        let base = 1 << 20;
        assert_eq!(
            runs,
            [
                (extent(base, base + 65536), true),
                (extent(base + 65536, base + 131_072), false),
                (extent(base + 131_072, 2 << 20), true)
            ]
        );
    }

    #[test]
    fn the_end_is_rounded_up_and_padded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let request =
            RawRequest { size: Bytes(70_001), replace: false, forbidden: Vec::new(), in_place: false };
        let mut target = RawTarget::open(&path, &request).unwrap();
        let mut memory = vec![7u8; 4096 * 2 + 131_072];
        memory[4096..4096 + 65536].fill(0);
        let placement = target.lay_out(&[extent(0, 70_001)], Bytes(0), true, &mut memory);
        let expected = Piece { range: 4096 + 65536..4096 + 73_728, place: Place::At(Bytes(65536)) };
        assert_eq!(placement, Placement { pieces: vec![expected], zeros: vec![] });
        assert!(is_zero(&memory[4096 + 70_001..4096 + 73_728]));
        assert_eq!(memory[4096 + 73_728], 7);
        let again = target.lay_out(&[extent(0, 70_001)], Bytes(0), false, &mut memory);
        assert_eq!(again.zeros, [extent(0, 65536)]);
        target.seal().unwrap();
        target.finish().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 70_001);
    }

    #[test]
    fn a_target_that_is_not_a_file_is_refused() {
        let request = RawRequest { size: Bytes(1), replace: true, forbidden: Vec::new(), in_place: false };
        let error = RawTarget::open(Path::new("/dev/null"), &request).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        let error = RawTarget::open(Path::new("/nowhere/at/all"), &request).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
    }

    #[test]
    fn zero_means_every_byte() {
        for length in [0usize, 1, 7, 8, 255, 256, 257, 4096, 5000] {
            let mut data = vec![0u8; length];
            assert!(is_zero(&data));
            for at in [0, length / 2, length.saturating_sub(1)] {
                if length > 0 {
                    data[at] = 1;
                    assert!(!is_zero(&data), "{length} {at}");
                    data[at] = 0;
                }
            }
        }
    }
}
