//! Records the intents of a change in the record of its job.

use super::change::{Action, Change, IntentLog, Step};
use crate::base::Result;
use crate::format::state::ChangeRecord;
use crate::job::Job;

impl IntentLog for Job {
    fn intend(&mut self, change: &Change, index: usize) -> Result<()> {
        self.set_change(Some(change_record(change, index, false)))
    }

    fn intend_undo(&mut self, change: &Change, index: usize) -> Result<()> {
        self.set_change(Some(change_record(change, index, true)))
    }

    fn done(&mut self, _change: &Change) -> Result<()> {
        self.set_change(None)
    }
}

/// What the record holds while step `index` is being done or undone.
pub fn change_record(change: &Change, index: usize, undo: bool) -> ChangeRecord {
    let (frozen, suspended) = held_at(&change.steps, index, undo);
    ChangeRecord {
        name: change.name.clone(),
        step: index,
        undo,
        frozen,
        suspended,
        steps: change.steps.iter().map(|step| step.action.to_string()).collect(),
    }
}

/// What may be frozen and suspended while step `index` is being done or undone: whatever a step up to `index`
/// froze or suspended, and no step *before* `index` thawed or resumed.
fn held_at(steps: &[Step], index: usize, undo: bool) -> (Vec<String>, Vec<String>) {
    let mut frozen: Vec<String> = Vec::new();
    let mut suspended: Vec<String> = Vec::new();
    for (at, step) in steps.iter().enumerate().take(index.saturating_add(1)) {
        // The undo of the switch suspends the device once more.
        let undo_actions = if undo && at == index { step.undo.as_slice() } else { &[] };
        for action in std::iter::once(&step.action).chain(undo_actions) {
            match action {
                Action::Freeze { filesystems } => {
                    frozen.extend(filesystems.iter().map(|path| path.display().to_string()));
                }
                Action::Suspend { device, .. } => suspended.push(device.clone()),
                Action::Thaw { filesystems } if at < index => {
                    frozen.retain(|path| {
                        !filesystems.iter().any(|thawed| thawed.display().to_string() == *path)
                    });
                }
                Action::Resume { device, .. } if at < index => suspended.retain(|other| other != device),
                _ => {}
            }
        }
    }
    (frozen, suspended)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dm::Udev;

    #[test]
    fn intents_name_what_may_be_held() {
        let suspend = Action::Suspend { device: "d".into(), flush: true, lock_filesystem: false };
        let resume = Action::Resume { device: "d".into(), udev: Udev::None };
        let steps = vec![
            Step::new("freeze", Action::Freeze { filesystems: vec!["/m".into()] }),
            Step::new("suspend", suspend.clone()),
            Step::new("switch", resume.clone()).undo(suspend).undo(resume),
            Step::new("thaw", Action::Thaw { filesystems: vec!["/m".into()] }),
            Step::new("end", Action::Unguard),
        ];
        let held = |index, undo| {
            let (frozen, suspended) = held_at(&steps, index, undo);
            (frozen.len(), suspended.len())
        };
        assert_eq!(held(0, false), (1, 0));
        assert_eq!(held(1, false), (1, 1));
        assert_eq!(held(2, false), (1, 1));
        assert_eq!(held(3, false), (1, 0));
        assert_eq!(held(4, false), (0, 0));
        assert!(held(2, true).1 >= 1);
    }
}
