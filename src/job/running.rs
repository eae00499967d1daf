//! A job of this process: its record, its lock, and its end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::origin_lock::OriginLock;
use super::paths::{RUN_DIR, further_progress_path, progress_path, segments_path};
use super::registry::{FoundJob, remove_job};
use crate::base::{DeviceNumber, Error, Result, ResultExt, clock};
use crate::dm::naming::new_id;
use crate::format::state::{ChangeRecord, CopyRecord, JobRecord, OriginRecord, ResourceRecord};
use crate::record::LockedRecord;
use crate::sys::privilege;
use crate::sys::rcu::{self, Expedite};

/// Resource kind: the kernel's switch, which a watchdog turns off if it can.
const EXPEDITED: &str = "rcu-expedited";

/// Resource kind: a file under construction, which gets its final name when it is complete.
const PARTIAL: &str = "partial";

/// A job of this process. If it is dropped without [`Job::finish`], its record stays for `recover`.
#[derive(Debug)]
pub struct Job {
    /// Locked until the process ends or the job is dropped.
    record: LockedRecord<JobRecord>,
    /// The locks of the live origins, if any.
    origin_locks: Vec<OriginLock>,
}

impl Job {
    /// Starts a job in [`RUN_DIR`].
    ///
    /// # Errors
    /// I/O errors.
    pub fn begin(command: &str) -> Result<Self> {
        Self::begin_in(Path::new(RUN_DIR), command)
    }

    /// Starts the job that holds the live `origins`. No other job can have any of them meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if another job has one; I/O errors.
    pub fn begin_for_origins(command: &str, origins: &[DeviceNumber]) -> Result<Self> {
        Self::begin_for_origins_in(Path::new(RUN_DIR), command, origins)
    }

    fn begin_for_origins_in(directory: &Path, command: &str, origins: &[DeviceNumber]) -> Result<Self> {
        let mut job = Self::begin_in(directory, command)?;
        for number in origins {
            match OriginLock::take(directory, *number, job.id()) {
                Ok(lock) => job.origin_locks.push(lock),
                Err(error) => return Err(error.after_undo(job.finish())),
            }
        }
        Ok(job)
    }

    /// Starts a job whose only resource is `partial`, a file that will become the command's result (None if
    /// the target is a device). So other processes learn which job uses the target, and `recover` removes the
    /// file if this process dies. None if no record can be created: the command works without (an ordinary
    /// user has none, and cleaning up after an error needs none).
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

    /// Ends the job with `result`. If the work is done or everything was undone, the record is removed; after
    /// a failed undo it stays for `recover`.
    ///
    /// # Errors
    /// That of `result`, else I/O errors.
    pub fn conclude<T>(self, result: Result<T>) -> Result<T> {
        match result {
            Ok(value) => self.finish().map(|()| value).map_err(advise_recover),
            Err(error) if error.failed_undos().is_empty() => Err(match self.finish() {
                Ok(()) => error,
                Err(undo) => advise_recover(error.with_failed_undo(undo)),
            }),
            Err(error) => Err(advise_recover(error)),
        }
    }

    fn begin_in(directory: &Path, command: &str) -> Result<Self> {
        let job = new_id();
        let record = JobRecord {
            job,
            command: command.to_owned(),
            process: std::process::id(),
            started_utc_ns: clock::utc_now_ns(),
            origin: None,
            further_origins: Vec::new(),
            change: None,
            resources: Vec::new(),
            copy: None,
        };
        let id = record.job.clone();
        Ok(Self { record: LockedRecord::create(directory, &id, record)?, origin_locks: Vec::new() })
    }

    /// Its id, as in the UUIDs of its devices.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.record.record().job
    }

    /// The path of its segment log, if it has one.
    #[must_use]
    pub fn segments_path(&self) -> PathBuf {
        segments_path(self.record.directory(), self.id())
    }

    /// The path at which [`ProgressFile`](crate::job::published::ProgressFile) writes its progress; removed
    /// with it.
    #[must_use]
    pub fn progress_path(&self) -> PathBuf {
        progress_path(self.record.directory(), self.id())
    }

    /// As [`Job::progress_path`], of the origin at `index` in the order in which they were given.
    #[must_use]
    pub fn progress_path_of(&self, index: usize) -> PathBuf {
        match index {
            0 => self.progress_path(),
            index => further_progress_path(self.record.directory(), self.id(), index + 1),
        }
    }

    /// Records the origins, in the order in which they were given.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_origins(&mut self, origins: Vec<OriginRecord>) -> Result<()> {
        let mut origins = origins.into_iter();
        let record = self.record.record_mut();
        record.origin = origins.next();
        record.further_origins = origins.collect();
        self.record.save()
    }

    /// Takes over a dead job as a job of this process.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused) if the job is running; the error of its
    /// record, if that cannot be read; I/O errors.
    pub fn take_over(found: FoundJob) -> Result<Self> {
        Self::take_over_in(Path::new(RUN_DIR), found)
    }

    fn take_over_in(directory: &Path, found: FoundJob) -> Result<Self> {
        let Some(lock) = found.lock else {
            return Err(Error::refused(format!("job {} is running", found.id)).state("nothing was changed"));
        };
        let mut record = LockedRecord::of(directory, &found.id, found.record?, lock);
        record.record_mut().process = std::process::id();
        let take = |origin: &OriginRecord| OriginLock::take(directory, origin.number, &found.id);
        let origin_locks = record.record().origins().map(take).collect::<Result<_>>()?;
        record.save()?;
        Ok(Self { record, origin_locks })
    }

    /// Its record.
    #[must_use]
    pub fn record(&self) -> &JobRecord {
        self.record.record()
    }

    /// Records what another process needs to resume the copy.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_copy(&mut self, copy: CopyRecord) -> Result<()> {
        self.record.record_mut().copy = Some(copy);
        self.record.save()
    }

    /// Records that --hook-after has been run.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_hook_after_done(&mut self) -> Result<()> {
        match &mut self.record.record_mut().copy {
            None => Ok(()),
            Some(copy) => {
                copy.hook_after_done = true;
                self.record.save()
            }
        }
    }

    /// Records a file that will become the command's result, right after it was created: if this process
    /// dies, `recover` removes the file. If that cannot be recorded, the command continues with a warning.
    pub fn note_partial(&mut self, path: &Path) {
        let noted = match path.to_str() {
            None => Err(Error::usage("its path is not UTF-8")),
            Some(path) => {
                let resource = ResourceRecord { kind: PARTIAL.to_owned(), path: path.to_owned() };
                self.record.record_mut().resources.push(resource);
                self.record.save()
            }
        };
        if let Err(error) = noted {
            warn_unrecorded(path, &error);
        }
    }

    /// Records that RCU may be expedited from the next intent on. Saved together with that intent.
    pub fn note_expedited(&mut self) {
        if Expedite::open_if_off().is_some() && !is_expedited(self.record()) {
            let resource = ResourceRecord { kind: EXPEDITED.to_owned(), path: rcu::PATH.to_owned() };
            self.record.record_mut().resources.push(resource);
        }
    }

    /// The device number of the record's filesystem, which must not be frozen.
    ///
    /// # Errors
    /// I/O errors.
    pub fn filesystem(&self) -> Result<DeviceNumber> {
        let directory = self.record.directory();
        let meta = fs::metadata(directory).io_context(|| format!("examining {}", directory.display()))?;
        Ok(DeviceNumber::from_dev(meta.dev()))
    }

    /// Ends the job: everything that it created is gone.
    ///
    /// # Errors
    /// I/O errors.
    pub fn finish(mut self) -> Result<()> {
        self.origin_locks.drain(..).for_each(OriginLock::release);
        remove_job(self.record.directory(), self.id())
    }

    /// Records what is about to be done to the origin; None if nothing is.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_change(&mut self, change: Option<ChangeRecord>) -> Result<()> {
        self.record.record_mut().change = change;
        self.record.save()
    }
}

fn warn_unrecorded(partial: &Path, error: &Error) {
    let partial = partial.display();
    tracing::warn!(
        "if this process is killed, {partial} stays until you remove it: it could not be recorded ({error})"
    );
}

/// Ends the job of a command that works without a record: as [`Job::conclude`], but after a success a record
/// that cannot be removed only causes a warning.
///
/// # Errors
/// That of `result`.
pub fn conclude<T>(job: Option<Job>, result: Result<T>) -> Result<T> {
    let Some(job) = job else { return result };
    let value = match result {
        Ok(value) => value,
        Err(error) => return job.conclude(Err(error)),
    };
    if let Err(error) = job.finish() {
        tracing::warn!(
            "the command succeeded, but its record remains; 'tidemark recover' removes it: {error}"
        );
    }
    Ok(value)
}

/// `error`, with the advice to run recover if something could not be undone.
#[must_use]
pub fn with_advice(error: Error) -> Error {
    if error.failed_undos().is_empty() { error } else { advise_recover(error) }
}

/// Adds the advice to run recover, as the record stays and what could not be undone is left.
fn advise_recover(error: Error) -> Error {
    const RECOVER: &str = "fix what failed above, then run 'tidemark recover', which removes what is left";
    match error.next_step() {
        // The advice "After a crash: ..." is not the advice to run it now.
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

/// The partial files named in the job's record. One may be named twice.
pub fn partials(record: &JobRecord) -> impl Iterator<Item = &Path> {
    let noted = record.resources.iter().filter(|resource| resource.kind == PARTIAL);
    let resumed = record.copy.iter().filter_map(|copy| copy.partial.as_deref());
    noted.map(|resource| resource.path.as_str()).chain(resumed).map(Path::new)
}

/// True if the job may have left [`rcu::PATH`] on.
#[must_use]
pub fn is_expedited(record: &JobRecord) -> bool {
    record.resources.iter().any(|resource| resource.kind == EXPEDITED)
}

#[cfg(test)]
mod tests {
    use super::super::origin_lock::refuse_held_origin_in;
    use super::super::paths::origin_lock_path;
    use super::super::published;
    use super::super::registry::{find_jobs_in, list_jobs_in};
    use super::*;
    use crate::format::state::ProgressView;
    use crate::record::path_of as record_path;

    #[test]
    fn a_living_job_is_distinguished_from_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let job = Job::begin_in(dir.path(), "copy").unwrap();
        let found = find_jobs_in(dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].alive);
        assert_eq!(found[0].record.as_ref().unwrap().job, job.id());
        assert!(list_jobs_in(dir.path()).unwrap()[0].alive);
        drop((found, job));
        let listed = list_jobs_in(dir.path()).unwrap();
        assert!(!listed[0].alive);
        let found = find_jobs_in(dir.path()).unwrap();
        assert!(!found[0].alive);
        // While one recover holds the lock, the job looks alive to another. `list_jobs` holds no lock.
        assert!(find_jobs_in(dir.path()).unwrap()[0].alive);
    }

    #[test]
    fn an_origin_has_one_job() {
        let dir = tempfile::tempdir().unwrap();
        let number = DeviceNumber { major: 253, minor: 4 };
        let begin = || Job::begin_for_origins_in(dir.path(), "copy", &[number]);
        let first = begin().unwrap();
        for error in [begin().unwrap_err(), refuse_held_origin_in(dir.path(), number).unwrap_err()] {
            assert_eq!(error.kind(), crate::base::ErrorKind::Refused);
            let owner = format!("job {} (process {})", first.id(), std::process::id());
            assert!(error.to_string().contains(&owner), "{error}");
        }
        assert_eq!(find_jobs_in(dir.path()).unwrap().len(), 1, "the refused job left nothing");
        let other = DeviceNumber { minor: 5, ..number };
        Job::begin_for_origins_in(dir.path(), "copy", &[other]).unwrap().finish().unwrap();
        // A group has all of its origins, or none.
        let error = Job::begin_for_origins_in(dir.path(), "copy", &[other, number]).unwrap_err();
        assert_eq!(error.kind(), crate::base::ErrorKind::Refused);
        Job::begin_for_origins_in(dir.path(), "copy", &[other]).unwrap().finish().unwrap();
        // A killed job leaves the file, which locks nothing; a finished job leaves nothing.
        drop(first);
        refuse_held_origin_in(dir.path(), number).unwrap();
        begin().unwrap().finish().unwrap();
        assert!(!origin_lock_path(dir.path(), number).exists());
    }

    #[test]
    fn a_dead_job_names_its_partial_file() {
        let dir = tempfile::tempdir().unwrap();
        let partial = Path::new("/srv/.copy.tidemark-partial.0123456789ab");
        drop(Job::begin_for_target_in(dir.path(), "restore", Some(partial)).unwrap());
        let found = find_jobs_in(dir.path()).unwrap();
        assert_eq!(partials(found[0].record.as_ref().unwrap()).collect::<Vec<_>>(), [partial]);
    }

    #[test]
    fn a_command_runs_without_a_record_if_none_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let partial = Path::new("/srv/.copy.tidemark-partial.0123456789ab");
        let nowhere = dir.path().join("file");
        fs::write(&nowhere, b"").unwrap();
        assert!(Job::begin_for_target_in(&nowhere, "restore", Some(partial)).is_none());
        assert!(Job::begin_for_target_in(&nowhere, "restore", None).is_none());
        // A record that cannot be removed does not turn a success into a failure.
        let job = Job::begin_for_target_in(dir.path(), "restore", Some(partial)).unwrap();
        let record = record_path(dir.path(), job.id());
        fs::remove_file(&record).unwrap();
        fs::create_dir(&record).unwrap();
        assert_eq!(conclude(Some(job), Ok(7)).unwrap(), 7);
    }

    #[test]
    fn an_error_that_leaves_a_record_advises_recover() {
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
        fs::write(job.progress_path_of(1), b"").unwrap();
        fs::write(published::temporary(&job.progress_path_of(31)), b"").unwrap();
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
    fn the_record_of_a_newer_program_is_found_and_marked() {
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
        // What `recover` uses.
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
        assert_eq!(found(), Some(view), "the last progress of a dead job");
        // A removal that was cut short does not leave a job.
        let id = new_id();
        fs::write(progress_path(dir.path(), &id), b"").unwrap();
        assert_eq!(find_jobs_in(dir.path()).unwrap().len(), 1);
    }

    #[test]
    fn the_progress_of_each_origin_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = Job::begin_in(dir.path(), "copy").unwrap();
        let origin = |minor| OriginRecord {
            device: format!("v{minor}"),
            number: DeviceNumber { major: 253, minor },
            table: String::new(),
            queue: std::collections::BTreeMap::new(),
        };
        job.set_origins(vec![origin(1), origin(2), origin(3)]).unwrap();
        let view =
            |path: &str| ProgressView { origin_path: Some(path.to_owned()), ..ProgressView::default() };
        for (index, path) in [(0, "a"), (2, "c")] {
            fs::write(job.progress_path_of(index), view(path).encode().unwrap()).unwrap();
        }
        let found = find_jobs_in(dir.path()).unwrap().remove(0);
        assert_eq!((found.progress, found.further_progress), (Some(view("a")), vec![view("c")]));
    }

    #[test]
    fn a_broken_record_is_an_error_and_the_job_is_still_found() {
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
