//! Signals: has someone asked us to stop, or how far we are?
//!
//! Every signal that would end the process and can be caught only counts; nothing is undone in a handler. The working
//! code asks [`stop_requested`] between its steps and unwinds by itself, so a second signal cannot make
//! things worse. A signal that was ignored when we started (nohup) stays ignored. Two are no request to stop:
//! - SIGUSR1 asks for progress, as dd's does. Only the thread that waits for signals takes it ([`take_questions`]): it
//!   must not cut short what another one waits for;
//! - SIGXFSZ comes with EFBIG, an error that is reported as any other.
//!
//! SIGPIPE is ignored by Rust's runtime: a closed pipe is an EPIPE error that we can clean up after. What tells of a
//! broken program (SIGSEGV, SIGABRT and the like) stays as it is, and so do SIGURG ([`nudge`](super::nudge)), SIGCHLD,
//! and those that stop and continue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};

use crate::base::{Result, ResultExt};

/// How many termination signals have arrived.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// How often progress was asked for.
static QUESTIONS: AtomicU32 = AtomicU32::new(0);

/// Those that end a process unless they are caught, beside the real-time ones.
const ENDING: [libc::c_int; 14] = [
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

/// Every signal that ends a process unless it is caught, and can be.
fn ending() -> impl Iterator<Item = libc::c_int> {
    ENDING.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

/// Wakes [`wait`]; never closed once made, so the handler's descriptor stays valid.
static EVENT: OnceLock<EventFd> = OnceLock::new();

/// Counts and wakes: an atomic add and write(2), both async-signal-safe; errno is kept for the code
/// that was interrupted.
extern "C" fn on_signal(signal: libc::c_int) {
    match signal {
        libc::SIGXFSZ => return,
        libc::SIGUSR1 => QUESTIONS.fetch_add(1, Ordering::SeqCst),
        _ => COUNT.fetch_add(1, Ordering::SeqCst),
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

/// From now on termination signals are counted instead of killing the process.
///
/// System calls are not restarted: a blocking read answers EINTR and its caller may look at
/// [`stop_requested`].
///
/// # Errors
/// The kernel's refusal of eventfd or sigaction.
pub fn catch_termination() -> Result<()> {
    if EVENT.get().is_none() {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .io_context(|| "making an event descriptor for signals".to_owned())?;
        // Set by another thread meanwhile: that one serves as well.
        let _ = EVENT.set(event);
    }
    only_usr1().thread_block().io_context(|| "blocking SIGUSR1".to_owned())?;
    let catch: extern "C" fn(libc::c_int) = on_signal;
    for signal in ending() {
        // What a shell set for us (nohup) holds.
        let was_ignored = set_handler(signal, catch as libc::sighandler_t)
            .io_context(|| format!("catching signal {signal}"))?
            == libc::SIG_IGN;
        if was_ignored {
            set_handler(signal, libc::SIG_IGN).io_context(|| format!("ignoring signal {signal} again"))?;
        }
    }
    Ok(())
}

/// From now on nothing that can be caught ends or stops this process.
pub fn ignore_all() {
    let stopping = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
    for signal in ending().chain(stopping) {
        let _ = set_handler(signal, libc::SIG_IGN);
    }
}

/// The signals that end, as the kernel takes them.
fn ending_set() -> libc::sigset_t {
    // SAFETY: sigemptyset makes a valid empty set of the local, and sigaddset adds to it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in ending() {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// From now on this thread is given none of the signals that end; [`is_untaken`] needs that.
pub fn refuse_in_this_thread() {
    let set = ending_set();
    // SAFETY: `set` is a live and valid set; the old mask is not asked for. It fails for an invalid `how` only.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// True where a signal that asks us to stop (not one that asks for progress, or tells of a full file) has arrived and nobody has taken it: the kernel gave it to a thread that is inside a
/// call which does not return, and gives it to no other. To be asked by a thread that refuses them.
#[must_use]
pub fn is_untaken() -> bool {
    // SAFETY: sigpending writes a set to the live local; sigismember reads it.
    unsafe {
        let mut pending: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut pending) == 0
            && ending()
                .filter(|signal| ![libc::SIGUSR1, libc::SIGXFSZ].contains(signal))
                .any(|signal| libc::sigismember(&raw const pending, signal) == 1)
    }
}

/// Sets what `signal` does, and answers what it did.
fn set_handler(signal: libc::c_int, handler: libc::sighandler_t) -> io::Result<libc::sighandler_t> {
    // SAFETY: `handler` is SIG_IGN or `on_signal`, an extern "C" function that does only async-signal-safe work on
    // statics; both structures are zeroed (valid for C's sigaction: no flags, an empty mask, no restorer), live through
    // the call, and are another.
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

fn only_usr1() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGUSR1);
    set
}

/// The calling thread is the one that takes SIGUSR1.
///
/// # Errors
/// The kernel's.
pub fn take_questions() -> io::Result<()> {
    only_usr1().thread_unblock().map_err(io::Error::from)
}

/// Does `work` with SIGUSR1 let through, which a child process that it starts would else have blocked for good.
pub fn for_children<T>(work: impl FnOnce() -> T) -> T {
    let was_blocked = SigSet::thread_get_mask().is_ok_and(|mask| mask.contains(Signal::SIGUSR1));
    let _ = only_usr1().thread_unblock();
    let done = work();
    if was_blocked {
        let _ = only_usr1().thread_block();
    }
    done
}

/// True once a termination signal has arrived.
#[must_use]
pub fn stop_requested() -> bool {
    COUNT.load(Ordering::SeqCst) > 0
}

/// What has arrived: requests to stop, questions for progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Requests to stop.
    pub stops: u32,
    /// Questions for progress.
    pub questions: u32,
}

/// Blocks until more than `seen` has arrived, and returns how much has; None when
/// [`catch_termination`] was not called or the kernel refuses to wait.
#[must_use]
pub fn wait(seen: Arrived) -> Option<Arrived> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;

    let event = EVENT.get()?;
    loop {
        let arrived =
            Arrived { stops: COUNT.load(Ordering::SeqCst), questions: QUESTIONS.load(Ordering::SeqCst) };
        if arrived != seen {
            return Some(arrived);
        }
        match poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
            Ok(_) => {
                // EAGAIN: somebody else drained it; the count above decides.
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
        let waiter = std::thread::spawn(|| wait(Arrived::default()));
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(waiter.join().unwrap().unwrap().stops >= 1);
        assert!(stop_requested());
    }

    #[test]
    fn what_ends_a_process_is_what_signal_7_says() {
        let all: Vec<_> = ending().collect();
        for other in [libc::SIGKILL, libc::SIGSTOP, libc::SIGSEGV, libc::SIGCHLD, libc::SIGURG, libc::SIGPIPE]
        {
            assert!(!all.contains(&other), "{other}");
        }
        assert!(all.contains(&libc::SIGQUIT) && all.contains(&libc::SIGRTMAX()));
    }
}
