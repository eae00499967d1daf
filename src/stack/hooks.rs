//! The user's commands around the instant.
//!
//! --hook-after undoes what --hook-before did, so it runs whenever --hook-before was started: also if that failed or
//! was killed, and if the instant failed. A process that is killed runs nothing any more, so a hook that leaves
//! something to be undone has to watch TIDEMARK_PID itself, as those in `hooks/` do.
//!
//! A hook runs as `sh -c CMD` in a process group of its own, so that a hook that exceeds its time is killed
//! with everything it started. Its standard output goes to our standard error: ours may carry the archive.

use std::cell::Cell;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::base::{Error, ErrorKind, Result, ResultExt};
use crate::sys::signal;

/// Interval at which a running hook is checked: short, as the origin is suspended meanwhile.
const POLL: Duration = Duration::from_millis(2);

/// How long to wait for the exit status after SIGKILL. A process in uninterruptible sleep (on the suspended
/// origin itself) dies only after the resume.
const REAP_MAX: Duration = Duration::from_millis(100);

/// How long --hook-after may continue to run after a stop request: it undoes what --hook-before did.
const AFTER_GRACE: Duration = Duration::from_secs(10);

/// When a hook is killed.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    /// The time.
    pub at: Instant,
    /// The option that sets it, for messages.
    pub option: &'static str,
}

/// --hook-before and --hook-after of one instant.
pub struct AroundInstant<'a> {
    /// The command of --hook-before.
    pub before: Option<&'a str>,
    /// The command of --hook-after.
    pub after: Option<&'a str>,
    /// As in [`Hook`].
    pub origin: &'a Path,
    /// As in [`Hook`].
    pub variables: &'a [(&'static str, &'a str)],
    /// --hook-timeout, for each of them.
    pub timeout: Duration,
    /// --hook-before was started, --hook-after was not.
    pub is_due: Cell<bool>,
}

impl AroundInstant<'_> {
    /// Runs --hook-before. From now on --hook-after is due.
    ///
    /// # Errors
    /// Those of [`Hook::run`].
    pub fn before(&self, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
        self.is_due.set(true);
        self.before.map_or(Ok(()), |command| self.hook("--hook-before", command).run(interrupt))
    }

    /// Runs --hook-after if it is due. Once `stop` returns an error (a signal, a lost snapshot), a hook that still runs
    /// is killed after [`AFTER_GRACE`].
    ///
    /// # Errors
    /// Those of [`Hook::run`]. They are for a warning: what the instant gave is good.
    pub fn after(&self, stop: &dyn Fn() -> Result<()>) -> Result<()> {
        let Some(command) = self.after.filter(|_| self.is_due.replace(false)) else { return Ok(()) };
        let stopped: Cell<Option<Instant>> = Cell::new(None);
        let patience = || match (stop(), stopped.get()) {
            (Err(_), None) => {
                stopped.set(Some(Instant::now()));
                Ok(())
            }
            (Err(error), Some(since)) if since.elapsed() >= AFTER_GRACE => Err(error),
            _ => Ok(()),
        };
        self.hook("--hook-after", command).run(&patience)
    }

    fn hook<'h>(&'h self, option: &'static str, command: &'h str) -> Hook<'h> {
        let deadline = Deadline { at: Instant::now() + self.timeout, option: "--hook-timeout" };
        Hook {
            option,
            command,
            origin: self.origin,
            below: None,
            deadline: Some(deadline),
            variables: self.variables,
        }
    }
}

/// One hook to run.
pub struct Hook<'a> {
    /// The option's name, for messages: "--hook-frozen".
    pub option: &'static str,
    /// The command line for `sh -c`.
    pub command: &'a str,
    /// TIDEMARK_ORIGIN, the device or file being copied.
    pub origin: &'a Path,
    /// TIDEMARK_ORIGIN_BELOW, the device that can be read while the origin is suspended.
    pub below: Option<&'a Path>,
    /// When to kill the hook.
    pub deadline: Option<Deadline>,
    /// Further variables of its environment.
    pub variables: &'a [(&'static str, &'a str)],
}

impl Hook<'_> {
    /// Runs the hook to its end; `interrupt` is polled meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::External`] if it cannot be started or fails, [`ErrorKind::Timeout`] if it is killed at
    /// the deadline, and the error of `interrupt`.
    pub fn run(&self, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut child = self.spawn()?;
        loop {
            match child.try_wait().io_context(|| format!("waiting for {} '{}'", self.option, self.command))? {
                Some(status) => return self.judge(status),
                None => thread::sleep(POLL),
            }
            if let Err(error) = interrupt() {
                self.kill(&mut child);
                return Err(error);
            }
            if let Some(deadline) = self.deadline.filter(|deadline| Instant::now() >= deadline.at) {
                self.kill(&mut child);
                let limit = deadline.option;
                let what = format!("{} '{}' ran past {limit} and was killed", self.option, self.command);
                return Err(Error::new(ErrorKind::Timeout, what)
                    .next(format!("make the hook shorter or raise {limit}")));
            }
        }
    }

    fn spawn(&self) -> Result<Child> {
        let stderr = std::io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .io_context(|| "duplicating standard error for a hook".to_owned())?;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(self.command).env("TIDEMARK_ORIGIN", self.origin);
        command.env("TIDEMARK_HOOK", self.option.trim_start_matches("--hook-"));
        command.env("TIDEMARK_PID", std::process::id().to_string());
        command.envs(self.variables.iter().copied());
        if let Some(below) = self.below {
            command.env("TIDEMARK_ORIGIN_BELOW", below);
        }
        command.stdin(Stdio::null()).stdout(Stdio::from(stderr)).process_group(0);
        signal::with_usr1_unblocked(|| command.spawn()).map_err(|source| {
            Error::new(ErrorKind::External, format!("starting {} '{}'", self.option, self.command))
                .with_source(source)
        })
    }

    fn judge(&self, status: ExitStatus) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::External, format!("{} '{}' failed: {status}", self.option, self.command)))
    }

    /// Sends SIGKILL to the whole group, which exists as long as the child is not reaped.
    fn kill(&self, child: &mut Child) {
        let Ok(id) = i32::try_from(child.id()) else { return };
        if let Err(errno) = killpg(Pid::from_raw(id), Signal::SIGKILL) {
            tracing::warn!("killing {} (process group {id}): {errno}", self.option);
        }
        let end = Instant::now() + REAP_MAX;
        while Instant::now() < end {
            match child.try_wait() {
                Ok(Some(_)) => return,
                _ => thread::sleep(POLL),
            }
        }
        tracing::warn!(
            "{} (process {id}) has not exited yet; it exits once the origin is resumed",
            self.option
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(command: &str, at: Option<Instant>) -> Result<()> {
        let deadline = at.map(|at| Deadline { at, option: "--freeze-budget" });
        Hook {
            option: "--hook-frozen",
            command,
            origin: Path::new("/dev/x"),
            below: Some(Path::new("/dev/y")),
            deadline,
            variables: &[],
        }
        .run(&|| Ok(()))
    }

    #[test]
    fn a_hook_sees_its_environment() {
        hook(r#"test "$TIDEMARK_ORIGIN $TIDEMARK_ORIGIN_BELOW" = "/dev/x /dev/y""#, None).unwrap();
        let own = std::process::id();
        hook(&format!(r#"test "$TIDEMARK_HOOK $TIDEMARK_PID" = "frozen {own}""#), None).unwrap();
    }

    #[test]
    fn a_failing_hook_is_an_error() {
        let error = hook("exit 7", None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::External);
        assert!(error.to_string().contains("exit status: 7"), "{error}");
    }

    #[test]
    fn a_hook_past_its_deadline_dies_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let command = format!("(sleep 1; touch {}) & sleep 600", mark.display());
        let start = Instant::now();
        let error = hook(&command, Some(start + Duration::from_millis(100))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(start.elapsed() < Duration::from_secs(30));
        thread::sleep(Duration::from_millis(1300));
        assert!(!mark.exists(), "the hook's child outlived it");
    }

    fn around<'a>(before: &'a str, after: &'a str) -> AroundInstant<'a> {
        AroundInstant {
            before: Some(before),
            after: Some(after),
            origin: Path::new("/dev/x"),
            variables: &[],
            timeout: Duration::from_millis(300),
            is_due: Cell::new(false),
        }
    }

    #[test]
    fn what_was_begun_before_is_ended_after_exactly_once() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let after = format!("echo ended >>{}", mark.display());
        let lines = || std::fs::read_to_string(&mark).unwrap_or_default().lines().count();
        let stop = || Ok(());
        around("true", &after).after(&stop).unwrap();
        assert_eq!(lines(), 0, "nothing was begun");
        for (round, before) in [(1, "true"), (2, "exit 3"), (3, "sleep 600")] {
            let around = around(before, &after);
            assert_eq!(around.before(&stop).is_ok(), before == "true", "{before}");
            around.after(&stop).unwrap();
            around.after(&stop).unwrap();
            assert_eq!(lines(), round, "{before}");
        }
        let around = around("sleep 600", &after);
        let error = around.before(&|| Err(Error::new(ErrorKind::Interrupted, "signal"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
        // The signal that ended the one before does not end the one after.
        around.after(&|| Err(Error::new(ErrorKind::Interrupted, "signal"))).unwrap();
        assert_eq!(lines(), 4);
    }

    #[test]
    fn a_hook_that_hangs_is_killed_at_its_timeout() {
        for error in [around("sleep 600", "true").before(&|| Ok(())).unwrap_err(), {
            let hangs = around("true", "sleep 600");
            hangs.before(&|| Ok(())).unwrap();
            hangs.after(&|| Ok(())).unwrap_err()
        }] {
            assert_eq!(error.kind(), ErrorKind::Timeout);
            assert!(error.to_string().contains("--hook-timeout"), "{error}");
        }
    }

    #[test]
    fn an_interrupt_ends_a_hook() {
        let hook = Hook {
            option: "--hook-before",
            command: "sleep 600",
            origin: Path::new("x"),
            below: None,
            deadline: None,
            variables: &[],
        };
        let error = hook.run(&|| Err(Error::new(ErrorKind::Interrupted, "signal"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Interrupted);
    }
}
