//! What the agent must not forget: an embedded transactional store.
//!
//! | table | key | value |
//! |-------|-----|-------|
//! | `vms` | name | [`VmRecord`] |
//! | `migrations` | id | [`MigrationRecord`] |
//! | `queue` | id | [`QueueRecord`] |
//! | `peers` | name | [`PeerRecord`] |
//! | `operators` | name | [`OperatorRecord`] |
//! | `switches` | name | [`limosa_protocol::api::Switch`] |
//!
//! **Invariants.** A `put` or `remove` that returned `Ok` is on the disk. After
//! one that failed nobody knows what is: the store answers nothing more, until a
//! restarted agent reads what the disk holds. One agent has a state folder: the
//! second finds the lock taken and ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_protocol::api::FailureCode;
use limosa_protocol::api::Switch;
use limosa_protocol::handover::{self, Stage};
use limosa_protocol::id::{Epoch, HostName, MigrationId, VmName};
use limosa_protocol::migration::{Migration, MoveRequest, Role};
use limosa_protocol::peer::GuestAddress;
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;
use limosa_qemu::accelerator::Accelerator;
use limosa_qemu::process::ProcessId;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::failure::DomainError;
use limosa_faults::{self as faults, Edge};

/// Most ended migrations that are kept; the oldest go first.
pub const MIGRATIONS_KEPT_MAX: usize = 200;

type Table = TableDefinition<'static, &'static str, &'static [u8]>;

/// Each kind of record has its table.
pub trait Record: Serialize + DeserializeOwned {
    const TABLE: &'static str;
    /// What tests call the writing of it, when they can make it fail.
    fn fault_name(&self) -> Option<&'static str> {
        None
    }
}

/// A VM that belongs to this host, or did until its migration ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmRecord {
    /// Folder that holds the definition.
    pub configuration: PathBuf,
    pub epoch: Epoch,
    /// Its QEMU, from its start to its end.
    pub run: Option<RunRecord>,
    /// The host to which an operator gave the VM: what is here is never started.
    pub given_up_to: Option<HostName>,
}

/// A QEMU that this agent started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunRecord {
    pub process: ProcessId,
    pub accelerator: Accelerator,
    pub cgroup: Option<PathBuf>,
}

/// One migration, as far as it must survive the agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationRecord {
    pub handover: handover::Record,
    /// The guest was paused and stays so.
    pub paused: bool,
    /// What moves and where it lies, as far as it is known here.
    pub plan: MigrationPlan,
    /// What operators see of it.
    pub view: Migration,
    /// The VM: at the destination as it will be here, at the source as it was.
    pub definition: Option<VmDefinition>,
    /// Destination: files and folders made for it, to be removed if it declines.
    pub made: Vec<PathBuf>,
    /// Destination: its QEMU. Source: the one that reads the disks of a VM that
    /// is off.
    pub run: Option<RunRecord>,
    /// Destination: addresses the guest was seen to use at the source.
    #[serde(default)]
    pub addresses: Vec<GuestAddress>,
    /// Destination: the guest is its users'. One that stands was paused by them.
    pub has_run: bool,
    /// The operator who gave the VM to this host, and when.
    pub forced: Option<String>,
}

impl MigrationRecord {
    /// The VM was off when it began to move: there is no guest memory.
    pub fn is_off(&self) -> bool {
        !self.plan.moves_memory()
    }

    /// Whether nothing is left to settle.
    pub fn is_ended(&self) -> bool {
        matches!(self.handover.stage, Stage::Done | Stage::Stayed | Stage::Superseded)
    }

    /// The other host.
    pub fn peer(&self) -> &HostName {
        match self.view.role {
            Role::Source => &self.view.destination,
            Role::Destination => &self.view.source,
        }
    }
}

/// A move that waits in the queue, or ended there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QueueRecord {
    /// What the operator asked for: preflight makes the plan when its turn comes.
    pub request: MoveRequest,
    /// What operators see of it; with an outcome it has ended without beginning.
    pub view: Migration,
}

/// A host that this one trusts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PeerRecord {
    pub fingerprint: String,
    pub certificate_hex: String,
    /// `ADDRESS:PORT` of its agent.
    pub address: String,
}

/// An operator who may command from afar.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OperatorRecord {
    pub fingerprint: String,
    pub certificate_hex: String,
}

impl Record for VmRecord {
    const TABLE: &'static str = "vms";
}
impl Record for MigrationRecord {
    const TABLE: &'static str = "migrations";
    fn fault_name(&self) -> Option<&'static str> {
        Some(self.handover.stage.as_str())
    }
}
impl Record for QueueRecord {
    const TABLE: &'static str = "queue";
}
impl Record for PeerRecord {
    const TABLE: &'static str = "peers";
}
impl Record for OperatorRecord {
    const TABLE: &'static str = "operators";
}
impl Record for Switch {
    const TABLE: &'static str = "switches";
}

/// Why the store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another agent has the folder.
    #[error(
        "another limosad uses the folder {}: stop it, or give this one its own `folder`, \
         `runtime_folder` and `listen`",
        folder.display()
    )]
    Locked {
        /// The folder
        folder: PathBuf,
    },
    /// A file of the folder cannot be used.
    #[error("cannot use {}", path.display())]
    Folder {
        /// The file
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The store refused; nothing can be said of what is on the disk.
    #[error("the state store failed")]
    Store(#[source] Box<redb::Error>),
    /// A write failed before.
    #[error("the state store failed earlier, so no record can be trusted")]
    Failed,
    /// A record was written by something else.
    #[error("record {key:?} of table {table} is not readable")]
    Record {
        /// Which table
        table: &'static str,
        /// Which record
        key: String,
        #[source]
        source: serde_json::Error,
    },
}

impl DomainError for StoreError {
    fn code(&self) -> FailureCode {
        match self {
            Self::Store(_) | Self::Failed => FailureCode::StoreFailed,
            _ => FailureCode::Internal,
        }
    }

    fn remedy(&self) -> Option<String> {
        let has_failed = matches!(self, Self::Store(_) | Self::Failed);
        has_failed.then(|| "look at the disk of the state folder, then restart limosad".to_owned())
    }
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Store(Box::new(error.into()))
    }
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::Folder { path, source }
}

/// Takes a folder for this agent alone, for as long as the file of that name is open.
pub fn lock(folder: &Path, name: &str) -> Result<File, StoreError> {
    let path = folder.join(name);
    let lock = File::create(&path).map_err(at(&path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| StoreError::Locked { folder: folder.to_owned() })?;
    Ok(lock)
}

/// The open store.
#[derive(Clone)]
pub struct Store {
    database: Arc<Database>,
    has_failed: Arc<AtomicBool>,
    _lock: Arc<File>,
}

impl Store {
    /// Opens the store of a state folder, making both when missing.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(folder).map_err(at(folder))?;
        let lock = lock(folder, "lock")?;
        let database = Database::create(folder.join("state.redb"))?;
        let write = database.begin_write()?;
        for table in [
            VmRecord::TABLE,
            MigrationRecord::TABLE,
            QueueRecord::TABLE,
            PeerRecord::TABLE,
            OperatorRecord::TABLE,
            Switch::TABLE,
        ] {
            write.open_table(Table::new(table))?;
        }
        write.commit()?;
        // A record is durable only if the way to its file is.
        for above in [Some(folder), folder.parent()].into_iter().flatten() {
            let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
            File::open(above).and_then(|above| above.sync_all()).map_err(at(above))?;
        }
        Ok(Self { database: Arc::new(database), has_failed: Arc::default(), _lock: Arc::new(lock) })
    }

    /// Does something to the disk, once nothing has failed yet.
    fn write(
        &self,
        fault_name: Option<&'static str>,
        work: impl FnOnce(&redb::WriteTransaction) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.check()?;
        let written = synced(|| {
            faults::reach_write(fault_name, Edge::Before)?;
            let write = self.database.begin_write()?;
            work(&write)?;
            write.commit()?;
            Ok(faults::reach_write(fault_name, Edge::After)?)
        });
        if written.is_err() {
            self.has_failed.store(true, Ordering::Release);
        }
        written
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.has_failed.load(Ordering::Acquire) { Err(StoreError::Failed) } else { Ok(()) }
    }

    /// Writes a record; on `Ok` it is on the disk.
    pub fn put<R: Record>(&self, key: &str, record: &R) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(record).map_err(|source| StoreError::Record {
            table: R::TABLE,
            key: key.to_owned(),
            source,
        })?;
        self.write(record.fault_name(), |write| {
            write.open_table(Table::new(R::TABLE))?.insert(key, bytes.as_slice())?;
            Ok(())
        })
    }

    /// Removes a record, if there is one; on `Ok` it is gone from the disk.
    pub fn remove<R: Record>(&self, key: &str) -> Result<(), StoreError> {
        self.write(None, |write| {
            write.open_table(Table::new(R::TABLE))?.remove(key)?;
            Ok(())
        })
    }

    /// Reads one record.
    pub fn get<R: Record>(&self, key: &str) -> Result<Option<R>, StoreError> {
        self.check()?;
        let table = self.database.begin_read()?.open_table(Table::new(R::TABLE))?;
        table.get(key)?.map(|bytes| decode(key, bytes.value())).transpose()
    }

    /// Reads all records of a kind, by key.
    pub fn all<R: Record>(&self) -> Result<Vec<(String, R)>, StoreError> {
        self.check()?;
        let table = self.database.begin_read()?.open_table(Table::new(R::TABLE))?;
        let mut records = Vec::new();
        for entry in table.iter()? {
            let (key, bytes) = entry?;
            records.push((key.value().to_owned(), decode(key.value(), bytes.value())?));
        }
        Ok(records)
    }

    /// Writes a migration and the VM that it concerns in one step: the commit
    /// of one is the commit of the other. `None` removes the VM.
    pub fn put_migration_and_vm(
        &self,
        migration: &MigrationRecord,
        vm: &VmName,
        record: Option<&VmRecord>,
    ) -> Result<(), StoreError> {
        let key = migration.view.id.to_string();
        let bad =
            |source| StoreError::Record { table: MigrationRecord::TABLE, key: key.clone(), source };
        let migration_bytes = serde_json::to_vec(migration).map_err(bad)?;
        let vm_bytes = record.map(serde_json::to_vec).transpose().map_err(bad)?;
        self.write(migration.fault_name(), |write| {
            write
                .open_table(Table::new(MigrationRecord::TABLE))?
                .insert(key.as_str(), migration_bytes.as_slice())?;
            {
                let mut vms = write.open_table(Table::new(VmRecord::TABLE))?;
                match &vm_bytes {
                    Some(bytes) => vms.insert(vm.as_str(), bytes.as_slice())?,
                    None => vms.remove(vm.as_str())?,
                };
            }
            Ok(())
        })
    }

    /// Forgets the oldest ended migrations beyond [`MIGRATIONS_KEPT_MAX`].
    pub fn forget_old_migrations(&self) -> Result<Vec<MigrationId>, StoreError> {
        // Keys are UUIDs of version 7: their order is the order of time.
        let ended: Vec<_> = self
            .all::<MigrationRecord>()?
            .into_iter()
            .filter(|(_, record)| record.is_ended())
            .collect();
        let surplus = ended.len().saturating_sub(MIGRATIONS_KEPT_MAX);
        let mut forgotten = Vec::new();
        for (key, record) in ended.into_iter().take(surplus) {
            self.remove::<MigrationRecord>(&key)?;
            forgotten.push(record.view.id);
        }
        Ok(forgotten)
    }
}

fn decode<R: Record>(key: &str, bytes: &[u8]) -> Result<R, StoreError> {
    serde_json::from_slice(bytes).map_err(|source| StoreError::Record {
        table: R::TABLE,
        key: key.to_owned(),
        source,
    })
}

/// Waits for the disk without holding up the other tasks of this thread.
fn synced<T>(work: impl FnOnce() -> T) -> T {
    let many_threads = tokio::runtime::Handle::try_current().is_ok_and(|runtime| {
        runtime.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread
    });
    if many_threads { tokio::task::block_in_place(work) } else { work() }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn a_second_agent_is_turned_away() {
        let folder = tempfile::tempdir().unwrap();
        let first = Store::open(folder.path()).unwrap();
        let refused = Store::open(folder.path()).err().unwrap().to_string();
        assert!(refused.contains("another limosad"), "{refused}");
        drop(first);
        // A test beside this one may just be starting a program: until that has
        // closed what it inherited, the lock is still held.
        let reopened = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            Store::open(folder.path()).ok()
        });
        assert!(reopened.is_some(), "the lock is not given back");
    }

    #[test]
    fn records_survive_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let record =
            VmRecord { configuration: "/x".into(), epoch: Epoch(3), run: None, given_up_to: None };
        {
            let store = Store::open(folder.path()).unwrap();
            store.put("web1", &record).unwrap();
            store.put("web2", &record).unwrap();
            store.remove::<VmRecord>("web2").unwrap();
        }
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.get::<VmRecord>("web1").unwrap().unwrap().epoch, Epoch(3));
        assert!(store.get::<VmRecord>("web2").unwrap().is_none());
        assert_eq!(store.all::<VmRecord>().unwrap().len(), 1);
    }
}
