//! This process: memory locking, open and mapped files, and the crash points of the tests.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use crate::base::DeviceNumber;

/// How many callers have locked memory and not unlocked it.
static LOCKS: Mutex<u32> = Mutex::new(0);

/// Keeps every page of this process, present and future, in memory: a page fault on a frozen filesystem would
/// never return. Raises the limit if permitted. Calls are counted.
///
/// # Errors
/// EPERM or ENOMEM if the limits forbid it.
pub fn lock_memory() -> io::Result<()> {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
        && soft != RLIM_INFINITY
        && setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).is_err()
    {
        // Without CAP_SYS_RESOURCE the granted limit applies; with CAP_IPC_LOCK none does.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
    }
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)?;
    *locks += 1;
    Ok(())
}

/// A path by which another process reaches this very file, as long as we have it open.
#[must_use]
pub fn path_of(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
}

/// The id of the mount through which `file` was opened, as in mountinfo; None if the kernel does not report
/// it.
pub fn mount_of(file: &File) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

/// The devices (`st_dev`) of the files that this process has mapped: its program and libraries.
///
/// # Errors
/// I/O errors of reading /proc.
pub fn mapped_from() -> io::Result<Vec<DeviceNumber>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let device = |line: &str| {
        let (major, minor) = line.split_whitespace().nth(3)?.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(DeviceNumber { major: number(major)?, minor: number(minor)? })
    };
    Ok(maps.lines().filter_map(device).collect())
}

/// Ends one [`lock_memory`]; does nothing if none succeeded.
///
/// # Errors
/// The kernel's errno.
pub fn unlock_memory() -> io::Result<()> {
    let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    *locks = locks.saturating_sub(1);
    if *locks == 0 { munlockall().map_err(io::Error::from) } else { Ok(()) }
}

/// Locks memory as long as this value lives.
#[derive(Debug)]
pub struct LockedMemory(());

impl LockedMemory {
    /// Locks memory.
    ///
    /// # Errors
    /// As [`lock_memory`].
    pub fn lock() -> io::Result<Self> {
        lock_memory().map(|()| Self(()))
    }
}

impl Drop for LockedMemory {
    fn drop(&mut self) {
        // Pages that stay locked do no harm.
        let _ = unlock_memory();
    }
}

/// Joins a worker thread, if it was not joined yet. A panic is logged: `what` names the thread.
pub fn join_worker(thread: &mut Option<JoinHandle<()>>, what: &str) {
    if let Some(thread) = thread.take()
        && thread.join().is_err()
    {
        tracing::error!("{what} has panicked");
    }
}

/// Closes every descriptor except the three standard ones, at the start of a process that uses no others yet.
/// Best effort (Linux 5.9).
pub fn close_inherited() {
    // SAFETY: the call takes numbers only; nothing in this process owns a descriptor from 3 on yet.
    unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
}

/// A place at which tests can kill or stall the process. Compiled to nothing without the feature `vm`.
///
/// `TIDEMARK_CRASH_AT=NAME` (or `NAME:N` for the n-th passage, from 1) kills the process with SIGKILL;
/// `TIDEMARK_STOP_AT` likewise stops it with SIGSTOP, until SIGCONT; `TIDEMARK_STALL_AT=NAME:SECONDS` sleeps
/// there, the first time.
#[cfg(not(feature = "vm"))]
#[inline]
pub fn crash_point(_name: &str) {}

/// A place at which tests can kill or stall the process.
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
    let seen = {
        let mut passages = PASSAGES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let seen = passages.entry(name.to_owned()).or_insert(0);
        *seen += 1;
        *seen
    };
    if split("TIDEMARK_STOP_AT") == Some(seen) {
        // Only SIGCONT continues it, in this very call.
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGSTOP);
    }
    if split("TIDEMARK_CRASH_AT") == Some(seen) {
        // SIGKILL to oneself cannot fail, and the call does not return.
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
        loop {
            std::thread::park();
        }
    }
}
