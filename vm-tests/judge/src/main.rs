//! An independent judge of Tidemark's use of device-mapper. It reads the kernel's devices with the crate
//! `devicemapper`, which shares no code with Tidemark, and compares.
//!
//!   dm-judge agree          the crate and dmsetup agree about every device; prints one fact per line
//!   dm-judge stack ORIGIN   the origin maps to devices of Tidemark, the facts about each are consistent, and nothing
//!   is suspended or has an inactive table; prints the chain of devices
//!
//! It only reads. The exit status is 1 if something differs; standard error has the reason.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use devicemapper::{DM, DevId, DeviceInfo, DmFlags, DmName, DmOptions};

/// While an application writes, two consecutive readings may differ.
const ATTEMPTS: usize = 50;

/// Part of the UUIDs of Tidemark's devices.
const OURS: &str = "TIDEMARK-";

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["agree"] => agree(),
        ["stack", origin] => stack(origin),
        _ => bail!("usage: dm-judge agree | dm-judge stack ORIGIN"),
    }
}

/// One device, as reported by the kernel.
struct Device {
    name: String,
    number: String,
    uuid: String,
    info: DeviceInfo,
    /// START LENGTH TARGET PARAMETERS, each.
    table: Vec<String>,
    status: Vec<String>,
    /// MAJOR:MINOR.
    beneath: BTreeSet<String>,
}

impl Device {
    fn read(dm: &DM, name: &DmName) -> Result<Self> {
        let id = DevId::Name(name);
        let lines = |options| -> Result<Vec<String>> {
            let (_, lines) =
                dm.table_status(&id, options).with_context(|| format!("reading the table of {name}"))?;
            let line = |(start, length, target, words): &(u64, u64, String, String)| {
                format!("{start} {length} {target} {words}").trim_end().to_owned()
            };
            Ok(lines.iter().map(line).collect())
        };
        let info = dm.device_info(&id).with_context(|| format!("looking at {name}"))?;
        let beneath =
            dm.table_deps(&id, DmOptions::default()).with_context(|| format!("what {name} stands on"))?;
        Ok(Self {
            name: name.to_string(),
            number: number(info.device()),
            uuid: info.uuid().map(ToString::to_string).unwrap_or_default(),
            table: lines(DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE))?,
            status: lines(DmOptions::default())?,
            beneath: beneath.into_iter().map(number).collect(),
            info,
        })
    }

    fn has(&self, flag: DmFlags) -> bool {
        self.info.flags().contains(flag)
    }

    /// The facts about the device, in the form of dmsetup's output below.
    fn facts(&self) -> Vec<String> {
        let Self { name, number, uuid, info, .. } = self;
        let suspended = if self.has(DmFlags::DM_SUSPEND) { "Suspended" } else { "Active" };
        let (open, events) = (info.open_count(), info.event_nr());
        let mut facts =
            vec![format!("info {name}: {number} open {open} events {events} '{uuid}' {suspended}")];
        facts.extend(self.table.iter().map(|line| format!("table {name}: {line}")));
        facts.extend(self.status.iter().map(|line| format!("status {name}: {line}")));
        facts.extend(self.beneath.iter().map(|number| format!("stands {name}: on {number}")));
        facts
    }
}

fn number(device: devicemapper::Device) -> String {
    format!("{}:{}", device.major, device.minor)
}

/// Every device, by name.
fn devices() -> Result<Vec<Device>> {
    let dm = DM::new().context("opening device-mapper")?;
    let listed = dm.list_devices().context("listing devices")?;
    let mut found = Vec::new();
    for (name, listed_number, _) in listed {
        let device = Device::read(&dm, &name)?;
        ensure!(device.number == number(listed_number), "{} has two numbers", device.name);
        found.push(device);
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

fn facts_by_crate() -> Result<BTreeSet<String>> {
    Ok(devices()?.iter().flat_map(Device::facts).collect())
}

fn dmsetup(words: &[&str]) -> Result<String> {
    let done = Command::new("dmsetup").args(words).output().context("starting dmsetup")?;
    ensure!(done.status.success(), "dmsetup {words:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

fn facts_by_dmsetup() -> Result<BTreeSet<String>> {
    let mut facts = BTreeSet::new();
    let columns = "name,major,minor,open,events,uuid,suspended";
    for line in dmsetup(&["info", "-c", "--noheadings", "--separator", "|", "-o", columns])?.lines() {
        let [name, major, minor, open, events, uuid, suspended] = line.split('|').collect::<Vec<_>>()[..]
        else {
            bail!("dmsetup info says '{line}'");
        };
        facts
            .insert(format!("info {name}: {major}:{minor} open {open} events {events} '{uuid}' {suspended}"));
    }
    for (kind, words) in [("table", ["table", "--showkeys"]), ("status", ["status", "--noflush"])] {
        for line in dmsetup(&words)?.lines() {
            let (name, line) =
                line.split_once(": ").with_context(|| format!("dmsetup {kind} says '{line}'"))?;
            // "NAME: " means that there is no table.
            if !line.trim().is_empty() {
                facts.insert(format!("{kind} {name}: {}", line.trim_end()));
            }
        }
    }
    for line in dmsetup(&["deps", "-o", "devno"])?.lines() {
        // NAME: 2 dependencies  : (252, 1) (252, 0)
        let (name, rest) = line.split_once(": ").with_context(|| format!("dmsetup deps says '{line}'"))?;
        for pair in rest.split('(').skip(1) {
            let number = pair.split(')').next().unwrap_or_default().replace(", ", ":");
            facts.insert(format!("stands {name}: on {number}"));
        }
    }
    Ok(facts)
}

/// Reads with the crate, with dmsetup, and with the crate again, until the two readings of the crate are equal.
fn agree() -> Result<()> {
    for _ in 0..ATTEMPTS {
        let (before, theirs, after) = (facts_by_crate()?, facts_by_dmsetup()?, facts_by_crate()?);
        if before != after {
            continue;
        }
        let only = |these: &BTreeSet<String>, those: &BTreeSet<String>| {
            these.difference(those).map(|fact| format!("  {fact}\n")).collect::<String>()
        };
        let (mine_only, theirs_only) = (only(&before, &theirs), only(&theirs, &before));
        if !mine_only.is_empty() || !theirs_only.is_empty() {
            bail!("they differ. devicemapper alone says:\n{mine_only}dmsetup alone says:\n{theirs_only}");
        }
        for fact in &before {
            println!("{fact}");
        }
        return Ok(());
    }
    bail!("the devices do not stand still: {ATTEMPTS} readings, each another one");
}

/// The devices named in a table line.
fn named(line: &str) -> BTreeSet<String> {
    let is_number = |word: &&str| {
        word.split_once(':').is_some_and(|(major, minor)| {
            [major, minor]
                .iter()
                .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
        })
    };
    line.split(' ').skip(3).filter(is_number).map(str::to_owned).collect()
}

fn stack(origin: &str) -> Result<()> {
    let all = devices()?;
    let mut wrong = Vec::new();
    for device in &all {
        let name = &device.name;
        let by_table: BTreeSet<String> = device.table.iter().flat_map(|line| named(line)).collect();
        if by_table != device.beneath {
            wrong
                .push(format!("{name}: its table names {by_table:?}, and it stands on {:?}", device.beneath));
        }
        let users = all.iter().filter(|user| user.beneath.contains(&device.number)).count();
        if usize::try_from(device.info.open_count()).is_ok_and(|open| open < users) {
            wrong.push(format!(
                "{name}: {users} devices stand on it, and it is open {} times",
                device.info.open_count()
            ));
        }
        if device.has(DmFlags::DM_SUSPEND) {
            wrong.push(format!("{name} is suspended"));
        }
        if device.has(DmFlags::DM_INACTIVE_PRESENT) {
            wrong.push(format!("{name} has a loaded table that is not active"));
        }
        for line in device.status.iter().filter(|line| line.split(' ').nth(2) == Some("snapshot")) {
            // USED/TOTAL METADATA, in sectors; or a word such as Invalid or Overflow.
            let used = line.split(' ').nth(3).and_then(|word| word.split_once('/'));
            let numbers = used.and_then(|(used, total)| Some((used.parse().ok()?, total.parse().ok()?)));
            if numbers.is_none_or(|(used, total): (u64, u64)| used > total) {
                wrong.push(format!("{name}: '{line}' is no snapshot that is valid"));
            }
        }
    }
    let top =
        all.iter().find(|device| device.name == origin).with_context(|| format!("there is no {origin}"))?;
    let mut way = Vec::new();
    go_down(top, &all, 0, &mut way)?;
    let ours: BTreeSet<&str> =
        all.iter().filter(|it| it.uuid.contains(OURS)).map(|it| it.name.as_str()).collect();
    if !way.iter().any(|(_, device)| ours.contains(device.name.as_str())) {
        wrong.push(format!("{origin} leads to no device of Tidemark"));
    }
    for (depth, device) in &way {
        let targets: BTreeSet<&str> = device.table.iter().filter_map(|line| line.split(' ').nth(2)).collect();
        let targets = targets.into_iter().collect::<Vec<_>>().join(", ");
        println!("{:indent$}{} ({}: {targets})", "", device.name, device.number, indent = depth * 2);
    }
    println!("of Tidemark: {}", ours.into_iter().collect::<Vec<_>>().join(" "));
    ensure!(wrong.is_empty(), "it does not fit together:\n  {}", wrong.join("\n  "));
    Ok(())
}

/// The device and all devices beneath it, each with its depth below the origin.
fn go_down<'all>(
    device: &'all Device,
    all: &'all [Device],
    depth: usize,
    way: &mut Vec<(usize, &'all Device)>,
) -> Result<()> {
    ensure!(depth <= all.len(), "{} stands on itself", device.name);
    way.push((depth, device));
    for below in all.iter().filter(|below| device.beneath.contains(&below.number)) {
        go_down(below, all, depth + 1, way)?;
    }
    Ok(())
}
