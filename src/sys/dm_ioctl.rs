//! Device-mapper calls issued without anybody's udev wait: suspend, resume, clear, remove, rename.
//!
//! The devicemapper crate waits for udev without a time limit inside resume, rename and remove. In
//! the critical section that would hang the origin, so these five are our own: one ioctl each, the
//! cookie (or none) chosen by the caller, no retries. Nothing here allocates.
//!
//! Structure and numbers: Linux `include/uapi/linux/dm-ioctl.h`, interface version 4.0.0.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Longest device name, in bytes (the kernel's field is 128 with its final zero).
pub const NAME_BYTES_MAX: usize = 127;
/// Longest UUID, in bytes (the kernel's field is 129 with its final zero).
pub const UUID_BYTES_MAX: usize = 128;

const FLAG_SUSPEND: u32 = 1 << 1;
const FLAG_SKIP_LOCKFS: u32 = 1 << 10;
const FLAG_NOFLUSH: u32 = 1 << 11;
const FLAG_UEVENT_GENERATED: u32 = 1 << 13;

/// `struct dm_ioctl`, with room behind it for a new name (rename takes it as payload).
#[repr(C)]
struct Request {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
    payload: [u8; 128],
}

const HEADER_BYTES: usize = 312;
const _: () = assert!(std::mem::size_of::<Request>() == HEADER_BYTES + 128);
const _: () = assert!(std::mem::offset_of!(Request, payload) == HEADER_BYTES);

// The ioctl's size field is that of the header alone, whatever follows it.
const fn code(number: u8) -> libc::c_ulong {
    nix::request_code_readwrite!(0xfd, number, HEADER_BYTES)
}
const DEV_REMOVE: libc::c_ulong = code(4);
const DEV_RENAME: libc::c_ulong = code(5);
const DEV_SUSPEND: libc::c_ulong = code(6);
const TABLE_CLEAR: libc::c_ulong = code(10);

/// What a suspension does before it holds I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SuspendFlags {
    /// Wait until writes already queued are done (otherwise they are held and sent on resume).
    pub flush: bool,
    /// Freeze the filesystem on the device, by device.
    pub lock_filesystem: bool,
}

/// True where the kernel sent a uevent that carries the call's cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct UeventSent(pub bool);

fn request(name: &str, flags: u32, event_nr: u32) -> io::Result<Request> {
    let mut request = Request {
        version: [4, 0, 0],
        data_size: u32::try_from(std::mem::size_of::<Request>()).expect("440 fits u32"),
        data_start: u32::try_from(HEADER_BYTES).expect("312 fits u32"),
        target_count: 0,
        open_count: 0,
        flags,
        event_nr,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
        payload: [0; 128],
    };
    put_text(&mut request.name, name)?;
    Ok(request)
}

fn put_text(field: &mut [u8; 128], text: &str) -> io::Result<()> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX || text.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    field[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

fn call(control: &File, number: libc::c_ulong, request: &mut Request) -> io::Result<UeventSent> {
    // SAFETY: the descriptor is open for as long as `control` is borrowed; `request` is a live,
    // exclusively borrowed `repr(C)` structure whose layout begins with `struct dm_ioctl`, and its
    // `data_size` is its true size, which bounds what the kernel reads and writes.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), number, std::ptr::from_mut(request)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UeventSent(request.flags & FLAG_UEVENT_GENERATED != 0))
}

/// Holds all I/O of device `name` until it is resumed. `control` is /dev/mapper/control.
///
/// # Errors
/// The kernel's errno: ENXIO for no such device, EINVAL where it is suspended already.
pub fn suspend(control: &File, name: &str, how: SuspendFlags) -> io::Result<()> {
    let mut flags = FLAG_SUSPEND;
    if !how.flush {
        flags |= FLAG_NOFLUSH;
    }
    if !how.lock_filesystem {
        flags |= FLAG_SKIP_LOCKFS;
    }
    call(control, DEV_SUSPEND, &mut request(name, flags, 0)?).map(|_| ())
}

/// Activates the inactive table of `name`, if one is loaded, and lets I/O go on. A device that is
/// not suspended and has no inactive table stays as it is. `event_nr` is the udev cookie with its
/// flags, or 0.
///
/// # Errors
/// The kernel's errno.
pub fn resume(control: &File, name: &str, event_nr: u32) -> io::Result<UeventSent> {
    // Taking over a new table flushes nothing and freezes nothing: the caller has suspended before,
    // or the device is new.
    call(control, DEV_SUSPEND, &mut request(name, FLAG_SKIP_LOCKFS | FLAG_NOFLUSH, event_nr)?)
}

/// Drops the inactive table of `name`, if one is loaded.
///
/// # Errors
/// The kernel's errno.
pub fn clear(control: &File, name: &str) -> io::Result<()> {
    call(control, TABLE_CLEAR, &mut request(name, 0, 0)?).map(|_| ())
}

/// Removes device `name`: one attempt.
///
/// # Errors
/// The kernel's errno: EBUSY while somebody has it open or maps to it.
pub fn remove(control: &File, name: &str, event_nr: u32) -> io::Result<UeventSent> {
    call(control, DEV_REMOVE, &mut request(name, 0, event_nr)?)
}

/// Renames device `name` to `to`.
///
/// # Errors
/// The kernel's errno: EBUSY where the new name is taken.
pub fn rename(control: &File, name: &str, to: &str, event_nr: u32) -> io::Result<UeventSent> {
    let mut request = request(name, 0, event_nr)?;
    put_text(&mut request.payload, to)?;
    call(control, DEV_RENAME, &mut request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_header() {
        // _IOWR(0xfd, 6, struct dm_ioctl), as strace prints it.
        assert_eq!(DEV_SUSPEND, 0xc138_fd06);
        assert_eq!(DEV_REMOVE, 0xc138_fd04);
    }

    #[test]
    fn names_are_bounded() {
        assert!(request("", 0, 0).is_err());
        assert!(request("a\0b", 0, 0).is_err());
        assert!(request(&"x".repeat(128), 0, 0).is_err());
        assert!(request(&"x".repeat(127), 0, 0).is_ok());
    }
}
