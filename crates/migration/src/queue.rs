//! Moves that wait for room: the queue between an operator's request and the driver.
//! [`super::admission`] starts them.
//!
//! ```text
//! request ─► preflight ─┬─ room at both hosts ─────────────► begin
//!                       └─ a host is full ─► waiting ─► preflight ─► begin
//!                                               └─ cancelled, or not possible any more ─► stayed
//! ```
//!
//! A waiting move holds neither its VM nor anything at the destination. Entries start oldest
//! first; one that waits for its destination does not hold up those for other hosts.
//!
//! **Invariants.** A waiting entry is on the disk before its operator is answered, so it
//! outlives the migrations. An id is never both in the queue and under way after a restart: the
//! migration's own record comes first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_protocol::id::{HostName, MigrationId, VmName};
use limosa_protocol::migration::{
    Migration, MoveRequest, Note, Outcome as End, QueueReason, Queued,
};
use tokio::sync::Notify;

use super::job::Job;
use limosa_host::clock::now_unix_ms;
use limosa_host::failure::{Failure, Result};
use limosa_host::store::{MigrationRecord, QueueRecord, Store, StoreError};

/// Most moves that wait on a host.
const WAITING_COUNT_MAX: usize = 256;
/// Most moves that ended while they waited and are remembered; the oldest go first.
const ENDED_KEPT_MAX: usize = 50;

/// The moves that wait on this host.
#[derive(Default)]
pub(crate) struct Queue {
    // Ids are UUIDs of version 7: their order is the order of requests.
    entries: Mutex<BTreeMap<MigrationId, Entry>>,
    changed: Notify,
}

#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) request: MoveRequest,
    pub(crate) job: Arc<Job>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    /// It has passed preflight and becomes a migration.
    Starting,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up the entries that a restart found.
    pub(crate) fn restore(&self, store: &Store) -> Result<(), StoreError> {
        for (key, record) in store.all::<QueueRecord>()? {
            if store.get::<MigrationRecord>(&key)?.is_some() {
                store.remove::<QueueRecord>(&key)?;
            } else if record.view.outcome.is_none() {
                let job = Arc::new(Job::of_view(record.view));
                let entry = Entry { request: record.request, job, state: State::Waiting };
                self.lock().insert(entry.job.id(), entry);
            }
        }
        Ok(())
    }

    /// Fails if a VM waits already.
    pub(crate) fn expect_free(&self, vm: &VmName) -> Result<()> {
        expect_no_entry(&self.lock(), vm)
    }

    /// Waits until a migration has ended, or a move was added.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Puts a move at the end, durably.
    pub(crate) fn push(
        &self,
        store: &Store,
        job: &Arc<Job>,
        request: MoveRequest,
        why: Note,
    ) -> Result<Migration> {
        let mut entries = self.lock();
        expect_no_entry(&entries, &job.view().vm)?;
        if entries.len() >= WAITING_COUNT_MAX {
            return Err(Failure::conflict(format!(
                "{WAITING_COUNT_MAX} moves wait on this host: wait for one to begin"
            )));
        }
        job.report_queued(Some(queued(why, now_unix_ms())));
        let entry = Entry { request, job: Arc::clone(job), state: State::Waiting };
        record(store, &entry)?;
        entries.insert(job.id(), entry);
        drop(entries);
        self.changed.notify_one();
        Ok(job.view())
    }

    /// Why a new move to a host has to wait for those before it.
    pub(crate) fn behind(&self, to: &HostName) -> Option<Note> {
        let entries = self.lock();
        let mut reasons = entries.values().filter_map(|entry| {
            let queued = entry.job.view().queued?;
            let is_before = queued.code == QueueReason::SourceFull || entry.request.to == *to;
            is_before.then_some(Note { code: queued.code, message: queued.reason })
        });
        reasons.next()
    }

    /// Waiting entries, oldest first.
    pub(crate) fn waiting(&self) -> Vec<Entry> {
        let entries = self.lock();
        let waiting = entries.values().filter(|entry| entry.state == State::Waiting);
        waiting.cloned().collect()
    }

    /// Changes the reason of a waiting entry; its time of waiting goes on.
    pub(crate) fn keep_waiting(&self, store: &Store, id: MigrationId, why: Note) -> Result<()> {
        let entries = self.lock();
        let Some(entry) = entries.get(&id) else { return Ok(()) };
        let before = entry.job.view().queued;
        if before.as_ref().is_some_and(|queued| queued.code == why.code) {
            return Ok(());
        }
        let since_unix_ms = before.map_or_else(now_unix_ms, |queued| queued.since_unix_ms);
        entry.job.report_queued(Some(queued(why, since_unix_ms)));
        record(store, entry)
    }

    /// Marks an entry as starting, unless it was cancelled meanwhile.
    pub(crate) fn start(&self, id: MigrationId) -> bool {
        let mut entries = self.lock();
        let Some(entry) = entries.get_mut(&id) else { return false };
        entry.state = State::Starting;
        true
    }

    /// Forgets an entry that has become a migration.
    pub(crate) fn forget(&self, store: &Store, id: MigrationId) -> Result<()> {
        self.lock().remove(&id);
        Ok(store.remove::<QueueRecord>(&id.to_string())?)
    }

    /// Ends an entry that does not begin; the VM stays.
    pub(crate) fn end(&self, store: &Store, id: MigrationId, why: String) -> Result<()> {
        let mut entries = self.lock();
        let Some(entry) = entries.get(&id) else { return Ok(()) };
        let mut view = entry.job.ended_view(End::Stayed, Some(why), None, Vec::new());
        view.queued = None;
        view.summary = None;
        let ended = QueueRecord { request: entry.request.clone(), view: view.clone() };
        store.put(&id.to_string(), &ended)?;
        entry.job.publish(&view);
        entries.remove(&id);
        drop(entries);
        Ok(forget_ended(store)?)
    }

    /// Cancels an entry. One that starts just now ends as a migration; `None` if there is no
    /// such entry.
    pub(crate) fn cancel(&self, store: &Store, id: MigrationId) -> Option<Result<Migration>> {
        let entry = self.lock().get(&id).cloned()?;
        let cancelled = match entry.state {
            State::Starting => entry.job.cancel(),
            State::Waiting => {
                self.end(store, id, "cancelled by an operator while it waited".to_owned())
            }
        };
        Some(cancelled.map(|()| entry.job.view()))
    }

    /// The job of an entry.
    pub(crate) fn job(&self, id: MigrationId) -> Option<Arc<Job>> {
        self.lock().get(&id).map(|entry| Arc::clone(&entry.job))
    }

    /// All entries as they are now.
    pub(crate) fn views(&self) -> Vec<Migration> {
        self.lock().values().map(|entry| entry.job.view()).collect()
    }

    /// Wakes the task that starts waiting moves: a migration has ended.
    pub(crate) fn wake(&self) {
        self.changed.notify_one();
    }
}

fn queued(why: Note, since_unix_ms: u64) -> Queued {
    Queued { code: why.code, reason: why.message, since_unix_ms }
}

fn record(store: &Store, entry: &Entry) -> Result<()> {
    let record = QueueRecord { request: entry.request.clone(), view: entry.job.view() };
    Ok(store.put(&entry.job.id().to_string(), &record)?)
}

fn expect_no_entry(entries: &BTreeMap<MigrationId, Entry>, vm: &VmName) -> Result<()> {
    let found = entries.values().find(|entry| entry.job.view().vm == *vm);
    found.map_or(Ok(()), |entry| {
        let id = entry.job.id();
        Err(Failure::conflict(format!(
            "VM {vm} waits to move already, as migration {id}: `limosa migration cancel {id}` \
             takes it out of the queue"
        )))
    })
}

fn forget_ended(store: &Store) -> Result<(), StoreError> {
    let all = store.all::<QueueRecord>()?;
    let ended: Vec<_> = all.iter().filter(|(_, record)| record.view.outcome.is_some()).collect();
    let surplus = ended.len().saturating_sub(ENDED_KEPT_MAX);
    ended.into_iter().take(surplus).try_for_each(|(key, _)| store.remove::<QueueRecord>(key))
}

#[cfg(test)]
mod tests {
    use limosa_protocol::handover::{Record, Stage};
    use limosa_protocol::id::Epoch;
    use limosa_protocol::migration::{Role, Verify};
    use limosa_protocol::plan::{MemoryCarrier, MemoryItem, MigrationPlan, Policy};
    use uuid::Uuid;

    use super::*;

    struct Fixture {
        _folder: tempfile::TempDir,
        store: Store,
        queue: Queue,
    }

    fn fixture() -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        Fixture { _folder: folder, store, queue: Queue::default() }
    }

    fn full(code: QueueReason) -> Note {
        Note { code, message: "16 migrations are under way".to_owned() }
    }

    impl Fixture {
        fn push(&self, vm: &str, to: &str, code: QueueReason) -> Result<Migration> {
            let request: MoveRequest =
                serde_json::from_value(serde_json::json!({ "to": to })).unwrap();
            let (vm, source, to) = (vm.parse().unwrap(), "a".parse().unwrap(), to.parse().unwrap());
            let job = Job::new(MigrationId(Uuid::now_v7()), vm, Role::Source, source, to);
            self.queue.push(&self.store, &Arc::new(job), request, full(code))
        }

        fn waiting(&self) -> Vec<String> {
            self.queue.waiting().iter().map(|entry| entry.job.view().vm.to_string()).collect()
        }
    }

    /// Goal: the order of requests is the order of the queue, also after a restart.
    #[test]
    fn waiting_moves_outlive_the_agent_in_their_order() {
        let mut fixture = fixture();
        for vm in ["web3", "web1", "web2"] {
            let view = fixture.push(vm, "b", QueueReason::SourceFull).unwrap();
            assert_eq!(view.status(), "queued");
        }
        let since = fixture.queue.views()[0].queued.clone().unwrap();
        fixture.queue = Queue::default();
        fixture.queue.restore(&fixture.store).unwrap();
        assert_eq!(fixture.waiting(), ["web3", "web1", "web2"]);
        assert_eq!(fixture.queue.views()[0].queued, Some(since));
    }

    /// Goal: a cancelled entry is out of the queue, durably, and its end can be seen.
    #[test]
    fn a_waiting_move_can_be_cancelled() {
        let mut fixture = fixture();
        let id = fixture.push("web1", "b", QueueReason::SourceFull).unwrap().id;
        let view = fixture.queue.cancel(&fixture.store, id).unwrap().unwrap();
        assert_eq!((view.outcome, view.queued), (Some(End::Stayed), None));
        assert!(fixture.queue.cancel(&fixture.store, id).is_none());
        let ended: QueueRecord = fixture.store.get(&id.to_string()).unwrap().unwrap();
        assert_eq!(ended.view.outcome, Some(End::Stayed));
        fixture.queue = Queue::default();
        fixture.queue.restore(&fixture.store).unwrap();
        assert!(fixture.waiting().is_empty());
    }

    /// Goal: cancelling an entry that starts just now is left to its migration.
    #[test]
    fn a_starting_move_is_cancelled_as_a_migration() {
        let fixture = fixture();
        let id = fixture.push("web1", "b", QueueReason::SourceFull).unwrap().id;
        let job = fixture.queue.job(id).unwrap();
        assert!(fixture.queue.start(id));
        let view = fixture.queue.cancel(&fixture.store, id).unwrap().unwrap();
        assert_eq!(view.outcome, None);
        assert!(job.is_cancelled());
        // One that was cancelled while it waited does not start.
        let other = fixture.push("web2", "b", QueueReason::SourceFull).unwrap().id;
        fixture.queue.cancel(&fixture.store, other).unwrap().unwrap();
        assert!(!fixture.queue.start(other));
    }

    #[test]
    fn a_vm_waits_once() {
        let fixture = fixture();
        let id = fixture.push("web1", "b", QueueReason::SourceFull).unwrap().id;
        let refused = fixture.push("web1", "c", QueueReason::SourceFull).unwrap_err();
        assert!(refused.to_string().contains(&id.to_string()), "{refused}");
        assert_eq!(fixture.waiting(), ["web1"]);
    }

    /// Goal: a later request does not overtake an earlier one for the same room.
    #[test]
    fn a_move_waits_behind_those_for_the_same_room() {
        let fixture = fixture();
        let host = |name: &str| name.parse::<HostName>().unwrap();
        assert_eq!(fixture.queue.behind(&host("b")), None);
        let id = fixture.push("web1", "b", QueueReason::DestinationFull).unwrap().id;
        assert_eq!(fixture.queue.behind(&host("b")), Some(full(QueueReason::DestinationFull)));
        assert_eq!(fixture.queue.behind(&host("c")), None);
        let now = full(QueueReason::SourceFull);
        fixture.queue.keep_waiting(&fixture.store, id, now.clone()).unwrap();
        assert_eq!(fixture.queue.behind(&host("c")), Some(now));
    }

    /// A migration of a VM without disks that was just offered.
    fn migration_record(view: Migration) -> MigrationRecord {
        MigrationRecord {
            handover: Record::first(view.id, Stage::Offered, Epoch(1)),
            paused: false,
            plan: MigrationPlan {
                peer: Some(view.destination.clone()),
                memory: MemoryItem { bytes: 64 << 20, carrier: MemoryCarrier::PreCopy },
                disks: Vec::new(),
                policy: Policy {
                    downtime_limit_ms: 300,
                    verify: Verify::Running,
                    retain_source_disks: false,
                },
            },
            view,
            definition: None,
            made: Vec::new(),
            run: None,
            addresses: Vec::new(),
            has_run: false,
            forced: None,
        }
    }

    /// Goal: a crash between a migration's record and the entry's removal starts it once.
    #[test]
    fn an_entry_that_became_a_migration_is_forgotten() {
        let fixture = fixture();
        let view = fixture.push("web1", "b", QueueReason::SourceFull).unwrap();
        let record = migration_record(view.clone());
        fixture.store.put(&view.id.to_string(), &record).unwrap();
        let queue = Queue::default();
        queue.restore(&fixture.store).unwrap();
        assert!(queue.views().is_empty());
        assert!(fixture.store.get::<QueueRecord>(&view.id.to_string()).unwrap().is_none());
    }

    #[test]
    fn of_ended_entries_the_last_are_kept() {
        let fixture = fixture();
        let ids: Vec<_> = (0..=ENDED_KEPT_MAX)
            .map(|_| {
                let id = fixture.push("web1", "b", QueueReason::SourceFull).unwrap().id;
                fixture.queue.cancel(&fixture.store, id).unwrap().unwrap();
                id
            })
            .collect();
        let is_kept =
            |id: &MigrationId| fixture.store.get::<QueueRecord>(&id.to_string()).unwrap().is_some();
        assert!(!is_kept(&ids[0]));
        assert!(ids[1..].iter().all(is_kept));
    }
}
