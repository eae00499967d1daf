//! Beside the copier: the monitor lets the store grow, the gate releases regions of the origin and holds it, the rescue
//! puts the origin back where the copier cannot.

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

/// The threads that work while the copier does, and what they tell.
pub(super) struct Workers {
    pub(super) monitor: Arc<Monitor>,
    pub(super) gate: Gate,
    pub(super) rescue: Rescue,
    store_events: Receiver<StoreEvent>,
    gate_events: Receiver<GateEvent>,
}

impl Workers {
    /// Starts them for the origin that `live` holds.
    ///
    /// # Errors
    /// Where a thread cannot be had, or device-mapper cannot be opened.
    pub(super) fn start(plan: &CopyPlan, live: &Live) -> Result<Self> {
        let dm = Dm::open()?;
        let snap = live.stack().snap().to_owned();
        let (say, store_events) = mpsc::channel();
        let store: Arc<CowStore> = Arc::clone(live.store());
        let monitor = Arc::new(Monitor::start(
            store,
            move || dm.snapshot_status(&snap),
            // Without a receiver the copy is over.
            move |event| drop(say.send(event)),
        )?);
        let hold = (plan.request.on_full == OnFull::Hold).then(|| {
            let monitor = Arc::clone(&monitor);
            HoldPolicy { is_short: Box::new(move || monitor.is_short()), budget: plan.request.hold_budget }
        });
        let (say, gate_events) = mpsc::channel();
        let told = move |event| {
            // Without a receiver the copy is over.
            let _ = say.send(event);
        };
        let gate = Gate::start(live.stack(), live.stack().released(), hold, told)?;
        let rescue = Rescue::start(live, &gate)?;
        Ok(Self { monitor, gate, rescue, store_events, gate_events })
    }

    /// Passes on what they have told since the last call.
    pub(super) fn relay(&self, plan: &CopyPlan, observer: &dyn Observer) {
        for event in self.store_events.try_iter() {
            tell(observer, event);
        }
        for event in self.gate_events.try_iter() {
            tell_gate(plan, observer, event);
        }
    }

    /// Ends all of them; the gate before the monitor, which asks the monitor.
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
