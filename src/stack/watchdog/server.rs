//! The watchdog process.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::protocol::{FAREWELL, Line, Lines, Order, failed};
use crate::base::{DeviceNumber, Result, ResultExt};
use crate::dm::Dm;
use crate::stack::isolation;
use crate::stack::oom::OomLog;
use crate::sys::rcu::{self, Expedite};
use crate::sys::{freeze, process};

/// The hidden first argument that makes the program a watchdog.
pub const ARGUMENT: &str = "__watchdog";

/// Pause between two rounds of resuming and thawing.
const ROUND: Duration = Duration::from_millis(10);
/// How long it keeps acting for a living command that does not answer.
const ALIVE_MAX: Duration = Duration::from_secs(600);
/// How long it retries for a dead command.
const DEAD_MAX: Duration = Duration::from_secs(60);

/// The process: reads orders from standard input, answers on standard output. `drop_loaded` is called when
/// the command dies, with the command's process number: it drops a table that the command loaded but did not
/// activate, and returns whether there was one. `put_back` undoes what the command's job left, if the OOM
/// killer killed the command. Both are None if there is no job.
#[must_use]
pub fn main(
    drop_loaded: Option<impl FnOnce(u32) -> Result<bool>>,
    put_back: Option<impl FnOnce() -> Result<()>>,
) -> ExitCode {
    isolation::isolate();
    let parent = std::os::unix::process::parent_id();
    let oom_log = OomLog::of_parent();
    let streams = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .and_then(|input| Ok((File::from(input), File::from(io::stdout().as_fd().try_clone_to_owned()?))));
    match streams.and_then(|(input, output)| serve(input, output, &mut KernelActuator::prepare)) {
        Ok(End::Farewell) => ExitCode::SUCCESS,
        Ok(End::Death) => {
            if let Some(drop_loaded) = drop_loaded {
                log_dropped(drop_loaded(parent));
            }
            if let (Some(put_back), Ok(mut oom_log)) = (put_back, oom_log)
                && oom_log.was_killed()
            {
                log_put_back(put_back());
            }
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// The kernel's log is the only place left to report to.
fn log_put_back(put_back: Result<()>) {
    let what = match put_back {
        Ok(()) => "what its copy left was put back".to_owned(),
        Err(error) => format!("what its copy left could not be put back: {error}"),
    };
    let log = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    write_kernel_log(
        log.as_ref(),
        &format!("the kernel killed the command because it ran out of memory; {what}"),
    );
}

fn log_dropped(dropped: Result<bool>) {
    let what = match dropped {
        Ok(false) => return,
        Ok(true) => "a table that it had loaded was dropped".to_owned(),
        Err(error) => format!("cannot determine whether it had loaded a table: {error}"),
    };
    let log = OpenOptions::new().write(true).open("/dev/kmsg").ok();
    write_kernel_log(log.as_ref(), &format!("the command died; {what}"));
}

/// Writes a notice to the kernel's log.
fn write_kernel_log(log: Option<&File>, text: &str) {
    if let Some(mut log) = log {
        // <5>: a notice.
        let _ = log.write_all(format!("<5>tidemark watchdog: {text}\n").as_bytes());
    }
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With a farewell, or after the watchdog has acted.
    Farewell,
    /// Without a farewell.
    Death,
}

/// What the watchdog acts on: the kernel, or a test's fake.
trait Actuator: Send + Sync {
    /// Drops inactive tables and resumes. Returns how many devices were resumed.
    fn release_devices(&self) -> io::Result<usize>;
    /// Thaws filesystem `index`.
    fn thaw(&self, index: usize) -> io::Result<()>;
    /// Turns off the expediting of RCU, if the command turned it on.
    fn restore_rcu_expedited(&self);
    /// The number of guarded filesystems.
    fn filesystem_count(&self) -> usize;
    /// Writes to the kernel's log: the command may be dead and report nothing.
    fn log(&self, text: &str);
}

type Prepare<'a> = &'a mut dyn FnMut(Order) -> Result<Arc<dyn Actuator>>;

fn serve(input: File, mut output: File, prepare: Prepare<'_>) -> io::Result<End> {
    let mut orders = Lines::new(input);
    // Without an order nothing is frozen, so there is no time limit.
    while let Line::Text(text) = orders.next(Duration::MAX)? {
        if text == FAREWELL {
            return Ok(End::Farewell);
        }
        let order: Order = serde_json::from_str(&text)?;
        let budget = Duration::from_millis(order.budget_ms);
        let actuator = match prepare(order) {
            Ok(actuator) => actuator,
            Err(error) => {
                writeln!(output, "{}", error.to_string().replace('\n', " "))?;
                return Ok(End::Farewell);
            }
        };
        writeln!(output, "ready")?;
        // Nor before the order is armed.
        let mut line = orders.next(Duration::MAX)?;
        let mut armed = None;
        while line == Line::Text("arm".to_owned()) {
            if armed.replace(Instant::now()).is_none() {
                writeln!(output, "armed")?;
            }
            // A pipe that cannot be read any more counts as ended.
            line = orders.next(budget).unwrap_or(Line::End);
        }
        match (line, armed) {
            (Line::Text(_), _) => {
                // Its open files would keep filesystems from being unmounted.
                drop(actuator);
                writeln!(output, "calm")?;
            }
            (Line::End, None) => return Ok(End::Death),
            (Line::End, Some(start)) => {
                let done = on_parent_exit(&actuator);
                actuator.log(&format!("the command died; {done} after {} ms", start.elapsed().as_millis()));
                actuator.restore_rcu_expedited();
                return Ok(End::Death);
            }
            (Line::Nothing, start) => {
                on_deadline(&actuator, &mut orders, &mut output, start.unwrap_or_else(Instant::now));
                actuator.restore_rcu_expedited();
                return Ok(End::Farewell);
            }
        }
    }
    Ok(End::Death)
}

/// The deadline has passed and the command is alive: act until it answers or dies.
fn on_deadline(actuator: &Arc<dyn Actuator>, orders: &mut Lines<File>, output: &mut File, start: Instant) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut released = release(actuator);
    for index in 0..actuator.filesystem_count() {
        let (actuator, stop) = (Arc::clone(actuator), Arc::clone(&stop));
        // Not joined: the thread may be inside FITHAW until a freeze in progress ends.
        thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                if actuator.thaw(index).is_ok() {
                    let took = start.elapsed().as_millis();
                    actuator.log(&format!("filesystem {} thawed after {took} ms", index + 1));
                }
                thread::sleep(ROUND);
            }
        });
    }
    actuator.log(&format!(
        "the freeze budget ran out after {} ms: {released} device(s) resumed, thawing",
        start.elapsed().as_millis()
    ));
    // The command may be dead by now; the read of the order pipe below finds that.
    let _ = writeln!(output, "fired");
    let end = Instant::now() + ALIVE_MAX;
    while Instant::now() < end {
        match orders.next(ROUND) {
            Ok(Line::Nothing) => released += release(actuator),
            // Sent before the command saw that the clock had run out.
            Ok(Line::Text(line)) if line == "arm" => {}
            Ok(Line::Text(_)) => {
                stop.store(true, Ordering::SeqCst);
                let _ = writeln!(output, "fired: {released} device(s) resumed");
                return;
            }
            Ok(Line::End) | Err(_) => {
                let done = on_parent_exit(actuator);
                actuator.log(&format!("then the command died; {done}"));
                return;
            }
        }
    }
}

fn release(actuator: &Arc<dyn Actuator>) -> usize {
    actuator.release_devices().unwrap_or(0)
}

/// The command is dead. Nothing new can be frozen or suspended, so everything is undone once.
fn on_parent_exit(actuator: &Arc<dyn Actuator>) -> String {
    let end = Instant::now() + DEAD_MAX;
    let mut resumed = actuator.release_devices();
    while resumed.is_err() && Instant::now() < end {
        thread::sleep(ROUND);
        resumed = actuator.release_devices();
    }
    // In the reverse order of freezing. EINVAL: it is not frozen.
    let thawed = (0..actuator.filesystem_count()).rev().filter(|index| actuator.thaw(*index).is_ok()).count();
    match resumed {
        Ok(count) => format!("{count} device(s) resumed, {thawed} filesystem(s) thawed"),
        Err(error) => format!("resuming failed ({error}), {thawed} filesystem(s) thawed"),
    }
}

/// The kernel's devices and filesystems, opened in advance.
struct KernelActuator {
    dm: Dm,
    devices: Vec<DeviceNumber>,
    filesystems: Vec<File>,
    /// The switch that the command turns on once the watchdog is armed.
    expedite: Option<Expedite>,
    log: Option<File>,
}

impl KernelActuator {
    fn prepare(order: Order) -> Result<Arc<dyn Actuator>> {
        let filesystems = order
            .filesystems
            .iter()
            .map(|path| File::open(path).io_context(|| format!("opening {}", path.display())))
            .collect::<Result<Vec<_>>>()?;
        let actuator = Self {
            dm: Dm::open()?,
            devices: order.devices,
            filesystems,
            expedite: if order.is_expedited { Expedite::open().ok() } else { None },
            log: OpenOptions::new().write(true).open("/dev/kmsg").ok(),
        };
        // Run the calls once, so that nothing is read or linked for the first time later.
        for &device in &actuator.devices {
            let _ = actuator.dm.info(device)?;
        }
        if let Err(source) = process::lock_memory() {
            actuator.refuse_unlocked_memory(source)?;
        }
        Ok(Arc::new(actuator))
    }

    /// Resumes the device if it is suspended. Fails if a table was loaded since the inactive table was
    /// dropped, as a resume would activate it: the next round drops that one too.
    fn resume_if_suspended(&self, device: DeviceNumber) -> Result<usize> {
        match self.dm.info(device)? {
            Some(info) if info.suspended && info.has_inactive => {
                Err(failed("found a table that was loaded meanwhile"))
            }
            Some(info) if info.suspended => self.dm.resume_if_suspended(device).map(|()| 1),
            _ => Ok(0),
        }
    }

    /// If memory cannot be locked, the watchdog's own pages may have to be read from a disk again. Refuses if
    /// that disk is one of those that it guards.
    fn refuse_unlocked_memory(&self, source: io::Error) -> Result<()> {
        let frozen = |file: &File| file.metadata().map(|meta| DeviceNumber::from_dev(meta.dev()));
        let frozen: Vec<DeviceNumber> = self
            .filesystems
            .iter()
            .map(frozen)
            .collect::<io::Result<_>>()
            .io_context(|| "examining the filesystems that will be frozen".to_owned())?;
        let mapped = process::mapped_from().io_context(|| "reading /proc/self/maps".to_owned())?;
        if !mapped.iter().any(|device| frozen.contains(device)) {
            return Ok(());
        }
        Err(failed("is on a filesystem that will be frozen, and cannot be locked in memory")
            .with_source(source)
            .next("raise 'ulimit -l' to 64 MiB, grant CAP_IPC_LOCK, or run tidemark from another filesystem"))
    }
}

impl Actuator for KernelActuator {
    fn release_devices(&self) -> io::Result<usize> {
        let mut count = 0;
        let mut failure = None;
        for &device in &self.devices {
            let result = self.dm.info(device).and_then(|info| match info {
                // A device that is not suspended may have a table that the command just loaded. Dropping it
                // makes the command's next step harmless.
                Some(_) => {
                    self.dm.clear(device)?;
                    self.resume_if_suspended(device)
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

    fn restore_rcu_expedited(&self) {
        if let Some(Err(error)) = self.expedite.as_ref().map(Expedite::turn_off) {
            self.log(&format!("{} stays on: {error}", rcu::PATH));
        }
    }

    fn filesystem_count(&self) -> usize {
        self.filesystems.len()
    }

    fn log(&self, text: &str) {
        write_kernel_log(self.log.as_ref(), text);
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
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct FakeActuator {
        suspended: AtomicBool,
        frozen: Mutex<[bool; 2]>,
        releases: AtomicUsize,
        logged: Mutex<Vec<String>>,
        rcu_restored: AtomicBool,
    }

    impl Actuator for FakeActuator {
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
        fn restore_rcu_expedited(&self) {
            self.rcu_restored.store(true, Ordering::SeqCst);
        }
        fn filesystem_count(&self) -> usize {
            2
        }
        fn log(&self, text: &str) {
            self.logged.lock().unwrap().push(text.to_owned());
        }
    }

    struct Setup {
        actuator: Arc<FakeActuator>,
        orders: Option<File>,
        verdicts: Lines<File>,
        thread: Option<thread::JoinHandle<io::Result<End>>>,
    }

    fn start(budget_ms: u64) -> Setup {
        let (input, orders) = pipe();
        let (verdicts, output) = pipe();
        let actuator = Arc::new(FakeActuator::default());
        let served = Arc::clone(&actuator);
        let thread = thread::spawn(move || {
            serve(input, output, &mut move |_| {
                let actuator: Arc<dyn Actuator> = Arc::<FakeActuator>::clone(&served);
                Ok(actuator)
            })
        });
        let mut setup =
            Setup { actuator, orders: Some(orders), verdicts: Lines::new(verdicts), thread: Some(thread) };
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
            self.actuator.suspended.store(true, Ordering::SeqCst);
            *self.actuator.frozen.lock().unwrap() = [true, true];
        }
        fn is_free(&self) -> bool {
            !self.actuator.suspended.load(Ordering::SeqCst)
                && *self.actuator.frozen.lock().unwrap() == [false, false]
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
        // Nor does it act when the command then ends with a farewell.
        setup.say(FAREWELL);
        assert_eq!(setup.end(), End::Farewell);
        assert!(!setup.is_free());
        // The command restores RCU itself, before it disarms.
        assert!(!setup.actuator.rcu_restored.load(Ordering::SeqCst));
        assert_eq!(setup.actuator.releases.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_watchdog_resumes_and_thaws_when_the_command_dies() {
        let mut setup = start(60_000);
        setup.arm();
        setup.hold();
        drop(setup.orders.take());
        assert_eq!(setup.end(), End::Death);
        assert!(setup.is_free() && setup.actuator.rcu_restored.load(Ordering::SeqCst));
        assert!(
            setup.actuator.logged.lock().unwrap()[0].contains("1 device(s) resumed, 2 filesystem(s) thawed")
        );
    }

    #[test]
    fn an_unarmed_watchdog_does_nothing_when_the_command_dies() {
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
        // An order that is never armed also ends with "disarm".
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
    fn arming_again_restarts_the_clock() {
        let mut setup = start(400);
        setup.hold();
        setup.arm();
        for _ in 0..10 {
            // No answer to a further "arm", as writers wait.
            setup.say("arm");
            thread::sleep(Duration::from_millis(80));
        }
        assert!(!setup.is_free());
        assert_eq!(setup.answer(), Line::Text("fired".into()));
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("fired: 1 device(s) resumed".into()));
        setup.end();
        assert!(!setup.actuator.suspended.load(Ordering::SeqCst));
    }

    #[test]
    fn a_fired_watchdog_acts_until_the_command_answers() {
        let mut setup = start(30);
        setup.arm();
        setup.hold();
        assert_eq!(setup.answer(), Line::Text("fired".into()));
        // What is frozen or suspended later is undone too.
        setup.hold();
        let end = Instant::now() + Duration::from_secs(20);
        while !setup.is_free() && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(setup.is_free());
        setup.say("disarm");
        assert_eq!(setup.answer(), Line::Text("fired: 2 device(s) resumed".into()));
        setup.end();
        assert!(setup.actuator.rcu_restored.load(Ordering::SeqCst));
    }
}
