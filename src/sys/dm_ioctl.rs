//! Device-mapper's control device: one ioctl per function, the udev cookie chosen by the caller, no retries.
//!
//! Why not the devicemapper crate: version 0.34 waits for udev without a time limit, which in the critical
//! section would hang the origin. It also identifies devices only by name and UUID. The calls that are made
//! while something is suspended ([`suspend`], [`resume`], [`clear`]) allocate nothing.
//!
//! Structure and numbers: Linux `include/uapi/linux/dm-ioctl.h`, interface version 4.0.0.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::base::DeviceNumber;

/// Longest device name, in bytes (the kernel's field is 128 bytes with the final zero).
pub const NAME_BYTES_MAX: usize = 127;
/// Longest reply: bounds the buffer, which grows until the kernel's reply fits.
pub const REPLY_BYTES_MAX: usize = 64 << 20;
/// First size of that buffer.
const REPLY_BYTES_FIRST: usize = 16 << 10;

/// The device is read-only.
pub const FLAG_READONLY: u32 = 1;
/// In: suspend instead of resume. Out: the device is suspended.
pub const FLAG_SUSPEND: u32 = 1 << 1;
/// Return tables instead of states.
pub const FLAG_STATUS_TABLE: u32 = 1 << 4;
/// The device has an active table.
pub const FLAG_ACTIVE_PRESENT: u32 = 1 << 5;
/// The device has an inactive table.
pub const FLAG_INACTIVE_PRESENT: u32 = 1 << 6;
const FLAG_BUFFER_FULL: u32 = 1 << 8;
const FLAG_SKIP_LOCKFS: u32 = 1 << 10;
/// Do not flush: I/O before a suspension, metadata before a status.
pub const FLAG_NOFLUSH: u32 = 1 << 11;
/// Return the inactive table.
pub const FLAG_QUERY_INACTIVE_TABLE: u32 = 1 << 12;
const FLAG_UEVENT_GENERATED: u32 = 1 << 13;

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
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
}

const HEADER_BYTES: usize = 312;
const _: () = assert!(std::mem::size_of::<Header>() == HEADER_BYTES);

const fn code(number: u8) -> libc::c_ulong {
    // The size in the code is that of the header alone, whatever follows it.
    nix::request_code_readwrite!(0xfd, number, HEADER_BYTES)
}
const DEV_REMOVE: libc::c_ulong = code(4);
const DEV_SUSPEND: libc::c_ulong = code(6);
const TABLE_CLEAR: libc::c_ulong = code(10);

/// A call whose reply may be long. The number is the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the kernel's names
pub enum Call {
    Version = 0,
    ListDevices = 2,
    DevCreate = 3,
    DevStatus = 7,
    TableLoad = 9,
    TableStatus = 12,
    ArmPoll = 16,
    GetTargetVersion = 17,
}

/// Identifies a device, by any of these (`__find_device_hash_cell` in Linux `drivers/md/dm-ioctl.c`). A name
/// can be given to another device at any time; a number stays as long as the device exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key<'a> {
    /// The device that has this name now.
    Name(&'a str),
    /// The device with this number.
    Number(DeviceNumber),
    /// The device with this UUID.
    Uuid(&'a str),
}

impl<'a> From<&'a str> for Key<'a> {
    fn from(name: &'a str) -> Self {
        Self::Name(name)
    }
}

impl<'a> From<&'a String> for Key<'a> {
    fn from(name: &'a String) -> Self {
        Self::Name(name)
    }
}

impl From<DeviceNumber> for Key<'_> {
    fn from(number: DeviceNumber) -> Self {
        Self::Number(number)
    }
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Number(number) => write!(f, "device {number}"),
            Self::Uuid(uuid) => write!(f, "the device with UUID {uuid}"),
        }
    }
}

/// The input of a [`Call`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CallArguments<'a> {
    /// The device, if the call is about one.
    pub device: Option<Key<'a>>,
    /// The UUID of a device to be created.
    pub uuid: Option<&'a str>,
    /// `FLAG_` values.
    pub flags: u32,
    /// Number of targets in `payload`.
    pub target_count: u32,
    /// The data after the header.
    pub payload: &'a [u8],
}

/// The output of a [`Call`].
#[derive(Clone, Debug)]
pub struct Reply {
    /// The version of the interface.
    pub version: [u32; 3],
    /// `FLAG_` values.
    pub flags: u32,
    /// How often the device is open.
    pub open_count: i32,
    /// The device's number, encoded as in `dev_t`.
    pub dev: u64,
    /// Number of targets in `payload`.
    pub target_count: u32,
    /// The device's name.
    pub name: String,
    /// The device's UUID.
    pub uuid: String,
    /// The data after the header.
    pub payload: Vec<u8>,
}

/// What a suspension does before it holds I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SuspendFlags {
    /// Wait until queued writes have completed (otherwise they are held and sent on resume).
    pub flush: bool,
    /// Freeze the filesystem on the device.
    pub lock_filesystem: bool,
}

/// True if the kernel sent a uevent that carries the call's cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct UeventSent(pub bool);

fn header(device: Option<Key<'_>>, flags: u32, event_nr: u32, size: usize) -> io::Result<Header> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let mut header = Header {
        version: [4, 0, 0],
        data_size: u32::try_from(size).map_err(|_| invalid())?,
        data_start: u32::try_from(HEADER_BYTES).map_err(|_| invalid())?,
        target_count: 0,
        open_count: 0,
        flags,
        event_nr,
        padding: 0,
        dev: 0,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    match device {
        None => {}
        Some(Key::Name(name)) => put_text(&mut header.name, name)?,
        Some(Key::Number(number)) => header.dev = number.to_dev(),
        Some(Key::Uuid(uuid)) => put_text(&mut header.uuid, uuid)?,
    }
    Ok(header)
}

fn put_text(field: &mut [u8], text: &str) -> io::Result<()> {
    if text.is_empty() || text.len() >= field.len() || text.contains('\0') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    field[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

fn get_text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn header_call(control: &File, number: libc::c_ulong, request: &mut Header) -> io::Result<UeventSent> {
    // SAFETY: the descriptor is open for as long as `control` is borrowed; `request` is a live,
    // exclusively borrowed `repr(C)` structure that begins with `struct dm_ioctl`, and its
    // `data_size`, set by `header_request`, is its true size, which bounds what the kernel reads and writes.
    let result = unsafe { libc::ioctl(control.as_raw_fd(), number, std::ptr::from_mut(request)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UeventSent(request.flags & FLAG_UEVENT_GENERATED != 0))
}

/// The request for a call that takes only a header.
fn header_request(device: Key<'_>, flags: u32, event_nr: u32) -> io::Result<Header> {
    header(Some(device), flags, event_nr, HEADER_BYTES)
}

/// Holds all I/O of `device` until it is resumed. `control` is /dev/mapper/control.
///
/// # Errors
/// The kernel's errno: ENXIO if there is no such device, EINVAL if it is suspended already, EINTR if a signal
/// arrived during the wait for queued I/O (the device is then resumed).
pub fn suspend(control: &File, device: Key<'_>, how: SuspendFlags) -> io::Result<()> {
    let mut flags = FLAG_SUSPEND;
    if !how.flush {
        flags |= FLAG_NOFLUSH;
    }
    if !how.lock_filesystem {
        flags |= FLAG_SKIP_LOCKFS;
    }
    header_call(control, DEV_SUSPEND, &mut header_request(device, flags, 0)?).map(|_| ())
}

/// Activates the inactive table of `device`, if there is one, and resumes I/O. A device that is not suspended
/// and has no inactive table is unchanged. `event_nr` is the udev cookie with its flags, or 0.
///
/// # Errors
/// The kernel's errno.
pub fn resume(control: &File, device: Key<'_>, event_nr: u32) -> io::Result<UeventSent> {
    // To activate a table, the kernel itself suspends a device that is not suspended: it must not flush or
    // freeze then.
    header_call(control, DEV_SUSPEND, &mut header_request(device, FLAG_SKIP_LOCKFS | FLAG_NOFLUSH, event_nr)?)
}

/// Drops the inactive table of `device`, if there is one.
///
/// # Errors
/// The kernel's errno.
pub fn clear(control: &File, device: Key<'_>) -> io::Result<()> {
    header_call(control, TABLE_CLEAR, &mut header_request(device, 0, 0)?).map(|_| ())
}

/// Removes `device`: one attempt.
///
/// # Errors
/// The kernel's errno: EBUSY while it is open or mapped to.
pub fn remove(control: &File, device: Key<'_>, event_nr: u32) -> io::Result<UeventSent> {
    header_call(control, DEV_REMOVE, &mut header_request(device, 0, event_nr)?)
}

/// Makes a call whose reply may be long; the buffer grows until it fits.
///
/// # Errors
/// The kernel's errno; EMSGSIZE for a reply over [`REPLY_BYTES_MAX`], EPROTO for one with inconsistent sizes.
pub fn call(control: &File, call: Call, arguments: &CallArguments<'_>) -> io::Result<Reply> {
    let number = match call {
        Call::Version => code(0),
        Call::ListDevices => code(2),
        Call::DevCreate => code(3),
        Call::DevStatus => code(7),
        Call::TableLoad => code(9),
        Call::TableStatus => code(12),
        Call::ArmPoll => code(16),
        Call::GetTargetVersion => code(17),
    };
    let mut size = (HEADER_BYTES + arguments.payload.len()).max(REPLY_BYTES_FIRST);
    while size <= REPLY_BYTES_MAX {
        let mut head = header(arguments.device, arguments.flags, 0, size)?;
        head.target_count = arguments.target_count;
        if let Some(uuid) = arguments.uuid {
            put_text(&mut head.uuid, uuid)?;
        }
        // As u64, for the header's alignment.
        let mut buffer = vec![0u64; size.div_ceil(8)];
        let head = exchange(control, number, &mut buffer, size, head, arguments.payload)?;
        if head.flags & FLAG_BUFFER_FULL == 0 {
            return reply(&buffer, &head, size);
        }
        size *= 2;
    }
    Err(io::Error::from_raw_os_error(libc::EMSGSIZE))
}

/// Writes header and payload to the buffer, makes the call, and reads the header back.
fn exchange(
    control: &File,
    number: libc::c_ulong,
    buffer: &mut [u64],
    size: usize,
    head: Header,
    payload: &[u8],
) -> io::Result<Header> {
    assert!(buffer.len() * 8 >= size && size >= HEADER_BYTES + payload.len());
    let start = buffer.as_mut_ptr();
    // SAFETY: the buffer is at least `size` bytes (asserted), 8-aligned as u64, exclusively borrowed,
    // and lives through the block; header and payload fit it (asserted) and the payload, another
    // borrow, does not overlap it. The descriptor is open while `control` is borrowed. `data_size` in
    // the header is `size`, which bounds what the kernel reads and writes. Every bit pattern is a
    // valid `Header`.
    unsafe {
        start.cast::<Header>().write(head);
        std::ptr::copy_nonoverlapping(payload.as_ptr(), start.cast::<u8>().add(HEADER_BYTES), payload.len());
        if libc::ioctl(control.as_raw_fd(), number, start) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(start.cast::<Header>().read())
    }
}

fn reply(buffer: &[u64], head: &Header, size: usize) -> io::Result<Reply> {
    let start = usize::try_from(head.data_start).unwrap_or(usize::MAX);
    let end = usize::try_from(head.data_size).unwrap_or(usize::MAX).max(start);
    if start < HEADER_BYTES || end > size {
        return Err(io::Error::from_raw_os_error(libc::EPROTO));
    }
    let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(Reply {
        version: head.version,
        flags: head.flags,
        open_count: head.open_count,
        dev: head.dev,
        target_count: head.target_count,
        name: get_text(&head.name),
        uuid: get_text(&head.uuid),
        payload: bytes[start..end].to_vec(),
    })
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
        assert!(header_request("".into(), 0, 0).is_err());
        assert!(header_request("a\0b".into(), 0, 0).is_err());
        assert!(header_request(Key::Name(&"x".repeat(128)), 0, 0).is_err());
        assert!(header_request(Key::Name(&"x".repeat(127)), 0, 0).is_ok());
    }

    #[test]
    fn replies_that_contradict_themselves_are_refused() {
        let buffer = vec![0u64; 64];
        let mut head = header(None, 0, 0, 512).unwrap();
        assert_eq!(reply(&buffer, &head, 512).unwrap().payload.len(), 200);
        head.data_size = 513;
        assert!(reply(&buffer, &head, 512).is_err());
        head.data_size = 0;
        head.data_start = 8;
        assert!(reply(&buffer, &head, 512).is_err());
    }
}
