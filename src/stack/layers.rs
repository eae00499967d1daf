//! The devices that are inserted between an origin and its disks while it is copied.
//!
//! From the bottom: `real` has the origin's own table; `snap` is the snapshot of `real`, which the copier
//! reads; `preserve` is the `snapshot-origin` over `real`, to which the origin's table leads. A layer is a
//! value: its role, its name and its table. An insertion creates the layers in order, the lowest first; a removal
//! removes them in the reverse order. A new kind of layer is one more entry of [`layers`], and of [`StackNames`].

use crate::dm::naming::{ROLE_PRESERVE, ROLE_REAL, ROLE_SNAP, stack_device_name};
use crate::dm::{DeviceIdentity, Table, Template};

use super::model::StackRequest;

/// A device of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layer {
    /// What it is for: a `ROLE_` constant.
    pub role: &'static str,
    /// Its name.
    pub device: String,
    /// Its UUID.
    pub uuid: String,
    /// Its table.
    pub table: Template,
    /// Held open exclusively as long as the process lives, which shows every namespace that it is running.
    pub is_claimed: bool,
}

/// The names of a stack's devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackNames {
    /// Carries the origin's own table.
    pub real: String,
    /// The snapshot: the origin as it was at the instant.
    pub snap: String,
    /// Preserves originals before the first write.
    pub preserve: String,
}

impl StackNames {
    /// For job `id` over the device `origin`.
    #[must_use]
    pub fn new(origin: &str, id: &str) -> Self {
        Self {
            real: stack_device_name(origin, ROLE_REAL, id),
            snap: stack_device_name(origin, ROLE_SNAP, id),
            preserve: stack_device_name(origin, ROLE_PRESERVE, id),
        }
    }

    /// The names in an order in which the devices can be removed, each with its role.
    pub(super) fn removable(&self) -> [(&'static str, &str); 3] {
        [(ROLE_PRESERVE, &self.preserve), (ROLE_SNAP, &self.snap), (ROLE_REAL, &self.real)]
    }
}

/// The layers of the stack that `request` describes, bottom first.
pub(super) fn layers(request: &StackRequest, own_table: &Table, id: &str) -> Vec<Layer> {
    let StackNames { real, snap, preserve } = StackNames::new(&request.origin, id);
    let length = own_table.length().get();
    let chunk = request.chunk.sectors().get();
    let snapshot = Template::new(format!("0 {length} snapshot {{{real}}} {} PO {chunk}", request.cow));
    let preserving = Template::new(format!("0 {length} snapshot-origin {{{real}}}"));
    let layer = |role, device, table| Layer {
        role,
        device,
        uuid: DeviceIdentity::new(&request.origin, role, id).uuid(),
        table,
        is_claimed: role == ROLE_SNAP,
    };
    vec![
        layer(ROLE_REAL, real, own_table.into()),
        layer(ROLE_SNAP, snap, snapshot),
        layer(ROLE_PRESERVE, preserve, preserving),
    ]
}
