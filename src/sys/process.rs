//! The process itself: memory locking, its own end, and the crash points of the tests.

use std::io;

use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Keeps every page of this process, present and future, in memory: a page fault served from a
/// frozen filesystem would never return.
///
/// # Errors
/// EPERM or ENOMEM where the limits forbid it.
pub fn lock_memory() -> io::Result<()> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(io::Error::from)
}

/// Ends [`lock_memory`].
///
/// # Errors
/// The kernel's errno.
pub fn unlock_memory() -> io::Result<()> {
    munlockall().map_err(io::Error::from)
}

/// From now on `signal` has no effect on this process.
///
/// # Errors
/// EINVAL for a signal that cannot be ignored.
pub fn ignore_signal(signal: Signal) -> io::Result<()> {
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { sigaction(signal, &ignore) }.map(|_| ()).map_err(io::Error::from)
}

/// Closes every descriptor but the three standard ones, at the start of a process that uses no other yet. Best effort
/// (Linux 5.9).
pub fn close_inherited() {
    // SAFETY: the call takes numbers only; nothing in this process owns a descriptor from 3 on yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
}

/// A place where the tests may end or stall the process. Compiled to nothing without the feature
/// `vm`.
///
/// `TIDEMARK_CRASH_AT=NAME` (or `NAME:N` for the n-th passage, from 1) kills the process with
/// SIGKILL; `TIDEMARK_STALL_AT=NAME:SECONDS` sleeps there, the first time.
#[cfg(not(feature = "vm"))]
#[inline]
pub fn crash_point(_name: &str) {}

/// See above.
#[cfg(feature = "vm")]
pub fn crash_point(name: &str) {
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    static STALLED: AtomicBool = AtomicBool::new(false);
    static PASSAGES: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());

    let split = |variable: &str| {
        let value = std::env::var(variable).ok()?;
        let (at, number) = match value.split_once(':') {
            Some((at, number)) => (at.to_owned(), number.parse::<u64>().ok()?),
            None => (value, 1),
        };
        (at == name).then_some(number)
    };
    if let Some(seconds) = split("TIDEMARK_STALL_AT")
        && STALLED.compare_exchange(false, true, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    {
        std::thread::sleep(std::time::Duration::from_secs(seconds));
    }
    if let Some(wanted) = split("TIDEMARK_CRASH_AT") {
        let mut passages = PASSAGES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let seen = passages.entry(name.to_owned()).or_insert(0);
        *seen += 1;
        if *seen == wanted {
            // SIGKILL to oneself cannot fail and does not return to us.
            let _ = nix::sys::signal::kill(nix::unistd::getpid(), Signal::SIGKILL);
            loop {
                std::thread::park();
            }
        }
    }
}
