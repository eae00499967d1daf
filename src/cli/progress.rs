//! Shows a running copy: a bar on a terminal, plain lines elsewhere, or JSON lines.
//!
//! A failed write of progress never disturbs the copy.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;

use super::meter::{Meter, duration_text, origin_text, phase_text, position_text, released_text, store_text};
use super::output::{Output, json_line, set_bar, stderr_has_colour, write_stderr};
use crate::base::{Bytes, clock, escape};
use crate::progress::{Event, Observer, Phase, StoreFill};

/// Time between two plain lines of progress.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Time between two JSON lines of progress.
const JSON_INTERVAL: Duration = Duration::from_secs(1);

/// Redraws of the bar per second.
const BAR_HZ: u8 = 5;

/// The operation in progress, for a progress request by a signal: of each origin, if there are several.
static CURRENT: Mutex<Meters> = Mutex::new(Meters::new());

/// The meters of an operation by the paths of its origins; without a path if there is only one.
type Meters = BTreeMap<Option<String>, Meter>;

/// The observer for this run's output. What it sees is also kept for [`show_progress`].
#[must_use]
pub fn observer(output: Output) -> Box<dyn Observer> {
    *lock(&CURRENT) = Meters::from([(None, Meter::default())]);
    Box::new(RecordingObserver(display_for(output)))
}

/// As [`observer`], for an operation on several origins at the same time: there is no bar.
#[must_use]
pub fn observer_of_several(output: Output) -> Box<dyn Observer> {
    *lock(&CURRENT) = Meters::new();
    let shown: Box<dyn Observer> = if output.json {
        Box::new(JsonLines::new(output))
    } else if output.quiet {
        Box::new(WarningsOnly)
    } else {
        Box::new(PlainLines::default())
    };
    Box::new(RecordingObserver(shown))
}

/// Shows the progress of the current operation on request, even with `--quiet`.
pub fn show_progress(output: Output) {
    // The lock is not held during the write, which may be to a file on a frozen filesystem.
    let text: String = lock(&CURRENT)
        .iter()
        .filter_map(|(origin, meter)| match output.json {
            true => json_position(origin.as_deref(), meter),
            false => Some(labelled(origin.as_deref(), &plain_line(meter))),
        })
        .collect();
    if output.json {
        let _ = output.result_text(&text);
    } else {
        write_stderr(&text);
    }
}

/// None before the first phase.
fn json_position(origin: Option<&str>, meter: &Meter) -> Option<String> {
    let (done, total, segments) = (meter.done(), meter.total(), meter.segments());
    let event = Event::Progress { phase: meter.phase()?, done, total, segments };
    Some(json_line("progress", JsonEvent { origin, ..JsonEvent::with_figures(&event, meter) }))
}

/// `text` with the path of its origin in front, if there are several.
fn labelled(origin: Option<&str>, text: &str) -> String {
    origin.map_or_else(|| text.to_owned(), |origin| format!("{origin}: {text}"))
}

/// Keeps the state for [`show_progress`], and passes events on to another observer.
struct RecordingObserver(Box<dyn Observer>);

impl Observer for RecordingObserver {
    fn event(&self, event: &Event) {
        if let Some(meter) = lock(&CURRENT).get_mut(&None) {
            meter.update(event, Instant::now());
        }
        self.0.event(event);
    }

    fn event_of(&self, origin: &str, event: &Event) {
        lock(&CURRENT).entry(Some(origin.to_owned())).or_default().update(event, Instant::now());
        self.0.event_of(origin, event);
    }
}

fn display_for(output: Output) -> Box<dyn Observer> {
    if output.json {
        Box::new(JsonLines::new(output))
    } else if output.quiet {
        Box::new(WarningsOnly)
    } else if io::stderr().is_terminal() {
        Box::new(Bar::new())
    } else {
        Box::new(PlainLines::default())
    }
}

/// A poisoned lock means that a thread panicked while drawing: the state is good enough to draw.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn instant_text(frozen: Duration, suspended: Duration, utc_ns: u64) -> String {
    format!(
        "instant {}: filesystems frozen for {:.1} ms, origin suspended for {:.1} ms\n",
        clock::utc_text(utc_ns).unwrap_or_else(|| "at an unknown time".to_owned()),
        frozen.as_secs_f64() * 1000.0,
        suspended.as_secs_f64() * 1000.0
    )
}

/// The observer for `--quiet`.
struct WarningsOnly;

impl Observer for WarningsOnly {
    fn event(&self, event: &Event) {
        if let Event::Warning { text } = event {
            write_stderr(&escape::text(&format!("warning: {text}\n")));
        }
    }

    fn event_of(&self, origin: &str, event: &Event) {
        if let Event::Warning { text } = event {
            write_stderr(&escape::text(&format!("{origin}: warning: {text}\n")));
        }
    }
}

/// Lines of text, every few seconds.
#[derive(Default)]
struct PlainLines(Mutex<Shown>);

/// The meters of the origins by their paths (none if there is only one), each with the time of its last line.
type Shown = BTreeMap<Option<String>, (Meter, Option<Instant>)>;

impl PlainLines {
    fn show(&self, origin: Option<&str>, event: &Event) {
        let now = Instant::now();
        let mut states = lock(&self.0);
        let state = states.entry(origin.map(str::to_owned)).or_default();
        state.0.update(event, now);
        let text = match event {
            Event::Phase { phase, total } => {
                state.1 = Some(now);
                match total {
                    Some(total) => format!("{}: {total}\n", phase_text(*phase)),
                    None => format!("{}\n", phase_text(*phase)),
                }
            }
            Event::Progress { .. } if state.1.is_none_or(|last| now - last >= PLAIN_INTERVAL) => {
                state.1 = Some(now);
                plain_line(&state.0)
            }
            Event::Progress { .. } | Event::Store(_) | Event::Regions { .. } | Event::Latency { .. } => {
                return;
            }
            Event::Instant { utc_ns, frozen, suspended } => instant_text(*frozen, *suspended, *utc_ns),
            Event::Note { text } => format!("{text}\n"),
            Event::Warning { text } => format!("warning: {text}\n"),
        };
        write_stderr(&escape::text(&labelled(origin, &text)));
    }
}

impl Observer for PlainLines {
    fn event(&self, event: &Event) {
        self.show(None, event);
    }

    fn event_of(&self, origin: &str, event: &Event) {
        self.show(Some(origin), event);
    }
}

/// "copying: 1.2 GiB of 10 GiB (12%), 400 MiB/s, 22 s left, store ...".
fn plain_line(meter: &Meter) -> String {
    let mut line = position_text(&meter.position());
    for text in detail_lines(meter).into_iter().flatten() {
        line.push_str(&format!(", {text}"));
    }
    line.push('\n');
    line
}

/// The lines below the bar: the store, the releases, and the latency of applications, each once it is known.
/// Each fits a terminal of 80 columns.
type DetailLines = [Option<String>; 3];

/// Their keys in the bar's template.
const DETAIL_KEYS: [&str; 3] = ["store_fill", "releases", "origin"];

fn detail_lines(meter: &Meter) -> DetailLines {
    [meter.store().map(store_text), meter.released().map(released_text), meter.latency().map(origin_text)]
}

/// A bar on the terminal, with lines below it.
struct Bar {
    meter: Mutex<Meter>,
    bar: ProgressBar,
    detail_lines: Arc<Mutex<DetailLines>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(BAR_HZ));
        set_bar(Some(bar.clone()));
        Self { meter: Mutex::default(), bar, detail_lines: Arc::default() }
    }

    fn style(&self, meter: &Meter) -> ProgressStyle {
        let colour = stderr_has_colour();
        let first = match (meter.total().is_some(), colour) {
            (true, true) => "{prefix:>10.bold} [{bar:20.cyan/blue}] {percent:>3}% {wide_msg}",
            (true, false) => "{prefix:>10} [{bar:20}] {percent:>3}% {wide_msg}",
            (false, true) => "{prefix:>10.bold} {spinner} {wide_msg}",
            (false, false) => "{prefix:>10} {spinner} {wide_msg}",
        };
        let mut template = first.to_owned();
        for (key, text) in DETAIL_KEYS.iter().zip(&*lock(&self.detail_lines)) {
            if text.is_some() {
                template.push_str(&format!("\n{:>10} {{{key}}}", ""));
            }
        }
        let mut style = ProgressStyle::with_template(&template)
            .expect("the templates are constants")
            .progress_chars("=> ");
        for (at, key) in DETAIL_KEYS.into_iter().enumerate() {
            let detail_lines = Arc::clone(&self.detail_lines);
            style = style.with_key(key, move |_: &ProgressState, out: &mut dyn fmt::Write| {
                let lines = lock(&detail_lines);
                // Writing to a String does not fail.
                let _ = out.write_str(lines.get(at).and_then(Option::as_deref).unwrap_or_default());
            });
        }
        style
    }

    /// Updates the lines below the bar; a new line needs another template.
    fn draw_details(&self, meter: &Meter) {
        let new = detail_lines(meter);
        let old = std::mem::replace(&mut *lock(&self.detail_lines), new.clone());
        if old.iter().map(Option::is_some).ne(new.iter().map(Option::is_some)) {
            self.bar.set_style(self.style(meter));
        }
        self.draw(meter);
    }

    fn draw(&self, meter: &Meter) {
        match meter.total() {
            Some(total) => self.bar.set_length(total.get()),
            None => self.bar.unset_length(),
        }
        self.bar.set_position(meter.done().get());
        self.bar.set_message(bar_message(meter));
    }
}

/// The text to the right of the bar: at most 45 columns, so that it fits a terminal of 80.
fn bar_message(meter: &Meter) -> String {
    let mut parts = Vec::new();
    match meter.total() {
        Some(total) => parts.push(format!("{} of {total}", meter.done())),
        None if meter.done() > Bytes::ZERO => parts.push(meter.done().to_string()),
        None => {}
    }
    if let Some(rate) = meter.rate() {
        parts.push(format!("{rate}/s"));
    }
    if let Some(left) = meter.left() {
        parts.push(format!("{} left", duration_text(left)));
    }
    parts.join(", ")
}

impl Observer for Bar {
    fn event(&self, event: &Event) {
        let mut meter = lock(&self.meter);
        meter.update(event, Instant::now());
        match event {
            Event::Phase { phase, .. } => {
                self.bar.set_style(self.style(&meter));
                self.bar.set_prefix(phase_text(*phase));
                self.bar.reset();
                self.draw(&meter);
            }
            Event::Progress { .. } => self.draw(&meter),
            Event::Store(_) | Event::Regions { .. } | Event::Latency { .. } => self.draw_details(&meter),
            Event::Instant { utc_ns, frozen, suspended } => {
                write_stderr(&instant_text(*frozen, *suspended, *utc_ns))
            }
            Event::Note { text } => write_stderr(&escape::text(&format!("{text}\n"))),
            Event::Warning { text } => write_stderr(&escape::text(&format!("warning: {text}\n"))),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        set_bar(None);
    }
}

/// One JSON object per line.
///
/// The line "preparing" is deferred until the next one: if the preparation fails, nothing has begun, and
/// standard output stays empty.
struct JsonLines {
    output: Output,
    state: Mutex<JsonState>,
}

#[derive(Default)]
struct JsonState {
    origins: Shown,
    deferred: String,
}

/// What a JSON line adds to the event: figures that every reader would compute again.
#[derive(Serialize)]
struct JsonEvent<'a> {
    #[serde(flatten)]
    event: &'a Event,
    /// The origin, if several are copied.
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_bytes_per_second: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<StoreFill>,
}

impl<'a> JsonEvent<'a> {
    fn plain(event: &'a Event) -> Self {
        Self { event, origin: None, rate_bytes_per_second: None, left_seconds: None, store: None }
    }

    fn with_figures(event: &'a Event, meter: &Meter) -> Self {
        let (rate, left) = (meter.rate(), meter.left().map(|left| left.as_secs()));
        let store = meter.store().copied();
        Self { rate_bytes_per_second: rate, left_seconds: left, store, ..Self::plain(event) }
    }
}

impl JsonLines {
    fn new(output: Output) -> Self {
        Self { output, state: Mutex::default() }
    }

    fn show(&self, origin: Option<&str>, event: &Event) {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let (meter, last) = state.origins.entry(origin.map(str::to_owned)).or_default();
        meter.update(event, now);
        if let Event::Progress { done, total, .. } = event
            && Some(*done) != *total
        {
            if last.is_some_and(|last| now - last < JSON_INTERVAL) {
                return;
            }
            *last = Some(now);
        }
        let body = match event {
            Event::Progress { .. } => JsonEvent::with_figures(event, meter),
            _ => JsonEvent::plain(event),
        };
        let line = json_line("progress", JsonEvent { origin, ..body });
        if matches!(event, Event::Phase { phase: Phase::Prepare, .. }) {
            state.deferred = line;
            return;
        }
        // A failed write is ignored: without a reader the copy continues.
        let _ = self.output.result_text(&(std::mem::take(&mut state.deferred) + &line));
    }
}

impl Observer for JsonLines {
    fn event(&self, event: &Event) {
        self.show(None, event);
    }

    fn event_of(&self, origin: &str, event: &Event) {
        self.show(Some(origin), event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::SegmentCount;

    #[test]
    fn a_plain_line_says_it_all() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let total = Some(Bytes::mib(100));
        meter.update(&Event::Phase { phase: Phase::Data, total }, start);
        let fill = StoreFill {
            used_bytes: Bytes::mib(1),
            total_bytes: Bytes::gib(1),
            ram_used_bytes: Bytes::mib(1),
            exceptions: 7,
            ..StoreFill::default()
        };
        let segments = Some(SegmentCount { done: 20, total: 100 });
        let progress = Event::Progress { phase: Phase::Data, done: Bytes::mib(20), total, segments };
        meter.update(&progress, start + Duration::from_secs(2));
        let copying = "copying: 20 MiB of 100 MiB (20%), 10 MiB/s, 8 s left, 20 of 100 segments";
        assert_eq!(plain_line(&meter), format!("{copying}\n"));
        meter.update(&Event::Store(fill), start);
        let store = "store 1 MiB of 1 GiB (RAM 1 MiB, disk 0 B), 7 exceptions, 0/s";
        assert_eq!(plain_line(&meter), format!("{copying}, {store}\n"));
        let (origin, rate) = (Some(Duration::from_millis(2)), Some(Bytes::mib(10)));
        meter.update(&Event::Latency { origin, baseline: None, rate }, start);
        assert_eq!(
            plain_line(&meter),
            format!("{copying}, {store}, origin 2.0 ms per I/O, copier at most 10 MiB/s\n")
        );
        assert_eq!(bar_message(&meter), "20 MiB of 100 MiB, 10 MiB/s, 8 s left");
    }

    #[test]
    fn every_event_is_a_json_object() {
        for event in [
            Event::Phase { phase: Phase::Data, total: None },
            Event::Progress { phase: Phase::Data, done: Bytes(1), total: Some(Bytes(2)), segments: None },
            Event::Store(StoreFill::default()),
            Event::Latency { origin: None, baseline: None, rate: None },
            Event::Instant { utc_ns: 1, frozen: Duration::ZERO, suspended: Duration::ZERO },
            Event::Note { text: "n".into() },
            Event::Warning { text: "w".into() },
        ] {
            let line = json_line("progress", JsonEvent::plain(&event));
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(value["tidemark"], 1, "{value}");
            assert_eq!(value["type"], "progress", "{value}");
            assert!(value["event"].is_string(), "{value}");
        }
    }

    #[test]
    fn numbers_are_named_in_json() {
        let value = |event: Event| -> serde_json::Value { serde_json::to_value(event).unwrap() };
        let segments = Some(SegmentCount { done: 3, total: 8 });
        let progress = Event::Progress { phase: Phase::Data, done: Bytes(1), total: None, segments };
        assert_eq!(
            value(progress),
            serde_json::json!({
                "event": "progress", "phase": "data", "done": 1, "total": null,
                "segments_done": 3, "segments_total": 8,
            })
        );
        let (stall, longest_stall) = (Duration::from_millis(250), Duration::from_millis(500));
        assert_eq!(
            value(Event::Regions { released: 1, total: 4, released_bytes: Bytes(64), stall, longest_stall }),
            serde_json::json!({
                "event": "regions", "released": 1, "total": 4, "released_bytes": 64,
                "stall_seconds": 0.25, "longest_stall_seconds": 0.5,
            })
        );
        assert_eq!(
            value(Event::Latency { origin: Some(stall), baseline: None, rate: Some(Bytes(7)) }),
            serde_json::json!({
                "event": "latency", "origin_seconds": 0.25, "baseline_seconds": null,
                "allowed_bytes_per_second": 7,
            })
        );
        let fill = value(Event::Store(StoreFill { ram_used_bytes: Bytes(5), ..StoreFill::default() }));
        assert_eq!((&fill["ram_used_bytes"], &fill["exceptions_per_second"]), (&5.into(), &0.into()));
    }
}
