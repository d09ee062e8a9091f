//! The ledger of ownership, which may name a third host, and that host.

use limosa_protocol::handover::{DestinationEvent, SourceEvent, Stage};
use limosa_protocol::id::Epoch;

use crate::mutation::Mutation;
use crate::step::{Side, work_is_done};
use crate::world::{ThirdHost, Work, World, spend};

/// The epoch at which the third host has the VM: past all that the two may choose.
const THIRD_EPOCH: Epoch = Epoch(20);

/// Whether the ledger is asked before this is written.
pub(crate) fn needs_grant(work: Option<Work>) -> bool {
    matches!(work, Some(Work::Persist(record))
        if matches!(record.stage, Stage::HandedOver | Stage::Owner))
}

/// Whether the ledger has named the third host, so that it grants nothing more.
pub(crate) fn is_refused(work: Option<Work>, world: &World) -> bool {
    needs_grant(work) && world.third != ThirdHost::HasNothing
}

pub(crate) fn ledger_refuses(world: &mut World, side: Side, mutation: Option<Mutation>) {
    if world.third == ThirdHost::HasNothing {
        spend(&mut world.budget.claims);
        world.third = ThirdHost::Owns;
    }
    if mutation == Some(Mutation::SourceWritesAfterLost) && side == Side::Source {
        return work_is_done(world, side, mutation);
    }
    match side {
        Side::Source => {
            world.source.work = None;
            world.feed_source(SourceEvent::Lost { owner: THIRD_EPOCH }, true, mutation);
            if mutation == Some(Mutation::LoserResumes) {
                world.run_source();
            }
            if mutation == Some(Mutation::LoserFrees) {
                world.source.free();
            }
        }
        Side::Destination => {
            world.destination.work = None;
            world.feed_destination(DestinationEvent::Lost { owner: THIRD_EPOCH }, true, mutation);
            if mutation == Some(Mutation::LoserFrees) {
                world.destination.free();
            }
        }
    }
}

/// The third host starts the VM: what the two have is old from then on.
pub(crate) fn third_starts(world: &mut World) {
    world.third = ThirdHost::Runs;
    world.source.newest = false;
    world.destination.newest = false;
}
