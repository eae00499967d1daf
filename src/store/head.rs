//! Creates and releases the RAM head.
//!
//! zram if the kernel has it (it compresses), else brd, else none. A head is never limited below its size:
//! `mem_limit` would turn incompressible originals into write errors, which invalidate the snapshot. So a
//! head may take all of its size in memory, and its whole size is accounted for.
//!
//! Invariants: each zram device is added for one store (`hot_add`), and only removed by the index in its
//! record. brd is used only if we loaded the module, as its devices cannot be distinguished from those of
//! other users.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt};

use super::place::device_bytes;
use super::record::{HeadRecord, Record};

const ZRAM_CONTROL: &str = "/sys/class/zram-control";
const BRD_MODULE: &str = "/sys/module/brd";
const BRD_NAME: &str = "ram0";

/// Attempts to release a device that another process has open for a moment (udev, blkid).
const RELEASE_ATTEMPTS: u32 = 50;
/// Pause between two attempts.
const RELEASE_PAUSE: Duration = Duration::from_millis(20);

/// A RAM disk that belongs to a store.
#[derive(Debug)]
pub(super) struct Head {
    pub kind: HeadKind,
    pub number: DeviceNumber,
    pub bytes: Bytes,
}

/// What a head is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeadKind {
    /// /dev/zramN
    Zram { index: u32 },
    /// /dev/ram0 of the module, which we loaded
    Brd,
}

impl Head {
    /// Creates a head of `bytes` (a multiple of 4 KiB). Each step is recorded in `record` first. The inner
    /// error says why neither zram nor brd can be used.
    pub(super) fn make(bytes: Bytes, record: &mut Record) -> Result<Result<Self, String>> {
        let no_zram = match make_zram(bytes, record)? {
            Ok(head) => return Ok(Ok(head)),
            Err(why) => why,
        };
        Ok(match make_brd(bytes, record)? {
            Ok(head) => Ok(head),
            Err(no_brd) => Err(format!("{no_zram}; {no_brd}")),
        })
    }

    /// The head that a record names, with `bytes` of it in use; None if the store has none.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if the device is missing or too small.
    pub(super) fn adopt(made: &HeadRecord, bytes: Bytes) -> Result<Option<Self>> {
        let (kind, name) = match made {
            HeadRecord::Zram { index } => (HeadKind::Zram { index: *index }, format!("zram{index}")),
            HeadRecord::Brd => (HeadKind::Brd, BRD_NAME.to_owned()),
            HeadRecord::Nothing | HeadRecord::ZramIntended { .. } => return Ok(None),
        };
        let path = format!("/sys/block/{name}/dev");
        let number = fs::read_to_string(&path)
            .map_err(|error| {
                Error::refused(format!("the RAM disk /dev/{name} does not exist")).with_source(error)
            })?
            .parse::<DeviceNumber>()?;
        let have = device_bytes(number)?;
        if have < bytes {
            return Err(Error::refused(format!("the RAM disk /dev/{name} has {have} instead of {bytes}")));
        }
        Ok(Some(Self { kind, number, bytes }))
    }

    /// Frees the memory.
    pub(super) fn release(&self) -> Result<()> {
        match self.kind {
            HeadKind::Zram { index } => release_zram(index),
            HeadKind::Brd => release_brd(),
        }
    }
}

/// Loads a kernel module. False if it cannot be loaded.
#[must_use]
pub fn load_module(name: &str, options: &[&str]) -> bool {
    run_modprobe(&[&[name], options].concat())
}

fn run_modprobe(arguments: &[&str]) -> bool {
    // modprobe's directory may be missing from the PATH of a root shell started by su(1).
    let program = ["/usr/sbin/modprobe", "/sbin/modprobe"]
        .iter()
        .find(|path| Path::new(path).exists())
        .unwrap_or(&"modprobe");
    let status = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match status {
        Ok(status) => status.success(),
        Err(error) => {
            tracing::debug!("running modprobe {}: {error}", arguments.join(" "));
            false
        }
    }
}

fn make_zram(bytes: Bytes, record: &mut Record) -> Result<Result<Head, String>> {
    if !Path::new(ZRAM_CONTROL).exists() && !load_module("zram", &["num_devices=0"]) {
        return Ok(Err("the kernel has no zram".to_owned()));
    }
    record.note(HeadRecord::ZramIntended { before: zram_indices() })?;
    let path = format!("{ZRAM_CONTROL}/hot_add");
    let index = match fs::read_to_string(&path) {
        Ok(text) => text
            .trim()
            .parse::<u32>()
            .map_err(|source| Error::kernel(format!("reading {path} ('{}')", text.trim()), source))?,
        Err(error) => {
            record.note(HeadRecord::Nothing)?;
            return Ok(Err(format!("no zram device could be added ({error})")));
        }
    };
    record.note(HeadRecord::Zram { index })?;
    let result = fs::write(sysfs(index, "disksize"), bytes.get().to_string())
        .and_then(|()| fs::read_to_string(sysfs(index, "dev")));
    let number = match result {
        Ok(text) => text.parse::<DeviceNumber>()?,
        Err(error) => {
            release_zram(index)?;
            // From here on another process may get this number.
            record.note(HeadRecord::Nothing)?;
            return Ok(Err(format!("a zram device of {bytes} could not be set up ({error})")));
        }
    };
    Ok(Ok(Head { kind: HeadKind::Zram { index }, number, bytes }))
}

/// Resets and removes a zram device. If it is gone already, that is no error.
pub(super) fn release_zram(index: u32) -> Result<()> {
    let reset = sysfs(index, "reset");
    let mut attempt = 1;
    loop {
        let result = fs::write(&reset, "1")
            .and_then(|()| fs::write(format!("{ZRAM_CONTROL}/hot_remove"), index.to_string()));
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < RELEASE_ATTEMPTS => {
                attempt += 1;
                thread::sleep(RELEASE_PAUSE);
            }
            other => {
                return other
                    .io_context(|| format!("releasing /dev/zram{index}"))
                    .map_err(|error| error.next(format!("echo 1 >{}", reset.display())));
            }
        }
    }
}

/// The zram devices that exist.
pub(super) fn zram_indices() -> Vec<u32> {
    let mut found: Vec<u32> = fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("zram")?.parse().ok())
        .collect();
    found.sort_unstable();
    found
}

/// True for a zram device without a size.
pub(super) fn zram_is_unused(index: u32) -> bool {
    fs::read_to_string(sysfs(index, "disksize")).is_ok_and(|text| text.trim() == "0")
}

fn sysfs(index: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/zram{index}/{file}"))
}

fn make_brd(bytes: Bytes, record: &mut Record) -> Result<Result<Head, String>> {
    if Path::new(BRD_MODULE).exists() {
        return Ok(Err("brd is loaded already, by other users".to_owned()));
    }
    record.note(HeadRecord::Brd)?;
    let kib = bytes.get() / 1024;
    if !load_module("brd", &["rd_nr=1", "max_part=0", &format!("rd_size={kib}")]) {
        record.note(HeadRecord::Nothing)?;
        return Ok(Err("the kernel has no brd".to_owned()));
    }
    let number = fs::read_to_string(format!("/sys/block/{BRD_NAME}/dev"))
        .io_context(|| format!("looking for /dev/{BRD_NAME}"))?
        .parse::<DeviceNumber>()?;
    let have = device_bytes(number)?;
    if have < bytes {
        release_brd()?;
        record.note(HeadRecord::Nothing)?;
        return Ok(Err(format!("/dev/{BRD_NAME} has {have} instead of {bytes}")));
    }
    Ok(Ok(Head { kind: HeadKind::Brd, number, bytes }))
}

/// Unloads the brd module, which we loaded. If it is gone already, that is no error.
pub(super) fn release_brd() -> Result<()> {
    for _ in 0..RELEASE_ATTEMPTS {
        if !Path::new(BRD_MODULE).exists() || run_modprobe(&["-r", "brd"]) {
            return Ok(());
        }
        thread::sleep(RELEASE_PAUSE);
    }
    Err(Error::new(ErrorKind::Kernel, "unloading the kernel module brd, our RAM disk")
        .state(format!("/dev/{BRD_NAME} keeps its memory"))
        .next("modprobe -r brd"))
}
