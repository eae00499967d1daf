//! Checks whether standard output was open when the process started. Rust's runtime replaces a closed one by
//! /dev/null before main(), so that no file of ours gets its number. After that the two cannot be distinguished,
//! and a copy to a closed standard output would seem to succeed. So it is checked earlier, by a function in
//! `.init_array`, which the loader runs before the runtime.

use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

// SAFETY: the section is a list of functions that the loader calls once each, with arguments that an
// extern "C" function may ignore; this static is one such function's address and nothing else.
#[used]
#[unsafe(link_section = ".init_array")]
static CHECK_STDOUT: extern "C" fn() = check_stdout;

/// Runs before main() and before Rust's runtime: only system calls and atomics.
extern "C" fn check_stdout() {
    // SAFETY: F_GETFD takes no argument and touches no memory; a closed descriptor returns EBADF.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    STDOUT_WAS_CLOSED.store(flags == -1, Ordering::Relaxed);
}

/// True if the process was started with standard output closed (`>&-`): whatever is written to it is lost.
#[must_use]
pub fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_standard_output_is_open() {
        // The command's own tests start it with a closed one.
        assert!(!stdout_was_closed());
    }
}
