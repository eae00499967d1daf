//! Tells udev how to treat our devices, and waits for udev.
//!
//! The kernel passes the low 32 bits of a call's `event_nr` on to udev as `DM_COOKIE`. The high half holds
//! flags that device-mapper's own rules obey. The low half, below a fixed magic, is the key of a System V
//! semaphore that the rules decrement when they have finished (libdevmapper's protocol,
//! `libdm/libdevmapper.h`). Invariants: a wait has a time limit, a semaphore is always destroyed, and without
//! a running udevd no semaphore is created and nothing waits.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::sys::dm_ioctl::UeventSent;
use crate::sys::semaphore::CookieSemaphore;

/// Upper half of every cookie's semaphore key (`DM_COOKIE_MAGIC`).
const COOKIE_MAGIC: u32 = 0x0D4D;
const FLAGS_SHIFT: u32 = 16;

const DISABLE_SUBSYSTEM_RULES: u32 = 0x0002;
const DISABLE_DISK_RULES: u32 = 0x0004;
const DISABLE_OTHER_RULES: u32 = 0x0008;
const PRIMARY_SOURCE: u32 = 0x0040;

/// Longest wait for udev's rules: a busy udevd takes a second or two at boot, and a hung one must not hang
/// us.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Attempts to find a free semaphore key.
const KEY_ATTEMPTS: usize = 8;

/// udevd's control socket: it exists while udevd runs.
const CONTROL_SOCKET: &str = "/run/udev/control";

/// How a call that causes a uevent deals with udev.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Udev {
    /// No cookie and no wait: used whenever anything is suspended, and for devices that are not ours (udev
    /// then keeps its information about them).
    None,
    /// One of our devices that other tools should ignore, as it shows the same filesystem as the origin. Not
    /// scanned by blkid, LVM or any rules except device-mapper's own.
    Internal,
    /// One of our devices for general use: an attached volume.
    Public,
}

impl Udev {
    fn flags(self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Internal => {
                Some(DISABLE_SUBSYSTEM_RULES | DISABLE_DISK_RULES | DISABLE_OTHER_RULES | PRIMARY_SOURCE)
            }
            Self::Public => Some(PRIMARY_SOURCE),
        }
    }
}

/// True while udevd runs.
#[must_use]
pub fn is_running() -> bool {
    Path::new(CONTROL_SOCKET).exists()
}

/// Makes `call` with the right `event_nr`, then waits, with a time limit, until udev has processed the
/// uevent. A timeout is only logged, as the device itself is ready.
pub(super) fn with_cookie(
    udev: Udev,
    device: impl fmt::Display,
    call: impl FnOnce(u32) -> io::Result<UeventSent>,
) -> io::Result<()> {
    let Some(flags) = udev.flags().filter(|_| is_running()) else {
        return call(0).map(|_| ());
    };
    let (base, semaphore) = new_semaphore()?;
    let UeventSent(sent) = call((flags << FLAGS_SHIFT) | u32::from(base))?;
    if sent && !wait(&semaphore) {
        tracing::warn!(
            "udev has not finished with {device} after {} s; continuing without it",
            WAIT_MAX.as_secs()
        );
    }
    Ok(())
}

fn wait(semaphore: &CookieSemaphore) -> bool {
    let end = Instant::now() + WAIT_MAX;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match semaphore.wait_zero(left) {
            Ok(done) => return done,
            // A signal: the caller checks for it at the next step.
            Err(error) if error.raw_os_error() == Some(libc::EINTR) && !left.is_zero() => {}
            Err(error) => {
                tracing::warn!("waiting for udev: {error}");
                return true;
            }
        }
    }
}

fn new_semaphore() -> io::Result<(u16, CookieSemaphore)> {
    let mut attempt = 0;
    loop {
        let random = uuid::Uuid::new_v4().into_bytes();
        let base = u16::from_le_bytes([random[0], random[1]]).max(1);
        match CookieSemaphore::create((COOKIE_MAGIC << FLAGS_SHIFT) | u32::from(base), 1) {
            Ok(semaphore) => return Ok((base, semaphore)),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) && attempt < KEY_ATTEMPTS => {
                attempt += 1
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn internal_devices_are_hidden_from_every_rule_but_device_mappers() {
        assert_eq!(Udev::Internal.flags(), Some(0x4e));
        assert_eq!(Udev::Public.flags(), Some(0x40));
        assert_eq!(Udev::None.flags(), None);
    }
}
