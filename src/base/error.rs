//! One error type for the whole crate: a stable kind, what failed and on what, the state that is left, what
//! to do next, and the cause.
//!
//! Callers match [`ErrorKind`], never the text. The errno of the first failed system call stays in the source
//! chain; [`Error::errno`] finds it.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something failed, as far as a caller can act on it. The kind decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The command line cannot be carried out as written (exit code 2).
    Usage,
    /// The state of the system forbids it: mounted, too small, unsupported stack (exit code 3).
    Refused,
    /// Data was read in full but is wrong: checksum, magic, truncation (exit code 4).
    BadData,
    /// A signal asked us to stop and everything was put back (exit code 130).
    Interrupted,
    /// A read, write or sync failed.
    Io,
    /// No space is left for the bytes to be written.
    NoSpace,
    /// The kernel refused a request or returned an invalid answer: an ioctl, a table, a status line.
    Kernel,
    /// The snapshot became invalid: its store failed or filled up.
    StoreInvalid,
    /// A time limit ran out (freeze budget, udev, a hook).
    Timeout,
    /// Something outside this process failed: a hook, an external process.
    External,
}

impl ErrorKind {
    /// The process's exit code for this kind (see the README's table).
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Refused => 3,
            Self::BadData => 4,
            Self::Interrupted => 130,
            _ => 1,
        }
    }

    /// Stable lower-case name, used in JSON output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Refused => "refused",
            Self::BadData => "bad-data",
            Self::Interrupted => "interrupted",
            Self::Io => "io",
            Self::NoSpace => "no-space",
            Self::Kernel => "kernel",
            Self::StoreInvalid => "store-invalid",
            Self::Timeout => "timeout",
            Self::External => "external",
        }
    }
}

type Source = Box<dyn StdError + Send + Sync + 'static>;

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    what: String,
    state: Option<String>,
    next: Option<String>,
    undo: Vec<Error>,
    source: Option<Source>,
}

/// An error: its kind, what failed and on what, the state left, the next step, failed undo steps, the cause.
#[derive(Debug)]
pub struct Error(Box<Inner>);

impl Error {
    /// A new error. `what` names what failed and on what: "read of 4096 bytes at 8192 of /dev/sda".
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            what: what.into(),
            state: None,
            next: None,
            undo: Vec::new(),
            source: None,
        }))
    }

    /// [`ErrorKind::Io`] (or [`ErrorKind::NoSpace`] for ENOSPC/EDQUOT) with its cause.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::new(kind, what).with_source(source)
    }

    /// [`ErrorKind::Refused`].
    pub fn refused(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Refused, what)
    }

    /// [`ErrorKind::BadData`].
    pub fn bad_data(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadData, what)
    }

    /// [`ErrorKind::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, what)
    }

    /// [`ErrorKind::Kernel`] with its cause.
    pub fn kernel(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::new(ErrorKind::Kernel, what).with_source(source)
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Source>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Adds the state that is left: "the origin is untouched".
    #[must_use]
    pub fn state(mut self, state: impl Into<String>) -> Self {
        self.0.state = Some(state.into());
        self
    }

    /// Adds what the user should do next.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.0.next = Some(next.into());
        self
    }

    /// The first of several failures; the others are added to it as failed undo steps.
    ///
    /// # Errors
    /// The first failure, if there is one.
    pub fn first_of(failures: impl IntoIterator<Item = Self>) -> Result<()> {
        match failures.into_iter().reduce(Self::with_failed_undo) {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// Adds an undo step that failed as well; both errors are reported.
    #[must_use]
    pub fn with_failed_undo(mut self, undo: Error) -> Self {
        self.0.undo.push(undo);
        self
    }

    /// Adds the failure of an undo step, if it failed.
    #[must_use]
    pub fn after_undo(self, undo: Result<()>) -> Self {
        match undo {
            Ok(()) => self,
            Err(undo) => self.with_failed_undo(undo),
        }
    }

    /// Adds a wider description in front; keeps the kind, state, next step and failed undo steps.
    #[must_use]
    pub fn context(mut self, what: impl Into<String>) -> Self {
        let inner = std::mem::take(&mut self.0.what);
        self.0.what = format!("{}: {inner}", what.into());
        self
    }

    /// The kind.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Replaces the kind, if the caller knows better than the callee what the failure means.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    /// The process's exit code: that of the kind. 130 ("everything put back") and 3 ("nothing was changed")
    /// become 1 after a failed undo step, since they are not true then.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.kind() {
            ErrorKind::Interrupted | ErrorKind::Refused if !self.failed_undos().is_empty() => 1,
            kind => kind.exit_code(),
        }
    }

    /// What failed, on what.
    #[must_use]
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// The state that is left, if it was given.
    #[must_use]
    pub fn state_left(&self) -> Option<&str> {
        self.0.state.as_deref()
    }

    /// What to do next, if it was given.
    #[must_use]
    pub fn next_step(&self) -> Option<&str> {
        self.0.next.as_deref()
    }

    /// Undo steps that failed after the cause.
    #[must_use]
    pub fn failed_undos(&self) -> &[Error] {
        &self.0.undo
    }

    /// The first errno in the source chain.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        let mut at: Option<&(dyn StdError + 'static)> = self.source();
        while let Some(cause) = at {
            if let Some(io) = cause.downcast_ref::<io::Error>()
                && let Some(errno) = io.raw_os_error()
            {
                return Some(errno);
            }
            if let Some(errno) = cause.downcast_ref::<nix::errno::Errno>() {
                return Some(*errno as i32);
            }
            at = cause.source();
        }
        None
    }
}

impl fmt::Display for Error {
    /// `what: cause` on one line. The caller lays out state, next step and failed undo steps.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.what)?;
        let mut at = self.source();
        while let Some(cause) = at {
            write!(f, ": {cause}")?;
            // Our own Display already prints the chain below it.
            if cause.is::<Error>() {
                break;
            }
            at = cause.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0.source {
            Some(source) => Some(source.as_ref()),
            None => None,
        }
    }
}

/// Adds context to results of other crates.
pub trait ResultExt<T> {
    /// Converts a foreign error with [`Error::io`]; `what` names what failed and on what.
    fn io_context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> ResultExt<T> for io::Result<T> {
    fn io_context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(what(), source))
    }
}

impl<T> ResultExt<T> for nix::Result<T> {
    fn io_context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::io(what(), io::Error::from(errno)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_survives_two_levels() {
        let low = Error::io("write", io::Error::from_raw_os_error(libc::ENOSPC));
        let high = Error::new(ErrorKind::Io, "copy").with_source(low);
        assert_eq!(high.errno(), Some(libc::ENOSPC));
        assert!(high.to_string().starts_with("copy: write: No space left"));
    }

    #[test]
    fn exit_codes_are_as_documented() {
        assert_eq!(ErrorKind::Usage.exit_code(), 2);
        assert_eq!(ErrorKind::Refused.exit_code(), 3);
        assert_eq!(ErrorKind::BadData.exit_code(), 4);
        assert_eq!(ErrorKind::Interrupted.exit_code(), 130);
        assert_eq!(ErrorKind::StoreInvalid.exit_code(), 1);
        for kind in [ErrorKind::Interrupted, ErrorKind::Refused] {
            let error = Error::new(kind, "stopped");
            assert_eq!(error.exit_code(), kind.exit_code());
            let undo = Error::new(ErrorKind::Kernel, "putting back");
            assert_eq!(
                error.with_failed_undo(undo).exit_code(),
                1,
                "130 and 3 are false after a failed undo"
            );
        }
    }
}
