//! Was standard output open when the process began? Rust's runtime opens /dev/null in the place of a closed
//! one before main(), so that no file of ours is taken for it; afterwards nobody can tell the two apart, and
//! a copy to a closed standard output would seem to succeed. So the question is asked before, by a function
//! in `.init_array`, which the loader runs ahead of the runtime.

use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

// SAFETY: the section is a list of functions that the loader calls once each, with arguments that an
// extern "C" function may ignore; this static is one such function's address and nothing else.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Runs before main() and before Rust's runtime: only system calls and atomics.
extern "C" fn look() {
    // SAFETY: F_GETFD takes no argument and touches no memory; a closed descriptor is answered with EBADF.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    STDOUT_WAS_CLOSED.store(flags == -1, Ordering::Relaxed);
}

/// True where the process was started with standard output closed (`>&-`): what is written to it is lost.
#[must_use]
pub fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_standard_output_is_open() {
        // The closed one is seen by the command's own tests, which start it so.
        assert!(!stdout_was_closed());
    }
}
