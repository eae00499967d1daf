//! A case: its name, its needs, its disks, and one script for each boot.

use std::time::Duration;

use super::kernel::Kernel;

/// When a case runs on a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Depth {
    /// In every run of the tests.
    Routine,
    /// In full runs only, before a release.
    Full,
}

impl Depth {
    /// Its name for the scripts.
    pub fn name(self) -> &'static str {
        match self {
            Depth::Routine => "routine",
            Depth::Full => "full",
        }
    }
}

/// How QEMU treats the host's page cache for a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// The disk answers from the host's page cache; a flush is an fsync.
    Writeback,
    /// As above, but a flush costs nothing: for cases that do not test durability.
    Unsafe,
}

/// A disk with a raw file of its own. The guest finds it as `disk N`.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Its size in bytes.
    pub bytes: u64,
    /// What QEMU does with flushes.
    pub cache: Cache,
    /// Its logical and physical block size, in bytes; a user-mode kernel's disks have 512.
    pub block_bytes: u32,
    /// Its limits; None for the host's own speed. QEMU only.
    pub throttle: Option<Throttle>,
    /// Its latency, by dm-delay in the guest; None for the host's own latency.
    pub delay: Option<Delay>,
}

impl Disk {
    /// A disk as fast as the host, with 512-byte blocks, whose flushes cost nothing.
    pub fn fast_mib(mib: u64) -> Disk {
        Disk { bytes: mib << 20, cache: Cache::Unsafe, block_bytes: 512, throttle: None, delay: None }
    }
}

/// Delays of the requests to a disk: races that lose data show only on slow disks.
#[derive(Clone, Copy, Debug)]
pub struct Delay {
    /// Before a read, in milliseconds.
    pub read_ms: u32,
    /// Before a write, in milliseconds.
    pub write_ms: u32,
    /// Before a flush, in milliseconds.
    pub flush_ms: u32,
}

/// The clock source of a guest's kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// The HPET (under KVM its own clock). The kernel would find an emulated TSC unstable some time after the start and
    /// patch itself while the other processor runs, which the emulation does not always survive. So it is told in
    /// advance.
    #[default]
    Hpet,
    /// The TSC, declared reliable so that the kernel does not check it. For measurements: each reading of the HPET
    /// leaves the guest and takes QEMU's lock, several times per I/O, unlike a real clock.
    Tsc,
}

/// Limits of a disk; QEMU delays requests that exceed them.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    /// Of each direction, or of both together.
    pub bytes_per_second: u64,
    /// Whether reads and writes share the bytes.
    pub shared: bool,
    /// Reads and writes together; a flush is not counted.
    pub requests_per_second: u64,
}

/// When the power fails during a boot.
#[derive(Clone, Debug)]
pub struct Cut {
    /// The marker at which it fails (`marker NAME` or `cut_here NAME` in the script).
    pub marker: String,
    /// The maximum delay after the marker; the seed chooses the actual one.
    pub delay_ms_max: u64,
}

/// One boot of the guest.
#[derive(Clone, Debug)]
pub struct Phase {
    /// The script's file name in `vm-tests/cases`.
    pub script: String,
    /// QEMU is killed in this phase; otherwise the script's exit status ends it.
    pub cut: Option<Cut>,
}

/// The expected result of a case. All but the harness's own cases must pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Every script exits with 0 and the kernel does not complain.
    Pass,
    /// The harness's own: the script's exit status is reported as a failure.
    ScriptFailure(i32),
    /// The harness's own: a complaint in the kernel's log is detected.
    KernelComplaint,
    /// The harness's own: the guest is killed at its time limit.
    Hang,
    /// The harness's own: something that the case needs is missing, which is detected before anything boots.
    Skip,
}

/// A case. Made with [`Case::new`] and refined by the methods.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name: a word of `[a-z0-9_]`, the topic first.
    pub name: String,
    /// The kernels it runs on, and when: filled in from the placement table.
    pub kernels: Vec<(Kernel, Depth)>,
    /// Why it runs there, if that is not obvious.
    pub why: &'static str,
    /// Kernel modules it needs; loaded before the script starts.
    pub modules: Vec<String>,
    /// Commands of the host's root that the script calls.
    pub commands: Vec<String>,
    /// Programs of `vm-tests` that it calls; `scripts/setup` builds them beside the binary under test.
    pub tools: Vec<String>,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// The guest's memory in MiB.
    pub memory_mib: u32,
    /// The clock source of its kernel.
    pub clock: Clock,
    /// How long one boot may take.
    pub limit: Duration,
    /// Its boots, in order, with the same disks.
    pub phases: Vec<Phase>,
    /// Variables for the scripts.
    pub variables: Vec<(String, String)>,
    /// Its expected result.
    pub expect: Expect,
    /// Folders of the project that its scripts use, beside the shared ones.
    pub folders: Vec<String>,
    /// Whether it runs the binary under test. If not, a new binary is no reason to run it again.
    pub uses_binary: bool,
    /// Parts of kernel log lines that are not complaints in this case.
    pub tolerated: Vec<String>,
    /// A measurement: it runs only with `--bench`, then always, and never among the tests.
    pub bench: bool,
}

#[allow(dead_code, reason = "the vocabulary of the case lists; not every word is in use at all times")]
impl Case {
    /// A case with one boot that runs `script`.
    pub fn new(name: impl Into<String>, script: impl Into<String>) -> Case {
        Case {
            name: name.into(),
            kernels: Vec::new(),
            why: "",
            modules: Vec::new(),
            commands: Vec::new(),
            tools: Vec::new(),
            disks: Vec::new(),
            memory_mib: 768,
            clock: Clock::default(),
            limit: Duration::from_secs(120),
            phases: vec![Phase { script: script.into(), cut: None }],
            variables: Vec::new(),
            expect: Expect::Pass,
            folders: Vec::new(),
            uses_binary: true,
            tolerated: Vec::new(),
            bench: false,
        }
    }

    /// Needs these kernel modules, loaded before the script starts.
    pub fn modules(mut self, names: &[&str]) -> Case {
        self.modules.extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// Needs these commands on the host.
    pub fn commands(mut self, names: &[&str]) -> Case {
        self.commands.extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// Calls this program of `vm-tests`, whose source is in the folder `vm-tests/source`.
    pub fn tool(mut self, name: &str, source: &str) -> Case {
        self.tools.push(name.to_owned());
        self.uses_folder(&format!("vm-tests/{source}"))
    }

    /// One more disk, with 512-byte blocks.
    pub fn disk_mib(self, mib: u64) -> Case {
        self.disk(Disk::fast_mib(mib))
    }

    /// One more disk whose requests are delayed: dm-delay is put on it, and `disk N` is that device.
    pub fn delayed_disk_mib(self, mib: u64, delay: Delay) -> Case {
        self.modules(&["dm-delay"]).disk(Disk { delay: Some(delay), ..Disk::fast_mib(mib) })
    }

    /// One more disk.
    pub fn disk(mut self, disk: Disk) -> Case {
        self.disks.push(disk);
        self
    }

    /// One more disk, with 512-byte blocks, limited by `throttle`.
    pub fn throttled_disk_mib(self, mib: u64, throttle: Throttle) -> Case {
        self.disk(Disk { throttle: Some(throttle), ..Disk::fast_mib(mib) })
    }

    /// A measurement, not a test.
    pub fn bench(mut self) -> Case {
        self.bench = true;
        self
    }

    /// The guest's memory.
    pub fn memory_mib(mut self, mib: u32) -> Case {
        self.memory_mib = mib;
        self
    }

    /// The clock source of its kernel.
    pub fn clock(mut self, clock: Clock) -> Case {
        self.clock = clock;
        self
    }

    /// How long one boot may take.
    pub fn limit_seconds(mut self, seconds: u64) -> Case {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// A variable for the scripts.
    pub fn variable(mut self, name: &str, value: impl Into<String>) -> Case {
        self.variables.push((name.to_owned(), value.into()));
        self
    }

    /// Makes the power fail in the last boot added so far, up to `delay_ms_max` after `marker`.
    pub fn power_cut_at(mut self, marker: &str, delay_ms_max: u64) -> Case {
        let last = self.phases.last_mut().expect("a case is made with one phase");
        last.cut = Some(Cut { marker: marker.to_owned(), delay_ms_max });
        self
    }

    /// One more boot, with the same disks.
    pub fn then(mut self, script: impl Into<String>) -> Case {
        self.phases.push(Phase { script: script.into(), cut: None });
        self
    }

    /// For the harness's own cases: the expected result.
    pub fn expect(mut self, expect: Expect) -> Case {
        self.expect = expect;
        self
    }

    /// Its scripts use this folder of the project.
    pub fn uses_folder(mut self, path: &str) -> Case {
        self.folders.push(path.to_owned());
        self
    }

    /// Does not run the binary under test.
    pub fn without_binary(mut self) -> Case {
        self.uses_binary = false;
        self
    }

    /// A part of a kernel log line that this case provokes on purpose.
    pub fn tolerate(mut self, part: &str) -> Case {
        self.tolerated.push(part.to_owned());
        self
    }
}
