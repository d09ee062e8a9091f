//! What becomes of a world in which nothing fails any more.
//!
//! All that was under way is lost; agents start again, work in flight succeeds,
//! and whoever waits asks. The way is one, so it needs no search.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use limosa_protocol::handover::{ColdStart, Destination, Guest, Source};

use crate::mutation::Mutation;
use crate::step::{self, Side, Step};
use crate::world::{Host, World};

/// Most steps until a world must have come to rest.
const HEALING_STEPS_MAX: usize = 300;
/// Rounds of silence on both sides that change nothing before it is at rest.
const SILENT_ROUNDS_MAX: usize = 3;

thread_local! {
    /// Ends already known, by the world's digest.
    static KNOWN: RefCell<HashMap<u64, bool>> = RefCell::default();
}

/// Whether the world ends with exactly one host that runs the VM or may start
/// it, and with both hosts knowing so.
pub(crate) fn heals(world: &World, mutation: Option<Mutation>) -> bool {
    let mut healing = world.clone();
    healing.said = BTreeSet::new();
    // Only what can no longer happen differs.
    healing.budget = crate::world::Budget::WRONG_OPERATOR;
    let mut hasher = DefaultHasher::new();
    (&healing, mutation).hash(&mut hasher);
    let digest = hasher.finish();
    if let Some(known) = KNOWN.with_borrow(|known| known.get(&digest).copied()) {
        return known;
    }
    let ends_well = comes_to_rest(&mut healing, mutation);
    KNOWN.with_borrow_mut(|known| known.insert(digest, ends_well));
    ends_well
}

fn comes_to_rest(world: &mut World, mutation: Option<Mutation>) -> bool {
    let mut silent_rounds = 0;
    for _ in 0..HEALING_STEPS_MAX {
        if let Some(next) = next_step(world) {
            if let Step::Deliver(message) = next {
                world.said.remove(&message);
            }
            step::take(world, next, mutation);
            continue;
        }
        if world.has_ended() || silent_rounds == SILENT_ROUNDS_MAX {
            return world.has_ended() && has_exactly_one(world);
        }
        silent_rounds += 1;
        step::take(world, Step::Silence(Side::Source), mutation);
        step::take(world, Step::Silence(Side::Destination), mutation);
    }
    false
}

fn next_step(world: &World) -> Option<Step> {
    if must_start(&world.source, Source::state) {
        return Some(Step::Restart(Side::Source));
    }
    if must_start(&world.destination, Destination::state) {
        return Some(Step::Restart(Side::Destination));
    }
    if world.source.work.is_some() {
        return Some(Step::Done(Side::Source));
    }
    if world.destination.work.is_some() {
        return Some(Step::Done(Side::Destination));
    }
    let source = world.source.machine.as_ref()?;
    let destination = world.destination.machine.as_ref()?;
    if world.source.qemu == Guest::Gone && !source.guest().is_absent() {
        return Some(Step::Notice(Side::Source));
    }
    if world.destination.qemu == Guest::Gone && !destination.guest().is_absent() {
        return Some(Step::Notice(Side::Destination));
    }
    if let Some(message) = world.said.first() {
        return Some(Step::Deliver(*message));
    }
    if step::all_can_arrive(world) {
        return Some(Step::AllArrives);
    }
    (source.state() == "copying").then_some(Step::GiveUp(Side::Source))
}

/// Its agent is down, or has stopped trusting its store.
fn must_start<M>(host: &Host<M>, state: fn(&M) -> &'static str) -> bool {
    host.machine.as_ref().is_none_or(|machine| state(machine) == "unknown-durability")
}

fn has_exactly_one(world: &World) -> bool {
    let has = |qemu: Guest, files: bool, start: Option<ColdStart>| {
        // Also one that lives, stopped: its owner's operator may let it run.
        let may_start = files && start == Some(ColdStart::Allowed);
        usize::from(qemu == Guest::Running || may_start)
    };
    let (source, destination) = (&world.source, &world.destination);
    let here = has(source.qemu, source.files, source.machine.as_ref().map(Source::cold_start));
    let there = has(
        destination.qemu,
        destination.files,
        destination.machine.as_ref().map(Destination::cold_start),
    );
    here + there == 1
}
