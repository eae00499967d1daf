//! Signals as requests of the user: to stop, or to show progress.
//!
//! Every catchable signal that would end the process is only counted; nothing is undone in a handler. The
//! working code checks [`stop_requested`] between its steps and unwinds by itself, so a second signal does no
//! harm. A signal that was ignored at the start (nohup) stays ignored. Two signals are not requests to stop:
//! - SIGUSR1 requests progress, as for dd. Only the thread that waits for signals receives it
//!   ([`unblock_progress_signal`]): it must not interrupt the calls of another thread;
//! - SIGXFSZ comes with EFBIG, an error that is reported like any other.
//!
//! Rust's runtime ignores SIGPIPE: a closed pipe is an EPIPE error, after which we can clean up. Signals of a
//! broken program (SIGSEGV, SIGABRT and the like) keep their action, and so do SIGURG
//! ([`nudge`](super::nudge)), SIGCHLD, and those that stop and continue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};

use crate::base::{Result, ResultExt};

/// Number of termination signals that have arrived.
static STOP_REQUESTS: AtomicU32 = AtomicU32::new(0);

/// Number of requests for progress.
static PROGRESS_REQUESTS: AtomicU32 = AtomicU32::new(0);

/// The signals that end a process unless caught, without the real-time signals.
const TERMINATING: [libc::c_int; 14] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];

/// Every catchable signal that ends a process unless it is caught.
fn terminating_signals() -> impl Iterator<Item = libc::c_int> {
    TERMINATING.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

/// Wakes [`wait`]; never closed once created, so the handler's descriptor stays valid.
static EVENT: OnceLock<EventFd> = OnceLock::new();

/// Counts and wakes: an atomic add and write(2), both async-signal-safe; restores errno for the interrupted
/// code.
extern "C" fn on_signal(signal: libc::c_int) {
    match signal {
        libc::SIGXFSZ => return,
        libc::SIGUSR1 => PROGRESS_REQUESTS.fetch_add(1, Ordering::SeqCst),
        _ => STOP_REQUESTS.fetch_add(1, Ordering::SeqCst),
    };
    if let Some(event) = EVENT.get() {
        let one = 1u64.to_ne_bytes();
        // SAFETY: __errno_location returns this thread's errno, valid for the thread's life. write
        // gets eight readable bytes and a descriptor that is open for the process's life; a full
        // counter makes it fail with EAGAIN (the descriptor is non-blocking), which loses nothing.
        unsafe {
            let errno = libc::__errno_location();
            let saved = *errno;
            libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len());
            *errno = saved;
        }
    }
}

/// From now on termination signals are counted instead of ending the process.
///
/// System calls are not restarted: a blocking read returns EINTR, and its caller can check
/// [`stop_requested`].
///
/// # Errors
/// The kernel's, from eventfd or sigaction.
pub fn catch_termination() -> Result<()> {
    if EVENT.get().is_none() {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .io_context(|| "creating an event descriptor for signals".to_owned())?;
        // If another thread has set it meanwhile, that one serves as well.
        let _ = EVENT.set(event);
    }
    usr1_set().thread_block().io_context(|| "blocking SIGUSR1".to_owned())?;
    let catch: extern "C" fn(libc::c_int) = on_signal;
    for signal in terminating_signals() {
        // A signal that the parent had ignored (nohup) stays ignored.
        let was_ignored = set_handler(signal, catch as libc::sighandler_t)
            .io_context(|| format!("catching signal {signal}"))?
            == libc::SIG_IGN;
        if was_ignored {
            set_handler(signal, libc::SIG_IGN).io_context(|| format!("ignoring signal {signal} again"))?;
        }
    }
    Ok(())
}

/// From now on no catchable signal ends or stops this process.
pub fn ignore_all() {
    let stopping = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    for signal in terminating_signals().chain(stopping) {
        let _ = set_handler(signal, libc::SIG_IGN);
    }
}

/// The terminating signals as a set.
fn terminating_set() -> libc::sigset_t {
    // SAFETY: sigemptyset makes a valid empty set of the local, and sigaddset adds to it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in terminating_signals() {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Blocks the terminating signals in this thread; [`is_stop_pending`] needs that.
pub fn block_in_this_thread() {
    let set = terminating_set();
    // SAFETY: `set` is a live and valid set; the old mask is not requested. It fails for an invalid `how`
    // only.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// True if a request to stop (not SIGUSR1 or SIGXFSZ) has arrived but has not been handled: the kernel
/// directed it to a thread that is inside a call that does not return, and directs it to no other. Must be
/// called by a thread that blocks these signals.
#[must_use]
pub fn is_stop_pending() -> bool {
    // SAFETY: sigpending writes a set to the live local; sigismember reads it.
    unsafe {
        let mut pending: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut pending) == 0
            && terminating_signals()
                .filter(|signal| ![libc::SIGUSR1, libc::SIGXFSZ].contains(signal))
                .any(|signal| libc::sigismember(&raw const pending, signal) == 1)
    }
}

/// Sets the action of `signal`, and returns the old one.
fn set_handler(signal: libc::c_int, handler: libc::sighandler_t) -> io::Result<libc::sighandler_t> {
    // SAFETY: `handler` is SIG_IGN or `on_signal`, an extern "C" function that does only async-signal-safe
    // work on statics; both structures are zeroed (valid for C's sigaction: no flags, an empty mask, no
    // restorer), live through the call, and are distinct.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        let mut old: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = handler;
        if libc::sigaction(signal, &raw const new, &raw mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(old.sa_sigaction)
    }
}

fn usr1_set() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set
}

/// Makes the calling thread the one that receives SIGUSR1.
///
/// # Errors
/// The kernel's.
pub fn unblock_progress_signal() -> io::Result<()> {
    usr1_set().thread_unblock().map_err(io::Error::from)
}

/// Runs `work` with SIGUSR1 unblocked, as a child process that it starts would inherit the block.
pub fn with_usr1_unblocked<T>(work: impl FnOnce() -> T) -> T {
    let was_blocked = SigSet::thread_get_mask().is_ok_and(|mask| mask.contains(Signal::SIGUSR1));
    let _ = usr1_set().thread_unblock();
    let done = work();
    if was_blocked {
        let _ = usr1_set().thread_block();
    }
    done
}

/// True once a termination signal has arrived.
#[must_use]
pub fn stop_requested() -> bool {
    STOP_REQUESTS.load(Ordering::SeqCst) > 0
}

/// The signals that have arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SignalCounts {
    /// Requests to stop.
    pub stops: u32,
    /// Requests for progress.
    pub progress_requests: u32,
}

/// Blocks until the counts differ from `seen`, and returns them. None if [`catch_termination`] was not
/// called, or the kernel refuses to wait.
#[must_use]
pub fn wait(seen: SignalCounts) -> Option<SignalCounts> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;

    let event = EVENT.get()?;
    loop {
        let arrived = SignalCounts {
            stops: STOP_REQUESTS.load(Ordering::SeqCst),
            progress_requests: PROGRESS_REQUESTS.load(Ordering::SeqCst),
        };
        if arrived != seen {
            return Some(arrived);
        }
        match poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) => {
                // EAGAIN: another thread has read it; the counts above decide.
                let _ = event.read();
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_counted_and_wakes_the_waiter() {
        catch_termination().unwrap();
        let waiter = std::thread::spawn(|| wait(SignalCounts::default()));
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(waiter.join().unwrap().unwrap().stops >= 1);
        assert!(stop_requested());
    }

    #[test]
    fn terminating_signals_are_those_of_signal_7() {
        let all: Vec<_> = terminating_signals().collect();
        for other in [libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV, libc::SIGCHLD, libc::SIGURG, libc::SIGPIPE]
        {
            assert!(!all.contains(&other), "{other}");
        }
        assert!(all.contains(&libc::SIGQUIT) && all.contains(&libc::SIGRTMAX()));
    }
}
