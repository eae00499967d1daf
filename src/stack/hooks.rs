//! The user's commands around the instant.
//!
//! A hook runs as `sh -c CMD` in a process group of its own, so that a hook that exceeds its time is killed
//! with everything it started. Its standard output goes to our standard error: ours may carry the archive.

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
    pub deadline: Option<Instant>,
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
            if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.kill(&mut child);
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!("{} '{}' ran past the freeze budget and was killed", self.option, self.command),
                )
                .next("make the hook shorter or raise --freeze-budget"));
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

    fn hook(command: &str, deadline: Option<Instant>) -> Result<()> {
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
