//! Writes back dirty data of an origin, before anything is held, in a child process.
//!
//! syncfs(2), and fsync(2) of a device, cannot be interrupted, and never return on a hung disk. A thread that
//! waits in them keeps its whole process from exiting. So a child waits, with the open filesystem or device as
//! its standard input and nothing else open. If the command has to stop, it kills the child and does not wait
//! for it. Write errors that the filesystem has recorded reach the child, as it shares the open file.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use crate::base::{Error, Result, ResultExt as _};
use crate::sys::freeze;

/// The hidden first argument that makes the program this child.
pub const ARGUMENT: &str = "__write-back";

/// Interval at which the child is checked: at first, and at most.
const POLL: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(20));

/// The child: writes back its standard input. The exit status is the errno, 0 for success.
#[must_use]
pub fn main() -> ExitCode {
    let input = std::io::stdin().as_fd().try_clone_to_owned().map(File::from);
    match input.and_then(|file| freeze::write_back(&file)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            ExitCode::from(error.raw_os_error().and_then(|errno| u8::try_from(errno).ok()).unwrap_or(255))
        }
    }
}

/// Writes back the filesystem of a directory, or the cache of a block device; `what` names it.
///
/// # Errors
/// That of `interrupt`, without waiting; the kernel's errno.
pub fn write_back(file: &File, what: &str, interrupt: &dyn Fn() -> Result<()>) -> Result<()> {
    let context = || format!("writing back {what}");
    let mut child = spawn(file).io_context(context)?;
    let mut pause = POLL.0;
    loop {
        if let Some(status) = child.try_wait().io_context(context)? {
            return match status.code() {
                Some(0) => Ok(()),
                Some(errno) => Err(Error::io(context(), std::io::Error::from_raw_os_error(errno))),
                None => Err(Error::new(crate::base::ErrorKind::External, format!("{}: {status}", context()))),
            };
        }
        if let Err(error) = interrupt() {
            // The signal takes effect once the kernel returns from the call.
            let _ = child.kill();
            return Err(error);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(POLL.1);
    }
}

fn spawn(file: &File) -> std::io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .stdin(Stdio::from(file.try_clone()?))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        // A Ctrl-C is for this process, which then ends the child itself.
        .process_group(0)
        .spawn()
}
