//! The hand-over, checked in every order of events: stateright walks through all
//! worlds that the real state machines can get into.
//!
//! ```text
//! world:  source machine, its store, its guest  ◄─ messages: lost, twice, in any order ─►
//!         destination machine, its store, its guest
//! faults: agents crash and come back, QEMU dies, a host restarts, a write fails
//! ```

mod mutation;
mod world;

use std::time::Instant;

use mutation::Mutation;
use stateright::{Checker, HasDiscoveries, Model, Property};
use world::{Budget, Step, World};

/// What is checked: the protocol as it is, or with a bug.
#[derive(Debug, Clone, Copy)]
struct HandOver {
    mutation: Option<Mutation>,
    budget: Budget,
}

impl Model for HandOver {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.budget)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Step>) {
        world.steps(actions);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(step, self.mutation);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one host runs the guest", |_, world: &World| {
                !world.both_run()
            }),
            Property::always("only the newest copy runs", |_, world: &World| !world.is_stale()),
            Property::always("only the owner writes a disk", |_, world: &World| {
                world.writers_own()
            }),
            Property::always("a whole copy is always there", |_, world: &World| {
                world.is_recoverable()
            }),
            Property::always("nothing happens that no machine expects", |_, world: &World| {
                world.unexpected.is_none()
            }),
            Property::always(
                "what heals ends with exactly one owner",
                |model: &Self, world: &World| world.heals(model.mutation),
            ),
            Property::sometimes("it moves", |_, world: &World| world.has_moved()),
            Property::sometimes("it stays", |_, world: &World| world.has_stayed()),
        ]
    }
}

/// Goal: no order of messages and faults breaks a property.
#[test]
fn every_order_of_events_keeps_the_promise() {
    for budget in Budget::TOGETHER {
        let started = Instant::now();
        let model = HandOver { mutation: None, budget };
        let checker = model.checker().threads(2).spawn_bfs().join();
        println!(
            "{budget:?}: {} steps to {} worlds in {:.1} s",
            checker.state_count(),
            checker.unique_state_count(),
            started.elapsed().as_secs_f64()
        );
        checker.assert_properties();
    }
}

/// Goal: the checker sees; each of these bugs breaks a property.
#[test]
fn every_planted_bug_is_found() {
    for mutation in Mutation::ALL {
        let model = HandOver { mutation: Some(mutation), budget: Budget::ONE_OF_EACH };
        let checker =
            model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
        let found: Vec<_> = checker
            .discoveries()
            .into_iter()
            .filter(|(name, _)| !["it moves", "it stays"].contains(name))
            .map(|(name, path)| format!("{name} (after {} steps)", path.into_actions().len()))
            .collect();
        println!("{mutation:?}: {}", found.join("; "));
        assert!(!found.is_empty(), "{mutation:?} was not found");
    }
}
