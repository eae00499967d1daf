//! The command line of QEMU.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::case::{Cache, Clock, Disk, Throttle};
use super::guest::{Boot, Host};

/// Processors of a guest: two, so that concurrent threads can race.
pub const PROCESSORS: usize = 2;

/// The command that boots a guest. With `probe`, the guest reports that it runs and powers off.
pub fn command(host: &Host, boot: &Boot<'_>, image: &Path, probe: bool) -> Result<Command> {
    let clock = match boot.clock {
        Clock::Hpet => "tsc=unstable",
        Clock::Tsc => "tsc=reliable clocksource=tsc",
    };
    let mut append = format!(
        "console=ttyS0 panic=-1 loglevel=5 mitigations=off rcupdate.rcu_cpu_stall_timeout=120 watchdog_thresh=60 {clock}"
    );
    if probe {
        append.push_str(" tidemark.probe");
    }
    let mut qemu = Command::new("qemu-system-x86_64");
    match host.accel.as_str() {
        "kvm" => qemu.args(["-accel", "kvm", "-cpu", "host"]),
        // With cx16, QEMU 7.2's software emulation makes the guest panic at random.
        _ => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"]),
    };
    qemu.args(["-smp", &PROCESSORS.to_string(), "-m", &boot.memory_mib.to_string()]);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    qemu.arg("-serial").arg(format!("file:{}", option(&boot.console)));
    qemu.arg("-kernel").arg(image);
    qemu.arg("-initrd").arg(host.vm.join(format!("initramfs-{}.cpio", boot.kernel.name())));
    qemu.arg("-append").arg(append);
    for (tag, path, access) in [("host", Path::new("/"), ",readonly=on"), ("case", &boot.share, "")] {
        qemu.arg("-fsdev")
            .arg(format!("local,id={tag},path={},security_model=none,multidevs=remap{access}", option(path)));
        qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
    }
    qemu.args(["-device", "virtio-rng-pci"]);
    for (number, (disk, path)) in boot.disks.iter().enumerate() {
        add_disk(&mut qemu, number, disk, path);
    }
    let messages = File::create(&boot.messages).context("cannot make QEMU's log")?;
    let again = messages.try_clone().context("cannot share QEMU's log")?;
    qemu.current_dir(&boot.folder).stdin(Stdio::null()).stdout(messages).stderr(again);
    Ok(qemu)
}

fn add_disk(qemu: &mut Command, number: usize, disk: &Disk, path: &Path) {
    let cache = match disk.cache {
        Cache::Writeback => "writeback",
        Cache::Unsafe => "unsafe",
    };
    let limits = disk.throttle.map_or_else(String::new, throttling);
    qemu.arg("-drive").arg(format!(
        // The guest must see an error of the host's disk. By default QEMU silently stops the guest when the host's
        // disk is full.
        "if=none,id=disk{number},format=raw,discard=unmap,cache={cache},{limits}werror=report,rerror=report,file={}",
        option(path)
    ));
    qemu.arg("-device").arg(format!(
        "virtio-blk-pci,drive=disk{number},serial=disk{number},logical_block_size={b},physical_block_size={b}",
        b = disk.block_bytes
    ));
}

/// A path as a value in QEMU's lists of options.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The part of `-drive` that limits the disk's speed.
fn throttling(throttle: Throttle) -> String {
    let Throttle { bytes_per_second: bytes, shared, requests_per_second: requests } = throttle;
    let ways: &[&str] = if shared { &["total"] } else { &["read", "write"] };
    let bytes: String = ways.iter().map(|way| format!("throttling.bps-{way}={bytes},")).collect();
    format!("{bytes}throttling.iops-total={requests},")
}
