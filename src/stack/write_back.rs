//! Writing back what is dirty on an origin, before anybody is held, by a process of its own.
//!
//! syncfs(2) and fsync(2) of a device cannot be interrupted, and on a slow or hung disk take for ever. A thread that waits
//! in them keeps its whole process from ending. So a child waits, with nothing but the open filesystem or device as its
//! standard input; where the command is to stop, it leaves the child behind. Errors that a filesystem has
//! noted reach the child, as it shares the open file.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use crate::base::{Error, Result, ResultExt as _};
use crate::sys::freeze;

/// The hidden first argument of the child.
pub const ARGUMENT: &str = "__write-back";

/// Between two looks at the child: first, and at most.
const POLL: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(20));

/// The child: what its standard input is, is written back. The exit status is the errno, 0 for none.
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

/// Writes back the filesystem of a directory, or a block device's own cache; `what` names it.
///
/// # Errors
/// What `interrupt` says, without a wait; the kernel's errno.
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
            // It dies of it once the kernel lets it go.
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
        // A Ctrl-C is for us, who then say so.
        .process_group(0)
        .spawn()
}
