//! Accepts an offer: the VM's name and place are taken, and the migration begins.

use std::sync::Arc;

use limosa_host::failure::{Failure, Result};
use limosa_host::store::{MigrationRecord, VmRecord};
use limosa_host::vm::{Vm, files};
use limosa_protocol::handover::{Record, Stage};
use limosa_protocol::id::HostName;
use limosa_protocol::migration::Role;
use limosa_protocol::peer::{Offer, OfferAnswer};
use tokio::sync::{Mutex, watch};
use tracing::Instrument;

use super::connections::Connections;
use super::incoming::Incoming;
use super::place;
use crate::handover::{DestinationDriver, Handover};
use crate::job::Job;
use crate::migrations::{Migrations, Slot};
use crate::preflight::{self, Placed};

impl Incoming {
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
        let _placing = migrations.context.host.allocation_lock.lock().await;
        let id = offer.migration;
        // The answer may have been lost, and the source asks again.
        if let Some(incoming) = migrations.incoming(id, from)
            && incoming.offer == offer
            && incoming.driver.expect_preparing().is_ok()
        {
            return Ok(OfferAnswer { problems: Vec::new(), is_full: false });
        }
        // A number that is known already would replace what it stands for.
        let known: Option<MigrationRecord> = migrations.context.host.store.get(&id.to_string())?;
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
            migrations.context.host.name.clone(),
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
        migrations.context.host.vms.add(&migrations.context.host.name, Arc::clone(&vm))?;
        let begun =
            DestinationDriver::begin(&migrations.context, &vm, &job, record, definition.clone());
        let driver = match begun {
            Ok(driver) => driver,
            Err(failure) => {
                migrations.context.host.vms.remove(&vm, &mut of_vm);
                return Err(failure);
            }
        };
        of_vm.lock = driver.initial_lock();
        drop(of_vm);
        let incoming = Arc::new(Self {
            context: Arc::clone(&migrations.context),
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

    /// An operator at this host may cancel, too.
    fn spawn_cancel_watch(self: &Arc<Self>) {
        let incoming = Arc::clone(self);
        self.job.spawn(async move {
            incoming.job.cancelled().await;
            incoming.driver.give_up("cancelled by an operator of the destination").await;
        });
    }
}
