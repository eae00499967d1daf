//! Keeps a command interruptible while a system call does not return.
//!
//! Opening, examining or reading a file on a dead file server or a suspended disk may block forever, and no signal ends
//! that wait. So a separate thread makes such a call. On a signal the command abandons the thread, releases what it
//! holds (locks, claims) and ends. The kernel keeps the process, which holds nothing, until the call returns.
//!
//! If the process is killed instead, the kernel also keeps its locks until the call returns. So a child process first
//! checks whether the path answers ([`does_answer`]); if it does not, the call is not made.

use std::cell::Cell;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::base::{Error, ErrorKind, Result, ResultExt as _};
use crate::sys::read_probe::Reads;
use crate::sys::{child_probe, signal};

/// Time between two checks for a signal.
const POLL: Duration = Duration::from_millis(50);

/// Makes `call` and waits for its result or for an error of `interrupt`. A result that arrives after such an error is
/// passed to `unwanted`.
///
/// # Errors
/// Those of `call` and `interrupt`; I/O errors if no thread can be started.
pub fn unless_interrupted<T: Send + 'static>(
    interrupt: &dyn Fn() -> Result<()>,
    call: impl FnOnce() -> Result<T> + Send + 'static,
    unwanted: impl FnOnce(T) + Send + 'static,
) -> Result<T> {
    let (answer, answered) = mpsc::sync_channel(0);
    thread::Builder::new()
        .name("may-hang".to_owned())
        .spawn(move || {
            signal::block_in_this_thread();
            if let Err(mpsc::SendError(Ok(late))) = answer.send(call()) {
                unwanted(late);
            }
        })
        .io_context(|| "starting a thread".to_owned())?;
    loop {
        match answered.recv_timeout(POLL) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Timeout) => interrupt()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::new(ErrorKind::External, "a thread ended without an answer"));
            }
        }
    }
}

/// True if reads at `offsets` of the file or device at `path` return within [`child_probe::TIMEOUT_FOR_NAMED`]; see
/// [`Reads::new`].
///
/// # Errors
/// Those of `interrupt`, which end the wait at once.
pub fn does_answer(path: &Path, offsets: Vec<u64>, interrupt: &dyn Fn() -> Result<()>) -> Result<bool> {
    let reads = Reads::new(path, offsets).io_context(|| format!("reading {}", path.display()))?;
    let stopped = Cell::new(None);
    let is_answered = reads.are_answered(&|| match interrupt() {
        Ok(()) => true,
        Err(error) => {
            stopped.set(Some(error));
            false
        }
    });
    stopped.take().map_or(Ok(is_answered), Err)
}

/// The message for a path that does not answer.
pub fn no_answer(path: &Path) -> String {
    format!("{} has not answered for {} s", path.display(), child_probe::TIMEOUT_FOR_NAMED.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_waited_for_and_a_signal_ends_the_wait() {
        let quiet = || Ok(());
        let slow = || {
            thread::sleep(Duration::from_millis(200));
            Ok(7)
        };
        assert_eq!(unless_interrupted(&quiet, slow, drop).unwrap(), 7);
        let failing = || Err::<(), _>(Error::refused("no"));
        assert_eq!(unless_interrupted(&quiet, failing, drop).unwrap_err().kind(), ErrorKind::Refused);
        let asked = Cell::new(0);
        let interrupt = || {
            asked.set(asked.get() + 1);
            if asked.get() < 3 { Ok(()) } else { Err(Error::new(ErrorKind::Interrupted, "a signal")) }
        };
        let (go_on, may_go_on) = mpsc::channel::<()>();
        let (late, was_late) = mpsc::channel();
        let hung = move || {
            let _ = may_go_on.recv();
            Ok(9)
        };
        let unwanted = move |value| late.send(value).unwrap();
        assert_eq!(
            unless_interrupted(&interrupt, hung, unwanted).unwrap_err().kind(),
            ErrorKind::Interrupted
        );
        drop(go_on);
        assert_eq!(was_late.recv_timeout(Duration::from_secs(60)), Ok(9));
    }
}
