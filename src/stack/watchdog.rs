//! The watchdog: a process of its own that lets the origin go on if the command cannot.
//!
//! It is started before anything is frozen, and serves a command as long as that lives, order after order ([`Standby`]
//! has it in between): for each it has everything open and locked in memory that it will need. It does not share what
//! happens to the command ([`apart`]): a Ctrl-C, the end of its session, a control group that is frozen or killed. Two
//! pipes join it to the command: orders in, verdicts out. An order is guarded from "arm", which it answers, to "disarm"; a
//! further "arm" starts its clock anew.
//!
//! Where the command dies without an order being armed, all goes on as it is: only a table that it had loaded and not put
//! to use is dropped, before anybody else takes it for his.
//!
//! It acts when its deadline passes, or when the order pipe ends while it is armed (the command is
//! dead). To act is, for each device: drop the inactive table, then resume; for each filesystem:
//! thaw. Dropping comes first because a resume *activates* a loaded table: after it, the origin has
//! either its old table (the stack never came to be) or, where the command had already switched, the
//! new one, whole. Never half of one.
//!
//! While the command lives it may still suspend or freeze something after the watchdog has acted, so
//! the watchdog goes on acting until the command answers: the command finds the verdict "fired"
//! before and after each of its own critical steps, stops the watchdog, and takes everything back
//! itself. Where the command had the kernel hurry ([`rcu`]), that is over once the watchdog has acted.
//!
//! A freeze in progress cannot be stopped, by anybody: FITHAW waits for its end, or answers that nothing is frozen yet.
//! So every filesystem has its own thread, and the kernel's log is told what was done when it was done, not before.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::base::{DeviceNumber, Error, ErrorKind, Result, ResultExt};
use crate::dm::Dm;
use crate::sys::rcu::{self, Expedite};
use crate::sys::{freeze, process};

use crate::stack::apart;
use crate::stack::want_of_memory::Witness;

/// The hidden first argument that makes the program a watchdog.
pub const ARGUMENT: &str = "__watchdog";

/// The last line of a command that ends; without it, the command has died.
const FAREWELL: &str = "farewell";

/// Longest order or verdict, in bytes.
const LINE_BYTES_MAX: usize = 1 << 20;
/// How long the watchdog may take to get ready, and to answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Pause between two rounds of acting.
const ROUND: Duration = Duration::from_millis(10);
/// Longest it goes on acting for a living command that does not answer.
const ALIVE_MAX: Duration = Duration::from_secs(600);
/// Longest it tries for a dead command.
const DEAD_MAX: Duration = Duration::from_secs(60);

/// What the watchdog guards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Device-mapper devices to be resumed: by number, as somebody may rename them meanwhile.
    pub devices: Vec<DeviceNumber>,
    /// Mount points to be thawed.
    pub filesystems: Vec<PathBuf>,
    /// Time from arming until it acts.
    pub budget_ms: u64,
    /// The command turns [`rcu::PATH`] on once the watchdog is armed.
    pub is_expedited: bool,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It had nothing to do.
    Calm,
    /// It has acted: the words say what it did.
    Fired(String),
    /// It died or does not answer.
    Lost,
}

/// A command's watchdog while it has nothing to guard: one process for all that the command does, one change after the
/// other. Clones have the same one.
#[derive(Clone, Debug, Default)]
pub struct Standby {
    waiting: Arc<Mutex<Option<Watchdog>>>,
    /// What it puts back where the kernel kills the command for want of memory.
    job: Option<Arc<str>>,
}

impl Standby {
    /// Starts a watchdog without waiting for it: while it gets ready, the command prepares what is to be guarded.
    /// Where it cannot be started, [`Standby::guard`] says so. Where the kernel kills the command for want of memory, the
    /// watchdog puts back what job `job` left.
    #[must_use]
    pub fn start(job: &str) -> Self {
        let standby = Self { job: Some(job.into()), ..Self::default() };
        *standby.lock() = standby.launch().ok();
        standby
    }

    fn launch(&self) -> Result<Watchdog> {
        Watchdog::launch(self.job.as_deref())
    }

    /// A watchdog that is ready to be armed: the one that stands by, or where there is none, or it died, another one.
    ///
    /// # Errors
    /// [`ErrorKind::External`] where none can be started or gets ready.
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

    /// What is guarded is over: `watchdog` stands by again, unless it has acted.
    #[must_use]
    pub fn dismiss(&self, mut watchdog: Watchdog) -> Verdict {
        let verdict = watchdog.disarm();
        if verdict == Verdict::Calm {
            *self.lock() = Some(watchdog);
        }
        verdict
    }

    fn lock(&self) -> MutexGuard<'_, Option<Watchdog>> {
        // It is set in one assignment.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The command's end of a watchdog that has an order. Dropped while it is armed, it takes the command for dead and acts.
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

    /// Gives it an order and waits until it is ready for that.
    fn guard(&mut self, order: &Order) -> Result<()> {
        let text = serde_json::to_string(order)
            .map_err(|source| failed("'s order cannot be written").with_source(source))?;
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
            Ok(Line::End) => Err(failed("died before anything was held")),
            Ok(Line::Nothing) => Err(failed("does not answer")),
            Err(source) => Err(failed("does not answer").with_source(source)),
        }
    }

    /// Starts its clock and waits for its word that it runs; where it runs already, starts it anew without waiting, for
    /// then writers wait.
    ///
    /// # Errors
    /// [`ErrorKind::External`] where it is gone or does not answer; [`ErrorKind::Timeout`] where it has acted already.
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

    /// Fails where the watchdog has acted or is gone. Does not wait.
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

    /// Stops its clock. Where it has acted it ends.
    fn disarm(&mut self) -> Verdict {
        if self.send("disarm").is_err() {
            // It may have acted, and ended, before.
            drop(self.orders.take());
        }
        let mut verdict = Verdict::Lost;
        let end = Instant::now() + ANSWER_MAX;
        // One line where it is calm; else the one of its acting and the last one, then the end.
        loop {
            match self.verdicts.next(end.saturating_duration_since(Instant::now())) {
                Ok(Line::Text(line)) if line == "calm" => {
                    self.is_armed = false;
                    return Verdict::Calm;
                }
                // Its answer to an "arm" that was no longer waited for.
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
        // One that still has something to let go on must not be stopped; another holds nothing that anybody needs.
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
            // Where it has ended already there is nobody to be told.
            let _ = self.send(FAREWELL);
        }
        drop(self.orders.take());
        self.reap(Instant::now() + ANSWER_MAX);
    }
}

fn failed(what: &str) -> Error {
    Error::new(ErrorKind::External, format!("the watchdog {what}"))
}

/// The error of a freeze budget that ran out.
#[must_use]
pub fn budget_ran_out() -> Error {
    Error::new(ErrorKind::Timeout, "the freeze budget ran out before the instant was over")
        .next("raise --freeze-budget, make --hook-frozen shorter, or try when there is less load")
}

/// The process: reads its orders from standard input, answers on standard output. `drop_loaded` drops a table that the
/// command, of this process number, has loaded and not put to use when it dies, and answers whether there was one;
/// `put_back` takes away what its job left, where the kernel has killed it for want of memory. None where it has no job.
#[must_use]
pub fn main(
    drop_loaded: Option<impl FnOnce(u32) -> Result<bool>>,
    put_back: Option<impl FnOnce() -> Result<()>>,
) -> ExitCode {
    apart::stand_apart();
    let parent = std::os::unix::process::parent_id();
    let witness = Witness::of_parent();
    let streams = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|input| Ok((File::from(input), File::from(io::stdout().as_fd().try_clone_to_owned()?))));
    match streams.and_then(|(input, output)| serve(input, output, &mut KernelHands::prepare)) {
        Ok(End::Farewell) => ExitCode::SUCCESS,
        Ok(End::Death) => {
            if let Some(drop_loaded) = drop_loaded {
                tell_dropped(drop_loaded(parent));
            }
            if let (Some(put_back), Ok(mut witness)) = (put_back, witness)
                && witness.was_killed()
            {
                tell_what_became(put_back());
            }
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// Nobody but the kernel's log is there to be told.
fn tell_what_became(put_back: Result<()>) {
    let what = match put_back {
        Ok(()) => "what its copy left was put back".to_owned(),
        Err(error) => format!("what its copy left could not be put back: {error}"),
    };
    let log = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    tell(log.as_ref(), &format!("the kernel killed the command for want of memory; {what}"));
}

fn tell_dropped(dropped: Result<bool>) {
    let what = match dropped {
        Ok(false) => return,
        Ok(true) => "a table that it had loaded was dropped".to_owned(),
        Err(error) => format!("it cannot be told whether it had loaded a table: {error}"),
    };
    let log = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    tell(log.as_ref(), &format!("the command died; {what}"));
}

/// A notice in the kernel's log.
fn tell(log: Option<&File>, text: &str) {
    if let Some(mut log) = log {
        // <5>: a notice.
        let _ = log.write_all(format!("<5>tidemark watchdog: {text}\n").as_bytes());
    }
}

/// How the command ended, or left the watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With its last line, or a verdict of the watchdog's.
    Farewell,
    /// Without a word.
    Death,
}

/// What the watchdog acts on: the kernel, or a test's fake.
trait Hands: Send + Sync {
    /// Drops inactive tables and resumes; the count of devices that were let go.
    fn release_devices(&self) -> io::Result<usize>;
    /// Thaws filesystem `index`.
    fn thaw(&self, index: usize) -> io::Result<()>;
    /// Turns off what the command has turned on to make the kernel hurry.
    fn end_hurry(&self);
    /// Filesystems guarded.
    fn filesystem_count(&self) -> usize;
    /// Leaves a word in the kernel's log: the command may be dead, and nobody else tells.
    fn tell(&self, text: &str);
}

type Prepare<'a> = &'a mut dyn FnMut(Order) -> Result<Arc<dyn Hands>>;

fn serve(input: File, mut output: File, prepare: Prepare<'_>) -> io::Result<End> {
    let mut orders = Lines::new(input);
    // Nothing is frozen while it has no order: without a limit.
    while let Line::Text(text) = orders.next(Duration::MAX)? {
        if text == FAREWELL {
            return Ok(End::Farewell);
        }
        let order: Order = serde_json::from_str(&text)?;
        let budget = Duration::from_millis(order.budget_ms);
        let hands = match prepare(order) {
            Ok(hands) => hands,
            Err(error) => {
                writeln!(output, "{}", error.to_string().replace('\n', " "))?;
                return Ok(End::Farewell);
            }
        };
        writeln!(output, "ready")?;
        // Nor before it is armed.
        let mut line = orders.next(Duration::MAX)?;
        let mut armed = None;
        while line == Line::Text("arm".to_owned()) {
            if armed.replace(Instant::now()).is_none() {
                writeln!(output, "armed")?;
            }
            // An order pipe that cannot be read any more is one that has ended.
            line = orders.next(budget).unwrap_or(Line::End);
        }
        match (line, armed) {
            (Line::Text(_), _) => {
                // What it had open keeps nobody from unmounting.
                drop(hands);
                writeln!(output, "calm")?;
            }
            (Line::End, None) => return Ok(End::Death),
            (Line::End, Some(start)) => {
                let done = act_for_the_dead(&hands);
                hands.tell(&format!("the command died; {done} after {} ms", start.elapsed().as_millis()));
                hands.end_hurry();
                return Ok(End::Death);
            }
            (Line::Nothing, start) => {
                act_for_the_living(&hands, &mut orders, &mut output, start.unwrap_or_else(Instant::now));
                hands.end_hurry();
                return Ok(End::Farewell);
            }
        }
    }
    Ok(End::Death)
}

/// The deadline passed and the command is alive: act until it answers or dies.
fn act_for_the_living(hands: &Arc<dyn Hands>, orders: &mut Lines<File>, output: &mut File, start: Instant) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut released = release(hands);
    for index in 0..hands.filesystem_count() {
        let (hands, stop) = (Arc::clone(hands), Arc::clone(&stop));
        // Not joined: it may be inside FITHAW until a freeze in progress is over.
        thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                if hands.thaw(index).is_ok() {
                    let took = start.elapsed().as_millis();
                    hands.tell(&format!("filesystem {} thawed after {took} ms", index + 1));
                }
                thread::sleep(ROUND);
            }
        });
    }
    hands.tell(&format!(
        "the freeze budget ran out after {} ms: {released} device(s) resumed, thawing",
        start.elapsed().as_millis()
    ));
    // The command may be dead by now; the order pipe tells below.
    let _ = writeln!(output, "fired");
    let end = Instant::now() + ALIVE_MAX;
    while Instant::now() < end {
        match orders.next(ROUND) {
            Ok(Line::Nothing) => released += release(hands),
            // It had not seen yet that the clock had run out.
            Ok(Line::Text(line)) if line == "arm" => {}
            Ok(Line::Text(_)) => {
                stop.store(true, Ordering::SeqCst);
                let _ = writeln!(output, "fired: {released} device(s) resumed");
                return;
            }
            Ok(Line::End) | Err(_) => {
                let done = act_for_the_dead(hands);
                hands.tell(&format!("then the command died; {done}"));
                return;
            }
        }
    }
}

fn release(hands: &Arc<dyn Hands>) -> usize {
    hands.release_devices().unwrap_or(0)
}

/// The command is dead: nothing new can be frozen or suspended, so each thing is undone once.
fn act_for_the_dead(hands: &Arc<dyn Hands>) -> String {
    let end = Instant::now() + DEAD_MAX;
    let mut resumed = hands.release_devices();
    while resumed.is_err() && Instant::now() < end {
        thread::sleep(ROUND);
        resumed = hands.release_devices();
    }
    // Last frozen, first thawed. EINVAL: it is not frozen.
    let thawed = (0..hands.filesystem_count()).rev().filter(|index| hands.thaw(*index).is_ok()).count();
    match resumed {
        Ok(count) => format!("{count} device(s) resumed, {thawed} filesystem(s) thawed"),
        Err(error) => format!("resuming failed ({error}), {thawed} filesystem(s) thawed"),
    }
}

/// The kernel's devices and filesystems, opened beforehand.
struct KernelHands {
    dm: Dm,
    devices: Vec<DeviceNumber>,
    filesystems: Vec<File>,
    /// The switch that the command turns on from here on.
    expedite: Option<Expedite>,
    log: Option<File>,
}

impl KernelHands {
    fn prepare(order: Order) -> Result<Arc<dyn Hands>> {
        let filesystems = order
            .filesystems
            .iter()
            .map(|path| File::open(path).io_context(|| format!("opening {}", path.display())))
            .collect::<Result<Vec<_>>>()?;
        let hands = Self {
            dm: Dm::open()?,
            devices: order.devices,
            filesystems,
            expedite: if order.is_expedited { Expedite::open().ok() } else { None },
            log: OpenOptions::new().write(true).open("/dev/kmsg").ok(),
        };
        // Walk the whole path once, so that nothing is read or linked for the first time later.
        for &device in &hands.devices {
            let _ = hands.dm.info(device)?;
        }
        if let Err(source) = process::lock_memory() {
            hands.refuse_to_wait_for(source)?;
        }
        Ok(Arc::new(hands))
    }

    /// A resume would put to use what somebody else has loaded since the inactive table was dropped: that is dropped with
    /// the next round.
    fn let_go(&self, device: DeviceNumber) -> Result<usize> {
        match self.dm.info(device)? {
            Some(info) if info.suspended && info.has_inactive => {
                Err(failed("found a table that was loaded behind it"))
            }
            Some(info) if info.suspended => self.dm.let_go(device).map(|()| 1),
            _ => Ok(0),
        }
    }

    /// Without memory that is locked, what the watchdog runs on may have to be read from a disk again: that must be
    /// none of those that it guards.
    fn refuse_to_wait_for(&self, source: io::Error) -> Result<()> {
        let frozen = |file: &File| file.metadata().map(|meta| DeviceNumber::from_dev(meta.dev()));
        let frozen: Vec<DeviceNumber> = self
            .filesystems
            .iter()
            .map(frozen)
            .collect::<io::Result<_>>()
            .io_context(|| "looking".to_owned())?;
        let mapped = process::mapped_from().io_context(|| "reading /proc/self/maps".to_owned())?;
        if !mapped.iter().any(|device| frozen.contains(device)) {
            return Ok(());
        }
        Err(failed("lies on a filesystem that is to be frozen, and may not be locked in memory")
            .with_source(source)
            .next("raise 'ulimit -l' to 64 MiB, grant CAP_IPC_LOCK, or run tidemark from another filesystem"))
    }
}

impl Hands for KernelHands {
    fn release_devices(&self) -> io::Result<usize> {
        let mut count = 0;
        let mut failure = None;
        for &device in &self.devices {
            let result = self.dm.info(device).and_then(|info| match info {
                // A device that is not suspended may have a table that the command just loaded:
                // dropping it makes the command's next step harmless.
                Some(_) => {
                    self.dm.clear(device)?;
                    self.let_go(device)
                }
                None => Ok(0),
            });
            match result {
                Ok(released) => count += released,
                Err(error) => failure = Some(io::Error::other(error)),
            }
        }
        failure.map_or(Ok(count), Err)
    }

    fn thaw(&self, index: usize) -> io::Result<()> {
        freeze::thaw(&self.filesystems[index])
    }

    fn end_hurry(&self) {
        if let Some(Err(error)) = self.expedite.as_ref().map(Expedite::turn_off) {
            self.tell(&format!("{} stays on: {error}", rcu::PATH));
        }
    }

    fn filesystem_count(&self) -> usize {
        self.filesystems.len()
    }

    fn tell(&self, text: &str) {
        tell(self.log.as_ref(), text);
    }
}

/// Lines from a pipe, each waited for with a limit.
#[derive(Debug)]
struct Lines<F> {
    file: F,
    buffered: Vec<u8>,
    ended: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// A line, without its end.
    Text(String),
    /// None within the limit.
    Nothing,
    /// The pipe has ended.
    End,
}

impl<F: Read + AsFd> Lines<F> {
    fn new(file: F) -> Self {
        Self { file, buffered: Vec::new(), ended: false }
    }

    fn next(&mut self, limit: Duration) -> io::Result<Line> {
        let end = Instant::now().checked_add(limit);
        loop {
            if let Some(at) = self.buffered.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffered.drain(..=at).collect();
                return Ok(Line::Text(String::from_utf8_lossy(&line[..at]).into_owned()));
            }
            if self.ended {
                return Ok(Line::End);
            }
            if self.buffered.len() > LINE_BYTES_MAX {
                return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
            }
            if !self.wait(end)? {
                return Ok(Line::Nothing);
            }
            let mut block = [0u8; 4096];
            match self.file.read(&mut block) {
                Ok(0) => self.ended = true,
                Ok(count) => self.buffered.extend_from_slice(&block[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// False where the limit passes first.
    fn wait(&self, end: Option<Instant>) -> io::Result<bool> {
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            // Rounded up: a wait that ends early would spin.
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                let ms = left.as_nanos().div_ceil(1_000_000).min(60_000);
                PollTimeout::from(u16::try_from(ms).unwrap_or(60_000))
            });
            match poll(&mut [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) if left.is_some_and(|left| left <= Duration::from_millis(60_000)) => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// For tests: both ends of a pipe.
#[cfg(test)]
fn pipe() -> (File, File) {
    let (read, write) = nix::unistd::pipe().unwrap();
    (File::from(read), File::from(write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct FakeHands {
        suspended: AtomicBool,
        frozen: Mutex<[bool; 2]>,
        releases: AtomicUsize,
        told: Mutex<Vec<String>>,
        hurry_ended: AtomicBool,
    }

    impl Hands for FakeHands {
        fn release_devices(&self) -> io::Result<usize> {
            self.releases.fetch_add(1, Ordering::SeqCst);
            Ok(usize::from(self.suspended.swap(false, Ordering::SeqCst)))
        }
        fn thaw(&self, index: usize) -> io::Result<()> {
            let mut frozen = self.frozen.lock().unwrap();
            if std::mem::replace(&mut frozen[index], false) {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::EINVAL))
            }
        }
        fn end_hurry(&self) {
            self.hurry_ended.store(true, Ordering::SeqCst);
        }
        fn filesystem_count(&self) -> usize {
            2
        }
        fn tell(&self, text: &str) {
            self.told.lock().unwrap().push(text.to_owned());
        }
    }

    struct Setup {
        hands: Arc<FakeHands>,
        orders: Option<File>,
        verdicts: Lines<File>,
        thread: Option<thread::JoinHandle<io::Result<End>>>,
    }

    fn start(budget_ms: u64) -> Setup {
        let (input, orders) = pipe();
        let (verdicts, output) = pipe();
        let hands = Arc::new(FakeHands::default());
        let theirs = Arc::clone(&hands);
        let thread = thread::spawn(move || {
            serve(input, output, &mut move |_| {
                let hands: Arc<dyn Hands> = Arc::<FakeHands>::clone(&theirs);
                Ok(hands)
            })
        });
        let mut setup =
            Setup { hands, orders: Some(orders), verdicts: Lines::new(verdicts), thread: Some(thread) };
        setup.order(budget_ms);
        setup
    }

    impl Setup {
        fn order(&mut self, budget_ms: u64) {
            let order = Order {
                devices: vec![DeviceNumber { major: 253, minor: 0 }],
                filesystems: vec!["/a".into()],
                budget_ms,
                is_expedited: true,
            };
            self.say(&serde_json::to_string(&order).unwrap());
            assert_eq!(self.answer(), Line::Text("ready".into()));
        }
        fn say(&mut self, line: &str) {
            writeln!(self.orders.as_mut().unwrap(), "{line}").unwrap();
        }
        fn arm(&mut self) {
            self.say("arm");
            assert_eq!(self.answer(), Line::Text("armed".into()));
        }
        fn answer(&mut self) -> Line {
            self.verdicts.next(Duration::from_secs(20)).unwrap()
        }
        fn hold(&self) {
            self.hands.suspended.store(true, Ordering::SeqCst);
            *self.hands.frozen.lock().unwrap() = [true, true];
        }
        fn is_free(&self) -> bool {
            !self.hands.suspended.load(Ordering::SeqCst)
                && *self.hands.frozen.lock().unwrap() == [false, false]
        }
        fn end(&mut self) -> End {
            self.thread.take().unwrap().join().unwrap().unwrap()
        }
    }

    #[test]
    fn a_disarmed_watchdog_does_nothing() {
        let mut setup = start(60_000);
        setup.arm();
        setup.hold();
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("calm".into()));
        // Nor when the command ends, which then is no death.
        setup.say(FAREWELL);
        assert_eq!(setup.end(), End::Farewell);
        assert!(!setup.is_free());
        // The command does that itself, before it disarms.
        assert!(!setup.hands.hurry_ended.load(Ordering::SeqCst));
        assert_eq!(setup.hands.releases.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_dead_command_is_cleaned_up_after() {
        let mut setup = start(60_000);
        setup.arm();
        setup.hold();
        drop(setup.orders.take());
        assert_eq!(setup.end(), End::Death);
        assert!(setup.is_free() && setup.hands.hurry_ended.load(Ordering::SeqCst));
        assert!(setup.hands.told.lock().unwrap()[0].contains("1 device(s) resumed, 2 filesystem(s) thawed"));
    }

    #[test]
    fn a_command_that_dies_unarmed_is_no_business_of_its() {
        let mut setup = start(60_000);
        setup.hold();
        drop(setup.orders.take());
        assert_eq!(setup.end(), End::Death);
        assert!(!setup.is_free());
    }

    #[test]
    fn one_order_follows_the_other_and_each_is_guarded() {
        let mut setup = start(60_000);
        setup.arm();
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("calm".into()));
        // Never armed, and over all the same.
        setup.order(60_000);
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("calm".into()));
        setup.order(30);
        setup.hold();
        setup.arm();
        assert_eq!(setup.answer(), Line::Text("fired".into()));
        drop(setup.orders.take());
        setup.end();
        assert!(setup.is_free());
    }

    #[test]
    fn a_command_that_arms_again_in_time_is_given_the_whole_time_again() {
        let mut setup = start(400);
        setup.hold();
        setup.arm();
        for _ in 0..10 {
            // Not answered again: writers wait.
            setup.say("arm");
            thread::sleep(Duration::from_millis(80));
        }
        assert!(!setup.is_free());
        assert_eq!(setup.answer(), Line::Text("fired".into()));
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("fired: 1 device(s) resumed".into()));
        setup.end();
        assert!(!setup.hands.suspended.load(Ordering::SeqCst));
    }

    #[test]
    fn an_overdue_command_is_acted_for_until_it_answers() {
        let mut setup = start(30);
        setup.arm();
        setup.hold();
        assert_eq!(setup.answer(), Line::Text("fired".into()));
        // What is frozen or suspended even later is let go too.
        setup.hold();
        let end = Instant::now() + Duration::from_secs(20);
        while !setup.is_free() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(setup.is_free());
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("fired: 2 device(s) resumed".into()));
        setup.end();
        assert!(setup.hands.hurry_ended.load(Ordering::SeqCst));
    }
}
