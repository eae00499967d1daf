//! Properties of files and of their devices: kind, size, zero-out, holes.
//!
//! Every function makes one kernel call (or two if one is not supported), and returns its errno unchanged.
//! Sizes are bytes. Nothing is retried, except after `EINTR`, and there is no policy.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::unistd::{Whence, lseek};

use crate::base::Bytes;

/// The kinds of file that differ in their I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A block device.
    Block,
    /// A regular file.
    Regular,
    /// A pipe or FIFO, a socket or a terminal: it has its own position and no offsets.
    Stream,
    /// A directory, or anything else without content.
    Other,
}

/// The kind of `file`.
///
/// # Errors
/// The errno of fstat(2).
pub fn kind(file: impl AsFd) -> io::Result<FileKind> {
    let file_type = metadata(file)?.file_type();
    Ok(if file_type.is_block_device() {
        FileKind::Block
    } else if file_type.is_file() {
        FileKind::Regular
    } else if file_type.is_fifo() || file_type.is_socket() || file_type.is_char_device() {
        FileKind::Stream
    } else {
        FileKind::Other
    })
}

/// Major and minor number: of the device itself for a device node, else of the file system's device.
///
/// # Errors
/// The errno of fstat(2).
pub fn device_number(file: impl AsFd) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = metadata(file)?;
    let file_type = metadata.file_type();
    let number = if file_type.is_block_device() || file_type.is_char_device() {
        metadata.rdev()
    } else {
        metadata.dev()
    };
    Ok((nix::sys::stat::major(number), nix::sys::stat::minor(number)))
}

fn metadata(file: impl AsFd) -> io::Result<std::fs::Metadata> {
    File::from(file.as_fd().try_clone_to_owned()?).metadata()
}

/// True if the block device with this major and minor number was removed: sysfs reports no size. A process that still
/// has it open cannot query anything else.
#[must_use]
pub fn is_gone((major, minor): (u64, u64)) -> bool {
    match std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/size")) {
        Ok(size) => size.trim() == "0",
        Err(error) => error.kind() == io::ErrorKind::NotFound && Path::new("/sys/dev/block").exists(),
    }
}

/// Size in bytes: BLKGETSIZE64 for a block device, else st_size.
///
/// # Errors
/// The errno of fstat(2) or ioctl(2).
pub fn size(file: impl AsFd) -> io::Result<Bytes> {
    match kind(&file)? {
        FileKind::Block => device_size(file),
        _ => metadata(file).map(|metadata| Bytes(metadata.len())),
    }
}

/// True if the handle bypasses the page cache (O_DIRECT).
///
/// # Errors
/// The errno of fcntl(2).
pub fn is_direct(file: impl AsFd) -> io::Result<bool> {
    let flags = fcntl(file, FcntlArg::F_GETFL)?;
    Ok(OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT))
}

mod raw {
    //! Numbers from linux/fs.h; `_IO` numbers carry no size, hence the `_bad` macros.
    nix::ioctl_read_bad!(blkgetsize64, nix::request_code_read!(0x12, 114, size_of::<usize>()), u64);
    nix::ioctl_read_bad!(blksszget, nix::request_code_none!(0x12, 104), libc::c_int);
    nix::ioctl_read_bad!(blkpbszget, nix::request_code_none!(0x12, 123), libc::c_uint);
    nix::ioctl_read_bad!(blkroget, nix::request_code_none!(0x12, 94), libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
    nix::ioctl_read_bad!(
        fs_ioc_getversion,
        nix::request_code_read!(b'v', 1, size_of::<usize>()),
        libc::c_long
    );
    nix::ioctl_read_bad!(fs_ioc_getfsuuid, nix::request_code_read!(0x15, 0, size_of::<FsUuid>()), FsUuid);

    /// `struct fsuuid2`.
    #[repr(C)]
    pub struct FsUuid {
        pub length: u8,
        pub bytes: [u8; 16],
    }
}

/// Repeats a call as long as a signal interrupts it.
fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Size of a block device.
///
/// # Errors
/// The errno of ioctl(2); ENOTTY for anything else.
pub fn device_size(device: impl AsFd) -> io::Result<Bytes> {
    let fd = device.as_fd().as_raw_fd();
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which is to a live local; `fd` is
    // open for the borrow of `device`.
    uninterrupted(|| unsafe { raw::blkgetsize64(fd, &raw mut size) })?;
    Ok(Bytes(size))
}

/// The generation of a regular file's inode, which differs for each file that reuses an inode number. None if
/// the file system does not report it.
pub fn generation(file: impl AsFd) -> Option<u32> {
    let fd = file.as_fd().as_raw_fd();
    // File systems write an int; the ioctl number specifies a long, so there is room.
    let mut generation: libc::c_long = 0;
    // SAFETY: FS_IOC_GETVERSION writes an int, at most a long, through the pointer, which is to a live local long;
    // `fd` is open for the borrow of `file`.
    uninterrupted(|| unsafe { raw::fs_ioc_getversion(fd, &raw mut generation) }).ok()?;
    u32::try_from(generation & 0xffff_ffff).ok()
}

/// The UUID of the filesystem of a file (Linux 6.9). None if the kernel does not report it.
pub fn filesystem_uuid(file: impl AsFd) -> Option<Vec<u8>> {
    let fd = file.as_fd().as_raw_fd();
    let mut answer = raw::FsUuid { length: 0, bytes: [0; 16] };
    // SAFETY: FS_IOC_GETFSUUID writes a `struct fsuuid2`, which is laid out as `FsUuid` is, through the pointer, which
    // is to a live local; `fd` is open for the borrow of `file`.
    uninterrupted(|| unsafe { raw::fs_ioc_getfsuuid(fd, &raw mut answer) }).ok()?;
    answer.bytes.get(..usize::from(answer.length)).filter(|uuid| !uuid.is_empty()).map(<[u8]>::to_vec)
}

/// Linux `include/uapi/asm-generic/fcntl.h`.
const F_SETSIG: libc::c_int = 10;

/// True if a process has a regular file open for writing, as far as the kernel reports it: it then refuses a
/// read lease (fcntl(2), F_SETLEASE: EAGAIN). False if leases are not available.
pub fn is_open_for_writing(file: impl AsFd) -> bool {
    let fd = file.as_fd().as_raw_fd();
    // If a writer opens the file while the lease is held, the kernel sends its holder SIGIO, which ends a
    // command. SIGURG does nothing.
    // SAFETY: F_SETSIG takes an int and touches no memory; `fd` is open for the borrow of `file`.
    unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) };
    // SAFETY: F_SETLEASE takes an int and touches no memory; `fd` is open for the borrow of `file`.
    match nix::errno::Errno::result(unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) }) {
        // Released at once: a writer's open() would wait for the lease.
        // SAFETY: as above.
        Ok(_) => unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) != 0 },
        Err(errno) => errno == nix::errno::Errno::EAGAIN,
    }
}

/// Makes `length` bytes at `start` of a block device read as zeros, by a command of the device, or else by
/// writing them in the kernel.
///
/// # Errors
/// The errno of ioctl(2); EINVAL if not aligned to logical blocks.
pub fn zero_out(device: impl AsFd, start: Bytes, length: Bytes) -> io::Result<()> {
    let fd = device.as_fd().as_raw_fd();
    let range = [start.get(), length.get()];
    // SAFETY: BLKZEROOUT reads two u64 through the pointer, which is to a live local array of two;
    // `fd` is open for the borrow of `device`.
    uninterrupted(|| unsafe { raw::blkzeroout(fd, &raw const range) }).map(drop)
}

/// Makes `length` bytes at `start` of a regular file a hole, without changing its size.
///
/// # Errors
/// The errno of fallocate(2); EOPNOTSUPP if the filesystem does not support it.
pub fn punch_hole(file: impl AsFd, start: Bytes, length: Bytes) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate_range(file, mode, start, length)
}

/// Makes `length` bytes at `start` read as zeros, keeping their space and the size. On a block device
/// this equals [`zero_out`].
///
/// # Errors
/// The errno of fallocate(2); EOPNOTSUPP if the filesystem does not support it.
pub fn zero_range(file: impl AsFd, start: Bytes, length: Bytes) -> io::Result<()> {
    let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate_range(file, mode, start, length)
}

fn fallocate_range(file: impl AsFd, mode: FallocateFlags, start: Bytes, length: Bytes) -> io::Result<()> {
    let (start, length) = (file_offset(start)?, file_offset(length)?);
    uninterrupted(|| fallocate(&file, mode, start, length))
}

/// The kernel's signed offset; EFBIG if it does not fit.
fn file_offset(bytes: Bytes) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes.get()).map_err(|_| Errno::EFBIG.into())
}

/// The first byte at or after `from` that may hold data; None if only a hole follows. Changes the position of
/// the handle.
///
/// # Errors
/// The errno of lseek(2); EINVAL if the file system does not report holes.
pub fn seek_data(file: impl AsFd, from: Bytes) -> io::Result<Option<Bytes>> {
    seek(file, from, Whence::SeekData)
}

fn seek(file: impl AsFd, from: Bytes, whence: Whence) -> io::Result<Option<Bytes>> {
    match lseek(file, file_offset(from)?, whence) {
        Ok(at) => u64::try_from(at).map(|at| Some(Bytes(at))).map_err(|_| Errno::EOVERFLOW.into()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{FileExt, OpenOptionsExt as _};

    #[test]
    fn a_regular_file_is_distinguished_from_pipe_and_directory() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(kind(&file).unwrap(), FileKind::Regular);
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(kind(&reader).unwrap(), FileKind::Stream);
        assert_eq!(kind(File::open("/").unwrap()).unwrap(), FileKind::Other);
    }

    #[test]
    fn block_ioctls_refuse_a_regular_file_with_enotty() {
        let file = tempfile::tempfile().unwrap();
        for error in [device_size(&file).unwrap_err(), zero_out(&file, Bytes(0), Bytes(512)).unwrap_err()] {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        }
    }

    #[test]
    fn holes_are_made_and_found() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7u8; 64 << 10]).unwrap();
        punch_hole(&file, Bytes::kib(16), Bytes::kib(32)).unwrap();
        let mut middle = vec![1u8; 32 << 10];
        file.read_exact_at(&mut middle, 16 << 10).unwrap();
        assert!(middle.iter().all(|byte| *byte == 0));
        assert_eq!(size(&file).unwrap(), Bytes::kib(64));
        assert_eq!(seek_data(&file, Bytes::kib(16)).unwrap(), Some(Bytes::kib(48)));
        assert_eq!(seek_data(&file, Bytes::kib(64)).unwrap(), None);
    }

    #[test]
    fn an_offset_beyond_the_kernels_range_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let error = punch_hole(&file, Bytes(u64::MAX), Bytes(1)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    }

    #[test]
    fn direct_io_is_detected() {
        let folder = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap();
        let path = folder.path().join("file");
        let direct =
            File::options().write(true).create(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
        assert!(is_direct(&direct).unwrap());
        assert!(!is_direct(File::open(&path).unwrap()).unwrap());
    }
}
