//! The handover, checked in every order of events: stateright walks through all
//! worlds that the real state machines of `limosa_protocol::handover` can get into.
//!
//! ```text
//! source machine, its store, its QEMU      ◄─ what was ever said may arrive now, ─►
//! destination machine, its store, its QEMU    later, again, or never
//!
//! at every step: an agent crashes (a write, a start, a removal in flight done or
//! not), a host restarts, QEMU dies, a sync fails, somebody cancels, an operator
//! takes the VM over
//! ```
//!
//! **Bounds.** None for faults: messages lost, repeated, late and in any order,
//! crashes, restarts of hosts, deaths of QEMU, failed syncs and cancels may happen
//! without end. A switchover is tried again twice, or once beside an operator or a host that
//! is destroyed; one operator decides, once ([`world::Budget`]).

#![expect(clippy::print_stdout, reason = "sizes and times of the model are its result")]
#![expect(clippy::disallowed_types, reason = "only the time of the search is looked at")]

mod heal;
mod ledger;
mod mutation;
mod perform;
mod step;
mod world;

use std::time::Instant;

use mutation::Mutation;
use stateright::{Checker, HasDiscoveries, Model, Property};
use step::Step;
use world::{Budget, MovingVm, ThirdHost, World};

/// What is checked: the protocol as it is, or with a planted bug.
#[derive(Debug, Clone, Copy)]
struct Handover {
    mutation: Option<Mutation>,
    budget: Budget,
}

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        [MovingVm::Runs, MovingVm::IsOff].map(|vm| World::new(self.budget, vm)).into()
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        step::possible(world, self.mutation, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        step::take(&mut next, step, self.mutation);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(TWO_RUN, |_, world: &World| world.running_count() <= 1),
            Property::always("only the owner writes a disk", |_, world: &World| {
                world.only_owner_writes()
            }),
            Property::always("nobody runs an old copy", |_, world: &World| !world.stale_run),
            Property::always("a whole copy is always there", |_, world: &World| {
                world.is_recoverable()
            }),
            Property::always("a machine expects what it ordered", |_, world: &World| {
                world.illegal.is_none()
            }),
            Property::always(HEALS, |model: &Self, world: &World| {
                heal::heals(world, model.mutation)
            }),
            Property::sometimes("it moves", |_, world: &World| world.has_moved()),
            Property::sometimes("it stays", |_, world: &World| world.has_stayed()),
            Property::sometimes("it is taken back", |_, world: &World| world.was_taken_back()),
            Property::sometimes("it moves when it is tried again", |_, world: &World| {
                world.has_moved() && world.destination.stored.attempt > 1
            }),
            Property::sometimes(
                "one host gives way to the operator's",
                |model: &Self, world: &World| {
                    model.budget != Budget::OPERATOR || world.was_superseded()
                },
            ),
            Property::sometimes(
                "both hosts give way to the ledger's",
                |model: &Self, world: &World| {
                    model.budget != Budget::LEDGER
                        || (world.third == ThirdHost::Runs && world.has_ended())
                },
            ),
        ]
    }
}

const CHECKER_THREADS: usize = 2;
/// What every world without further faults comes to.
const HEALS: &str = "what heals ends with exactly one";
/// What must never break.
const TWO_RUN: &str = "at most one host runs the guest";

fn check(name: &str, budget: Budget) {
    let started = Instant::now();
    let model = Handover { mutation: None, budget };
    let checker = model.checker().threads(CHECKER_THREADS).spawn_bfs().join();
    println!(
        "{name}: {} worlds, {} different, depth {}, {:.1} s",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f64()
    );
    checker.assert_properties();
}

/// Goal: no order of messages and faults breaks a property.
/// Method: all of them; there are few worlds, because what was said stays said.
#[test]
fn every_order_of_events_keeps_the_promise() {
    check("faults", Budget::FAULTS);
    check("faults and an operator who is sure", Budget::OPERATOR);
    check("faults and a host that is destroyed", Budget::LOSS);
    check("faults and a ledger that names a third host", Budget::LEDGER);
}

/// Goal: the checker sees; each of these bugs breaks a property, and is shown by
/// the shortest way to it.
#[test]
fn every_planted_bug_is_found() {
    for mutation in Mutation::ALL {
        let started = Instant::now();
        let budget = if mutation.is_of_ledger() { Budget::LEDGER } else { Budget::FAULTS };
        let model = Handover { mutation: Some(mutation), budget };
        let checker = model
            .checker()
            .threads(1) // the first way found is then the shortest
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        let mut found = Vec::new();
        for (name, path) in checker.discoveries() {
            if Handover::is_promise(name) {
                found.push(format!("{name}\n    {:?}", path.into_actions()));
            }
        }
        let worlds = checker.unique_state_count();
        let seconds = started.elapsed().as_secs_f64();
        println!("{mutation:?}: {worlds} worlds, {seconds:.1} s\n  {}", found.join("\n  "));
        assert!(!found.is_empty(), "{mutation:?} was not found");
    }
}

/// Goal: what two hosts alone cannot promise is known, and is only this: an
/// operator who is wrong about the other host gets two running guests.
#[test]
fn an_operator_who_is_wrong_is_not_protected() {
    let model = Handover { mutation: None, budget: Budget::WRONG_OPERATOR };
    let checker = model
        .checker()
        .threads(CHECKER_THREADS)
        .finish_when(HasDiscoveries::AllOf([TWO_RUN].into()))
        .spawn_bfs()
        .join();
    let path = checker.discovery(TWO_RUN);
    println!("{:?}", path.as_ref().map(|path| path.clone().into_actions()));
    assert!(path.is_some());
}

/// Goal: as soon as the two hosts speak, the one with the lower epoch gives way,
/// also when an operator was wrong.
#[test]
fn a_wrong_decision_is_healed() {
    let model = Handover { mutation: None, budget: Budget::WRONG_OPERATOR };
    let checker = model.checker().threads(CHECKER_THREADS).spawn_bfs().join();
    let path = checker.discovery(HEALS);
    assert!(path.is_none(), "{:?}", path.map(stateright::Path::into_actions));
}

impl Handover {
    /// Whether a property must always hold (the others must hold sometimes).
    fn is_promise(name: &str) -> bool {
        ![
            "it moves",
            "it stays",
            "it is taken back",
            "it moves when it is tried again",
            "one host gives way to the operator's",
            "both hosts give way to the ledger's",
        ]
        .contains(&name)
    }
}
