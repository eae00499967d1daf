//! The threads that run in parallel with the copier: the monitor enlarges the store, the gate releases regions of the
//! origin and holds its writers, the rescue thread restores the origin if the copier cannot.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};

use super::live::Live;
use super::plan::CopyPlan;
use super::rescue::Rescue;
use crate::base::{Bytes, Result};
use crate::dm::Dm;
use crate::op::request::OnFull;
use crate::progress::{Event, Observer, StoreFill};
use crate::stack::gate::{Gate, GateEvent, GateReport, HoldPolicy};
use crate::store::{CowStore, Monitor, StoreEvent};

/// The threads that run in parallel with the copier, and the channel of their events.
pub(super) struct Workers {
    pub(super) monitor: Arc<Monitor>,
    pub(super) gate: Gate,
    pub(super) rescue: Rescue,
    store_events: Receiver<StoreEvent>,
    gate_events: Receiver<GateEvent>,
}

impl Workers {
    /// Starts the threads for the origin that `live` holds.
    ///
    /// # Errors
    /// If a thread cannot be started, or device-mapper cannot be opened.
    pub(super) fn start(plan: &CopyPlan, live: &Live) -> Result<Self> {
        let dm = Dm::open()?;
        let snap = live.stack().snap().to_owned();
        let (say, store_events) = mpsc::channel();
        let store: Arc<CowStore> = Arc::clone(live.store());
        let monitor = Arc::new(Monitor::start(
            store,
            move || dm.snapshot_status(&snap),
            // If the receiver is gone, the copy has ended.
            move |event| drop(say.send(event)),
        )?);
        let hold = (plan.request.on_full == OnFull::Hold).then(|| {
            let monitor = Arc::clone(&monitor);
            HoldPolicy { is_short: Box::new(move || monitor.is_short()), budget: plan.request.hold_budget }
        });
        let (say, gate_events) = mpsc::channel();
        let told = move |event| {
            // If the receiver is gone, the copy has ended.
            let _ = say.send(event);
        };
        let gate = Gate::start(live.stack(), live.stack().released(), hold, told)?;
        let rescue = Rescue::start(live, &gate)?;
        Ok(Self { monitor, gate, rescue, store_events, gate_events })
    }

    /// Passes on the events since the last call.
    pub(super) fn relay(&self, plan: &CopyPlan, observer: &dyn Observer) {
        for event in self.store_events.try_iter() {
            tell(observer, event);
        }
        for event in self.gate_events.try_iter() {
            tell_gate(plan, observer, event);
        }
    }

    /// Ends all threads; the gate before the monitor, because the gate calls the monitor.
    pub(super) fn stop(self, plan: &CopyPlan, observer: &dyn Observer) -> (StoreFill, GateReport) {
        self.relay(plan, observer);
        drop(self.rescue);
        let release = self.gate.stop();
        let fill = match Arc::try_unwrap(self.monitor) {
            Ok(monitor) => monitor.stop(),
            Err(monitor) => monitor.fill(),
        };
        for event in self.store_events.try_iter() {
            tell(observer, event);
        }
        (fill, release)
    }
}

fn tell_gate(plan: &CopyPlan, observer: &dyn Observer, event: GateEvent) {
    let regions = |bytes: Bytes| bytes.get().div_ceil(plan.region.get().max(1));
    match event {
        GateEvent::Released(report, stall) => observer.event(&Event::Regions {
            released: regions(report.released_bytes),
            total: regions(plan.origin.size),
            released_bytes: report.released_bytes,
            stall,
            longest_stall: report.longest_stall,
        }),
        GateEvent::Holding => observer.event(&Event::Warning {
            text: "the store is about to fill: writers of the origin are held until the copy has caught up"
                .to_owned(),
        }),
        GateEvent::HoldSpent => observer.event(&Event::Warning {
            text: "writers have been held for as long as --hold-budget allows: they continue, and the \
                   snapshot is lost when the store is full"
                .to_owned(),
        }),
    }
}

fn tell(observer: &dyn Observer, event: StoreEvent) {
    match event {
        StoreEvent::Fill(fill) => observer.event(&Event::Store(fill)),
        StoreEvent::Grown(grown) => observer
            .event(&Event::Note { text: format!("the store has grown from {} to {}", grown.from, grown.to) }),
        StoreEvent::Warning(text) => observer.event(&Event::Warning { text }),
    }
}
