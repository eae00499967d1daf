//! Who may do what: the one place that asks for root.

use nix::unistd::geteuid;

use crate::base::{Error, Result};

/// True where the effective user is root.
#[must_use]
pub fn is_root() -> bool {
    geteuid().is_root()
}

/// Refuses unless the effective user is root; `what` names what needs it: "copying a device".
///
/// # Errors
/// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused), with what to do instead.
pub fn require_root(what: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    Err(Error::refused(format!("{what} needs root"))
        .state("nothing was changed")
        .next("run it again with sudo, or from a root shell"))
}
