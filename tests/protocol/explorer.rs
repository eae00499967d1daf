//! Checks a property in every reachable state. The search is breadth first, so that the first counterexample is a
//! shortest one.
//!
//! The well-kept crate for this (`stateright`) brings a web server and threads; a queue and a map are enough here.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::hash::{BuildHasherDefault, Hasher};

use super::model::{Phase, Protocol, Step, World};

/// Upper bound for states, far above the model's number, so that an endless model fails.
const STATES_MAX: usize = 20_000_000;

/// Hashes a code with one multiplication: most of the time is spent on lookups.
#[derive(Default)]
struct CodeHasher(u64);

impl Hasher for CodeHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("a code is one number");
    }

    fn write_u64(&mut self, code: u64) {
        let product = u128::from(code).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        self.0 = u64::try_from(product >> 64 & u128::from(u64::MAX)).expect("64 bits remain");
    }
}

/// The result of an exploration.
pub struct Exploration {
    /// Reached states that are not final.
    pub states: usize,
    /// Number of ways to end with a named copy; of those with originals; and of those by a second process.
    pub named: usize,
    /// See [`Exploration::named`].
    pub named_with_originals: usize,
    /// See [`Exploration::named`].
    pub named_after_death: usize,
    /// Number of ways to end with a refused copy.
    pub refused: usize,
    /// The first fault, and the steps to it.
    pub counterexample: Option<(Fault, Vec<Step>)>,
}

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A named copy differs from the instant.
    Inexact,
    /// No step is possible, but the copy has not ended: writers wait forever.
    Stuck,
}

impl Exploration {
    /// The counterexample, one step per line.
    pub fn trace(&self) -> String {
        let mut text = String::new();
        if let Some((fault, steps)) = &self.counterexample {
            for (number, step) in steps.iter().enumerate() {
                writeln!(text, "{:3} {step}", number + 1).expect("a string takes what is written");
            }
            writeln!(text, "    {fault:?}").expect("a string takes what is written");
        }
        text
    }
}

/// Explores everything, or up to the first fault.
pub fn explore(protocol: &Protocol) -> Exploration {
    let start = protocol.start();
    let mut known: HashSet<u64, BuildHasherDefault<CodeHasher>> = HashSet::default();
    known.insert(start.code());
    // In order of discovery: each with its predecessor and the step from there.
    let mut worlds: Vec<(World, u32, Option<Step>)> = vec![(start, 0, None)];
    let mut found = Exploration {
        states: 0,
        named: 0,
        named_with_originals: 0,
        named_after_death: 0,
        refused: 0,
        counterexample: None,
    };
    let mut steps = Vec::new();
    let mut at = 0;
    while let Some((world, ..)) = worlds.get(at).copied() {
        protocol.steps(&world, &mut steps);
        if steps.is_empty() {
            found.counterexample = Some((Fault::Stuck, path(&worlds, at, None)));
            break;
        }
        for (step, next) in steps.drain(..) {
            found.count(&next);
            if next.phase() == Phase::Named && !next.is_exact(protocol) {
                found.counterexample = Some((Fault::Inexact, path(&worlds, at, Some(step))));
                break;
            }
            // A final state has no successors.
            if !matches!(next.phase(), Phase::Named | Phase::Refused) && known.insert(next.code()) {
                worlds.push((next, u32::try_from(at).expect("far fewer states are allowed"), Some(step)));
            }
        }
        if found.counterexample.is_some() {
            break;
        }
        assert!(worlds.len() <= STATES_MAX, "the model has more than {STATES_MAX} states");
        at += 1;
    }
    found.states = worlds.len();
    found
}

impl Exploration {
    fn count(&mut self, world: &World) {
        match world.phase() {
            Phase::Named => {
                self.named += 1;
                self.named_with_originals += usize::from(world.has_originals());
                self.named_after_death += usize::from(world.was_resumed());
            }
            Phase::Refused => self.refused += 1,
            _ => {}
        }
    }
}

fn path(worlds: &[(World, u32, Option<Step>)], mut at: usize, last: Option<Step>) -> Vec<Step> {
    let mut steps: Vec<Step> = last.into_iter().collect();
    while let (_, before, Some(step)) = worlds[at] {
        steps.push(step);
        at = usize::try_from(before).expect("a number of a state is an index");
    }
    steps.reverse();
    steps
}
