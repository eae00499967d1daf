//! The report of a copy.

use std::time::Duration;

use serde::Serialize;

use super::plan::CopyPlan;
use super::since::SinceReport;
use crate::base::{Bytes, Error, Result, clock};
use crate::copy::CopyReport;
use crate::job;
use crate::progress::{Event, Observer, StoreFill};
use crate::secondary::SecondaryTarget;
use crate::stack::gate::GateReport;
use crate::stack::{HoldTimes, Skipped};
use crate::store::KeptStore;

/// The report of a copy. Times are in milliseconds if the name ends in `_ms`.
#[derive(Clone, Debug, Serialize)]
pub struct CopyOutcome {
    /// The origin.
    pub origin: String,
    /// Its size in bytes.
    pub origin_bytes: Bytes,
    /// The instant of the copy.
    pub instant: InstantReport,
    /// The kept snapshot that was copied, as VOLUME@NAME; None if the origin was none.
    pub snapshot: Option<String>,
    /// What was copied since another snapshot; None for a whole copy.
    pub since: Option<SinceReport>,
    /// The copier's figures.
    #[serde(flatten)]
    pub copy: CopyReport,
    /// The COW store's figures; None for a cold origin.
    pub store: Option<StoreFill>,
    /// The releases of regions during the copy; None for a cold origin.
    pub release: Option<GateReport>,
    /// Free space that was neither copied nor preserved.
    pub skipped: SkippedReport,
    /// Filesystems on the origin that were not frozen at the instant, and why.
    pub not_frozen: Vec<String>,
    /// Path of the store that was kept.
    pub kept_store: Option<String>,
    /// Duration of the whole command in seconds.
    pub total_seconds: f64,
}

impl CopyOutcome {
    /// The report of a copy that has ended with `result`, after everything was restored.
    pub fn of(plan: &CopyPlan, result: CopyResult, total: Duration) -> Self {
        Self {
            origin: plan.origin.path.display().to_string(),
            origin_bytes: plan.origin.size,
            instant: result.instant.into(),
            snapshot: plan.kept.as_ref().map(|kept| kept.snapshot.clone()),
            since: result.since,
            copy: result.copy,
            store: result.store,
            release: result.release,
            skipped: result.skipped,
            not_frozen: plan.origin.not_frozen.clone(),
            kept_store: result.kept.map(|kept| kept.path.display().to_string()),
            total_seconds: total.as_secs_f64(),
        }
    }
}

/// The report of a copy of several origins from one instant.
#[derive(Debug, Serialize)]
pub struct GroupOutcome {
    /// The instant of all copies.
    pub instant: InstantReport,
    /// One for each origin, in the order of the command line.
    pub origins: Vec<OriginOutcome>,
    /// Duration of the whole command in seconds.
    pub total_seconds: f64,
}

/// What became of one origin of several.
#[derive(Debug, Serialize)]
pub struct OriginOutcome {
    /// The origin.
    pub origin: String,
    /// Its secondary.
    pub secondary: String,
    /// The report of its copy; None if that failed.
    pub copy: Option<CopyOutcome>,
    /// Why it failed.
    #[serde(serialize_with = "error_text")]
    pub error: Option<Error>,
}

fn error_text<S: serde::Serializer>(
    error: &Option<Error>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    error.as_ref().map(Error::to_string).serialize(serializer)
}

impl OriginOutcome {
    /// What `copied` means for the origin of `plan`.
    pub(super) fn of(plan: &CopyPlan, copied: Result<CopyOutcome>) -> Self {
        let (copy, error) = match copied {
            Ok(copy) => (Some(copy), None),
            Err(error) => (None, Some(error)),
        };
        let secondary = match &plan.request.secondary {
            SecondaryTarget::Path(path) => path.display().to_string(),
            SecondaryTarget::Pipe => "-".to_owned(),
        };
        Self { origin: plan.origin.path.display().to_string(), secondary, copy, error }
    }

    /// True if nothing is left of the copy but its result.
    pub(super) fn is_put_back(&self) -> bool {
        self.error.as_ref().is_none_or(|error| error.failed_undos().is_empty())
    }
}

impl GroupOutcome {
    /// Fails if the copy of an origin failed, with the gravest error: bad data, then a failure, then a refusal, then
    /// an interrupt.
    ///
    /// # Errors
    /// That error, which names its origin and how many failed.
    pub fn verdict(self) -> Result<()> {
        let count = self.origins.len();
        let complete: Vec<&str> =
            self.origins.iter().filter(|one| one.copy.is_some()).map(|one| one.secondary.as_str()).collect();
        let state = match complete.as_slice() {
            [] => "no copy is complete".to_owned(),
            names => format!("complete, and of the same instant: {}", names.join(", ")),
        };
        let failed = count - complete.len();
        let mut errors: Vec<_> =
            self.origins.into_iter().filter_map(|one| Some((one.origin, one.error?))).collect();
        errors.sort_by_key(|(_, error)| rank(error));
        let mut errors = errors.into_iter();
        let Some((origin, error)) = errors.next() else { return Ok(()) };
        // What was not put back is said, also of the others.
        let error = errors
            .map(|(_, other)| other)
            .filter(|other| !other.failed_undos().is_empty())
            .fold(error, Error::with_failed_undo);
        let what = if failed == 1 {
            format!("1 of {count} copies failed, that of {origin}")
        } else {
            format!("{failed} of {count} copies failed; that of {origin}")
        };
        let own = error.state_left().map(|own| format!("{own}; ")).unwrap_or_default();
        Err(job::with_advice(error.context(what).state(format!("{own}{state}"))))
    }
}

/// The gravest first.
fn rank(error: &Error) -> u8 {
    match error.exit_code() {
        4 => 0,
        1 => 1,
        3 => 2,
        2 => 3,
        _ => 4,
    }
}

/// The result of a copy before everything was restored.
pub struct CopyResult {
    /// For how long the origin was held at the instant.
    pub instant: HoldTimes,
    /// What was copied since another snapshot.
    pub since: Option<SinceReport>,
    /// The copier's figures.
    pub copy: CopyReport,
    /// The COW store's figures; None for a cold origin.
    pub store: Option<StoreFill>,
    /// The releases of regions; None for a cold origin.
    pub release: Option<GateReport>,
    /// Free space that was left out.
    pub skipped: SkippedReport,
    /// The store that was kept.
    pub kept: Option<KeptStore>,
}

/// Free space that a copy left out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SkippedReport {
    /// Its size in bytes.
    pub bytes: Bytes,
    /// The number of ranges.
    pub ranges: usize,
    /// Why nothing, or not more, was left out.
    pub notes: Vec<String>,
    /// The part of `bytes` that the user left out; None if everything was wanted.
    pub omitted_bytes: Option<Bytes>,
    /// What was copied although the user left it out, and why.
    pub omission_notes: Vec<String>,
}

impl SkippedReport {
    /// The free space that the stack left out.
    pub fn of(skipped: &Skipped) -> Self {
        Self {
            bytes: skipped.extents.iter().map(|extent| extent.length()).sum(),
            ranges: skipped.extents.len(),
            notes: skipped.notes.clone(),
            omitted_bytes: skipped.omitted,
            omission_notes: skipped.omission_notes.clone(),
        }
    }
}

/// The time of the instant, and for how long the origin was held for it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct InstantReport {
    /// RFC 3339, UTC.
    pub utc: String,
    /// Writing back the filesystems, before anything was held.
    pub synced_ms: f64,
    /// From the first freeze to the last thaw.
    pub frozen_ms: f64,
    /// From the suspension to the resume.
    pub suspended_ms: f64,
}

impl From<HoldTimes> for InstantReport {
    fn from(times: HoldTimes) -> Self {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Self {
            utc: clock::utc_text(times.instant_utc_ns).unwrap_or_default(),
            synced_ms: ms(times.synced),
            frozen_ms: ms(times.frozen),
            suspended_ms: ms(times.suspended),
        }
    }
}

/// Reports to the observer what is left out.
pub(super) fn tell_skipped(plan: &CopyPlan, skipped: &SkippedReport, observer: &dyn Observer) {
    for text in &skipped.notes {
        observer.event(&Event::Note { text: format!("free space: {text}; all of it is copied") });
    }
    let omitted = skipped.omitted_bytes.unwrap_or_default();
    let free = skipped.bytes.saturating_sub(omitted);
    let text = if plan.request.all {
        "free space is copied and preserved as well (--all)".to_owned()
    } else if free == Bytes::ZERO {
        "no free space is known: everything is copied".to_owned()
    } else {
        format!("{free} of free space are not copied")
    };
    observer.event(&Event::Note { text });
    for text in &skipped.omission_notes {
        observer.event(&Event::Warning { text: text.clone() });
    }
    if skipped.omitted_bytes.is_some() {
        observer.event(&Event::Note { text: format!("{omitted} are left out (--include, --exclude)") });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::ErrorKind;

    fn failed(origin: &str, kind: ErrorKind) -> OriginOutcome {
        OriginOutcome {
            origin: origin.to_owned(),
            secondary: format!("{origin}.tdm"),
            copy: None,
            error: Some(Error::new(kind, "what").state("own")),
        }
    }

    fn verdict(origins: Vec<OriginOutcome>) -> Result<()> {
        GroupOutcome { instant: InstantReport::default(), origins, total_seconds: 0.0 }.verdict()
    }

    #[test]
    fn the_gravest_failure_decides() {
        use ErrorKind::{BadData, Interrupted, NoSpace, Refused, StoreInvalid};
        verdict(Vec::new()).unwrap();
        for (kinds, code) in [
            (vec![Interrupted, Interrupted], 130),
            (vec![Interrupted, Refused], 3),
            (vec![Refused, Interrupted, NoSpace], 1),
            (vec![StoreInvalid, BadData, Interrupted], 4),
        ] {
            let count = kinds.len();
            let origins = kinds.into_iter().enumerate().map(|(index, kind)| failed(&index.to_string(), kind));
            let error = verdict(origins.collect()).unwrap_err();
            assert_eq!(error.exit_code(), code);
            assert!(error.to_string().starts_with(&format!("{count} of {count} copies failed")), "{error}");
            assert_eq!(error.state_left(), Some("own; no copy is complete"));
        }
    }

    #[test]
    fn what_could_not_be_put_back_is_said_of_every_origin() {
        let mut second = failed("b", ErrorKind::NoSpace);
        let undo = Error::new(ErrorKind::Kernel, "putting back");
        second.error = second.error.map(|error| error.with_failed_undo(undo));
        let error = verdict(vec![failed("a", ErrorKind::BadData), second]).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(!error.failed_undos().is_empty());
        assert!(error.next_step().unwrap().contains("tidemark recover"), "{error:?}");
    }

    #[test]
    fn what_could_not_be_put_back_is_known() {
        let mut outcome = failed("a", ErrorKind::NoSpace);
        assert!(outcome.is_put_back());
        let undo = Error::new(ErrorKind::Kernel, "putting back");
        outcome.error = Some(Error::new(ErrorKind::NoSpace, "what").with_failed_undo(undo));
        assert!(!outcome.is_put_back());
    }
}
