//! Privileges: the one place that checks for root.

use nix::unistd::geteuid;

use crate::base::{Error, Result};

/// True if the effective user is root.
#[must_use]
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Refuses unless the effective user is root; `what` is the operation: "copying a device".
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused), with an alternative.
pub fn require_root(what: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    Err(Error::refused(format!("{what} needs root"))
        .state("nothing was changed")
        .next("run it again with sudo, or from a root shell"))
}
