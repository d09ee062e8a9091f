//! Single rules of the machines; every order of events is the model's.

use super::*;
use crate::id::MigrationId;
use uuid::Uuid;

const OFFERED: Epoch = Epoch(3);

/// A store that keeps one record, and fails when told to.
#[derive(Default)]
struct OneRecord {
    record: Option<Record>,
    fails: bool,
}

impl Store for OneRecord {
    type Error = &'static str;
    fn write_durably(&mut self, record: &Record) -> Result<(), &'static str> {
        if self.fails {
            return Err("the disk is full");
        }
        self.record = Some(*record);
        Ok(())
    }
}

fn record(stage: Stage) -> Record {
    Record::first(MigrationId(Uuid::from_u128(1)), stage, OFFERED)
}

fn receipt(record: Record) -> Receipt {
    persist(&mut OneRecord::default(), record).unwrap()
}

/// A source that was told that the destination is ready.
fn committing() -> (Source, Record) {
    let mut source = Source::begin(receipt(record(Stage::Offered)), Guest::Running).unwrap();
    assert_eq!(source.on(SourceEvent::Delivered).unwrap(), [SourceAction::AskReady { attempt: 1 }]);
    let mut actions = source.on(SourceEvent::Ready { epoch: Epoch(4), attempt: 1 }).unwrap();
    let Some(SourceAction::Persist(record)) = actions.pop() else { panic!("{actions:?}") };
    (source, record)
}

/// Goal: what is not listed is refused, with the names of both, and changes nothing.
#[test]
fn an_unlisted_pair_is_an_error_with_both_names() {
    let (mut source, record) = committing();
    source.on(SourceEvent::Recorded(receipt(record))).unwrap();
    let before = source.clone();
    let refused = source.on(SourceEvent::GiveUp).unwrap_err();
    assert_eq!(refused.to_string(), "handover: give-up cannot happen in state handed-over");
    assert_eq!(source, before);
    assert!(!source.may_give_up());

    let preparing = receipt(self::record(Stage::Preparing));
    let mut destination = Destination::begin(preparing, Guest::Stopped).unwrap();
    let refused = destination.on(DestinationEvent::Commit { epoch: Epoch(4) }).unwrap_err();
    assert_eq!(refused.to_string(), "handover: commit cannot happen in state preparing");
}

/// Goal: only the receipt of this very record passes the commit point.
#[test]
fn another_receipt_does_not_commit() {
    let (mut source, wanted) = committing();
    let other = Record { migration: MigrationId(Uuid::from_u128(2)), ..wanted };
    source.on(SourceEvent::Recorded(receipt(other))).unwrap_err();
    let earlier = Record { epoch: OFFERED, ..wanted };
    source.on(SourceEvent::Recorded(receipt(earlier))).unwrap_err();
    let offered = Record { stage: Stage::Offered, ..wanted };
    source.on(SourceEvent::Recorded(receipt(offered))).unwrap_err();
    let actions = source.on(SourceEvent::Recorded(receipt(wanted))).unwrap();
    assert!(matches!(&actions[..], [SourceAction::SendCommit(c)] if c.epoch() == Epoch(4)));
}

/// Goal: after a failed sync nothing happens until a restart has read the store,
/// and then what it holds decides.
#[test]
fn a_failed_sync_does_nothing_until_a_restart() {
    let mut store = OneRecord { fails: true, ..OneRecord::default() };
    for (held, then) in [(Stage::Offered, "resuming"), (Stage::HandedOver, "handed-over")] {
        let (mut source, wanted) = committing();
        persist(&mut store, wanted).unwrap_err();
        assert_eq!(source.on(SourceEvent::RecordFailed).unwrap(), []);
        assert_eq!(source.doubt(), Some(Doubt::UnknownDurability));
        assert_eq!(source.on(SourceEvent::Asked).unwrap(), []);
        source.on(SourceEvent::ForceOwner).unwrap_err();
        source.on(SourceEvent::GiveUp).unwrap_err();
        let (source, _) = Source::restore(receipt(record(held)), Guest::Stopped).unwrap();
        assert_eq!(source.state(), then);
    }
}

/// Goal: a source that has lost its store does not make the destination throw
/// the last copy away; one that never offered does.
#[test]
fn a_whole_copy_outlives_a_source_without_records() {
    let (mut ready, _) =
        Destination::restore(receipt(record(Stage::Ready)), Guest::Stopped).unwrap();
    assert_eq!(ready.on(DestinationEvent::Unheard).unwrap(), []);
    assert_eq!(ready.doubt(), Some(Doubt::CommitUnheard));
    let (_, actions) =
        Destination::restore(receipt(record(Stage::Preparing)), Guest::Stopped).unwrap();
    assert_eq!(actions, [DestinationAction::Persist(record(Stage::Declined))]);
}

/// Goal: records read back as they were written, and a role takes only its own.
#[test]
fn records_are_read_back() {
    let stages = [
        (Stage::Offered, "offered", "source"),
        (Stage::HandedOver, "handed-over", "source"),
        (Stage::Preparing, "preparing", "destination"),
        (Stage::Ready, "ready", "destination"),
        (Stage::Declined, "declined", "destination"),
    ];
    for (stage, name, role) in stages {
        let text = serde_json::to_string(&record(stage)).unwrap();
        assert!(text.contains(&format!("\"stage\":\"{name}\"")), "{text}");
        let back: Record = serde_json::from_str(&text).unwrap();
        assert_eq!(back, record(stage));
        let source = Source::restore(receipt(back), Guest::Stopped).is_ok();
        let destination = Destination::restore(receipt(back), Guest::Stopped).is_ok();
        assert_eq!((source, destination), (role == "source", role == "destination"));
    }
}
