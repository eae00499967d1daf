//! The list of cases, one module per topic. The script of a case is `NAME.sh` in this folder. Scripts share code in
//! `lib*.sh` files, which they source from `$REPO/vm-tests/cases`.

mod bench;
mod copy;
mod free;
mod freeze;
mod golden;
mod harness;
mod hooks;
mod placement;
mod snapshot;
mod soak;
mod stack;
mod store;

use crate::harness::Case;

/// Every case, in the order in which they run.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(harness::cases());
    cases.extend(golden::cases());
    cases.extend(copy::cases());
    cases.extend(free::cases());
    cases.extend(freeze::cases());
    cases.extend(stack::cases());
    cases.extend(store::cases());
    cases.extend(snapshot::cases());
    cases.extend(hooks::cases());
    cases.extend(soak::cases());
    cases.extend(bench::cases());
    placement::place(&mut cases);
    cases
}
