//! The migrations of this host: those under way, and what they need of the host.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_auth::Identity;
use limosa_protocol::id::{HostName, MigrationId, VmName};
use limosa_protocol::migration::{Migration, Note, QueueReason, Role};
use tokio::sync::watch;

use crate::settings::MigrationSettings;

use crate::context::Context;
use crate::destination::Incoming;
use crate::handover::Handover;
use crate::job::Job;
use crate::queue::Queue;
use limosa_host::Host;
use limosa_host::failure::{Failure, Result, chain};
use limosa_host::store::{MigrationRecord, QueueRecord, StoreError};
use limosa_host::vm::{Vm, create, run};

/// Starts a VM that is off.
pub async fn start_vm(migrations: &Arc<Migrations>, vm: &Arc<Vm>) -> Result<()> {
    migrations.close_alone(&vm.name).await;
    run::start(&migrations.context.host, vm).await
}

/// Deletes a VM that is off.
pub async fn delete_vm(migrations: &Migrations, vm: &Arc<Vm>) -> Result<()> {
    migrations.close_alone(&vm.name).await;
    create::delete(&migrations.context.host, vm).await
}

/// All migrations under way, those that wait, and what they need of this host.
pub struct Migrations {
    pub(crate) context: Arc<Context>,
    under_way: Mutex<BTreeMap<MigrationId, UnderWay>>,
    /// Slots of migrations that are about to be added.
    reserved_count: AtomicUsize,
    pub(crate) queue: Queue,
}

/// Room for one migration, until it is added.
pub(crate) struct Slot<'a> {
    reserved_count: &'a AtomicUsize,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.reserved_count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One migration under way.
#[derive(Clone)]
struct UnderWay {
    driver: Handover,
    incoming: Option<Arc<Incoming>>,
}

impl UnderWay {
    fn job(&self) -> &Arc<Job> {
        self.driver.job()
    }
}

/// One that only waits for its peer's last word moves nothing.
fn moving_count(under_way: &BTreeMap<MigrationId, UnderWay>) -> usize {
    under_way.values().filter(|one| one.job().view().outcome.is_none()).count()
}

impl Migrations {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, UnderWay>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No migrations yet.
    pub fn new(host: Arc<Host>, identity: Identity, settings: MigrationSettings) -> Self {
        Self {
            context: Arc::new(Context { host, identity, settings }),
            under_way: Mutex::default(),
            reserved_count: AtomicUsize::new(0),
            queue: Queue::default(),
        }
    }

    fn has_room(&self, under_way: &BTreeMap<MigrationId, UnderWay>) -> bool {
        let reserved = self.reserved_count.load(Ordering::Relaxed);
        moving_count(under_way) + reserved < usize::from(self.context.settings.concurrent_max)
    }

    /// Whether no further migration may begin on this host.
    pub(crate) fn is_full(&self) -> bool {
        !self.has_room(&self.lock())
    }

    /// Why a move waits while this host is full.
    pub(crate) fn source_full(&self) -> Note {
        let (count, here) = (self.context.settings.concurrent_max, &self.context.host.name);
        let message = format!("{count} migrations are under way at {here}");
        Note { code: QueueReason::SourceFull, message }
    }

    /// Room for one migration more, if there is any.
    pub(crate) fn reserve(&self) -> Option<Slot<'_>> {
        // Under the lock, so that two cannot reserve the last slot.
        let under_way = self.lock();
        self.has_room(&under_way).then(|| {
            self.reserved_count.fetch_add(1, Ordering::Relaxed);
            Slot { reserved_count: &self.reserved_count }
        })
    }

    /// Adds a migration that begins, in its slot.
    pub(crate) fn add(
        self: &Arc<Self>,
        driver: Handover,
        incoming: Option<Arc<Incoming>>,
        slot: Slot<'_>,
    ) {
        self.forget_once_ended(&driver);
        let mut under_way = self.lock();
        under_way.insert(driver.id(), UnderWay { driver, incoming });
        drop(slot);
    }

    /// Adds a migration that a restart found.
    pub(crate) fn add_restored(self: &Arc<Self>, driver: Handover) {
        self.forget_once_ended(&driver);
        self.lock().insert(driver.id(), UnderWay { driver, incoming: None });
    }

    /// An unsettled migration with a host.
    pub(crate) fn handover(&self, id: MigrationId, with: &HostName) -> Option<Handover> {
        let driver = self.lock().get(&id)?.driver.clone();
        (driver.peer() == *with).then_some(driver)
    }

    /// The handover that a VM of this host has yet to settle.
    pub(crate) fn unsettled(&self, vm: &VmName) -> Option<Handover> {
        let under_way = self.lock();
        let mut of_vm = under_way.values().filter(|one| one.job().view().vm == *vm);
        of_vm.find(|one| one.driver.status().ended.is_none()).map(|one| one.driver.clone())
    }

    /// Closes an earlier move of a VM that stayed, if that needs no vote of its
    /// destination: one that was never asked whether it is ready can have nothing of it.
    async fn close_alone(&self, vm: &VmName) {
        if let Some(Handover::Source(driver)) = self.unsettled(vm)
            && driver.status().is_ours
        {
            driver.move_on().await;
        }
    }

    /// Forgets a migration once it is settled; its record stays, and is still answered from.
    fn forget_once_ended(self: &Arc<Self>, driver: &Handover) {
        let (migrations, id, mut status) = (Arc::clone(self), driver.id(), driver.watch());
        driver.job().spawn(async move {
            // An error means that the driver is gone: there is nothing more to wait for.
            status.wait_for(|now| now.ended.is_some()).await.ok();
            drop(status);
            migrations.lock().remove(&id);
            migrations.queue.wake();
            if let Err(error) = migrations.context.host.store.forget_old_migrations() {
                tracing::warn!(error = chain(&error), "old migrations stay recorded");
            }
        });
    }

    /// The receiving half of a migration under way from a host.
    pub(crate) fn incoming(&self, id: MigrationId, from: &HostName) -> Option<Arc<Incoming>> {
        let incoming = self.lock().get(&id)?.incoming.clone()?;
        (incoming.source() == from).then_some(incoming)
    }

    /// Everything that this host receives, but that one.
    pub(crate) fn receiving_but(&self, id: MigrationId) -> Vec<Arc<Incoming>> {
        let under_way = self.lock();
        let others = under_way.iter().filter(|(other, _)| **other != id);
        let receiving = others.filter(|(_, one)| one.driver.status().is_receiving);
        receiving.filter_map(|(_, one)| one.incoming.clone()).collect()
    }

    /// Any migration under way with a host.
    pub fn under_way_with(&self, host: &HostName) -> Option<Migration> {
        self.lock().values().find_map(|under_way| {
            let view = under_way.job().view();
            let peer = match view.role {
                Role::Source => &view.destination,
                Role::Destination => &view.source,
            };
            (peer == host).then_some(view)
        })
    }

    /// All migrations, the oldest first: those recorded, as they are now.
    pub fn list(&self) -> Result<Vec<Migration>> {
        let recorded = match self.context.host.store.all::<MigrationRecord>() {
            Ok(recorded) => recorded,
            // Those under way are what an operator now needs to see.
            Err(StoreError::Failed) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let ended_in_queue = match self.context.host.store.all::<QueueRecord>() {
            Ok(recorded) => recorded,
            Err(StoreError::Failed) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let waited = ended_in_queue.into_iter().map(|(_, record)| record.view);
        let waited = waited.chain(self.queue.views());
        let recorded = waited.chain(recorded.into_iter().map(|(_, record)| record.view));
        let mut views: BTreeMap<_, _> = recorded.map(|view| (view.id, view)).collect();
        for (id, under_way) in self.lock().iter() {
            views.insert(*id, under_way.job().view());
        }
        Ok(views.into_values().collect())
    }

    /// One migration as it is now.
    pub fn view(&self, id: MigrationId) -> Result<Migration> {
        if let Some(under_way) = self.lock().get(&id) {
            return Ok(under_way.job().view());
        }
        if let Some(job) = self.queue.job(id) {
            return Ok(job.view());
        }
        let key = id.to_string();
        let view = match self.context.host.store.get::<MigrationRecord>(&key)? {
            Some(record) => Some(record.view),
            None => self.context.host.store.get::<QueueRecord>(&key)?.map(|record| record.view),
        };
        view.ok_or_else(|| {
            Failure::not_found(format!(
                "no migration {id}: `limosa migration list` shows those there are"
            ))
        })
    }

    /// The views of a migration under way, as they change.
    pub fn subscribe(&self, id: MigrationId) -> Option<watch::Receiver<Migration>> {
        let under_way = self.lock().get(&id).map(|under_way| Arc::clone(under_way.job()));
        under_way.or_else(|| self.queue.job(id)).map(|job| job.subscribe())
    }

    /// Asks a migration to end; it does so on its own time.
    pub fn cancel(&self, id: MigrationId) -> Result<Migration> {
        let under_way = self.lock().get(&id).cloned();
        if under_way.is_none()
            && let Some(cancelled) = self.queue.cancel(&self.context.host.store, id)
        {
            return cancelled;
        }
        match under_way {
            Some(under_way) => {
                // The whole VM may be here only: that is not given up unheard.
                if let Some(doubt) = under_way.driver.status().doubt {
                    let what = under_way.driver.doubt_text(doubt);
                    return Err(Failure::conflict(format!("nothing was cancelled: {what}")));
                }
                under_way.job().cancel()?;
                Ok(under_way.job().view())
            }
            None => {
                let view = self.view(id)?;
                let end = view.outcome.map_or("unknown", |outcome| outcome.as_str());
                Err(Failure::conflict(format!("migration {id} has ended already: {end}")))
            }
        }
    }
}
