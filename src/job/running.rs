//! A job in progress: its record, its lock, and its end.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::file::RecordFile;
use super::origin_lock::OriginLock;
use super::paths::{RUN_DIR, lock_path, progress_path, record_path, segments_path};
use super::registry::{FoundJob, remove_job};
use crate::base::{DeviceNumber, Error, Result, ResultExt, clock};
use crate::dm::naming::new_id;
use crate::format::state::{ChangeRecord, CopyRecord, JobRecord, OriginRecord, ResourceRecord};

use crate::sys::privilege;
use crate::sys::rcu::{self, Expedite};

/// The kind of a resource: the kernel's switch that a watchdog turns off, if it can.
const EXPEDITED: &str = "rcu-expedited";

/// The kind of a resource: a file under construction, which has another name until it is complete.
const PARTIAL: &str = "partial";

/// A job of this process. Dropped without [`Job::finish`], it leaves its record for `recover`.
#[derive(Debug)]
pub struct Job {
    record: JobRecord,
    directory: PathBuf,
    file: RecordFile,
    /// Of a live copy.
    origin_lock: Option<OriginLock>,
    /// Held until the process ends or the job is dropped.
    _lock: Flock<File>,
}

impl Job {
    /// Begins a job in [`RUN_DIR`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn begin(command: &str) -> Result<Self> {
        Self::begin_in(Path::new(RUN_DIR), command)
    }

    /// Begins the job of a copy of the live origin `number`, which no other job has then.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) where one has; I/O errors.
    pub fn begin_for_origin(command: &str, number: DeviceNumber) -> Result<Self> {
        Self::begin_for_origin_in(Path::new(RUN_DIR), command, number)
    }

    fn begin_for_origin_in(directory: &Path, command: &str, number: DeviceNumber) -> Result<Self> {
        let mut job = Self::begin_in(directory, command)?;
        match OriginLock::take(directory, number, job.id()) {
            Ok(lock) => {
                job.origin_lock = Some(lock);
                Ok(job)
            }
            Err(error) => Err(error.after_undo(job.finish())),
        }
    }

    /// Begins a job that has made nothing but `partial`, which is to become a command's result (none where the target
    /// is a device), so that others learn who has it and `recover` removes a file if we die. None where no record can
    /// be made: the command can do without (an ordinary user's has none, and none is needed to clean up behind an
    /// error).
    #[must_use]
    pub fn begin_for_target(command: &str, partial: Option<&Path>) -> Option<Self> {
        if privilege::is_root() {
            Self::begin_for_target_in(Path::new(RUN_DIR), command, partial)
        } else {
            None
        }
    }

    fn begin_for_target_in(directory: &Path, command: &str, partial: Option<&Path>) -> Option<Self> {
        match (Self::begin_in(directory, command), partial) {
            (Ok(mut job), partial) => {
                partial.into_iter().for_each(|partial| job.note_partial(partial));
                Some(job)
            }
            (Err(error), Some(partial)) => {
                warn_unrecorded(partial, &error);
                None
            }
            (Err(error), None) => {
                tracing::debug!(%error, "no record of the job");
                None
            }
        }
    }

    /// Ends the job after `result`: with the work done or everything put back nothing is left to
    /// remember; after a failed undo the record stays for `recover`.
    ///
    /// # Errors
    /// `result`'s, else I/O errors.
    pub fn conclude<T>(self, result: Result<T>) -> Result<T> {
        match result {
            Ok(value) => self.finish().map(|()| value).map_err(names_recover),
            Err(error) if error.failed_undos().is_empty() => Err(match self.finish() {
                Ok(()) => error,
                Err(undo) => names_recover(error.with_failed_undo(undo)),
            }),
            Err(error) => Err(names_recover(error)),
        }
    }

    fn begin_in(directory: &Path, command: &str) -> Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .io_context(|| format!("making the directory {}", directory.display()))?;
        let job = new_id();
        let path = lock_path(directory, &job);
        // Locked under another name first: once it can be found, it is held.
        let hidden = directory.join(format!("{job}.lock-new"));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&hidden)
            .io_context(|| format!("making {}", hidden.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| Error::io(format!("locking {}", hidden.display()), errno.into()))?;
        fs::rename(&hidden, &path).io_context(|| format!("making {}", path.display()))?;
        let record = JobRecord {
            job,
            command: command.to_owned(),
            process: std::process::id(),
            started_utc_ns: clock::utc_now_ns(),
            origin: None,
            change: None,
            resources: Vec::new(),
            copy: None,
        };
        let file = RecordFile::new(record_path(directory, &record.job));
        let mut job = Self { record, directory: directory.to_owned(), file, origin_lock: None, _lock: lock };
        match job.save() {
            Ok(()) => Ok(job),
            // What can be found of it would pass for a dead one.
            Err(error) => Err(error.after_undo(job.finish())),
        }
    }

    /// Its id, as in the UUIDs of its devices.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.record.job
    }

    /// Where the journal of its segments is, if it makes one.
    #[must_use]
    pub fn segments_path(&self) -> PathBuf {
        segments_path(&self.directory, &self.record.job)
    }

    /// Where [`ProgressFile`](crate::job::published::ProgressFile) shows how far it is; removed with it.
    #[must_use]
    pub fn progress_path(&self) -> PathBuf {
        progress_path(&self.directory, &self.record.job)
    }

    /// Notes what is being copied.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_origin(&mut self, origin: OriginRecord) -> Result<()> {
        self.record.origin = Some(origin);
        self.save()
    }

    /// Goes on with a dead job as this process's own.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) for a living one; its record's, where that
    /// cannot be read; I/O errors.
    pub fn take_over(found: FoundJob) -> Result<Self> {
        Self::take_over_in(Path::new(RUN_DIR), found)
    }

    fn take_over_in(directory: &Path, found: FoundJob) -> Result<Self> {
        let Some(lock) = found.lock else {
            return Err(Error::refused(format!("job {} is running", found.id)).state("nothing was changed"));
        };
        let mut record = found.record?;
        record.process = std::process::id();
        let number = record.origin.as_ref().map(|origin| origin.number);
        let origin_lock =
            number.map(|number| OriginLock::take(directory, number, &record.job)).transpose()?;
        let file = RecordFile::new(record_path(directory, &record.job));
        let mut job = Self { record, directory: directory.to_owned(), file, origin_lock, _lock: lock };
        job.save()?;
        Ok(job)
    }

    /// Its record.
    #[must_use]
    pub fn record(&self) -> &JobRecord {
        &self.record
    }

    /// Notes what another process needs to go on with the copy.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_copy(&mut self, copy: CopyRecord) -> Result<()> {
        self.record.copy = Some(copy);
        self.save()
    }

    /// Notes that --hook-after has been run.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_hook_after_done(&mut self) -> Result<()> {
        match &mut self.record.copy {
            None => Ok(()),
            Some(copy) => {
                copy.hook_after_done = true;
                self.save()
            }
        }
    }

    /// Notes a file that is to become the command's result, at once after it was made: if we die, `recover`
    /// removes it. Where that cannot be noted the command goes on, and says so.
    pub fn note_partial(&mut self, path: &Path) {
        let noted = match path.to_str() {
            None => Err(Error::usage("its path is not in UTF-8")),
            Some(path) => {
                let resource = ResourceRecord { kind: PARTIAL.to_owned(), path: path.to_owned() };
                self.record.resources.push(resource);
                self.save()
            }
        };
        if let Err(error) = noted {
            warn_unrecorded(path, &error);
        }
    }

    /// Notes that the kernel's grace periods may be made shorter from the next intent on: with that, it is saved.
    pub fn note_expedited(&mut self) {
        if Expedite::find_off().is_some() && !is_expedited(&self.record) {
            let resource = ResourceRecord { kind: EXPEDITED.to_owned(), path: rcu::PATH.to_owned() };
            self.record.resources.push(resource);
        }
    }

    /// The device number of the filesystem that the record is on: it must not be frozen.
    ///
    /// # Errors
    /// I/O errors.
    pub fn filesystem(&self) -> Result<DeviceNumber> {
        let meta = fs::metadata(&self.directory)
            .io_context(|| format!("looking at {}", self.directory.display()))?;
        Ok(DeviceNumber::from_dev(meta.dev()))
    }

    /// Ends the job: everything it made is gone.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(mut self) -> Result<()> {
        if let Some(lock) = self.origin_lock.take() {
            lock.release();
        }
        remove_job(&self.directory, &self.record.job)
    }

    /// Writes what is about to be done to the origin; None where nothing is.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_change(&mut self, change: Option<ChangeRecord>) -> Result<()> {
        self.record.change = change;
        self.save()
    }

    fn save(&mut self) -> Result<()> {
        self.file.save(&self.record)
    }
}

fn warn_unrecorded(partial: &Path, error: &Error) {
    let partial = partial.display();
    tracing::warn!(
        "if this process is killed, {partial} stays until you remove it: no record of it ({error})"
    );
}

/// Ends the job of a command that could do without: as [`Job::conclude`], but a record that stays behind a result which
/// is there is only said.
///
/// # Errors
/// `result`'s.
pub fn conclude<T>(job: Option<Job>, result: Result<T>) -> Result<T> {
    let Some(job) = job else { return result };
    let value = match result {
        Ok(value) => value,
        Err(error) => return job.conclude(Err(error)),
    };
    if let Err(error) = job.finish() {
        tracing::warn!("all is done, but its record stays, which 'tidemark recover' removes: {error}");
    }
    Ok(value)
}

/// What failed to be put back stays in the record, and whoever reads the error has to learn who clears it away.
fn names_recover(error: Error) -> Error {
    const RECOVER: &str =
        "run 'tidemark recover', which clears away what is left, once what failed above is in order";
    match error.next_step() {
        // "After a crash: ..." is no advice to do so.
        Some(next) if next.contains("run 'tidemark recover'") || next.contains("run tidemark recover") => {
            error
        }
        Some(next) => {
            let next = format!("{RECOVER}; then {next}");
            error.next(next)
        }
        None => error.next(RECOVER),
    }
}

/// The files that the job was to complete, by its record. One may be named twice.
pub fn partials(record: &JobRecord) -> impl Iterator<Item = &Path> {
    let noted = record.resources.iter().filter(|resource| resource.kind == PARTIAL);
    let gone_on_with = record.copy.iter().filter_map(|copy| copy.partial.as_deref());
    noted.map(|resource| resource.path.as_str()).chain(gone_on_with).map(Path::new)
}

/// True where the job may have left [`rcu::PATH`] on.
#[must_use]
pub fn is_expedited(record: &JobRecord) -> bool {
    record.resources.iter().any(|resource| resource.kind == EXPEDITED)
}

#[cfg(test)]
mod tests {
    use super::super::origin_lock::refuse_held_origin_in;
    use super::super::paths::origin_lock_path;
    use super::super::published;
    use super::super::registry::{find_jobs_in, look_at_jobs_in};
    use super::*;
    use crate::format::state::ProgressView;

    #[test]
    fn a_living_job_is_told_from_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::begin_in(dir.path(), "copy").unwrap();
        let found = find_jobs_in(dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].alive);
        assert_eq!(found[0].record.as_ref().unwrap().job, job.id());
        assert!(look_at_jobs_in(dir.path()).unwrap()[0].alive);
        drop((found, job));
        let looked = look_at_jobs_in(dir.path()).unwrap();
        assert!(!looked[0].alive);
        let found = find_jobs_in(dir.path()).unwrap();
        assert!(!found[0].alive);
        // While one recover holds it, another sees it as somebody's; who only looked holds nothing.
        assert!(find_jobs_in(dir.path()).unwrap()[0].alive);
    }

    #[test]
    fn an_origin_has_one_job() {
        let dir = tempfile::tempdir().unwrap();
        let number = DeviceNumber { major: 253, minor: 4 };
        let begin = || Job::begin_for_origin_in(dir.path(), "copy", number);
        let first = begin().unwrap();
        for error in [begin().unwrap_err(), refuse_held_origin_in(dir.path(), number).unwrap_err()] {
            assert_eq!(error.kind(), crate::base::ErrorKind::Refused);
            let who = format!("job {} (process {})", first.id(), std::process::id());
            assert!(error.to_string().contains(&who), "{error}");
        }
        assert_eq!(find_jobs_in(dir.path()).unwrap().len(), 1, "the one refused left nothing");
        let other = DeviceNumber { minor: 5, ..number };
        Job::begin_for_origin_in(dir.path(), "copy", other).unwrap().finish().unwrap();
        // A killed one leaves the file, which locks nothing; an ended one leaves nothing.
        drop(first);
        refuse_held_origin_in(dir.path(), number).unwrap();
        begin().unwrap().finish().unwrap();
        assert!(!origin_lock_path(dir.path(), number).exists());
    }

    #[test]
    fn a_dead_job_names_what_it_was_to_complete() {
        let dir = tempfile::tempdir().unwrap();
        let partial = Path::new("/srv/.copy.tidemark-partial.0123456789ab");
        drop(Job::begin_for_target_in(dir.path(), "restore", Some(partial)).unwrap());
        let found = find_jobs_in(dir.path()).unwrap();
        assert_eq!(partials(found[0].record.as_ref().unwrap()).collect::<Vec<_>>(), [partial]);
    }

    #[test]
    fn a_command_that_can_do_without_a_record_does() {
        let dir = tempfile::tempdir().unwrap();
        let partial = Path::new("/srv/.copy.tidemark-partial.0123456789ab");
        let nowhere = dir.path().join("file");
        fs::write(&nowhere, b"").unwrap();
        assert!(Job::begin_for_target_in(&nowhere, "restore", Some(partial)).is_none());
        assert!(Job::begin_for_target_in(&nowhere, "restore", None).is_none());
        // A record that cannot be removed is no reason to call what is done failed.
        let job = Job::begin_for_target_in(dir.path(), "restore", Some(partial)).unwrap();
        let record = record_path(dir.path(), job.id());
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
        assert_eq!(conclude(Some(job), Ok(7)).unwrap(), 7);
    }

    #[test]
    fn whoever_leaves_a_record_names_who_clears_it_away() {
        let dir = tempfile::tempdir().unwrap();
        let failed = |error: Error, undos: usize| {
            let job = Job::begin_in(dir.path(), "copy").unwrap();
            let record = record_path(dir.path(), job.id());
            let undo = || Error::new(crate::base::ErrorKind::Io, "remove the partial file /srv/x");
            let error = (0..undos).fold(error, |error, _| error.with_failed_undo(undo()));
            let next = job.conclude::<()>(Err(error)).unwrap_err().next_step().map(str::to_owned);
            (next.unwrap_or_default(), record.exists())
        };
        let error = || Error::new(crate::base::ErrorKind::Io, "sync of /srv/x");
        assert_eq!(failed(error(), 0), (String::new(), false));
        let (next, is_left) = failed(error(), 1);
        assert!(is_left && next.contains("tidemark recover"), "{next}");
        let (next, _) = failed(error().next("make room"), 1);
        assert!(next.contains("tidemark recover") && next.ends_with("; then make room"), "{next}");
        let (next, _) = failed(error().next("run 'tidemark recover', and copy again"), 1);
        assert_eq!(next, "run 'tidemark recover', and copy again");
    }

    #[test]
    fn a_finished_job_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = Job::begin_in(dir.path(), "copy").unwrap();
        job.note_partial(Path::new("/srv/.copy.tidemark-partial.0123456789ab"));
        fs::write(job.segments_path(), b"").unwrap();
        fs::write(job.progress_path(), b"").unwrap();
        fs::write(published::temporary(&job.progress_path()), b"").unwrap();
        job.finish().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_job_can_be_taken_over_and_a_living_one_cannot() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::begin_in(dir.path(), "copy").unwrap();
        fs::write(job.segments_path(), "x").unwrap();
        let found = find_jobs_in(dir.path()).unwrap().remove(0);
        assert_eq!(Job::take_over_in(dir.path(), found).unwrap_err().kind(), crate::base::ErrorKind::Refused);
        let id = job.id().to_owned();
        drop(job);
        let found = find_jobs_in(dir.path()).unwrap().remove(0);
        let job = Job::take_over_in(dir.path(), found).unwrap();
        assert_eq!(job.id(), id);
        assert!(find_jobs_in(dir.path()).unwrap()[0].alive);
        job.finish().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_newer_program_has_left_is_found_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = Job::begin_in(dir.path(), "copy").unwrap();
        job.note_partial(Path::new("/srv/.copy.tidemark-partial.0123456789ab"));
        let path = record_path(dir.path(), job.id());
        drop(job);
        let found = find_jobs_in(dir.path()).unwrap().remove(0);
        assert!(!found.is_newer);
        drop(found);
        let text = fs::read_to_string(&path).unwrap();
        let (body, _) = text.split_once("crc32c ").unwrap();
        let body = body.replacen('{', "{\"added\":[1],", 1);
        let sum = crate::base::checksum::crc32c_salted(b"job", body.as_bytes());
        fs::write(&path, format!("{body}crc32c {sum:08x}\n")).unwrap();
        let found = find_jobs_in(dir.path()).unwrap().remove(0);
        assert!(found.is_newer);
        // What `recover` goes by.
        let record = found.record.unwrap();
        assert_eq!(partials(&record).count(), 1);
    }

    #[test]
    fn a_jobs_progress_is_found_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::begin_in(dir.path(), "copy").unwrap();
        let found = || find_jobs_in(dir.path()).unwrap().remove(0).progress;
        assert_eq!(found(), None);
        let view = ProgressView { phase: "data".to_owned(), ..ProgressView::default() };
        fs::write(job.progress_path(), view.encode().unwrap()).unwrap();
        assert_eq!(found(), Some(view.clone()));
        fs::write(job.progress_path(), b"rubbish").unwrap();
        assert_eq!(found(), None);
        fs::write(job.progress_path(), view.encode().unwrap()).unwrap();
        drop(job);
        assert_eq!(found(), Some(view), "what a dead one said last");
        // What a removal left that was cut short is no job.
        let id = new_id();
        fs::write(progress_path(dir.path(), &id), b"").unwrap();
        assert_eq!(find_jobs_in(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn a_broken_record_is_an_error_and_the_job_is_found_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::begin_in(dir.path(), "copy").unwrap();
        let id = job.id().to_owned();
        drop(job);
        fs::write(record_path(dir.path(), &id), "rubbish").unwrap();
        let found = find_jobs_in(dir.path()).unwrap();
        assert!(found[0].record.is_err());
        assert_eq!(found[0].id, id);
    }
}
