//! Termination signals: has someone asked us to stop?
//!
//! SIGINT, SIGTERM and SIGHUP only count; nothing is undone in a handler. The working code asks
//! [`stop_requested`] between its steps and unwinds by itself, so a second signal cannot make
//! things worse. A signal that was ignored when we started (nohup) stays ignored. SIGPIPE is already
//! ignored by Rust's runtime: a closed pipe is an EPIPE error that we can clean up after.

use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::base::{Result, ResultExt};

/// How many termination signals have arrived.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Wakes [`wait`]; never closed once made, so the handler's descriptor stays valid.
static EVENT: OnceLock<EventFd> = OnceLock::new();

/// Counts and wakes: an atomic add and write(2), both async-signal-safe; errno is kept for the code
/// that was interrupted.
extern "C" fn on_signal(_signal: libc::c_int) {
    COUNT.fetch_add(1, Ordering::SeqCst);
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
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler is an extern "C" function that does only async-signal-safe work, and
        // everything it touches is static.
        let old = unsafe { sigaction(signal, &action) }.io_context(|| format!("catching {signal}"))?;
        if matches!(old.handler(), SigHandler::SigIgn) {
            // SAFETY: puts back the disposition we were started with.
            unsafe { sigaction(signal, &old) }.io_context(|| format!("ignoring {signal} again"))?;
        }
    }
    Ok(())
}

/// True once a termination signal has arrived.
#[must_use]
pub fn stop_requested() -> bool {
    COUNT.load(Ordering::SeqCst) > 0
}

/// Blocks until more signals than `seen` have arrived, and returns how many there are; None when
/// [`catch_termination`] was not called or the kernel refuses to wait.
#[must_use]
pub fn wait(seen: u32) -> Option<u32> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;

    let event = EVENT.get()?;
    loop {
        let count = COUNT.load(Ordering::SeqCst);
        if count > seen {
            return Some(count);
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
        let waiter = std::thread::spawn(|| wait(0));
        nix::sys::signal::raise(Signal::SIGTERM).unwrap();
        assert!(waiter.join().unwrap().unwrap() >= 1);
        assert!(stop_requested());
    }
}
