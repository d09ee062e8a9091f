//! What can happen next, and what then becomes of the world.

use limosa_protocol::handover::{
    ColdStart, Destination, DestinationEvent, Guest, Source, SourceEvent,
};
use limosa_protocol::id::Epoch;

use crate::ledger::{is_refused, ledger_refuses, needs_grant, third_starts};
use crate::mutation::Mutation;
use crate::world::{Host, Message, ThirdHost, Work, World, spend};

/// A host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// The guest was stopped and all of it has arrived.
    AllArrives,
    /// A message arrives; it may do so again.
    Deliver(Message),
    /// Nothing has arrived for a while.
    Silence(Side),
    /// The source's guest stood for too long without the destination's word.
    Retry,
    /// Somebody cancels, or something fails.
    GiveUp(Side),
    /// Work in flight succeeds.
    Done(Side),
    /// A sync fails; the record is there or not.
    WriteFails { side: Side, is_there: bool },
    /// QEMU refuses to let the guest run.
    StartRefused(Side),
    /// An agent ends; its work in flight is done or not.
    Crash { side: Side, is_done: bool },
    /// A host ends; its work in flight is done or not.
    Reboot { side: Side, is_done: bool },
    /// An agent starts.
    Restart(Side),
    /// A VM that was kept and runs is about to be moved again.
    MovesOn,
    /// QEMU ends.
    QemuDies(Side),
    /// The agent notices that it did.
    Notice(Side),
    /// An operator starts the VM anew from a host's disks.
    ColdStart(Side),
    /// An operator makes a host the owner.
    Force(Side),
    /// A host is destroyed.
    Destroy(Side),
    /// The ledger names a third host instead of granting a record.
    Lost(Side),
    /// The third host starts the VM.
    ThirdStarts,
}

use Side::{Destination as There, Source as Here};

/// All that can happen now.
pub(crate) fn possible(world: &World, mutation: Option<Mutation>, steps: &mut Vec<Step>) {
    for message in &world.said {
        steps.push(Step::Deliver(*message));
    }
    if all_can_arrive(world) {
        steps.push(Step::AllArrives);
    }
    of_source(world, mutation, steps);
    of_destination(world, mutation, steps);
    of_host(Here, &world.source, world, steps);
    of_host(There, &world.destination, world, steps);
    if world.budget.losses > 0 {
        steps.extend([Step::Destroy(Here), Step::Destroy(There)]);
    }
    if world.third == ThirdHost::Owns && world.has_given_way() {
        steps.push(Step::ThirdStarts);
    }
}

pub(crate) fn all_can_arrive(world: &World) -> bool {
    is_in(&world.source, Source::state, "copying")
        && is_in(&world.destination, Destination::state, "preparing")
        && attempts(world).is_some_and(|(here, there)| here == there)
        && matches!(
            (world.source.qemu, world.destination.qemu),
            (Guest::Running, Guest::Stopped) | (Guest::Off, Guest::Off)
        )
}

/// Which attempt each side is at.
fn attempts(world: &World) -> Option<(u32, u32)> {
    Some((world.source.machine.as_ref()?.attempt(), world.destination.machine.as_ref()?.attempt()))
}

fn is_in<M>(host: &Host<M>, state: fn(&M) -> &'static str, name: &str) -> bool {
    host.work.is_none() && host.machine.as_ref().is_some_and(|machine| state(machine) == name)
}

fn of_source(world: &World, mutation: Option<Mutation>, steps: &mut Vec<Step>) {
    let host = &world.source;
    let Some(machine) = &host.machine else { return };
    if host.qemu == Guest::Gone && !machine.guest().is_absent() {
        steps.push(Step::Notice(Here));
    }
    if host.work == Some(Work::RunGuest)
        && host.qemu != Guest::Running
        && world.budget.refused_starts > 0
    {
        steps.push(Step::StartRefused(Here));
    }
    if host.work.is_some() {
        return;
    }
    steps.push(Step::Silence(Here));
    // A guest without memory, and one whose QEMU is lost, has nothing to run on with.
    if matches!(machine.state(), "copying" | "asking")
        && !machine.guest().is_absent()
        && world.budget.retries > 0
    {
        steps.push(Step::Retry);
    }
    let aborts_late =
        mutation == Some(Mutation::AbortAfterHandedOver) && machine.state() == "handed-over";
    if machine.may_give_up() || aborts_late {
        steps.push(Step::GiveUp(Here));
    }
    if machine.state() == "keeping" {
        steps.push(Step::MovesOn);
    }
    let starts = may_start(machine.cold_start(), mutation);
    if host.qemu.is_absent() && host.files && starts {
        steps.push(Step::ColdStart(Here));
    }
    if machine.may_force_owner() && host.files && may_force(world, &world.destination) {
        steps.push(Step::Force(Here));
    }
}

fn of_destination(world: &World, mutation: Option<Mutation>, steps: &mut Vec<Step>) {
    let host = &world.destination;
    let Some(machine) = &host.machine else { return };
    if host.qemu == Guest::Gone && !machine.guest().is_absent() {
        steps.push(Step::Notice(There));
    }
    if host.work == Some(Work::RunGuest)
        && host.qemu != Guest::Running
        && world.budget.refused_starts > 0
    {
        steps.push(Step::StartRefused(There));
    }
    if host.work.is_some() {
        return;
    }
    steps.push(Step::Silence(There));
    let declines_late =
        mutation == Some(Mutation::DeclinedWhileOwner) && machine.state() == "owner";
    if machine.may_give_up() || declines_late {
        steps.push(Step::GiveUp(There));
    }
    let starts = may_start(machine.cold_start(), mutation);
    if host.qemu.is_absent() && host.files && starts {
        steps.push(Step::ColdStart(There));
    }
    // A source that has heard *declined* may start the VM at any later time: only
    // one that never comes back cannot.
    let is_given_back = machine.state() == "declined" && !world.source.is_lost;
    if machine.may_force_owner() && !is_given_back && host.files && may_force(world, &world.source)
    {
        steps.push(Step::Force(There));
    }
}

fn may_start(answer: ColdStart, mutation: Option<Mutation>) -> bool {
    match answer {
        ColdStart::Allowed => true,
        ColdStart::Unconfirmed => mutation == Some(Mutation::ColdStartUnasked),
        ColdStart::NotOwner => mutation == Some(Mutation::ColdStartByNonOwner),
    }
}

/// An operator who is sure has seen that the other host's QEMU ended, or that the
/// host is destroyed.
fn may_force<M>(world: &World, other: &Host<M>) -> bool {
    (world.budget.forces > 0 && other.qemu.is_absent())
        || world.budget.wrong_forces > 0
        || other.is_lost
}

fn of_host<M>(side: Side, host: &Host<M>, world: &World, steps: &mut Vec<Step>) {
    let budget = &world.budget;
    if host.is_lost {
        return;
    }
    if budget.qemu_deaths > 0 && !host.qemu.is_absent() {
        steps.push(Step::QemuDies(side));
    }
    let needs_grant = needs_grant(host.work);
    let may_be_done = host.work.is_some() && !is_refused(host.work, world);
    let outcomes: &[bool] = if may_be_done { &[false, true] } else { &[false] };
    for is_done in outcomes.iter().copied() {
        if budget.crashes > 0 && host.machine.is_some() {
            steps.push(Step::Crash { side, is_done });
        }
        // Restarting a host whose agent is down and QEMU gone changes nothing.
        if budget.reboots > 0 && (host.machine.is_some() || !host.qemu.is_absent()) {
            steps.push(Step::Reboot { side, is_done });
        }
    }
    if host.machine.is_none() {
        steps.push(Step::Restart(side));
    }
    if may_be_done {
        steps.push(Step::Done(side));
    }
    if needs_grant && (budget.claims > 0 || world.third != ThirdHost::HasNothing) {
        steps.push(Step::Lost(side));
    }
    if matches!(host.work, Some(Work::Persist(_))) && budget.failed_writes > 0 {
        steps.push(Step::WriteFails { side, is_there: false });
        if may_be_done {
            steps.push(Step::WriteFails { side, is_there: true });
        }
    }
}

/// Makes a step.
pub(crate) fn take(world: &mut World, step: Step, mutation: Option<Mutation>) {
    match step {
        Step::AllArrives => {
            world.source.stop();
            world.destination.newest = true;
            world.feed_source(SourceEvent::Delivered, true, mutation);
        }
        Step::Deliver(message) => deliver(world, message, mutation),
        Step::Silence(Here) => peer_is_silent(world, mutation),
        Step::Silence(There) => world.feed_destination(DestinationEvent::Silence, true, mutation),
        Step::Retry => {
            spend(&mut world.budget.retries);
            world.feed_source(SourceEvent::Retry, true, mutation);
        }
        Step::GiveUp(Here) if is_in(&world.source, Source::state, "handed-over") => {
            world.run_source();
        }
        Step::GiveUp(Here) => world.feed_source(SourceEvent::GiveUp, true, mutation),
        Step::GiveUp(There) => destination_gives_up(world, mutation),
        Step::Done(side) => work_is_done(world, side, mutation),
        Step::WriteFails { side, is_there } => write_fails(world, side, is_there, mutation),
        Step::StartRefused(Here) => {
            spend(&mut world.budget.refused_starts);
            world.source.work = None;
            world.source.disks_taken = false;
            world.feed_source(SourceEvent::GuestNeverRan, true, mutation);
        }
        Step::StartRefused(There) => {
            spend(&mut world.budget.refused_starts);
            world.destination.work = None;
            world.destination.disks_taken = false;
            world.feed_destination(DestinationEvent::GuestNeverRan, true, mutation);
        }
        Step::Crash { side, is_done } => {
            spend(&mut world.budget.crashes);
            agent_ends(world, side, is_done);
        }
        Step::Reboot { side, is_done } => {
            spend(&mut world.budget.reboots);
            agent_ends(world, side, is_done);
            qemu_ends(world, side);
        }
        Step::MovesOn => world.feed_source(SourceEvent::MovesOn, true, mutation),
        Step::Restart(Here) => world.restart_source(mutation),
        Step::Restart(There) => world.restart_destination(mutation),
        Step::QemuDies(side) => {
            spend(&mut world.budget.qemu_deaths);
            qemu_ends(world, side);
        }
        Step::Notice(Here) => world.feed_source(SourceEvent::QemuGone, true, mutation),
        Step::Notice(There) => world.feed_destination(DestinationEvent::QemuGone, true, mutation),
        Step::ColdStart(Here) => world.source_runs(),
        Step::ColdStart(There) => world.destination_runs(),
        Step::Force(side) => force(world, side, mutation),
        Step::Destroy(side) => {
            spend(&mut world.budget.losses);
            match side {
                Here => world.source.destroy(),
                There => world.destination.destroy(),
            }
        }
        Step::Lost(side) => ledger_refuses(world, side, mutation),
        Step::ThirdStarts => third_starts(world),
    }
}

fn peer_is_silent(world: &mut World, mutation: Option<Mutation>) {
    let is_committed = is_in(&world.source, Source::state, "handed-over");
    if mutation == Some(Mutation::SourceResumesOnLostReply) && is_committed {
        world.run_source();
    }
    if mutation == Some(Mutation::SourceRunsOnUnnumbered)
        && is_in(&world.source, Source::state, "asking")
    {
        world.run_source();
    }
    world.feed_source(SourceEvent::Silence, true, mutation);
}

pub(crate) fn work_is_done(world: &mut World, side: Side, mutation: Option<Mutation>) {
    match side {
        Here => {
            if let Some(event) = world.source.work.take().and_then(|work| world.do_source(work)) {
                world.feed_source(event, true, mutation);
            }
        }
        There => {
            let work = world.destination.work.take();
            if let Some(event) = work.and_then(|work| world.do_destination(work)) {
                world.feed_destination(event, true, mutation);
            }
        }
    }
}

fn agent_ends(world: &mut World, side: Side, is_done: bool) {
    match side {
        Here => {
            if let Some(work) = world.source.agent_ends(is_done) {
                world.do_source(work);
            }
        }
        There => {
            if let Some(work) = world.destination.agent_ends(is_done) {
                world.do_destination(work);
            }
        }
    }
}

fn qemu_ends(world: &mut World, side: Side) {
    match side {
        Here => world.source.qemu_ends(),
        There => world.destination.qemu_ends(),
    }
}

fn write_fails(world: &mut World, side: Side, is_there: bool, mutation: Option<Mutation>) {
    spend(&mut world.budget.failed_writes);
    match side {
        Here => {
            if let Some(Work::Persist(record)) = world.source.work.take()
                && is_there
            {
                world.source.stored = record;
            }
            if mutation == Some(Mutation::FailedSyncCountsAsUnwritten)
                && is_in(&world.source, Source::state, "committing")
            {
                world.run_source();
            }
            world.feed_source(SourceEvent::RecordFailed, true, mutation);
        }
        There => {
            if let Some(Work::Persist(record)) = world.destination.work.take()
                && is_there
            {
                world.destination.stored = record;
            }
            world.feed_destination(DestinationEvent::RecordFailed, true, mutation);
        }
    }
}

fn destination_gives_up(world: &mut World, mutation: Option<Mutation>) {
    if let Some(machine) = &world.destination.machine
        && machine.state() == "owner"
    {
        let message = Message::Declined(machine.epoch());
        world.said.insert(message);
        return;
    }
    world.feed_destination(DestinationEvent::GiveUp, true, mutation);
}

fn force(world: &mut World, side: Side, mutation: Option<Mutation>) {
    let budget = &mut world.budget;
    if budget.forces > 0 {
        spend(&mut budget.forces);
    } else if budget.wrong_forces > 0 {
        spend(&mut budget.wrong_forces);
    }
    world.forced = true;
    match side {
        Here => world.feed_source(SourceEvent::ForceOwner, true, mutation),
        There => world.feed_destination(DestinationEvent::ForceOwner, true, mutation),
    }
}

fn deliver(world: &mut World, message: Message, mutation: Option<Mutation>) {
    let is_stale_taken = mutation == Some(Mutation::StaleEpochAccepted);
    let to_source = |epoch: Epoch, world: &World| match &world.source.machine {
        Some(machine) if is_stale_taken => machine.epoch(),
        _ => epoch,
    };
    let to_destination = |epoch: Epoch, world: &World| match &world.destination.machine {
        Some(machine) if is_stale_taken => machine.epoch(),
        _ => epoch,
    };
    let event = match message {
        Message::Ready(epoch, attempt) => {
            let now = world.source.machine.as_ref().map(Source::attempt);
            let is_taken = mutation == Some(Mutation::ReadyOfEarlierAttemptAccepted);
            SourceEvent::Ready {
                epoch: to_source(epoch, world),
                attempt: now.filter(|_| is_taken).unwrap_or(attempt),
            }
        }
        Message::Running(epoch) => SourceEvent::Running { epoch: to_source(epoch, world) },
        Message::Declined(epoch) => SourceEvent::Declined { epoch: to_source(epoch, world) },
        Message::Ask => SourceEvent::Asked,
        _ => {
            if world.destination.work.is_some() {
                return;
            }
            let event = match message {
                Message::Commit(epoch) => {
                    second_qemu(world, mutation);
                    DestinationEvent::Commit { epoch: to_destination(epoch, world) }
                }
                Message::Stays(epoch) => {
                    DestinationEvent::Stays { epoch: to_destination(epoch, world) }
                }
                Message::Retired(epoch) => {
                    DestinationEvent::Retired { epoch: to_destination(epoch, world) }
                }
                Message::AskReady(attempt) => asked_ready(world, attempt),
                Message::Retry(attempt) => DestinationEvent::Retry { attempt },
                _ => DestinationEvent::Undecided,
            };
            world.feed_destination(event, false, mutation);
            return;
        }
    };
    // A question may be answered while work is in flight; the rest waits.
    if world.source.work.is_none() || event == SourceEvent::Asked {
        world.feed_source(event, false, mutation);
    }
}

/// What the destination's agent makes of the question whether it is ready.
fn asked_ready(world: &World, attempt: u32) -> DestinationEvent {
    let host = &world.destination;
    if host.machine.as_ref().map(Destination::attempt) != Some(attempt) {
        return DestinationEvent::Asked;
    }
    match host.machine.as_ref().map(Destination::state) {
        Some("preparing") if host.qemu == Guest::Gone => DestinationEvent::GiveUp,
        Some("preparing" | "ready") => DestinationEvent::Complete { attempt },
        _ => DestinationEvent::Asked,
    }
}

fn second_qemu(world: &mut World, mutation: Option<Mutation>) {
    if mutation == Some(Mutation::RepeatedCommitStartsSecondQemu)
        && is_in(&world.destination, Destination::state, "owner")
    {
        world.second_qemu |= world.destination.qemu == Guest::Running;
    }
}
