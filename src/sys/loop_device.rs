//! Loop devices: attach with direct I/O, grow, query, detach.
//!
//! Structures and numbers: Linux `include/uapi/linux/loop.h`. `LOOP_CONFIGURE` (Linux 5.8) sets backing file,
//! block size and flags in one call, so the device never exists without its autoclear flag: after a crash
//! nothing stays attached once the last user has closed it.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::child_probe::{self, Question, Words};
use crate::base::Bytes;

/// The control device.
pub const CONTROL_PATH: &str = "/dev/loop-control";

const SET_CAPACITY: libc::c_ulong = 0x4c07;
const GET_STATUS64: libc::c_ulong = 0x4c05;
const CONFIGURE: libc::c_ulong = 0x4c0a;
const CTL_GET_FREE: libc::c_ulong = 0x4c82;

const FLAG_READ_ONLY: u32 = 1;
const FLAG_AUTOCLEAR: u32 = 4;
const FLAG_DIRECT_IO: u32 = 16;

/// Attempts to get a free loop device: another process may take the same one first.
const ATTACH_ATTEMPTS: u32 = 64;
/// Pause after an attempt that failed.
const ATTACH_PAUSE: Duration = Duration::from_millis(10);

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(std::mem::size_of::<Info>() == 232);
const _: () = assert!(std::mem::size_of::<Config>() == 304);

const EMPTY_INFO: Info = Info {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; 64],
    crypt_name: [0; 64],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// A loop device that we have attached and hold open. Dropping it closes our handle; the kernel detaches the
/// file once nothing else (a device-mapper table) uses the device.
#[derive(Debug)]
pub struct LoopDevice {
    device: File,
}

/// The kernel's status of an attached loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopStatus {
    /// `st_dev` of the backing file.
    pub backing_dev: u64,
    /// `st_ino` of the backing file.
    pub backing_inode: u64,
    /// `st_rdev` of the backing file: the number of a block device, zero for anything else.
    pub backing_rdev: u64,
    /// Its start in the backing file.
    pub offset: Bytes,
    /// Its length, if it ends before the backing file.
    pub length: Option<Bytes>,
    /// True if writes are refused.
    pub read_only: bool,
    /// True if the kernel detaches it on the last close.
    pub autoclear: bool,
    /// True if reads and writes bypass the page cache of the backing file's filesystem.
    pub direct_io: bool,
}

impl LoopDevice {
    /// Attaches `backing`, opened for reading and writing, to a free loop device with direct I/O and logical
    /// blocks of `block_bytes`. The kernel detaches it on its last close. If the filesystem has no direct
    /// I/O, some kernels do without (see [`LoopDevice::status`]), others refuse with EINVAL.
    ///
    /// # Errors
    /// The kernel's errno; ENOENT if the loop module is missing.
    pub fn attach(backing: &File, block_bytes: u32, direct_io: bool) -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL_PATH)?;
        let flags = FLAG_AUTOCLEAR | if direct_io { FLAG_DIRECT_IO } else { 0 };
        let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
        let mut attempt = 1;
        loop {
            let number = call_plain(&control, CTL_GET_FREE)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let config =
                Config { fd, block_size: block_bytes, info: Info { flags, ..EMPTY_INFO }, reserved: [0; 8] };
            let result =
                open_node(&path).and_then(|device| configure(&device, &config).map(|()| Self { device }));
            match result {
                Err(error) if lost_race(&error) && attempt < ATTACH_ATTEMPTS => {
                    attempt += 1;
                    thread::sleep(ATTACH_PAUSE);
                }
                other => return other,
            }
        }
    }

    /// Opens a device that is attached already, to enlarge it, and to hold it like one that we attached.
    ///
    /// # Errors
    /// The kernel's errno; ENXIO if nothing is attached.
    pub fn open(path: &Path) -> io::Result<Self> {
        let device = Self { device: open_node(path)? };
        device.status()?;
        Ok(device)
    }

    /// The path of its node: /dev/loopN.
    #[must_use]
    #[cfg(test)]
    pub fn path(&self) -> PathBuf {
        std::fs::read_link(format!("/proc/self/fd/{}", self.device.as_raw_fd())).unwrap()
    }

    /// Its device number, as returned by stat().
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn rdev(&self) -> io::Result<libc::dev_t> {
        self.device.metadata().map(|metadata| metadata.rdev())
    }

    /// Adopts the present size of the backing file.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn refresh_size(&self) -> io::Result<()> {
        call_plain(&self.device, SET_CAPACITY).map(|_| ())
    }

    /// The kernel's status.
    ///
    /// # Errors
    /// The kernel's errno; ENXIO if nothing is attached.
    pub fn status(&self) -> io::Result<LoopStatus> {
        info_of(self.device.as_raw_fd()).map(|info| status_from(&info)).map_err(io::Error::from_raw_os_error)
    }
}

/// The status of each of the loop devices at `paths`; None if no file is attached. The kernel gets it from
/// the file system of the backing file, which may have to ask a server: so a child process asks, see
/// [`child_probe`].
///
/// # Errors
/// For each device the kernel's errno; [`io::ErrorKind::TimedOut`] if there is no answer.
pub fn statuses(paths: &[&Path]) -> Vec<io::Result<Option<LoopStatus>>> {
    let terminated = |path: &Path| CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
    let questions: Vec<StatusQuestion> = paths.iter().map(|path| StatusQuestion(terminated(path))).collect();
    let or_none = |answer: io::Result<LoopStatus>| match answer {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        answer => answer.map(Some),
    };
    child_probe::ask(&questions).into_iter().map(or_none).collect()
}

/// As [`statuses`], for one device.
///
/// # Errors
/// As [`statuses`].
pub fn status(path: &Path) -> io::Result<Option<LoopStatus>> {
    statuses(&[path]).pop().unwrap_or(Ok(None))
}

/// The question for the status of the loop device at a path.
struct StatusQuestion(CString);

// SAFETY: `ask` makes system calls only, of which open() and close() are async-signal-safe by signal-safety(7), and
// ioctl() is in every libc a plain system call that takes no lock.
unsafe impl Question for StatusQuestion {
    type Answer = LoopStatus;

    fn ask(&self) -> Result<Words, i32> {
        // SAFETY: the path ends with a zero.
        let device =
            unsafe { libc::open(self.0.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if device < 0 {
            return Err(Errno::last_raw());
        }
        let info = info_of(device);
        // SAFETY: closes the descriptor that this function has opened.
        unsafe { libc::close(device) };
        let info = info?;
        Ok([info.device, info.inode, info.rdevice, info.offset, info.size_limit, u64::from(info.flags)])
    }

    fn answer([device, inode, rdevice, offset, size_limit, flags]: Words) -> LoopStatus {
        let flags = u32::try_from(flags).unwrap_or(0);
        status_from(&Info { device, inode, rdevice, offset, size_limit, flags, ..EMPTY_INFO })
    }
}

/// Another process was faster: the device is in use (EBUSY), or its node does not exist yet.
fn lost_race(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT | libc::ENXIO | libc::EAGAIN))
}

fn open_node(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path)
}

fn call_plain(file: &File, number: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: these requests take no pointer; the descriptor is open while `file` is borrowed.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn configure(device: &File, config: &Config) -> io::Result<()> {
    // SAFETY: the kernel reads one `struct loop_config` from the pointer, whose layout `Config` has
    // (size asserted above); it is live for the call, and the descriptor is open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), CONFIGURE, std::ptr::from_ref(config)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The error is an errno.
fn info_of(device: RawFd) -> Result<Info, i32> {
    let mut info = EMPTY_INFO;
    // SAFETY: the kernel writes one `struct loop_info64` to the pointer, whose layout `Info` has
    // (size asserted above); it is live and exclusively ours for the call.
    let result = unsafe { libc::ioctl(device, GET_STATUS64, std::ptr::from_mut(&mut info)) };
    if result < 0 { Err(Errno::last_raw()) } else { Ok(info) }
}

fn status_from(info: &Info) -> LoopStatus {
    LoopStatus {
        backing_dev: info.device,
        backing_inode: info.inode,
        backing_rdev: info.rdevice,
        offset: Bytes(info.offset),
        length: Some(Bytes(info.size_limit)).filter(|length| *length != Bytes::ZERO),
        read_only: info.flags & FLAG_READ_ONLY != 0,
        autoclear: info.flags & FLAG_AUTOCLEAR != 0,
        direct_io: info.flags & FLAG_DIRECT_IO != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loop devices need root: without it the tests are skipped.
    fn may_attach() -> bool {
        nix::unistd::geteuid().is_root() && Path::new(CONTROL_PATH).exists()
    }

    fn bytes_of(device: &LoopDevice) -> u64 {
        let name = device.path().file_name().unwrap().to_str().unwrap().to_owned();
        std::fs::read_to_string(format!("/sys/block/{name}/size")).unwrap().trim().parse::<u64>().unwrap()
            * 512
    }

    #[test]
    fn a_file_is_attached_grown_and_detached_on_the_last_close() {
        if !may_attach() {
            return;
        }
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(1 << 20).unwrap();
        let device = LoopDevice::attach(&file, 4096, true).unwrap();
        assert_eq!(bytes_of(&device), 1 << 20);
        let status = device.status().unwrap();
        assert!(status.autoclear);
        assert_eq!(status.backing_inode, file.metadata().unwrap().ino());
        assert_ne!(device.rdev().unwrap(), 0);

        file.set_len(3 << 20).unwrap();
        device.refresh_size().unwrap();
        assert_eq!(bytes_of(&device), 3 << 20);

        let path = device.path().to_owned();
        drop(device);
        // A work queue of the kernel does the detachment.
        for _ in 0..100 {
            match super::status(&path) {
                Ok(Some(left)) if left.backing_inode == status.backing_inode => {
                    thread::sleep(Duration::from_millis(20));
                }
                _ => return,
            }
        }
        panic!("{} is still attached", path.display());
    }

    #[test]
    fn a_file_that_cannot_be_attached_is_an_error() {
        if !may_attach() {
            return;
        }
        // A pipe cannot be a backing file.
        let (reader, _writer) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        assert!(LoopDevice::attach(&file, 4096, true).is_err());
    }
}
