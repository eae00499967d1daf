//! A change to a stack as data: ordered steps, each with its undo.
//!
//! The value that `--dry-run` prints is the value that runs. Each step follows this order, the crash
//! argument:
//! 1. the journal holds the step's intent on stable storage;
//! 2. the kernel performs the step;
//! 3. only then the next intent is written.
//!
//! So after a crash only the last intent is in doubt; everything before it has happened. If a step fails, the
//! steps *before* it are undone, last first. The failed step itself is not: a step is all or nothing, and the
//! undo of a step that never happened could hit a device that is not ours. A failed undo does not stop the
//! rest; the cause and every failed undo are reported. Nothing is logged during a change: standard error may
//! be a file on the filesystem that is frozen.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::{Error, Result};
use crate::sys::dm_ioctl::SuspendFlags;
use crate::sys::process::crash_point;

use crate::dm::{Dm, Slot, Table, Template, Udev};

/// Most steps in a change.
pub const STEPS_MAX: usize = 1024;

/// One request to the kernel, or something that the executor does around it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
#[allow(missing_docs)] // the fields are what their variant says
pub enum Action {
    /// Make a device without a table.
    Create { device: String, uuid: String },
    /// Put the device's table under one [`Owner`](super::Owner) for the rest of the change. Fail unless this
    /// is the active table and no other tool is changing it.
    Own { device: String, table: Template },
    /// Load a table into the device's inactive slot.
    Load { device: String, table: Template },
    /// Load a table that is computed at this step: ranges in use lead to `preserve`, all others lead where `real`
    /// leads.
    LoadOver { device: String, real: String, preserve: String },
    /// Drop the device's inactive table, if any.
    Clear { device: String },
    /// Suspend the device; `flush` waits for queued I/O.
    Suspend { device: String, flush: bool, lock_filesystem: bool },
    /// Resume the device, which activates its inactive table, if any.
    Resume { device: String, udev: Udev },
    /// Remove the device.
    Remove { device: String, udev: Udev },
    /// Hold the device open exclusively: shows every namespace that the command is running.
    Claim { device: String },
    /// Close what [`Action::Claim`] holds open.
    Unclaim { device: String },
    /// Fail unless the device's active table is this one.
    Expect { device: String, table: Template },
    /// Fail unless the device's active table is the one that [`Action::LoadOver`] made.
    ExpectOver { device: String },
    /// Sync, then freeze filesystems, all or none.
    Freeze { filesystems: Vec<PathBuf> },
    /// Thaw what [`Action::Freeze`] froze.
    Thaw { filesystems: Vec<PathBuf> },
    /// Start the watchdog. It resumes and thaws if the command dies or exceeds its budget.
    Guard { devices: Vec<String>, filesystems: Vec<PathBuf> },
    /// Stop the watchdog; fail if it has acted.
    Unguard,
    /// Stop the watchdog, if there is one, whether or not it has acted: for undo.
    Dismiss,
    /// The instant: the caller's work while the origin is quiet.
    Instant,
}

/// An action with its name and its undo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Short name within the change: "create-real". Also names the step's crash points.
    pub name: String,
    /// What is done.
    pub action: Action,
    /// The actions that undo it, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<Action>,
}

impl Step {
    /// A step that needs no undo.
    #[must_use]
    pub fn new(name: &str, action: Action) -> Self {
        Self { name: name.to_owned(), action, undo: Vec::new() }
    }

    /// Adds an action that undoes the step.
    #[must_use]
    pub fn undo(mut self, action: Action) -> Self {
        self.undo.push(action);
        self
    }
}

/// A named sequence of steps: run in order, undone in reverse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// "insert", "remove".
    pub name: String,
    /// In order.
    pub steps: Vec<Step>,
}

/// Performs the actions: the kernel, or a fake in tests.
pub trait Executor {
    /// Performs one action, whole or not at all.
    ///
    /// # Errors
    /// What failed on which device.
    fn execute(&mut self, action: &Action) -> Result<()>;

    /// Another change begins.
    fn begin(&mut self) {}

    /// From now on steps are undone. Nothing may interrupt that.
    fn begin_undo(&mut self) {}
}

/// Stores the intents.
pub trait IntentLog {
    /// Returns once the intent to do step `index` of `change` is on stable storage.
    ///
    /// # Errors
    /// I/O errors; the step is not done then.
    fn intend(&mut self, change: &Change, index: usize) -> Result<()>;

    /// Returns once stable storage records that `change` is being undone from step `index` on.
    ///
    /// # Errors
    /// I/O errors; the undo continues regardless.
    fn intend_undo(&mut self, change: &Change, index: usize) -> Result<()>;

    /// Returns once stable storage records that `change` is over: done, or undone without a failure.
    ///
    /// # Errors
    /// I/O errors.
    fn done(&mut self, change: &Change) -> Result<()>;
}

/// A journal that records nothing: for changes that can be repeated from any point.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoIntents;

impl IntentLog for NoIntents {
    fn intend(&mut self, _change: &Change, _index: usize) -> Result<()> {
        Ok(())
    }
    fn intend_undo(&mut self, _change: &Change, _index: usize) -> Result<()> {
        Ok(())
    }
    fn done(&mut self, _change: &Change) -> Result<()> {
        Ok(())
    }
}

/// A journal whose write errors are only logged: for changes that can be repeated from any point, and must
/// run even if nothing can be written any more.
pub struct BestEffort<'a> {
    journal: &'a mut dyn IntentLog,
    warned: bool,
}

impl<'a> BestEffort<'a> {
    /// Wraps `journal`.
    pub fn new(journal: &'a mut dyn IntentLog) -> Self {
        Self { journal, warned: false }
    }

    fn warn_once(&mut self, result: Result<()>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.warned, true)
        {
            tracing::warn!("{error}; continuing without a record of it");
        }
    }
}

impl IntentLog for BestEffort<'_> {
    fn intend(&mut self, change: &Change, index: usize) -> Result<()> {
        let result = self.journal.intend(change, index);
        self.warn_once(result);
        Ok(())
    }
    fn intend_undo(&mut self, change: &Change, index: usize) -> Result<()> {
        let result = self.journal.intend_undo(change, index);
        self.warn_once(result);
        Ok(())
    }
    fn done(&mut self, change: &Change) -> Result<()> {
        let result = self.journal.done(change);
        self.warn_once(result);
        Ok(())
    }
}

impl Change {
    /// A change that has no steps yet.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), steps: Vec::new() }
    }

    /// Adds a step.
    #[must_use]
    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// The crash points that running this change passes, in order.
    #[cfg(any(test, feature = "vm"))]
    pub fn crash_points(&self) -> Vec<String> {
        self.steps
            .iter()
            .flat_map(|step| {
                [format!("{}.{}.before", self.name, step.name), format!("{}.{}.after", self.name, step.name)]
            })
            .collect()
    }

    /// Runs every step. If one fails, undoes those before it.
    ///
    /// # Errors
    /// The failed step's, with every failed undo.
    pub fn run(&self, executor: &mut dyn Executor, journal: &mut dyn IntentLog) -> Result<()> {
        assert!(self.steps.len() <= STEPS_MAX, "a change has at most {STEPS_MAX} steps");
        executor.begin();
        for (index, step) in self.steps.iter().enumerate() {
            let result = journal.intend(self, index).and_then(|()| {
                self.pass(step, "before");
                executor.execute(&step.action)
            });
            if let Err(error) = result {
                let error = error.context(format!("{} (step '{}')", self.name, step.name));
                return Err(self.undo_steps(index, error, executor, journal));
            }
            self.pass(step, "after");
        }
        // A failed change leaves nothing in place, even if only its record failed.
        journal.done(self).map_err(|error| self.undo_steps(self.steps.len(), error, executor, journal))
    }

    /// Undoes the steps before `end`, last first. Adds each failure to `error`.
    fn undo_steps(
        &self,
        end: usize,
        mut error: Error,
        executor: &mut dyn Executor,
        journal: &mut dyn IntentLog,
    ) -> Error {
        executor.begin_undo();
        for (index, step) in self.steps.iter().enumerate().take(end).rev() {
            if step.undo.is_empty() {
                continue;
            }
            if let Err(undo) = journal.intend_undo(self, index) {
                error = error.with_failed_undo(undo);
            }
            self.pass(step, "undo");
            for action in &step.undo {
                if let Err(undo) = executor.execute(action) {
                    error = error.with_failed_undo(undo.context(format!("undoing '{}'", step.name)));
                }
            }
        }
        if error.failed_undos().is_empty()
            && let Err(undo) = journal.done(self)
        {
            error = error.with_failed_undo(undo);
        }
        if error.failed_undos().is_empty() {
            error.state("everything was put back")
        } else {
            error
                .state("not everything could be put back")
                .next("run 'tidemark recover', which undoes what is left")
        }
    }

    fn pass(&self, step: &Step, at: &str) {
        if cfg!(feature = "vm") {
            crash_point(&format!("{}.{}.{at}", self.name, step.name));
        }
    }
}

impl Dm {
    /// Resolves a template to a table, with the current numbers of its devices.
    ///
    /// # Errors
    /// The kernel's, for a device that does not exist.
    pub fn resolve(&self, template: &Template) -> Result<Table> {
        template.resolve(&mut |name| Ok(self.info_of(name)?.number))
    }

    /// Performs an action that needs only device-mapper.
    ///
    /// # Errors
    /// The kernel's; [`ErrorKind::Kernel`] for an [`Action::Expect`] whose table differs.
    ///
    /// # Panics
    /// For an action that only the executor performs (freeze, thaw, guard, instant): a broken invariant.
    ///
    /// [`ErrorKind::Kernel`]: crate::base::ErrorKind::Kernel
    pub fn execute(&self, action: &Action) -> Result<()> {
        match action {
            Action::Create { device, uuid } => self.create(device, uuid).map(|_| ()),
            Action::Load { device, table } => self.load(device, &self.resolve(table)?),
            Action::Clear { device } => self.clear(device),
            Action::Suspend { device, flush, lock_filesystem } => {
                self.suspend(device, SuspendFlags { flush: *flush, lock_filesystem: *lock_filesystem })
            }
            Action::Resume { device, udev } => {
                self.resume(device, *udev)?;
                if *udev != Udev::None {
                    self.create_mapper_link(device);
                }
                Ok(())
            }
            Action::Remove { device, udev } => self.remove(device, *udev),
            Action::Expect { device, table } => {
                let found = self.table(device, Slot::Active)?;
                if found.as_ref() == Some(&self.resolve(table)?) {
                    return Ok(());
                }
                let found = found.map_or_else(|| "none".to_owned(), |table| table.to_string());
                Err(Error::new(
                    crate::base::ErrorKind::Kernel,
                    format!("the table of {device} is '{found}' instead of '{table}'"),
                ))
            }
            Action::Own { .. }
            | Action::LoadOver { .. }
            | Action::Claim { .. }
            | Action::Unclaim { .. }
            | Action::ExpectOver { .. }
            | Action::Freeze { .. }
            | Action::Thaw { .. }
            | Action::Guard { .. }
            | Action::Unguard
            | Action::Dismiss
            | Action::Instant => {
                unreachable!("'{action}' is done by the executor, not by device-mapper")
            }
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths = |paths: &[PathBuf]| {
            paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        match self {
            Self::Create { device, .. } => write!(f, "make device {device}"),
            Self::Own { device, .. } => {
                write!(f, "check that no other tool is changing the table of {device}")
            }
            Self::Load { device, table } => {
                write!(f, "load into {device}: {}", table.to_string().replace('\n', "; "))
            }
            Self::LoadOver { device, preserve, .. } => {
                write!(f, "load into {device}: linear to {preserve}, except where space is free")
            }
            Self::Clear { device } => write!(f, "drop the inactive table of {device}"),
            Self::Suspend { device, flush, lock_filesystem } => {
                write!(f, "suspend {device}")?;
                if !flush {
                    f.write_str(", without flushing")?;
                }
                if *lock_filesystem {
                    f.write_str(", freezing its filesystem")?;
                }
                Ok(())
            }
            Self::Resume { device, .. } => write!(f, "resume {device}"),
            Self::Remove { device, .. } => write!(f, "remove device {device}"),
            Self::Claim { device } => write!(f, "hold {device} open, which marks the copy as running"),
            Self::Unclaim { device } => write!(f, "close {device}"),
            Self::Expect { device, .. } | Self::ExpectOver { device } => {
                write!(f, "check the table of {device}")
            }
            Self::Freeze { filesystems } => write!(f, "freeze {}", paths(filesystems)),
            Self::Thaw { filesystems } => write!(f, "thaw {}", paths(filesystems)),
            Self::Guard { devices, .. } => write!(f, "start the watchdog for {}", devices.join(", ")),
            Self::Unguard | Self::Dismiss => f.write_str("stop the watchdog"),
            Self::Instant => f.write_str("the instant"),
        }
    }
}
