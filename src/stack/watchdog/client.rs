//! The command's side of its watchdog.

use std::io::Write;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::protocol::{FAREWELL, Line, Lines, Order, failed};
use super::server::ARGUMENT;
use crate::base::{Error, ErrorKind, Result};

/// Longest wait for the watchdog to get ready, or to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How a watchdog ended, or stands by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It had no reason to act.
    Calm,
    /// It has acted: the text describes what it did.
    Fired(String),
    /// It died or does not answer.
    Lost,
}

/// The watchdog of a command while it has nothing to guard: one process for all changes of the command, one
/// after the other. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Standby {
    waiting: Arc<Mutex<Option<Watchdog>>>,
    /// The job that it cleans up if the OOM killer kills the command.
    job: Option<Arc<str>>,
}

impl Standby {
    /// Starts a watchdog without waiting: it gets ready while the command prepares what is to be guarded. If
    /// it cannot be started, [`Standby::guard`] reports that. If the OOM killer kills the command, the
    /// watchdog undoes what job `job` left.
    #[must_use]
    pub fn start(job: &str) -> Self {
        let standby = Self { job: Some(job.into()), ..Self::default() };
        *standby.lock() = standby.launch().ok();
        standby
    }

    fn launch(&self) -> Result<Watchdog> {
        Watchdog::launch(self.job.as_deref())
    }

    /// A watchdog that is ready to be armed: the one on standby, or a new one if there is none or it died.
    ///
    /// # Errors
    /// [`ErrorKind::External`] if none can be started, or none gets ready.
    pub fn guard(&self, order: &Order) -> Result<Watchdog> {
        let waiting = self.lock().take();
        if let Some(mut watchdog) = waiting
            && watchdog.guard(order).is_ok()
        {
            return Ok(watchdog);
        }
        let mut watchdog = self.launch()?;
        watchdog.guard(order)?;
        Ok(watchdog)
    }

    /// Ends the guard: `watchdog` is on standby again, unless it has acted.
    #[must_use]
    pub fn dismiss(&self, mut watchdog: Watchdog) -> Verdict {
        let verdict = watchdog.disarm();
        if verdict == Verdict::Calm {
            *self.lock() = Some(watchdog);
        }
        verdict
    }

    fn lock(&self) -> MutexGuard<'_, Option<Watchdog>> {
        // Set in one assignment, so it is never half-written.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The command's side of a watchdog that has an order. If it is dropped while armed, the watchdog takes the
/// command for dead and acts.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    orders: Option<ChildStdin>,
    verdicts: Lines<ChildStdout>,
    is_armed: bool,
}

impl Watchdog {
    fn launch(job: Option<&str>) -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(ARGUMENT)
            .args(job)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| failed("cannot be started").with_source(source))?;
        let (orders, verdicts) = match (child.stdin.take(), child.stdout.take()) {
            (Some(orders), Some(verdicts)) => (orders, verdicts),
            _ => unreachable!("both streams were asked for as pipes"),
        };
        Ok(Self { child, orders: Some(orders), verdicts: Lines::new(verdicts), is_armed: false })
    }

    /// Sends an order and waits until the watchdog is ready for it.
    fn guard(&mut self, order: &Order) -> Result<()> {
        let text = serde_json::to_string(order)
            .map_err(|source| failed("order cannot be encoded").with_source(source))?;
        self.send(&text)?;
        match self.answer()?.as_str() {
            "ready" => Ok(()),
            line => Err(failed(&format!("is not ready: {line}"))),
        }
    }

    /// Its next line.
    fn answer(&mut self) -> Result<String> {
        match self.verdicts.next(ANSWER_MAX) {
            Ok(Line::Text(line)) => Ok(line),
            Ok(Line::End) => Err(failed("died before anything was frozen or suspended")),
            Ok(Line::Nothing) => Err(failed("does not answer")),
            Err(source) => Err(failed("does not answer").with_source(source)),
        }
    }

    /// Starts the clock and waits for the confirmation. If the clock runs already, restarts it without
    /// waiting, as writers wait then.
    ///
    /// # Errors
    /// [`ErrorKind::External`] if the watchdog is gone or does not answer; [`ErrorKind::Timeout`] if it has
    /// acted already.
    pub fn arm(&mut self) -> Result<()> {
        let was_armed = std::mem::replace(&mut self.is_armed, true);
        self.send("arm")?;
        if was_armed {
            return Ok(());
        }
        match self.answer()?.as_str() {
            "armed" => Ok(()),
            _ => Err(budget_ran_out()),
        }
    }

    /// Fails if the watchdog has acted or is gone. Does not wait.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`].
    pub fn check(&mut self) -> Result<()> {
        match self.verdicts.next(Duration::ZERO) {
            Ok(Line::Nothing) => Ok(()),
            Ok(Line::Text(_)) => Err(budget_ran_out()),
            Ok(Line::End) | Err(_) => Err(Error::new(ErrorKind::External, "the watchdog has died")),
        }
    }

    /// Stops the clock. A watchdog that has acted exits.
    fn disarm(&mut self) -> Verdict {
        if self.send("disarm").is_err() {
            // It may have acted, and exited, before.
            drop(self.orders.take());
        }
        let mut verdict = Verdict::Lost;
        let end = Instant::now() + ANSWER_MAX;
        // A calm watchdog sends one line. One that has acted sends "fired", then its last line, then the end.
        loop {
            match self.verdicts.next(end.saturating_duration_since(Instant::now())) {
                Ok(Line::Text(line)) if line == "calm" => {
                    self.is_armed = false;
                    return Verdict::Calm;
                }
                // The answer to an "arm" that was not waited for.
                Ok(Line::Text(line)) if line == "armed" => {}
                Ok(Line::Text(line)) => verdict = Verdict::Fired(line),
                _ => return verdict,
            }
        }
    }

    fn reap(&mut self, end: Instant) {
        while Instant::now() < end {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(1)),
                _ => return,
            }
        }
        // An armed one may still have something to resume, so it must not be killed. An unarmed one holds
        // nothing of use.
        if !self.is_armed {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn send(&mut self, line: &str) -> Result<()> {
        let Some(orders) = self.orders.as_mut() else {
            return Err(Error::new(ErrorKind::External, "the watchdog was dismissed already"));
        };
        orders
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| orders.flush())
            .map_err(|source| Error::new(ErrorKind::External, "the watchdog is gone").with_source(source))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if !self.is_armed {
            // Fails if it has exited already, which needs no farewell.
            let _ = self.send(FAREWELL);
        }
        drop(self.orders.take());
        self.reap(Instant::now() + ANSWER_MAX);
    }
}

/// The error when the freeze budget runs out.
#[must_use]
pub fn budget_ran_out() -> Error {
    Error::new(ErrorKind::Timeout, "the freeze budget ran out before the instant had been taken")
        .next("raise --freeze-budget, make --hook-frozen shorter, or try when there is less load")
}
