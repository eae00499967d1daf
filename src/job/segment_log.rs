//! The segment log: records which segments of a copy are durable on the secondary, in a file next to the job's
//! record (see [`format::segment_log`](crate::format::segment_log)).
//!
//! Invariants:
//! - A record is appended only after the segment's write and a later sync of the secondary have completed,
//!   with one write(2) per call. Nothing is buffered, so what a call has confirmed survives SIGKILL.
//! - The segment log is never synced: it survives the process, and a copy never survives a reboot.
//! - After a failed append every later one fails, and the file ends with its last whole record.
//! - A copy continues without its segment log. If the log can no longer be written (a full `/run`), it is
//!   removed before a region is released that it does not name: a resume from it would take newer data for
//!   that of the instant. The copy then continues and cannot be resumed; one warning reports that.
//!
//! Must not decide how a resumed copy uses the segment log.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::base::{Bytes, Error, ErrorKind, Result, ResultExt as _, SegmentIx};
use crate::format::segment_log::{
    Follower, HEADER_BYTES, Header, PlacedSegment, RECORD_BYTES, RECORD_COUNT_MAX, Record,
};

/// Records read at a time.
const READ_RECORDS: usize = 4096;

/// The content of a segment log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentLogContent {
    /// The copy that it belongs to.
    pub header: Header,
    /// Each segment once, with its last record.
    pub placed: Vec<PlacedSegment>,
    /// True if some of them may have been overlaid with originals.
    pub originals_begun: bool,
    /// The end of the good records; anything after it is torn.
    pub length: Bytes,
}

/// A segment log open for appending, or dropped after a failed append.
#[derive(Debug)]
pub struct SegmentLog {
    file: File,
    path: PathBuf,
    header: Header,
    /// The number of the next record.
    next: u64,
    /// errno of the first failed append.
    failed: Option<i32>,
    /// The file has been removed for good; the copy continues without it.
    dropped: bool,
}

impl SegmentLog {
    /// Creates a segment log at `path`, which must not exist.
    ///
    /// # Errors
    /// I/O errors; [`ErrorKind::BadData`] for a header with impossible facts.
    pub fn create(path: &Path, header: &Header) -> Result<Self> {
        let block = header.encode()?;
        let mut file = options()
            .create_new(true)
            .mode(0o600)
            .open(path)
            .io_context(|| format!("creating the segment log {}", path.display()))?;
        // Killed in between: a segment log without a header is refused, and nothing was placed yet.
        file.write_all(&block).io_context(|| format!("writing {}", path.display()))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            header: header.clone(),
            next: 0,
            failed: None,
            dropped: false,
        })
    }

    /// Opens the segment log of a copy that died, to continue it: a torn end is truncated.
    ///
    /// # Errors
    /// As [`read`].
    pub fn open(path: &Path) -> Result<(Self, SegmentLogContent)> {
        let file = open(path)?;
        let content = read_from(&file, path)?;
        file.set_len(content.length.get())
            .io_context(|| format!("truncating the torn end of {}", path.display()))?;
        let records = (content.length.as_len() - HEADER_BYTES) / RECORD_BYTES;
        let next = Bytes::from_len(records).get();
        let (path, header) = (path.to_owned(), content.header.clone());
        let journal = Self { file, path, header, next, failed: None, dropped: false };
        Ok((journal, content))
    }

    /// Records that the writes of all these segments have completed.
    ///
    /// # Errors
    /// I/O errors: the copy can no longer be resumed from this log, and as long as the file exists, no
    /// region may be released that it does not name. [`ErrorKind::BadData`] for impossible segments.
    pub fn append(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        let mut records = segments.iter().map(|segment| Record::Placed(*segment));
        self.write(&mut records)
    }

    /// Replaces the whole segment log: these segments are placed, and nothing else is recorded. Killed in
    /// between: the old segment log, or the new one.
    ///
    /// # Errors
    /// As [`SegmentLog::append`]; the old segment log is unchanged.
    pub fn rewrite(&mut self, segments: &[PlacedSegment]) -> Result<()> {
        let new = self.path.with_extension("segments-new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(self.failure(error)),
            _ => {}
        }
        let mut journal = Self::create(&new, &self.header)?;
        journal.append(segments)?;
        fs::rename(&new, &self.path).map_err(|error| self.failure(error))?;
        *self = Self { path: self.path.clone(), ..journal };
        Ok(())
    }

    /// Records that the data may be overlaid with originals from now on.
    ///
    /// # Errors
    /// I/O errors.
    pub fn originals_begun(&mut self) -> Result<()> {
        self.write(&mut std::iter::once(Record::OriginalsBegun))
    }

    fn write(&mut self, records: &mut dyn Iterator<Item = Record>) -> Result<()> {
        if let Some(errno) = self.failed {
            return Err(self.failure(io::Error::from_raw_os_error(errno)));
        }
        let mut bytes = Vec::new();
        let mut next = self.next;
        for record in records {
            if next >= RECORD_COUNT_MAX {
                let what = format!(
                    "{} has {RECORD_COUNT_MAX} records, the most that a segment log can hold",
                    self.path.display()
                );
                return Err(Error::refused(what).next("copy again from the beginning"));
            }
            bytes.extend(self.header.encode_record(next, &record)?);
            next += 1;
        }
        let end = Bytes::from_len(HEADER_BYTES) + Bytes::from_len(RECORD_BYTES) * self.next;
        if let Err(error) = self.file.write_all_at(&bytes, end.get()) {
            self.failed = Some(error.raw_os_error().unwrap_or(libc::EIO));
            // A part of the records may be in the file: a reader takes that for a torn end only if it is the
            // end.
            if let Err(error) = self.file.set_len(end.get()) {
                tracing::warn!(
                    path = %self.path.display(),
                    %error,
                    "the torn end of the segment log could not be truncated"
                );
            }
            return Err(self.failure(error));
        }
        self.next = next;
        Ok(())
    }

    fn failure(&self, error: io::Error) -> Error {
        Error::io(format!("appending to the segment log {}", self.path.display()), error)
    }

    /// Calls `note`. If that fails, drops the segment log, so that no resume uses one with gaps.
    ///
    /// # Errors
    /// If the records themselves are invalid, or the segment log cannot be removed.
    pub fn note_or_drop(&mut self, note: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.dropped {
            return Ok(());
        }
        match note(self) {
            // The records themselves are invalid: the copy is broken, whatever the space.
            Err(error) if error.kind() == ErrorKind::BadData => Err(error),
            Err(error) => self.drop_log(error),
            Ok(()) => Ok(()),
        }
    }

    fn drop_log(&mut self, error: Error) -> Result<()> {
        let new = self.path.with_extension("segments-new");
        for path in [&new, &self.path] {
            match fs::remove_file(path) {
                Err(undo) if undo.kind() != io::ErrorKind::NotFound => {
                    return Err(
                        error.with_failed_undo(Error::io(format!("removing {}", path.display()), undo))
                    );
                }
                _ => {}
            }
        }
        self.dropped = true;
        tracing::warn!(
            "{error}; the copy continues, but if it is killed, 'tidemark resume' cannot resume it"
        );
        Ok(())
    }
}

/// Reads the segment log at `path`. Changes nothing.
///
/// # Errors
/// I/O errors; [`ErrorKind::BadData`] for a segment log with damage other than a torn end.
pub fn read(path: &Path) -> Result<SegmentLogContent> {
    read_from(&open(path)?, path)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options
}

fn open(path: &Path) -> Result<File> {
    options().open(path).map_err(|error| {
        let missing = error.kind() == io::ErrorKind::NotFound;
        let error = Error::io(format!("opening the segment log {}", path.display()), error);
        if missing {
            error.with_kind(ErrorKind::Refused).next("run 'tidemark recover', and copy again")
        } else {
            error
        }
    })
}

fn read_from(file: &File, path: &Path) -> Result<SegmentLogContent> {
    let mut input = file;
    let mut memory = vec![0; READ_RECORDS * RECORD_BYTES];
    let found = fill(&mut input, &mut memory[..HEADER_BYTES], path)?;
    let named = |error: Error| {
        error
            .context(path.display().to_string())
            .next("the copy cannot be resumed: run 'tidemark recover', and copy again")
    };
    let header = Header::decode(&memory[..found]).map_err(named)?;
    let mut follower = Follower::new(&header);
    let mut latest = Latest::new(header.segment_count());
    loop {
        // Bounded: the follower refuses more than RECORD_COUNT_MAX records.
        let found = fill(&mut input, &mut memory, path)?;
        let blocks = memory[..found].chunks_exact(RECORD_BYTES);
        let rest = blocks.remainder();
        for block in blocks {
            let block = block.try_into().expect("chunks_exact gives whole records");
            if let Some(Record::Placed(segment)) = follower.take(block).map_err(named)? {
                latest.note(segment);
            }
        }
        follower.end(rest).map_err(named)?;
        if found < memory.len() {
            break;
        }
    }
    let length = Bytes::from_len(HEADER_BYTES) + Bytes::from_len(RECORD_BYTES) * follower.good();
    let originals_begun = follower.originals_begun();
    Ok(SegmentLogContent { header, placed: latest.placed, originals_begun, length })
}

/// Reads until `memory` is full or the file ends.
fn fill(file: &mut &File, memory: &mut [u8], path: &Path) -> Result<usize> {
    let mut done = 0;
    while done < memory.len() {
        match file.read(&mut memory[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(format!("reading {}", path.display()), error)),
        }
    }
    Ok(done)
}

/// The last record of each segment.
struct Latest {
    placed: Vec<PlacedSegment>,
    /// For each segment its position in `placed` plus one, or 0 for none.
    places: Vec<u32>,
}

impl Latest {
    fn new(count: u64) -> Self {
        Self { placed: Vec::new(), places: vec![0; Bytes(count).as_len()] }
    }

    fn note(&mut self, segment: PlacedSegment) {
        let SegmentIx(ix) = segment.ix;
        let place = &mut self.places[Bytes(ix).as_len()];
        match usize::try_from(*place).expect("32 bits fit usize on Linux").checked_sub(1) {
            Some(place) => self.placed[place] = segment,
            None => {
                self.placed.push(segment);
                *place = u32::try_from(self.placed.len()).expect("at most SEGMENT_COUNT_MAX segments");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::base::SegmentSize;
    use crate::format::SecondaryForm;

    fn header() -> Header {
        Header {
            job: Uuid::from_u128(7),
            form: SecondaryForm::Archive,
            archive: Some(Uuid::from_u128(8)),
            origin_size: Bytes::mib(1),
            segment: SegmentSize::new(SegmentSize::MIN).unwrap(),
            instant_ns: 9,
        }
    }

    fn segment(ix: u64, checksum: u64) -> PlacedSegment {
        PlacedSegment { ix: SegmentIx(ix), frame: Some(ix), checksum: Some(checksum), zero: false }
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0123.segments");
        (directory, path)
    }

    #[test]
    fn the_journal_can_be_read_while_it_is_written() {
        let (_keep, path) = place();
        let mut journal = SegmentLog::create(&path, &header()).unwrap();
        assert!(SegmentLog::create(&path, &header()).is_err(), "one journal for one job");
        journal.append(&[segment(3, 1)]).unwrap();
        assert_eq!(read(&path).unwrap().placed, [segment(3, 1)]);
        journal.append(&[segment(4, 1), segment(5, 1)]).unwrap();
        journal.append(&[]).unwrap();
        assert!(!read(&path).unwrap().originals_begun);
        journal.originals_begun().unwrap();
        let content = read(&path).unwrap();
        assert_eq!(content.placed, [segment(3, 1), segment(4, 1), segment(5, 1)]);
        assert!(content.originals_begun);
        assert_eq!(content.header, header());
    }

    #[test]
    fn a_torn_end_is_cut_off_and_the_journal_continues() {
        let (_keep, path) = place();
        let mut journal = SegmentLog::create(&path, &header()).unwrap();
        journal.append(&[segment(0, 1), segment(1, 1)]).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        for cut in HEADER_BYTES..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, content) = SegmentLog::open(&path).unwrap();
            let kept = (cut - HEADER_BYTES) / RECORD_BYTES;
            assert_eq!(content.placed, [segment(0, 1), segment(1, 1)][..kept], "cut at {cut}");
            journal.append(&[segment(2, 5)]).unwrap();
            let placed = read(&path).unwrap().placed;
            assert_eq!((placed.len(), placed[kept]), (kept + 1, segment(2, 5)), "cut at {cut}");
        }
    }

    #[test]
    fn a_rewritten_journal_has_only_the_new_records_and_continues() {
        let (keep, path) = place();
        let mut journal = SegmentLog::create(&path, &header()).unwrap();
        journal.append(&[segment(0, 1), segment(1, 2), segment(2, 3)]).unwrap();
        fs::write(keep.path().join("0123.segments-new"), "what a kill has left").unwrap();
        journal.rewrite(&[segment(0, 1), segment(2, 3)]).unwrap();
        assert_eq!(read(&path).unwrap().placed, [segment(0, 1), segment(2, 3)]);
        // The frame of a lost segment is reused for another.
        journal.append(&[PlacedSegment { frame: Some(1), ..segment(5, 9) }]).unwrap();
        journal.originals_begun().unwrap();
        let (_, content) = SegmentLog::open(&path).unwrap();
        assert_eq!(content.placed.len(), 3);
        assert!(content.originals_begun);
        assert_eq!(fs::read_dir(keep.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn damage_before_the_end_and_a_missing_file_are_refused() {
        let (_keep, path) = place();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::Refused);
        let mut journal = SegmentLog::create(&path, &header()).unwrap();
        journal.append(&[segment(0, 1), segment(1, 1)]).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[HEADER_BYTES] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = SegmentLog::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadData);
        assert!(error.next_step().is_some());
        assert_eq!(fs::read(&path).unwrap(), bytes, "what is refused is not changed");
        fs::write(&path, b"").unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::BadData);
        // The log of a copy that an older program began, and left when it was killed.
        let older = include_bytes!("../../tests/golden/segment_log/v1.segments");
        fs::write(&path, older).unwrap();
        for error in [read(&path).unwrap_err(), SegmentLog::open(&path).unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains("0123.segments: its version is 1"), "{error}");
            assert!(error.next_step().unwrap().contains("tidemark recover"));
        }
        assert_eq!(fs::read(&path).unwrap(), older);
    }

    #[test]
    fn after_a_failed_append_every_append_fails() {
        let (_keep, path) = place();
        let mut journal = SegmentLog::create(&path, &header()).unwrap();
        journal.append(&[segment(0, 1)]).unwrap();
        let before = fs::read(&path).unwrap();
        journal.file = File::open(&path).unwrap();
        assert_eq!(journal.append(&[segment(1, 1)]).unwrap_err().errno(), Some(libc::EBADF));
        journal.file = options().open(&path).unwrap();
        assert_eq!(journal.originals_begun().unwrap_err().errno(), Some(libc::EBADF));
        assert_eq!(fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_copy_outlives_its_journal_which_is_removed() {
        let (keep, path) = place();
        let mut journal = SegmentLog::create(&path, &header()).unwrap();
        journal.note_or_drop(|log| log.append(&[segment(0, 1)])).unwrap();
        // Fails as on a full filesystem.
        journal.file = File::open(&path).unwrap();
        journal.note_or_drop(|log| log.append(&[segment(1, 1)])).unwrap();
        assert_eq!(fs::read_dir(keep.path()).unwrap().count(), 0);
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::Refused);
        journal.note_or_drop(|log| log.rewrite(&[segment(1, 1)])).unwrap();
        journal.note_or_drop(SegmentLog::originals_begun).unwrap();
        assert_eq!(fs::read_dir(keep.path()).unwrap().count(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]
        #[test]
        fn the_last_record_of_a_segment_counts(
            batches in prop::collection::vec(prop::collection::vec((0u64..16, any::<u32>()), 0..700), 0..30),
        ) {
            let (_keep, path) = place();
            let mut journal = SegmentLog::create(&path, &header()).unwrap();
            let mut model = BTreeMap::new();
            for batch in batches {
                let batch: Vec<PlacedSegment> = batch.into_iter().map(|(ix, checksum)| segment(ix, u64::from(checksum))).collect();
                model.extend(batch.iter().map(|segment| (segment.ix, *segment)));
                journal.append(&batch).unwrap();
            }
            let mut placed = read(&path).unwrap().placed;
            placed.sort_by_key(|segment| segment.ix);
            prop_assert_eq!(placed, model.into_values().collect::<Vec<_>>());
        }
    }
}
