//! The destination's half: from the offer to a VM that runs, or to nothing.
//!
//! ```text
//! offer ─► placed ─ receive ─► receiving ─ ready? ─► ready ─ commit ─► owner
//!             └───────────────────┴───────── abort, failure ─► declined
//! ```
//!
//! **Invariants.** Everything made here is noted in the record before or while
//! it is made, so that declining removes it also after a crash. What is received
//! goes to a QEMU that stands; only [`super::handover`] lets it run.

mod channels;
mod place;
mod receive;
mod retry;
mod take_over;
pub(crate) mod verify;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use hyper::body::Bytes;
use limosa_plane::{PlaneError, PlaneEvent};
use limosa_protocol::handover::{Record, Stage};
use limosa_protocol::id::HostName;
use limosa_protocol::migration::{Phase, Role};
use limosa_protocol::peer::{FileReceived, Offer, OfferAnswer, RetryStarted};
use limosa_protocol::plan::MigrationPlan;
use limosa_protocol::vm::VmDefinition;
use limosa_qemu::ram;
use tokio::sync::{Mutex, mpsc, watch};
use tracing::{Instrument, Span};

pub(crate) use channels::ConnectionGroup;
pub use channels::accept_channel;
pub(crate) use place::{free, removable};
pub(crate) use receive::end_plane;
pub(crate) use take_over::{expect_paused, resume_guest};

use channels::Connections;

use super::handover::{DestinationDriver, Handover};
use super::job::Job;
use super::preflight::{self, Placed};
use crate::migrations::Migrations;
use crate::migrations::Slot;
use limosa_host::failure::{Failure, Result};
use limosa_host::store::{MigrationRecord, VmRecord};
use limosa_host::vm::{Qemu, Vm, files};

/// Unit in which the kernel counts what a file takes.
const BLOCK_BYTES: u64 = 512;

/// What one migration receives at its destination.
pub(crate) struct Incoming {
    migrations: Arc<Migrations>,
    job: Arc<Job>,
    offer: Offer,
    definition: VmDefinition,
    /// The plan of the offer with the locations of this host
    plan: MigrationPlan,
    vm: Arc<Vm>,
    driver: Arc<DestinationDriver>,
    connections: Connections,
    /// Whose turn it is to write a small file.
    file_turn: Mutex<()>,
    /// The last attempt that the source began
    attempt: watch::Sender<u32>,
    inner: Mutex<Inner>,
}

/// What changes while it goes on.
#[derive(Default)]
struct Inner {
    /// Folders and images that were made for the VM.
    made: Vec<PathBuf>,
    qemu: Option<Qemu>,
    /// What the plane is made of, until it is.
    parts: Option<receive::Parts>,
    events: Option<mpsc::Receiver<PlaneEvent>>,
    /// Why the link is lost, while it is
    lost: Option<watch::Sender<Option<PlaneError>>>,
    /// What the source was told of the attempt that began last
    begun: Option<(u32, RetryStarted)>,
    arrived: Arrived,
    /// Everything is here; with RAM that was read again, its digests.
    settled: Option<Settled>,
}

/// What the plane said has come; kept, for who asks may be cut off and ask again.
#[derive(Default)]
struct Arrived {
    ram: bool,
    disks: bool,
}

/// Everything is here, loaded and flushed.
#[derive(Clone)]
struct Settled {
    /// Of RAM that was read again, by part.
    ram_digests: Option<Vec<u128>>,
}

impl Incoming {
    /// The host that gives the VM.
    pub(crate) fn source(&self) -> &HostName {
        &self.offer.source
    }

    /// Bytes of guest memory that are still to come.
    pub(crate) fn memory_to_come_bytes(&self) -> u64 {
        if !self.plan.moves_memory() {
            return 0;
        }
        let total = self.definition.memory_bytes();
        // Whoever has the lock now lets QEMU start, or all of it has arrived.
        let Ok(inner) = self.inner.try_lock() else { return 0 };
        let filled = inner.qemu.as_ref().map_or(0, |qemu| {
            let size_bytes = qemu.accelerator.ram_bytes(total);
            let memory = ram::open(&qemu.process, size_bytes);
            let found = memory.ok().and_then(|memory| memory.metadata().ok());
            found.map_or(0, |found| found.blocks() * BLOCK_BYTES)
        });
        total.saturating_sub(filled)
    }

    /// Where images lie, and bytes of each that are still to come.
    pub(crate) fn images_to_come_bytes(&self) -> Vec<(PathBuf, u64)> {
        let to_come = self.plan.images_to_make().map(|(image, disk)| {
            let found = std::fs::metadata(&image.path);
            let here = found.map_or(0, |found| found.blocks() * BLOCK_BYTES);
            let bytes = disk.allocated_bytes.min(disk.virtual_bytes).saturating_sub(here);
            (image.path.clone(), bytes)
        });
        to_come.collect()
    }

    /// Takes an offer: checks it again, takes the VM's name and makes place.
    pub(crate) async fn accept(
        migrations: &Arc<Migrations>,
        from: &HostName,
        offer: Offer,
    ) -> Result<OfferAnswer> {
        if offer.source != *from {
            return Err(Failure::forbidden(format!(
                "host {from} offers a VM in the name of {}",
                offer.source
            )));
        }
        let _placing = migrations.host.allocation_lock.lock().await;
        let id = offer.migration;
        // The answer may have been lost, and the source asks again.
        if let Some(incoming) = migrations.incoming(id, from)
            && incoming.offer == offer
            && incoming.driver.expect_preparing().is_ok()
        {
            return Ok(OfferAnswer { problems: Vec::new(), is_full: false });
        }
        // A number that is known already would replace what it stands for.
        let known: Option<MigrationRecord> = migrations.host.store.get(&id.to_string())?;
        if known.is_some() {
            return Err(Failure::conflict(format!("migration {id} was offered before")));
        }
        let problems = preflight::check_offer(migrations, &offer).await?;
        if !problems.is_empty() {
            return Ok(OfferAnswer { problems, is_full: false });
        }
        let Some(slot) = migrations.reserve() else {
            return Ok(OfferAnswer { problems, is_full: true });
        };
        let incoming = Self::take(migrations, offer, slot).await?;
        if let Err(failure) = incoming.make_place().instrument(incoming.span()).await {
            incoming.driver.give_up(&failure.to_string()).await;
            return Err(failure);
        }
        Ok(OfferAnswer { problems: Vec::new(), is_full: false })
    }

    /// Takes the VM's name, records the offer and begins.
    async fn take(migrations: &Arc<Migrations>, offer: Offer, slot: Slot<'_>) -> Result<Arc<Self>> {
        let id = offer.migration;
        let Placed { definition, plan } = preflight::place_offer(migrations, &offer);
        let configuration = files::place(&definition.places.configuration, "configuration")?;
        let of_vm = VmRecord {
            configuration: configuration.to_owned(),
            epoch: offer.epoch.next(),
            run: None,
            given_up_to: None,
        };
        let vm = Arc::new(Vm::new(definition.clone(), of_vm));
        let job = Arc::new(Job::new(
            id,
            definition.name.clone(),
            Role::Destination,
            offer.source.clone(),
            migrations.host.name.clone(),
        ));
        let record = MigrationRecord {
            handover: Record::first(offer.migration, Stage::Preparing, offer.epoch),
            paused: false,
            plan: plan.clone(),
            view: job.view(),
            definition: Some(definition.clone()),
            made: place::what_could_be_made(&definition).await?,
            run: None,
            addresses: Vec::new(),
            has_run: false,
            forced: None,
        };
        // Held until the lock is on it: nobody is to start or delete what has only a name.
        let mut of_vm = vm.lock().await;
        migrations.host.vms.add(&migrations.host.name, Arc::clone(&vm))?;
        let begun = DestinationDriver::begin(migrations, &vm, &job, record, definition.clone());
        let driver = match begun {
            Ok(driver) => driver,
            Err(failure) => {
                migrations.host.vms.remove(&vm, &mut of_vm);
                return Err(failure);
            }
        };
        of_vm.lock = driver.initial_lock();
        drop(of_vm);
        let incoming = Arc::new(Self {
            migrations: Arc::clone(migrations),
            job,
            offer,
            definition,
            plan,
            vm: Arc::clone(&vm),
            driver: Arc::clone(&driver),
            connections: Connections::default(),
            file_turn: Mutex::default(),
            attempt: watch::Sender::new(1),
            inner: Mutex::default(),
        });
        let receiving = Some(Arc::clone(&incoming));
        migrations.add(Handover::Destination(Arc::clone(&driver)), receiving, slot);
        incoming.spawn_cancel_watch();
        driver.spawn_settling();
        Ok(incoming)
    }

    /// The span of this migration.
    pub(crate) fn span(&self) -> Span {
        self.job.span()
    }

    /// An operator at this host may cancel, too.
    fn spawn_cancel_watch(self: &Arc<Self>) {
        let incoming = Arc::clone(self);
        self.job.spawn(async move {
            incoming.job.cancelled().await;
            incoming.driver.give_up("cancelled by an operator of the destination").await;
        });
    }

    /// Takes a part of a small file that moves beside the disks. A part that is
    /// here already, whose answer was lost, changes nothing.
    pub(crate) async fn take_file(
        &self,
        name: &str,
        offset: u64,
        part: Bytes,
    ) -> Result<FileReceived> {
        self.driver.expect_preparing()?;
        let expected = self.offer.files.iter().find(|(offered, _)| offered == name);
        let known = files::small_files(&self.definition)?;
        let is_known = known.iter().any(|(known, _)| *known == name);
        let Some((_, size_bytes)) = expected.filter(|_| is_known) else {
            return Err(Failure::bad_request(format!("the offer names no file {name}")));
        };
        let folder =
            files::place(&self.definition.places.configuration, "configuration")?.to_owned();
        let path = folder.join(name);
        let noted = path.clone();
        // One part at a time, also when an earlier request is still being done.
        let _turn = self.file_turn.lock().await;
        if offset == 0 {
            self.driver
                .note(|record| {
                    if !record.made.contains(&noted) {
                        record.made.push(noted);
                    }
                })
                .await?;
        }
        receive::append(&path, offset, part, *size_bytes).await
    }

    /// Notes a failure and declines: the source finds out when it asks, or by
    /// its channels.
    async fn fail(&self, reason: String) {
        self.driver.give_up(&reason).await;
    }

    fn enter(&self, phase: Phase) {
        self.job.enter(phase);
    }
}
