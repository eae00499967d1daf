//! An exhaustive exploration of the argument for exactness: with every order of steps, and with a death of the process
//! and a loss of the store at any moment, a copy that has its name equals the instant. Each rule is needed: without it
//! the explorer finds a wrong copy, or a writer that waits forever.
//!
//! `cargo test --test protocol -- --nocapture` shows the number of states, and the counterexamples.

#![allow(clippy::print_stdout, reason = "what was explored is shown with --nocapture")]

#[path = "protocol/explorer.rs"]
mod explorer;
#[path = "protocol/model.rs"]
mod model;

use explorer::{Exploration, Fault, explore};
use model::{CHUNKS, Protocol, Rule, Step};

const NONE_FREE: [bool; CHUNKS] = [false; CHUNKS];

fn show(what: &str, found: &Exploration) {
    println!(
        "{what:22} {:9} states {:7} named ({} with originals, {} by a second process) {:7} refused\n{}",
        found.states,
        found.named,
        found.named_with_originals,
        found.named_after_death,
        found.refused,
        found.trace()
    );
}

/// Explores the variant without `rule`, which must have this fault, and returns the steps to it.
fn without(rule: Rule, fault: Fault) -> Vec<Step> {
    let found = explore(&Protocol { broken: Some(rule), free: NONE_FREE });
    show(&format!("{rule:?}"), &found);
    let (seen, steps) = found.counterexample.expect("every rule is needed");
    assert_eq!(seen, fault, "{rule:?}");
    steps
}

fn position(steps: &[Step], wanted: impl Fn(&Step) -> bool) -> usize {
    steps.iter().position(wanted).unwrap_or_else(|| panic!("no such step in {steps:?}"))
}

#[test]
fn a_copy_that_has_its_name_is_the_instant() {
    for (what, free) in [("everything in use", NONE_FREE), ("a chunk is free", [false, true, false])] {
        let found = explore(&Protocol { broken: None, free });
        show(what, &found);
        assert!(found.counterexample.is_none(), "{what}:\n{}", found.trace());
        // Otherwise nothing would be proved.
        assert!(found.named > 0 && found.named_with_originals > 0 && found.named_after_death > 0);
        assert!(found.refused > 0);
    }
}

#[test]
fn a_write_that_overtakes_its_original_spoils_the_copy() {
    let steps = without(Rule::PreservedFirst, Fault::Inexact);
    let reach = position(&steps, |step| matches!(step, Step::Reach(_)));
    assert!(!steps[..reach].iter().any(|step| matches!(step, Step::Commit(_))), "{steps:?}");
}

#[test]
fn an_exception_ahead_of_its_original_spoils_the_copy() {
    let steps = without(Rule::OriginalBeforeException, Fault::Inexact);
    assert!(!steps.iter().any(|step| matches!(step, Step::Store(_))), "{steps:?}");
}

#[test]
fn originals_that_are_read_too_early_spoil_the_copy() {
    let steps = without(Rule::OriginalsAfterReads, Fault::Inexact);
    let list = position(&steps, |step| *step == Step::List);
    assert!(steps[list..].iter().any(|step| matches!(step, Step::Read(_))), "{steps:?}");
}

#[test]
fn an_original_that_is_left_out_spoils_the_copy() {
    let steps = without(Rule::AllOriginals, Fault::Inexact);
    position(&steps, |step| matches!(step, Step::Commit(_)));
    assert!(!steps.iter().any(|step| matches!(step, Step::Overlay(_))), "{steps:?}");
}

#[test]
fn a_region_that_is_released_before_it_is_read_spoils_the_copy() {
    let steps = without(Rule::ReleasedAfterRead, Fault::Inexact);
    let release = position(&steps, |step| matches!(step, Step::Release(_)));
    assert!(steps[release..].iter().any(|step| matches!(step, Step::Read(_))), "{steps:?}");
}

#[test]
fn a_region_that_is_released_before_it_is_noted_is_read_again_after_a_death() {
    let steps = without(Rule::ReleasedAfterNote, Fault::Inexact);
    position(&steps, |step| *step == Step::Resume);
}

#[test]
fn a_region_that_is_preserved_again_after_its_release_spoils_the_copy() {
    let steps = without(Rule::ReleasedForGood, Fault::Inexact);
    let release = position(&steps, |step| matches!(step, Step::Release(_)));
    let resume = position(&steps, |step| *step == Step::Resume);
    assert!(release < resume, "{steps:?}");
    // New content is preserved as if it were the original.
    assert!(steps[release..].iter().any(|step| matches!(step, Step::Reach(_))), "{steps:?}");
    assert!(steps[resume..].iter().any(|step| matches!(step, Step::Overlay(_))), "{steps:?}");
}

#[test]
fn a_table_that_is_replaced_under_a_write_spoils_the_copy() {
    let steps = without(Rule::Drained, Fault::Inexact);
    // A write waits for its original to be stored, while another write, after the release, changes it.
    let release = position(&steps, |step| matches!(step, Step::Release(_)));
    assert!(steps[..release].iter().any(|step| matches!(step, Step::Write(_))), "{steps:?}");
    let reach = position(&steps, |step| matches!(step, Step::Reach(_)));
    assert!(reach > release && steps[reach..].iter().any(|step| matches!(step, Step::Store(_))), "{steps:?}");
}

#[test]
fn a_note_ahead_of_its_segment_spoils_a_copy_that_goes_on() {
    let steps = without(Rule::NotedAfterWritten, Fault::Inexact);
    position(&steps, |step| *step == Step::Resume);
}

#[test]
fn a_segment_that_is_copied_again_after_its_release_spoils_the_copy() {
    let steps = without(Rule::NotedIsKept, Fault::Inexact);
    position(&steps, |step| *step == Step::Resume);
}

#[test]
fn originals_that_are_not_laid_anew_spoil_a_copy_that_goes_on() {
    let steps = without(Rule::OriginalsAnew, Fault::Inexact);
    position(&steps, |step| *step == Step::Resume);
}

#[test]
fn a_write_of_a_dead_process_that_lands_late_spoils_the_copy() {
    let steps = without(Rule::NothingUnderWay, Fault::Inexact);
    let resume = position(&steps, |step| *step == Step::Resume);
    assert!(steps[resume..].iter().any(|step| matches!(step, Step::Land(_))), "{steps:?}");
}

#[test]
fn a_snapshot_that_is_not_seen_valid_at_the_end_spoils_the_copy() {
    let steps = without(Rule::ValidAtTheEnd, Fault::Inexact);
    position(&steps, |step| *step == Step::Lose);
}

/// The check at the end covers it. A refusal at once only spares the user the rest of the copy.
#[test]
fn a_snapshot_that_is_lost_before_a_resume_is_seen_at_the_end_at_the_latest() {
    let found = explore(&Protocol { broken: Some(Rule::ValidOnResume), free: NONE_FREE });
    show("ValidOnResume", &found);
    assert!(found.counterexample.is_none(), "{}", found.trace());
}

#[test]
fn what_is_in_use_and_taken_for_free_spoils_the_copy() {
    let steps = without(Rule::FreeIsFree, Fault::Inexact);
    assert!(!steps.iter().any(|step| matches!(step, Step::Commit(0))), "{steps:?}");
}

#[test]
fn without_a_watchdog_writers_wait_for_ever() {
    let steps = without(Rule::WatchdogResumes, Fault::Stuck);
    position(&steps, |step| matches!(step, Step::Die(_)));
}
