//! Which events each state takes: the whole list, so that a pair that is not in
//! it is an error on purpose.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::id::MigrationId;
use uuid::Uuid;

/// At which the source owned the VM.
const OFFERED: Epoch = Epoch(6);
/// What words may say: of this migration's epochs, and of later decisions.
const EPOCHS: [Epoch; 4] = [Epoch(6), Epoch(7), Epoch(8), Epoch(9)];
/// Attempts that are tried.
const ATTEMPTS: [u32; 2] = [1, 2];
const STAGES: [Stage; 9] = [
    Stage::Offered,
    Stage::HandedOver,
    Stage::Preparing,
    Stage::Ready,
    Stage::Owner,
    Stage::Declined,
    Stage::Done,
    Stage::Stayed,
    Stage::Superseded,
];

/// A store that holds what it is told.
struct Disk;

impl Store for Disk {
    type Error = std::convert::Infallible;
    fn write_durably(&mut self, _: &Record) -> Result<(), Self::Error> {
        Ok(())
    }
}

fn receipt(stage: Stage, epoch: Epoch, attempt: u32) -> Receipt {
    let record = Record {
        migration: MigrationId(Uuid::from_u128(1)),
        offered: OFFERED,
        stage,
        epoch,
        attempt,
    };
    let Ok(receipt) = persist(&mut Disk, record);
    receipt
}

fn receipts() -> impl Iterator<Item = Receipt> {
    let of_stage = |stage| {
        EPOCHS
            .into_iter()
            .flat_map(move |epoch| ATTEMPTS.map(move |attempt| receipt(stage, epoch, attempt)))
    };
    STAGES.into_iter().flat_map(of_stage)
}

fn of_source() -> Vec<SourceEvent> {
    use SourceEvent as On;
    let mut events = vec![
        On::Delivered,
        On::RecordFailed,
        On::Lost { owner: Epoch(9) },
        On::Unheard,
        On::Retry,
        On::Asked,
        On::Silence,
        On::GiveUp,
        On::GuestRuns,
        On::GuestNeverRan,
        On::QemuGone,
        On::Freed,
        On::ForceOwner,
        On::MovesOn,
    ];
    for epoch in EPOCHS {
        events.extend(ATTEMPTS.map(|attempt| On::Ready { epoch, attempt }));
        events.extend([On::Running { epoch }, On::Declined { epoch }]);
    }
    events.extend(receipts().map(On::Recorded));
    events
}

fn of_destination() -> Vec<DestinationEvent> {
    use DestinationEvent as On;
    let mut events = vec![
        On::RecordFailed,
        On::Lost { owner: Epoch(9) },
        On::Undecided,
        On::Unheard,
        On::Asked,
        On::Silence,
        On::GiveUp,
        On::GuestRuns,
        On::GuestNeverRan,
        On::QemuGone,
        On::Freed,
        On::ForceOwner,
    ];
    for epoch in EPOCHS {
        events.extend([On::Commit { epoch }, On::Stays { epoch }, On::Retired { epoch }]);
    }
    for attempt in ATTEMPTS {
        events.extend([On::Complete { attempt }, On::Retry { attempt }]);
    }
    events.extend(receipts().map(On::Recorded));
    events
}

/// Gives every event to every machine that can come to be in two attempts; says, a line for each
/// state, which of them some machine in it takes.
fn taken<M: Machine + Clone + Ord>(
    first: Vec<M>,
    events: fn() -> Vec<M::Event>,
    event_name: fn(&M::Event) -> &'static str,
) -> String {
    let mut known: BTreeSet<M> = first.iter().cloned().collect();
    let mut waiting = first;
    let mut taken: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    while let Some(machine) = waiting.pop() {
        let of_state = taken.entry(machine.snapshot().state).or_default();
        for event in events() {
            let name = event_name(&event);
            let mut next = machine.clone();
            match next.on(event) {
                Ok(_) => {
                    of_state.insert(name);
                    if next.snapshot().attempt <= ATTEMPTS[1] && known.insert(next.clone()) {
                        waiting.push(next);
                    }
                }
                Err(illegal) => {
                    assert!(next == machine);
                    let state = machine.snapshot().state;
                    assert_eq!((illegal.state, illegal.event), (state, name));
                }
            }
        }
    }
    let line = |(state, events): (&&str, &BTreeSet<&str>)| {
        let events: Vec<_> = events.iter().copied().collect();
        format!("{state}: {}\n", events.join(" "))
    };
    taken.iter().map(line).collect()
}

/// Goal: no pair is taken or refused by accident. A word may come at any time but
/// while a result is waited for; what the host itself does may not.
#[test]
fn a_source_takes_these() {
    let first = [Guest::Running, Guest::Off]
        .map(|guest| Source::begin(receipt(Stage::Offered, OFFERED.next(), 1), guest).unwrap());
    assert_eq!(taken(first.into(), of_source, SourceEvent::name), SOURCE);
}

/// Goal: the same for the destination.
#[test]
fn a_destination_takes_these() {
    let first = [Guest::Stopped, Guest::Off].map(|guest| {
        Destination::begin(receipt(Stage::Preparing, OFFERED.next(), 1), guest).unwrap()
    });
    assert_eq!(taken(first.into(), of_destination, DestinationEvent::name), DESTINATION);
}

const SOURCE: &str = "\
asking: asked declined give-up qemu-gone ready retry running silence unheard
closing: asked give-up moves-on qemu-gone record-failed recorded silence
committing: asked lost qemu-gone record-failed recorded silence
copying: asked declined delivered give-up qemu-gone ready retry running silence unheard
handed-over: asked declined force-owner qemu-gone ready running silence unheard
keeping: asked declined force-owner give-up moves-on qemu-gone ready running silence unheard
moved: asked declined moves-on qemu-gone ready running silence unheard
resuming: asked give-up guest-never-ran guest-runs qemu-gone silence
retiring: asked declined freed qemu-gone ready running silence unheard
stayed: asked declined give-up moves-on qemu-gone ready running silence unheard
superseded: asked declined moves-on qemu-gone ready running silence unheard
taking-back: asked lost qemu-gone record-failed recorded silence
unknown-durability: asked declined qemu-gone ready running silence unheard
";

const DESTINATION: &str = "\
closing: asked qemu-gone record-failed recorded silence
declined: asked commit force-owner give-up qemu-gone retired retry silence stays undecided unheard
declining: asked qemu-gone record-failed recorded silence
freeing: asked commit freed give-up qemu-gone retired retry silence stays undecided unheard
moved: asked commit qemu-gone retired retry silence stays undecided unheard
owner: asked commit force-owner qemu-gone retired retry silence stays undecided unheard
owning: asked lost qemu-gone record-failed recorded silence
preparing: asked complete give-up qemu-gone retired retry silence stays undecided unheard
ready: asked commit complete force-owner give-up qemu-gone retired retry silence stays undecided unheard
readying: asked qemu-gone record-failed recorded silence
repeating: asked qemu-gone record-failed recorded silence
starting: asked guest-never-ran guest-runs qemu-gone silence
stayed: asked commit give-up qemu-gone retired retry silence stays undecided unheard
superseded: asked commit qemu-gone retired retry silence stays undecided unheard
unknown-durability: asked commit qemu-gone retired retry silence stays undecided unheard
";
