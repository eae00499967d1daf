//! Shows a running copy: a bar on a terminal, plain lines elsewhere, or JSON lines.
//!
//! All of it is talk: a failed write never disturbs the copy.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;

use super::meter::{Meter, duration_text, phase_text, store_text};
use super::output::{Output, json_line, set_bar, stderr_has_colour, talk};
use crate::base::{Bytes, clock};
use crate::copy::progress::{Event, Observer, Phase, StoreFill};

/// Between two plain lines of progress.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Between two JSON lines of progress.
const JSON_INTERVAL: Duration = Duration::from_secs(1);

/// Redraws of the bar per second.
const BAR_HZ: u8 = 5;

/// The observer that suits this run's output.
#[must_use]
pub fn observer(output: Output) -> Box<dyn Observer> {
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

/// A poisoned lock means that a thread panicked while drawing: what it holds is good enough to draw.
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

/// `--quiet`.
struct WarningsOnly;

impl Observer for WarningsOnly {
    fn event(&self, event: &Event) {
        if let Event::Warning { text } = event {
            talk(&format!("warning: {text}\n"));
        }
    }
}

/// Lines of text, every few seconds.
#[derive(Default)]
struct PlainLines(Mutex<(Meter, Option<Instant>)>);

impl Observer for PlainLines {
    fn event(&self, event: &Event) {
        let now = Instant::now();
        let mut state = lock(&self.0);
        state.0.take(event, now);
        match event {
            Event::Phase { phase, total } => {
                state.1 = Some(now);
                talk(&match total {
                    Some(total) => format!("{}: {total}\n", phase_text(*phase)),
                    None => format!("{}\n", phase_text(*phase)),
                });
            }
            Event::Progress { .. } => {
                if state.1.is_none_or(|last| now - last >= PLAIN_INTERVAL) {
                    state.1 = Some(now);
                    talk(&plain_line(&state.0));
                }
            }
            Event::Store(_) => {}
            Event::Instant { utc_ns, frozen, suspended } => talk(&instant_text(*frozen, *suspended, *utc_ns)),
            Event::Note { text } => talk(&format!("{text}\n")),
            Event::Warning { text } => talk(&format!("warning: {text}\n")),
        }
    }
}

/// "copying: 1.2 GiB of 10 GiB (12%), 400 MiB/s, 22 s left, store ...".
fn plain_line(meter: &Meter) -> String {
    let mut line = format!("{}: {}", meter.phase().map_or("working", phase_text), meter.done());
    if let Some(total) = meter.total() {
        line.push_str(&format!(" of {total}"));
    }
    if let Some(percent) = meter.percent() {
        line.push_str(&format!(" ({percent}%)"));
    }
    if let Some(rate) = meter.rate() {
        line.push_str(&format!(", {rate}/s"));
    }
    if let Some(left) = meter.left() {
        line.push_str(&format!(", {} left", duration_text(left)));
    }
    if let Some(fill) = meter.store() {
        line.push_str(&format!(", {}", store_text(fill)));
    }
    line.push('\n');
    line
}

/// A bar on the terminal, and beneath it a line for the store once there is one.
struct Bar {
    meter: Mutex<Meter>,
    bar: ProgressBar,
    store: Arc<Mutex<String>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(BAR_HZ));
        set_bar(Some(bar.clone()));
        Self { meter: Mutex::default(), bar, store: Arc::default() }
    }

    fn style(&self, meter: &Meter) -> ProgressStyle {
        let colour = stderr_has_colour();
        let first = match (meter.total().is_some(), colour) {
            (true, true) => "{prefix:>10.bold} [{bar:20.cyan/blue}] {percent:>3}% {wide_msg}",
            (true, false) => "{prefix:>10} [{bar:20}] {percent:>3}% {wide_msg}",
            (false, true) => "{prefix:>10.bold} {spinner} {wide_msg}",
            (false, false) => "{prefix:>10} {spinner} {wide_msg}",
        };
        let second = if meter.store().is_some() { "\n{store_fill}" } else { "" };
        let store = Arc::clone(&self.store);
        ProgressStyle::with_template(&format!("{first}{second}"))
            .expect("the templates are constants")
            .progress_chars("=> ")
            .with_key("store_fill", move |_: &ProgressState, out: &mut dyn fmt::Write| {
                // A String cannot refuse.
                let _ = out.write_str(&lock(&store));
            })
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

/// What stands to the right of the bar: 45 columns at most, so that it fits a terminal of 80.
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
        meter.take(event, Instant::now());
        match event {
            Event::Phase { phase, .. } => {
                self.bar.set_style(self.style(&meter));
                self.bar.set_prefix(phase_text(*phase));
                self.bar.reset();
                self.draw(&meter);
            }
            Event::Progress { .. } => self.draw(&meter),
            Event::Store(fill) => {
                let text = format!("{:>10} {}", "", store_text(fill));
                let first = std::mem::replace(&mut *lock(&self.store), text).is_empty();
                if first {
                    self.bar.set_style(self.style(&meter));
                }
                self.draw(&meter);
            }
            Event::Instant { utc_ns, frozen, suspended } => talk(&instant_text(*frozen, *suspended, *utc_ns)),
            Event::Note { text } => talk(&format!("{text}\n")),
            Event::Warning { text } => talk(&format!("warning: {text}\n")),
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
/// The line that says "preparing" waits for the next one: where preparing fails, nothing has begun,
/// and standard output stays empty.
struct JsonLines {
    output: Output,
    state: Mutex<JsonState>,
}

#[derive(Default)]
struct JsonState {
    meter: Meter,
    last: Option<Instant>,
    held: String,
}

/// What a JSON line adds to the event: the arithmetic that every reader would do again.
#[derive(Serialize)]
struct JsonEvent<'a> {
    #[serde(flatten)]
    event: &'a Event,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_bytes_per_second: Option<Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    store: Option<StoreFill>,
}

impl JsonLines {
    fn new(output: Output) -> Self {
        Self { output, state: Mutex::default() }
    }
}

impl Observer for JsonLines {
    fn event(&self, event: &Event) {
        let now = Instant::now();
        let mut state = lock(&self.state);
        state.meter.take(event, now);
        let is_progress = matches!(event, Event::Progress { .. });
        if let Event::Progress { done, total, .. } = event
            && Some(*done) != *total
        {
            if state.last.is_some_and(|last| now - last < JSON_INTERVAL) {
                return;
            }
            state.last = Some(now);
        }
        let meter = &state.meter;
        let (rate, left, store) = if is_progress {
            (meter.rate(), meter.left().map(|left| left.as_secs()), meter.store().copied())
        } else {
            (None, None, None)
        };
        let body = JsonEvent { event, rate_bytes_per_second: rate, left_seconds: left, store };
        let line = json_line("progress", body);
        if matches!(event, Event::Phase { phase: Phase::Prepare, .. }) {
            state.held = line;
            return;
        }
        // Progress is talk: with nobody left to read it the copy goes on.
        let _ = self.output.result_text(&(std::mem::take(&mut state.held) + &line));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_says_it_all() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let total = Some(Bytes::mib(100));
        meter.take(&Event::Phase { phase: Phase::Data, total }, start);
        let fill = StoreFill {
            used_bytes: Bytes::mib(1),
            total_bytes: Bytes::gib(1),
            exceptions: 7,
            ..StoreFill::default()
        };
        meter.take(&Event::Store(fill), start);
        let progress = Event::Progress { phase: Phase::Data, done: Bytes::mib(20), total };
        meter.take(&progress, start + Duration::from_secs(2));
        assert_eq!(
            plain_line(&meter),
            "copying: 20 MiB of 100 MiB (20%), 10 MiB/s, 8 s left, store 1 MiB of 1 GiB, 7 exceptions\n"
        );
        assert_eq!(bar_message(&meter), "20 MiB of 100 MiB, 10 MiB/s, 8 s left");
    }

    #[test]
    fn every_event_is_a_json_object() {
        for event in [
            Event::Phase { phase: Phase::Data, total: None },
            Event::Progress { phase: Phase::Data, done: Bytes(1), total: Some(Bytes(2)) },
            Event::Store(StoreFill::default()),
            Event::Instant { utc_ns: 1, frozen: Duration::ZERO, suspended: Duration::ZERO },
            Event::Note { text: "n".into() },
            Event::Warning { text: "w".into() },
        ] {
            let body =
                JsonEvent { event: &event, rate_bytes_per_second: None, left_seconds: None, store: None };
            let value: serde_json::Value = serde_json::from_str(&json_line("progress", body)).unwrap();
            assert_eq!(value["tidemark"], 1, "{value}");
            assert_eq!(value["type"], "progress", "{value}");
            assert!(value["event"].is_string(), "{value}");
        }
    }
}
