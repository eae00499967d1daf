//! How is a guest started, watched and stopped?
//!
//! One QEMU process per boot. Its end is always seen: it powers itself off after the script, or it is killed,
//! by its own process id, at its time limit or at the moment the power is to fail.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::case::{Cache, Clock, Cut, Disk, Throttle};

/// A guest's processors: enough for what runs beside each other to be in each other's way.
pub const PROCESSORS: usize = 2;

/// How often the guest's files are looked at.
const POLL: Duration = Duration::from_millis(5);

/// The machine's side of a boot: what is the same for every guest.
pub struct Machine {
    /// The project's folder, at the same path in the guest.
    pub repo: PathBuf,
    /// `tcg` or `kvm`.
    pub accel: String,
}

/// What one boot needs.
pub struct Boot<'case> {
    /// The kernel's series, which names its folder.
    pub series: &'case str,
    /// What the guest's kernel reads the time from.
    pub clock: Clock,
    /// The guest's memory.
    pub memory_mib: u32,
    /// The disks and their files, in order.
    pub disks: Vec<(&'case Disk, PathBuf)>,
    /// The folder shared with the guest.
    pub share: PathBuf,
    /// Where the console goes.
    pub console: PathBuf,
    /// Where QEMU's own messages go.
    pub messages: PathBuf,
    /// When the guest is killed.
    pub limit: Duration,
    /// The boot's number, which names its result files.
    pub phase: usize,
    /// When the power fails, and how long after the marker.
    pub cut: Option<(&'case Cut, Duration)>,
}

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// The script ended with this status and the guest powered off.
    Exited(i32),
    /// The power was cut where the case asked for it.
    Cut,
    /// Killed at the time limit.
    Hung,
    /// QEMU ended and the script had not: a panic, or QEMU could not start.
    Died,
}

/// The part of `-drive` that bounds what the disk can do.
fn throttling(throttle: Throttle) -> String {
    let Throttle { bytes_per_second: bytes, shared, requests_per_second: requests } = throttle;
    let ways: &[&str] = if shared { &["total"] } else { &["read", "write"] };
    let bytes: String = ways.iter().map(|way| format!("throttling.bps-{way}={bytes},")).collect();
    format!("{bytes}throttling.iops-total={requests},")
}

/// Kills QEMU when the runner leaves early.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // An error says that it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine {
    /// The newest vmlinuz of a series.
    pub fn kernel_image(&self, series: &str) -> Option<PathBuf> {
        let boot = self.repo.join(format!("target/vm/kernel-{series}/boot"));
        fs::read_dir(boot).ok()?.filter_map(|entry| Some(entry.ok()?.path())).find(|path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("vmlinuz"))
        })
    }

    fn command(&self, boot: &Boot<'_>, probe: bool) -> Result<Command, String> {
        let series = boot.series;
        let vm = self.repo.join("target/vm");
        let image =
            self.kernel_image(series).ok_or_else(|| format!("no kernel {series}: run scripts/setup"))?;
        let repo = self.repo.display();
        let clock = match boot.clock {
            Clock::Hpet => "tsc=unstable",
            Clock::Tsc => "tsc=reliable clocksource=tsc",
        };
        let mut append = format!(
            "console=ttyS0 panic=-1 loglevel=5 mitigations=off rcupdate.rcu_cpu_stall_timeout=120 watchdog_thresh=60 \
             {clock} tidemark.repo={repo} tidemark.modules={repo}/target/vm/kernel-{series}/lib/modules"
        );
        if probe {
            append.push_str(" tidemark.probe");
        }
        let mut qemu = Command::new("qemu-system-x86_64");
        match self.accel.as_str() {
            "kvm" => qemu.args(["-accel", "kvm", "-cpu", "host"]),
            // With cx16 on, QEMU 7.2's software emulation makes the guest panic at random.
            _ => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,-cx16"]),
        };
        qemu.args(["-smp", &PROCESSORS.to_string(), "-m", &boot.memory_mib.to_string()]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.arg("-serial").arg(format!("file:{}", boot.console.display()));
        qemu.arg("-kernel").arg(image);
        qemu.arg("-initrd").arg(vm.join(format!("initramfs-{series}.cpio")));
        qemu.arg("-append").arg(append);
        for (tag, path, access) in [("host", Path::new("/"), ",readonly=on"), ("case", &boot.share, "")] {
            qemu.arg("-fsdev").arg(format!(
                "local,id={tag},path={},security_model=none,multidevs=remap{access}",
                path.display()
            ));
            qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        qemu.args(["-device", "virtio-rng-pci"]);
        for (number, (disk, path)) in boot.disks.iter().enumerate() {
            let cache = match disk.cache {
                Cache::Writeback => "writeback",
                Cache::Unsafe => "unsafe",
            };
            let limits = disk.throttle.map_or_else(String::new, throttling);
            qemu.arg("-drive").arg(format!(
                // An error of the host's disk is the guest's to report; QEMU's default is to stop the guest
                // without a word where the host's disk is full.
                "if=none,id=disk{number},format=raw,discard=unmap,cache={cache},{limits}werror=report,rerror=report,file={}",
                path.display()
            ));
            qemu.arg("-device").arg(format!(
                "virtio-blk-pci,drive=disk{number},serial=disk{number},logical_block_size={b},physical_block_size={b}",
                b = disk.block_bytes
            ));
        }
        let messages =
            File::create(&boot.messages).map_err(|error| format!("cannot make QEMU's log: {error}"))?;
        let again = messages.try_clone().map_err(|error| format!("cannot share QEMU's log: {error}"))?;
        qemu.stdin(Stdio::null()).stdout(messages).stderr(again);
        Ok(qemu)
    }

    /// Boots and waits for the end.
    pub fn boot(&self, boot: &Boot<'_>) -> Result<Ending, String> {
        let child = self
            .command(boot, false)?
            .spawn()
            .map_err(|error| format!("cannot start qemu-system-x86_64 (run scripts/setup): {error}"))?;
        let mut guard = Guard(child);
        let start = Instant::now();
        let status = boot.share.join(format!("status.{}", boot.phase));
        let mut cut_at: Option<Instant> = None;
        loop {
            let now = Instant::now();
            if let Some((cut, delay)) = boot.cut {
                if cut_at.is_none() && boot.share.join(format!("marker.{}", cut.marker)).exists() {
                    cut_at = Some(now + delay);
                }
                if cut_at.is_some_and(|at| now >= at) {
                    return Ok(Ending::Cut);
                }
            }
            let ended = guard.0.try_wait().map_err(|error| format!("cannot wait for QEMU: {error}"))?;
            if ended.is_some() {
                return Ok(
                    match fs::read_to_string(&status).ok().and_then(|text| text.trim().parse().ok()) {
                        Some(code) => Ending::Exited(code),
                        None => Ending::Died,
                    },
                );
            }
            if now.duration_since(start) > boot.limit {
                return Ok(Ending::Hung);
            }
            thread::sleep(POLL);
        }
    }

    /// Whether a guest starts at all with this accelerator.
    pub fn probe(&self, boot: &Boot<'_>) -> Result<bool, String> {
        let Ok(child) = self.command(boot, true)?.spawn() else { return Ok(false) };
        let mut guard = Guard(child);
        let start = Instant::now();
        loop {
            let ended = guard.0.try_wait().map_err(|error| format!("cannot wait for QEMU: {error}"))?;
            if ended.is_some() || start.elapsed() > boot.limit {
                let console = fs::read(&boot.console).unwrap_or_default();
                return Ok(String::from_utf8_lossy(&console).contains("tidemark-guest: alive"));
            }
            thread::sleep(POLL);
        }
    }
}
