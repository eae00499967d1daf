//! Raw secondaries that have a record, for `status`, `inspect` and `verify`. Changes nothing.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use super::copy::raw_parent::describe;
use super::memory;
use crate::base::limits::COPY_BUFFER_BYTES_MAX;
use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _, SegmentIx, SegmentSize, clock};
use crate::copy::contents;
use crate::format::archive::{BLOCK_BYTES, Superblock};
use crate::format::raw_copy::{RawCopy, RawCopyState};
use crate::io::{Driver, EnginePreference, open_engine};
use crate::progress::Observer;
use crate::secondary::engine_config;
use crate::secondary::partial::resolve;
use crate::secondary::raw::identity_of;
use crate::secondary::raw_copies::{FoundCopy, RawCopies};

/// A raw secondary, as its record describes it. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RawSecondary {
    /// Where it is, or was when it was recorded.
    pub secondary: PathBuf,
    /// The record's id.
    pub record: Uuid,
    /// An update of it has begun and is not complete: it is a copy of nothing.
    pub is_updating: bool,
    /// The kept snapshot since which it can be updated, as VOLUME@NAME.
    pub base: String,
    /// Its id.
    pub base_id: Uuid,
    /// The kept snapshot that it holds, or is being updated to; None for another instant.
    pub shown: Option<String>,
    /// The instant that it holds, or is being updated to: RFC 3339, UTC.
    pub instant: Option<String>,
    /// Its size.
    pub size: Bytes,
    /// The unit of its checksums.
    pub segment: SegmentSize,
    /// Bytes that were not copied, and read as zeros.
    pub absent_bytes: Bytes,
    /// The facts of the device or file prove that it is the recorded one. None if it was not examined.
    pub is_proven: Option<bool>,
    /// What it is, in words.
    pub text: String,
}

/// The result of a verification. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct RawVerifyReport {
    /// The secondary.
    #[serde(flatten)]
    pub secondary: RawSecondary,
    /// Bytes that were read, and have the recorded checksums.
    pub verified_bytes: Bytes,
    /// Duration.
    pub seconds: f64,
}

impl RawSecondary {
    fn of(copy: &RawCopy, is_proven: Option<bool>) -> Self {
        Self {
            secondary: copy.description.path.clone().into(),
            record: copy.id,
            is_updating: copy.state == RawCopyState::Updating,
            base: copy.description.base.clone(),
            base_id: copy.base,
            shown: copy.description.shown.clone(),
            instant: clock::utc_text(copy.shown.instant_ns),
            size: copy.size,
            segment: copy.segment,
            absent_bytes: copy.absent.iter().map(|extent| extent.length()).sum(),
            is_proven,
            text: describe(copy),
        }
    }

    /// All that are recorded; an error for each record that cannot be read.
    ///
    /// # Errors
    /// I/O errors.
    pub fn all() -> Result<Vec<Result<Self>>> {
        let copies = RawCopies::default().read_all()?.into_iter();
        Ok(copies.map(|copy| copy.map(|copy| Self::of(&copy, None))).collect())
    }
}

/// The record of the device or file at `path`; None if it has none, or is an archive.
fn find(path: &Path) -> Result<Option<(PathBuf, FoundCopy)>> {
    let mut head = [0u8; BLOCK_BYTES];
    let is_archive = File::open(path)
        .and_then(|mut file| file.read_exact(&mut head))
        .map(|()| Superblock::decode_head(&head).is_ok());
    // One that cannot be read is reported as an archive that cannot be read.
    if !matches!(is_archive, Ok(false)) {
        return Ok(None);
    }
    let full = resolve(path)?;
    match RawCopies::default().find(&full, &identity_of(&full)?) {
        // Only the superuser reads the records.
        Err(error) if error.errno() == Some(libc::EACCES) => Ok(None),
        found => Ok(found?.map(|found| (full, found))),
    }
}

/// Describes the raw secondary at `path`; None if there is no record of it.
///
/// # Errors
/// [`ErrorKind::Refused`] if another device is recorded under this path; [`ErrorKind::BadData`] for a damaged record;
/// I/O errors.
pub fn inspect(path: &Path) -> Result<Option<RawSecondary>> {
    let found = find(path)?;
    Ok(found.map(|(full, found)| RawSecondary {
        secondary: full,
        ..RawSecondary::of(&found.copy, Some(found.is_proven))
    }))
}

/// Compares every segment of the raw secondary at `path` with its record; None if there is no record of it.
///
/// # Errors
/// [`ErrorKind::BadData`] if it differs, or is being updated; as [`inspect`]; the interrupt's.
pub fn verify(
    path: &Path,
    observer: &dyn Observer,
    interrupt: &dyn Fn() -> Result<()>,
) -> Result<Option<RawVerifyReport>> {
    let Some((full, found)) = find(path)? else { return Ok(None) };
    let (copy, shown) = (&found.copy, full.display().to_string());
    if copy.state == RawCopyState::Updating {
        return Err(Error::bad_data(format!("{shown} {}", describe(copy))).next(format!(
            "run the increment again: tidemark copy ORIGIN --since {} {shown}",
            copy.description.base
        )));
    }
    let file = open(&full)?;
    let buffers = memory::for_buffers(copy.segment, COPY_BUFFER_BYTES_MAX, 1)?;
    let mut engine = open_engine(engine_config(copy.segment, buffers), EnginePreference::Auto)?;
    let ix = engine.add_file(file.into(), &shown)?;
    let mut driver = Driver::new(engine.as_mut(), observer, interrupt);
    let segments: Vec<SegmentIx> = (0..copy.segment_count()).map(SegmentIx).collect();
    let mut different: Vec<SegmentIx> = Vec::new();
    contents::checksums(&mut driver, ix, (copy.size, copy.segment), &segments, &mut |ix, checksum| {
        if copy.checksums.get(Bytes(ix.get()).as_len()) != Some(&checksum) {
            different.push(ix);
        }
        Ok(())
    })?;
    if let Some(first) = different.iter().min() {
        return Err(Error::new(
            ErrorKind::BadData,
            format!(
                "{shown} does not hold what was recorded of it: {} of {} segments of {} differ, the first at {}",
                different.len(),
                segments.len(),
                copy.segment,
                copy.segment.offset_of(*first).unwrap_or_default().get()
            ),
        )
        .next("if it was used since the copy, differences are to be expected; else check its medium, and copy again"));
    }
    let seconds = driver.now().as_secs_f64();
    let secondary = RawSecondary { secondary: full, ..RawSecondary::of(copy, Some(found.is_proven)) };
    Ok(Some(RawVerifyReport { secondary, verified_bytes: copy.size, seconds }))
}

fn open(path: &Path) -> Result<File> {
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags | libc::O_CLOEXEC).open(path);
    let file = open(libc::O_DIRECT).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => open(0),
        _ => Err(error),
    });
    file.io_context(|| format!("open {}", path.display()))
}
