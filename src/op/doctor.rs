//! `tidemark doctor`: what this machine lacks for Tidemark, and how to get it.
//!
//! Changes nothing: no module is loaded, no file created. A check is `missing` if the main task (a copy of a live
//! volume) is impossible without it, and `warn` if it is worse without it.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use serde::Serialize;

use crate::base::{Bytes, Error, Result, SegmentSize};
use crate::dm::Dm;
use crate::io::engine::EngineConfig;
use crate::io::open::{EnginePreference, open_engine};
use crate::store::TailPlace;
use crate::store::size::{RESERVE_MAX, TAIL_FIRST_MIN};
use crate::topology::Topology;

use super::memory;

/// The oldest kernel that has every interface we use (`LOOP_CONFIGURE`).
const KERNEL_OLDEST: (u32, u32) = (5, 8);
/// The oldest kernel on which the tests run.
const KERNEL_TESTED: (u32, u32) = (6, 1);

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_ADMIN: u32 = 21;

/// Maximum locked memory of the watchdog and the critical section.
const MEMLOCK_MIN: Bytes = Bytes::mib(64);

/// Maximum size of a file of `/lib/modules` that is read: a distribution's `modules.dep` is under 1 MiB.
const MODULE_LIST_BYTES_MAX: u64 = 64 << 20;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// The main task works, but slower or with restrictions.
    Warn,
    /// The main task is impossible.
    Missing,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name: "dm-snapshot".
    pub name: &'static str,
    /// Its result.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What it is needed for.
    pub needed_for: &'static str,
    /// How to get it; None if nothing is lacking.
    pub remedy: Option<String>,
}

/// The results of all checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In order of importance.
    pub checks: Vec<Check>,
    /// False if any check is [`Status::Missing`].
    pub ready: bool,
}

impl Report {
    /// # Errors
    /// [`ErrorKind::Refused`](crate::base::ErrorKind::Refused), naming what is missing.
    pub fn verdict(&self) -> Result<()> {
        if self.ready {
            return Ok(());
        }
        let missing: Vec<&str> = self
            .checks
            .iter()
            .filter(|check| check.status == Status::Missing)
            .map(|check| check.name)
            .collect();
        Err(Error::refused(format!("this machine cannot copy a live volume yet: {}", missing.join(", ")))
            .state("nothing was changed")
            .next("do what the report says, then run 'tidemark doctor' again"))
    }
}

/// Examines this machine.
#[must_use]
pub fn run() -> Report {
    Host::this().examine()
}

/// The availability of a kernel module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    Loaded,
    BuiltIn,
    Available,
    Absent,
    /// The running kernel's module folder does not exist.
    NoFolder,
}

/// The machine's files; tests use another root.
struct Host {
    root: PathBuf,
    release: String,
}

impl Host {
    fn this() -> Self {
        let release = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self { root: PathBuf::from("/"), release }
    }

    fn examine(&self) -> Report {
        let mut checks = vec![self.privilege(), self.kernel()];
        checks.extend(self.modules());
        checks.extend([
            device_mapper(),
            self.flushes(),
            self.memory_head(),
            self.io_uring(),
            self.memlock(),
            self.memory(),
            directory("run-writable", "/run/tidemark", "the records of commands in progress"),
            directory("state-writable", "/var/lib/tidemark", "attached volumes, and the store by default"),
            store_space(),
            self.modprobe(),
        ]);
        let ready = checks.iter().all(|check| check.status != Status::Missing);
        Report { checks, ready }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn read(&self, path: &str) -> Option<String> {
        let path = self.path(path);
        let short = fs::metadata(&path).ok()?.len() <= MODULE_LIST_BYTES_MAX;
        short.then(|| fs::read_to_string(path).ok())?
    }

    fn has_capability(&self, number: u32) -> bool {
        let status = self.read("/proc/self/status").unwrap_or_default();
        effective_capabilities(&status).is_some_and(|all| all & (1 << number) != 0)
    }

    fn privilege(&self) -> Check {
        let needed_for = "every command that touches a device";
        if self.has_capability(CAP_SYS_ADMIN) {
            return ok("root", needed_for, "may administer the system (CAP_SYS_ADMIN)");
        }
        missing("root", needed_for, "may not administer the system", "run it with sudo, or from a root shell")
    }

    fn kernel(&self) -> Check {
        let needed_for = "LOOP_CONFIGURE, io_uring";
        let found = format!("Linux {}", self.release);
        match parse_release(&self.release) {
            Some(version) if version >= KERNEL_TESTED => ok("kernel", needed_for, &found),
            Some(version) if version >= KERNEL_OLDEST => warn(
                "kernel",
                needed_for,
                &found,
                "the tests run on 6.1 and 6.12: install a newer kernel from your distribution",
            ),
            _ => {
                missing("kernel", needed_for, &found, "install kernel 5.8 or newer, preferably 6.1 or newer")
            }
        }
    }

    fn modules(&self) -> Vec<Check> {
        [
            ("dm-mod", "dm_mod", "every device that Tidemark creates"),
            ("dm-snapshot", "dm_snapshot", "copy-on-write: the instant of a live volume"),
            ("loop", "loop", "a COW store in a file"),
        ]
        .into_iter()
        .map(|(name, module, needed_for)| match self.module(module) {
            Module::Loaded => ok(name, needed_for, "loaded"),
            Module::BuiltIn => ok(name, needed_for, "built into the kernel"),
            Module::Available => ok(name, needed_for, "available, loaded when it is needed"),
            Module::Absent => missing(
                name,
                needed_for,
                &format!("not part of the kernel {}", self.release),
                &generic_kernel_remedy(&self.read("/etc/os-release").unwrap_or_default()),
            ),
            Module::NoFolder => missing(
                name,
                needed_for,
                &format!("/lib/modules/{} does not exist", self.release),
                "reboot into the kernel that is installed (it was updated), or, in a container, mount the \
                 host's /lib/modules",
            ),
        })
        .collect()
    }

    /// `name` has underscores, as in /sys/module.
    fn module(&self, name: &str) -> Module {
        if self.path(&format!("/sys/module/{name}")).exists() {
            return Module::Loaded;
        }
        let folder = format!("/lib/modules/{}", self.release);
        let in_list =
            |file: &str| self.read(&format!("{folder}/{file}")).map(|text| lists_module(&text, name));
        match (in_list("modules.builtin"), in_list("modules.dep")) {
            (Some(true), _) => Module::BuiltIn,
            (_, Some(true)) => Module::Available,
            (None, None) => Module::NoFolder,
            _ => Module::Absent,
        }
    }

    fn is_usable(&self, module: &str) -> bool {
        matches!(self.module(module), Module::Loaded | Module::BuiltIn | Module::Available)
    }

    fn flushes(&self) -> Check {
        let (name, needed_for) = ("dm-switch", "cheap flushes and cheap new files during a copy");
        if self.is_usable("dm_switch") {
            return ok(name, needed_for, "available");
        }
        warn(
            name,
            needed_for,
            "not available: writes to fewer free ranges bypass the snapshot, and each flush of an \
             application costs more",
            &generic_kernel_remedy(&self.read("/etc/os-release").unwrap_or_default()),
        )
    }

    fn memory_head(&self) -> Check {
        let (name, needed_for) = ("zram", "the COW store's RAM head: cheap first writes");
        if self.is_usable("zram") {
            return ok(name, needed_for, "available");
        }
        if self.module("brd") == Module::Available {
            return ok(name, needed_for, "not available; brd is used instead");
        }
        warn(
            name,
            needed_for,
            "neither zram nor an unused brd is available",
            &generic_kernel_remedy(&self.read("/etc/os-release").unwrap_or_default()),
        )
    }

    fn io_uring(&self) -> Check {
        let (name, needed_for) =
            ("io_uring", "copying at full speed (without it, plain read and write calls are used)");
        let config = EngineConfig { buffer_count: 1, buffer_bytes: Bytes::kib(4) };
        let why = match open_engine(config, EnginePreference::Uring) {
            Ok(_) => return ok(name, needed_for, "works"),
            Err(error) => error.to_string(),
        };
        let setting = self.read("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
        let remedy = match setting.trim() {
            "1" => "run as root, or join the group of sysctl kernel.io_uring_group",
            "2" => "sysctl -w kernel.io_uring_disabled=0",
            _ => "in a container, allow io_uring in its seccomp profile; otherwise install a newer kernel",
        };
        warn(name, needed_for, &why, remedy)
    }

    fn memlock(&self) -> Check {
        let (name, needed_for) = ("memlock", "staying in memory while the origin is suspended");
        if self.has_capability(CAP_IPC_LOCK) {
            return ok(name, needed_for, "may lock memory (CAP_IPC_LOCK)");
        }
        match lockable(&self.read("/proc/self/limits").unwrap_or_default()) {
            Some(bytes) if bytes >= MEMLOCK_MIN => ok(name, needed_for, &format!("up to {bytes}")),
            Some(bytes) => warn(
                name,
                needed_for,
                &format!("only {bytes} may be locked"),
                "run as root, or raise 'ulimit -l'",
            ),
            None => warn(name, needed_for, "the kernel does not say how much may be locked", "run as root"),
        }
    }

    fn memory(&self) -> Check {
        let (name, needed_for) = ("memory", "the buffers of a copy");
        let (least, usual) = (memory::least(SegmentSize::default()), memory::USUAL);
        match memory::left(&Topology::at(&self.root), &self.root) {
            None => ok(name, needed_for, "no control group limits it"),
            Some(left) if left >= usual => {
                ok(name, needed_for, &format!("the control group may use {left} more"))
            }
            Some(left) => {
                let found = format!("the control group may use only {left} more");
                let remedy = format!("allow it {usual} (memory.max, systemd's MemoryMax=)");
                if left >= least {
                    warn(name, needed_for, &found, &remedy)
                } else {
                    missing(name, needed_for, &found, &remedy)
                }
            }
        }
    }

    fn modprobe(&self) -> Check {
        let (name, needed_for) = ("modprobe", "loading kernel modules when they are needed");
        if ["/usr/sbin/modprobe", "/sbin/modprobe", "/usr/bin/modprobe"]
            .iter()
            .any(|at| self.path(at).exists())
        {
            return ok(name, needed_for, "found");
        }
        let all = ["dm_mod", "dm_snapshot", "loop", "zram"];
        if all.iter().all(|module| matches!(self.module(module), Module::Loaded | Module::BuiltIn)) {
            return ok(name, needed_for, "not found, but every module is loaded");
        }
        warn(
            name,
            needed_for,
            "not found",
            "install the package kmod, or load dm-snapshot, loop and zram first",
        )
    }
}

fn device_mapper() -> Check {
    let (name, needed_for) = ("device-mapper", "every device that Tidemark creates");
    match Dm::open().and_then(|dm| dm.version()) {
        Ok((major, minor, patch)) => {
            ok(name, needed_for, &format!("interface version {major}.{minor}.{patch}"))
        }
        Err(error) => missing(
            name,
            needed_for,
            &error.to_string(),
            error
                .next_step()
                .unwrap_or("run as root; modprobe dm_mod; in a container, add /dev/mapper/control"),
        ),
    }
}

/// Checks the nearest existing ancestor of `path`: the rest is created when needed.
fn directory(name: &'static str, path: &str, needed_for: &'static str) -> Check {
    let at = Path::new(path).ancestors().find(|at| at.exists()).unwrap_or(Path::new("/"));
    match access(at, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => ok(name, needed_for, &format!("{} can be written", at.display())),
        Err(errno) => missing(
            name,
            needed_for,
            &format!("{} cannot be written: {}", at.display(), errno.desc()),
            match errno {
                nix::errno::Errno::EROFS => "remount it read-write, or mount a tmpfs over it",
                _ => "run as root",
            },
        ),
    }
}

fn store_space() -> Check {
    let (name, needed_for) = ("store-space", "a COW store at the default place");
    let space = TailPlace::resolve(None).and_then(|place| place.available());
    match space {
        Ok(free) if free >= TAIL_FIRST_MIN => {
            ok(name, needed_for, &format!("{free} free, in addition to a reserve of at most {RESERVE_MAX}"))
        }
        Ok(free) => warn(
            name,
            needed_for,
            &format!("only {free} free, in addition to the reserve"),
            "free space on the filesystem of /var/lib/tidemark, or name another place with --store",
        ),
        Err(error) => warn(name, needed_for, &error.to_string(), "name another place with --store"),
    }
}

fn ok(name: &'static str, needed_for: &'static str, found: &str) -> Check {
    Check { name, status: Status::Ok, found: found.to_owned(), needed_for, remedy: None }
}

fn warn(name: &'static str, needed_for: &'static str, found: &str, remedy: &str) -> Check {
    let remedy = Some(remedy.to_owned());
    Check { name, status: Status::Warn, found: found.to_owned(), needed_for, remedy }
}

fn missing(name: &'static str, needed_for: &'static str, found: &str, remedy: &str) -> Check {
    let remedy = Some(remedy.to_owned());
    Check { name, status: Status::Missing, found: found.to_owned(), needed_for, remedy }
}

/// The package that has the modules, by the distribution's ID.
fn generic_kernel_remedy(os_release: &str) -> String {
    let ids: Vec<&str> = os_release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches('"').split_ascii_whitespace())
        .collect();
    let any = |names: &[&str]| names.iter().any(|name| ids.contains(name));
    if any(&["ubuntu"]) {
        "apt-get install linux-generic (or linux-modules-extra-$(uname -r)), then reboot".to_owned()
    } else if any(&["debian"]) {
        "apt-get install linux-image-amd64 (the cloud kernels lack modules; arm64: linux-image-arm64), then \
         reboot"
            .to_owned()
    } else if any(&["rhel", "fedora", "centos"]) {
        "dnf install kernel-modules kernel-modules-extra, then reboot if the kernel changed".to_owned()
    } else if any(&["suse", "opensuse"]) {
        "zypper install kernel-default (instead of kernel-default-base), then reboot".to_owned()
    } else {
        "install your distribution's generic kernel with all its modules, then reboot".to_owned()
    }
}

/// Searches `modules.dep` or `modules.builtin`: a line has a path up to the first colon or its end, with the file name
/// up to `.ko`. The kernel treats `-` and `_` as equal.
fn lists_module(list: &str, name: &str) -> bool {
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or("");
        let file = path.rsplit('/').next().unwrap_or("");
        file.split_once(".ko").is_some_and(|(stem, _)| stem.replace('-', "_") == name)
    })
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let text = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(text.trim(), 16).ok()
}

/// The soft limit of "Max locked memory" in /proc/PID/limits.
fn lockable(limits: &str) -> Option<Bytes> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(Bytes(u64::MAX)),
        number => number.parse().ok().map(Bytes),
    }
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host { root: dir.path().to_owned(), release: "6.12.1-amd64".to_owned() };
        (dir, host)
    }

    fn find<'a>(checks: &'a [Check], name: &str) -> &'a Check {
        checks.iter().find(|check| check.name == name).unwrap()
    }

    #[test]
    fn modules_are_found_wherever_they_are() {
        let (_dir, host) = host(&[
            ("sys/module/loop/refcnt", ""),
            ("lib/modules/6.12.1-amd64/modules.builtin", "kernel/drivers/md/dm-mod.ko\n"),
            (
                "lib/modules/6.12.1-amd64/modules.dep",
                "kernel/drivers/md/dm-snapshot.ko.xz: kernel/drivers/md/dm-bufio.ko.xz\nkernel/x/zram.ko.zst:\n",
            ),
        ]);
        assert_eq!(host.module("loop"), Module::Loaded);
        assert_eq!(host.module("dm_mod"), Module::BuiltIn);
        assert_eq!(host.module("dm_snapshot"), Module::Available);
        assert_eq!(host.module("dm_bufio"), Module::Absent, "a need is no module of its own");
        assert_eq!(host.module("brd"), Module::Absent);
        assert!(host.modules().iter().all(|check| check.status == Status::Ok));
        assert_eq!(host.memory_head().status, Status::Ok);
        let (_dir, host) = self::host(&[("sys/module/dm_switch/refcnt", "")]);
        assert_eq!(host.flushes().status, Status::Ok);
    }

    #[test]
    fn what_is_missing_comes_with_a_remedy() {
        let (_dir, bare) = host(&[("proc/self/status", "CapEff:\t0000000000000000\n")]);
        for check in bare.modules().iter().chain([&bare.privilege()]) {
            assert_eq!(check.status, Status::Missing, "{check:?}");
            assert!(check.remedy.is_some());
        }
        assert!(find(&bare.modules(), "loop").remedy.as_deref().unwrap().contains("reboot"));
        let (_dir, cloud) = host(&[
            ("lib/modules/6.12.1-amd64/modules.dep", "kernel/drivers/block/loop.ko:\n"),
            ("etc/os-release", "NAME=x\nID=debian\n"),
        ]);
        let modules = cloud.modules();
        assert_eq!(find(&modules, "loop").status, Status::Ok);
        assert!(find(&modules, "dm-snapshot").remedy.as_deref().unwrap().contains("linux-image-amd64"));
        assert_eq!(cloud.memory_head().status, Status::Warn);
        assert_eq!(cloud.flushes().status, Status::Warn);
        assert_eq!(cloud.modprobe().status, Status::Warn);
    }

    #[test]
    fn versions_and_capabilities_are_read() {
        assert_eq!(parse_release("6.12.1-amd64"), Some((6, 12)));
        assert_eq!(parse_release("5.4"), Some((5, 4)));
        assert_eq!(parse_release("x"), None);
        assert_eq!(effective_capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        let limits = "Max locked memory         8388608              8388608              bytes     \n";
        assert_eq!(lockable(limits), Some(Bytes::mib(8)));
        assert_eq!(lockable("Max locked memory unlimited unlimited bytes"), Some(Bytes(u64::MAX)));
        assert_eq!(lockable(""), None);
        let (_dir, root) = host(&[("proc/self/status", "CapEff:\t000001ffffffffff\n")]);
        assert_eq!(root.privilege().status, Status::Ok);
        assert_eq!(root.memlock().status, Status::Ok);
        for (release, status) in [
            ("6.12.1", Status::Ok),
            ("5.10.0", Status::Warn),
            ("5.4.0", Status::Missing),
            ("", Status::Missing),
        ] {
            let host = Host { root: PathBuf::from("/nowhere"), release: release.to_owned() };
            assert_eq!(host.kernel().status, status, "{release}");
        }
    }

    #[test]
    fn this_machine_is_examined_without_a_change() {
        let report = run();
        assert_eq!(report.ready, report.verdict().is_ok());
        for check in &report.checks {
            assert_eq!(check.remedy.is_none(), check.status == Status::Ok, "{check:?}");
            assert!(!check.found.is_empty(), "{check:?}");
        }
        let mut names: Vec<_> = report.checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), report.checks.len(), "a name stands for one check");
    }
}
