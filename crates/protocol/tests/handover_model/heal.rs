//! What becomes of a world in which nothing fails any more.
//!
//! All that was under way is lost; agents start again, work in flight succeeds,
//! and whoever waits asks. Of a host that is destroyed nothing more is heard, and
//! an operator decides on the other. The way is one, so it needs no search.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use limosa_protocol::handover::{ColdStart, Destination, Guest, Source};

use crate::ledger;
use crate::mutation::Mutation;
use crate::step::{self, Side, Step};
use crate::world::{Host, ThirdHost, Work, World};

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
            return match survivor(world) {
                None => world.has_ended() && has_exactly_one(world),
                Some(side) => ends_alone(world, side, mutation),
            };
        }
        silent_rounds += 1;
        step::take(world, Step::Silence(Side::Source), mutation);
        step::take(world, Step::Silence(Side::Destination), mutation);
    }
    false
}

/// The host that is left of a pair of which one is destroyed.
fn survivor(world: &World) -> Option<Side> {
    match (world.source.is_lost, world.destination.is_lost) {
        (true, _) => Some(Side::Destination),
        (_, true) => Some(Side::Source),
        _ => None,
    }
}

/// Whether its operator can have the VM there, if it holds a whole copy.
fn ends_alone(world: &mut World, side: Side, mutation: Option<Mutation>) -> bool {
    let (files, may_force) = match side {
        Side::Source => {
            let machine = world.source.machine.as_ref();
            (world.source.files, machine.is_some_and(Source::may_force_owner))
        }
        Side::Destination => {
            let machine = world.destination.machine.as_ref();
            (world.destination.files, machine.is_some_and(Destination::may_force_owner))
        }
    };
    if may_force {
        step::take(world, Step::Force(side), mutation);
        while let Some(next) = next_step(world) {
            step::take(world, next, mutation);
        }
    }
    !files || has_exactly_one(world)
}

fn next_step(world: &World) -> Option<Step> {
    if let Some(side) = survivor(world) {
        return next_step_alone(world, side);
    }
    if must_start(&world.source, Source::state) {
        return Some(Step::Restart(Side::Source));
    }
    if must_start(&world.destination, Destination::state) {
        return Some(Step::Restart(Side::Destination));
    }
    if world.source.work.is_some() {
        return Some(end_of_work(Side::Source, world.source.work, world));
    }
    if world.destination.work.is_some() {
        return Some(end_of_work(Side::Destination, world.destination.work, world));
    }
    if world.third == ThirdHost::Owns && world.has_given_way() {
        return Some(Step::ThirdStarts);
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

fn end_of_work(side: Side, work: Option<Work>, world: &World) -> Step {
    if ledger::is_refused(work, world) { Step::Lost(side) } else { Step::Done(side) }
}

/// The same on the only host there is.
fn next_step_alone(world: &World, side: Side) -> Option<Step> {
    fn of<M>(
        side: Side,
        host: &Host<M>,
        state: fn(&M) -> &'static str,
        guest: fn(&M) -> Guest,
    ) -> Option<Step> {
        if must_start(host, state) {
            return Some(Step::Restart(side));
        }
        if host.work.is_some() {
            return Some(Step::Done(side));
        }
        let machine = host.machine.as_ref()?;
        if host.qemu == Guest::Gone && !guest(machine).is_absent() {
            return Some(Step::Notice(side));
        }
        // Nothing more arrives: the link has been away for long enough.
        matches!(state(machine), "copying" | "asking" | "preparing").then_some(Step::GiveUp(side))
    }
    match side {
        Side::Source => of(side, &world.source, Source::state, Source::guest),
        Side::Destination => of(side, &world.destination, Destination::state, Destination::guest),
    }
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
    here + there + usize::from(world.third == ThirdHost::Runs) == 1
}
