//! Where does the RAM head come from, and how is it given back?
//!
//! zram where the kernel has it (it compresses), else brd, else none. A head is never limited below
//! its size: `mem_limit` would turn originals that do not compress into write errors, which void the
//! snapshot. So a head may take all of its size in memory, and all of it is counted.
//!
//! Invariants: a zram device is added for us alone (`hot_add`) and only ever removed by its index
//! from our record; brd is used only where we loaded the module, because its devices cannot be told
//! apart from anybody else's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::base::{Bytes, DeviceNumber, Error, ErrorKind, Result, ResultExt};

use super::place::device_bytes;
use super::record::{Made, Record};

const ZRAM_CONTROL: &str = "/sys/class/zram-control";
const BRD_MODULE: &str = "/sys/module/brd";
const BRD_NAME: &str = "ram0";

/// Attempts to give a device back that somebody looks at for a moment (udev, blkid).
const RELEASE_ATTEMPTS: u32 = 50;
/// Pause between them.
const RELEASE_PAUSE: Duration = Duration::from_millis(20);

/// A RAM disk that is ours.
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
    /// /dev/ram0 of a module that we loaded
    Brd,
}

impl Head {
    /// Makes a head of `bytes` (a multiple of 4 KiB), each step noted in `record` first. Where
    /// neither zram nor brd can be had: why.
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

    /// The head that a record names, with `bytes` of it in use; None for a store without one.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where it is not there or smaller.
    pub(super) fn adopt(made: &Made, bytes: Bytes) -> Result<Option<Self>> {
        let (kind, name) = match made {
            Made::Zram { index } => (HeadKind::Zram { index: *index }, format!("zram{index}")),
            Made::Brd => (HeadKind::Brd, BRD_NAME.to_owned()),
            Made::Nothing | Made::ZramIntended { .. } => return Ok(None),
        };
        let path = format!("/sys/block/{name}/dev");
        let number = fs::read_to_string(&path)
            .map_err(|error| {
                Error::refused(format!("the RAM disk /dev/{name} is not there")).with_source(error)
            })?
            .parse::<DeviceNumber>()?;
        let have = device_bytes(number)?;
        if have < bytes {
            return Err(Error::refused(format!("the RAM disk /dev/{name} has {have} instead of {bytes}")));
        }
        Ok(Some(Self { kind, number, bytes }))
    }

    /// Gives the memory back.
    pub(super) fn release(&self) -> Result<()> {
        match self.kind {
            HeadKind::Zram { index } => release_zram(index),
            HeadKind::Brd => release_brd(),
        }
    }
}

/// Loads a kernel module. False where it cannot be loaded.
#[must_use]
pub fn load_module(name: &str, options: &[&str]) -> bool {
    run_modprobe(&[&[name], options].concat())
}

fn run_modprobe(arguments: &[&str]) -> bool {
    // A root shell made by su(1) may lack the directory that modprobe is in.
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
    record.note(Made::ZramIntended { before: zram_indices() })?;
    let path = format!("{ZRAM_CONTROL}/hot_add");
    let index = match fs::read_to_string(&path) {
        Ok(text) => text
            .trim()
            .parse::<u32>()
            .map_err(|source| Error::kernel(format!("reading {path} ('{}')", text.trim()), source))?,
        Err(error) => {
            record.note(Made::Nothing)?;
            return Ok(Err(format!("no zram device could be added ({error})")));
        }
    };
    record.note(Made::Zram { index })?;
    let result = fs::write(sysfs(index, "disksize"), bytes.get().to_string())
        .and_then(|()| fs::read_to_string(sysfs(index, "dev")));
    let number = match result {
        Ok(text) => text.parse::<DeviceNumber>()?,
        Err(error) => {
            release_zram(index)?;
            // From here on the number is anybody's.
            record.note(Made::Nothing)?;
            return Ok(Err(format!("a zram device of {bytes} could not be made ({error})")));
        }
    };
    Ok(Ok(Head { kind: HeadKind::Zram { index }, number, bytes }))
}

/// Resets and removes a zram device. One that is gone already is no error.
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
                    .io_context(|| format!("giving back /dev/zram{index}"))
                    .map_err(|error| error.next(format!("echo 1 >{}", reset.display())));
            }
        }
    }
}

/// The zram devices there are.
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

/// True for a zram device that nobody has given a size.
pub(super) fn zram_is_unused(index: u32) -> bool {
    fs::read_to_string(sysfs(index, "disksize")).is_ok_and(|text| text.trim() == "0")
}

fn sysfs(index: u32, file: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/zram{index}/{file}"))
}

fn make_brd(bytes: Bytes, record: &mut Record) -> Result<Result<Head, String>> {
    if Path::new(BRD_MODULE).exists() {
        return Ok(Err("brd is in use by others".to_owned()));
    }
    record.note(Made::Brd)?;
    let kib = bytes.get() / 1024;
    if !load_module("brd", &["rd_nr=1", "max_part=0", &format!("rd_size={kib}")]) {
        record.note(Made::Nothing)?;
        return Ok(Err("the kernel has no brd".to_owned()));
    }
    let number = fs::read_to_string(format!("/sys/block/{BRD_NAME}/dev"))
        .io_context(|| format!("looking for /dev/{BRD_NAME}"))?
        .parse::<DeviceNumber>()?;
    let have = device_bytes(number)?;
    if have < bytes {
        release_brd()?;
        record.note(Made::Nothing)?;
        return Ok(Err(format!("/dev/{BRD_NAME} has {have} instead of {bytes}")));
    }
    Ok(Ok(Head { kind: HeadKind::Brd, number, bytes }))
}

/// Unloads the brd module that we loaded. One that is gone already is no error.
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
