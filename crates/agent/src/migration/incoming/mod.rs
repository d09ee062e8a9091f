//! The destination's half: from the offer to a VM that runs, or to nothing.
//!
//! ```text
//! offer ─► placed ─ receive ─► receiving ─ ready? ─► ready ─ commit ─► owner
//!             └───────────────────┴───────── abort, failure ─► declined
//! ```
//!
//! **Invariants.** Everything made here is noted in the record before or while
//! it is made, so that declining removes it also after a crash. The guest runs
//! only in [`Incoming::commit`], after the record says `owner`.

mod receive;
mod take_over;
pub(crate) mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use limosa_plane::{ChannelIo, DestinationPlane, PlaneEvent};
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::migration::{Outcome as End, Phase, Role};
use limosa_protocol::peer::{ChannelHello, Offer, OfferAnswer, PeerView};
use limosa_protocol::vm::VmDefinition;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio_rustls::server::TlsStream;

pub(crate) use take_over::go_on_as_owner;

use super::compare;
use super::job::Job;
use super::outgoing::{end_record, forget_job};
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::peer_link::into_blocking;
use crate::store::{MigrationRecord, Stage, VmRecord};
use crate::vm::{Qemu, Vm, files, run};

/// One migration at its destination.
pub(crate) struct Incoming {
    agent: Arc<Agent>,
    job: Arc<Job>,
    offer: Offer,
    vm: Arc<Vm>,
    inner: Mutex<Inner>,
}

/// What changes while it goes on.
struct Inner {
    record: MigrationRecord,
    definition: VmDefinition,
    qemu: Option<Qemu>,
    receiving: Option<Receiving>,
    plane: Option<DestinationPlane>,
    events: Option<mpsc::Receiver<PlaneEvent>>,
    failed: Option<String>,
}

impl Inner {
    /// Nothing more is taken once the migration is ready or given up.
    fn expect_preparing(&self) -> Outcome<()> {
        match self.record.stage {
            Stage::Preparing => Ok(()),
            _ => Err(Failure::conflict("this migration takes nothing more")),
        }
    }
}

/// What is prepared for channels that have not all come yet.
struct Receiving {
    token: String,
    channels: Vec<Option<ChannelIo>>,
    return_path: Option<ChannelIo>,
    parts: Option<receive::Parts>,
}

impl Incoming {
    /// The host that gives the VM.
    pub(crate) fn source(&self) -> &HostName {
        &self.offer.source
    }

    fn id(&self) -> MigrationId {
        self.offer.migration
    }

    /// Takes an offer: checks it again, takes the VM's name and makes place.
    pub(crate) async fn accept(
        agent: &Arc<Agent>,
        from: &HostName,
        offer: Offer,
    ) -> Outcome<OfferAnswer> {
        if offer.source != *from {
            return Err(Failure::forbidden(format!(
                "host {from} offers a VM in the name of {}",
                offer.source
            )));
        }
        // A number that is known already would replace what it stands for.
        let id = offer.migration;
        let known: Option<MigrationRecord> = agent.store.get(&id.to_string())?;
        if known.is_some() {
            return Err(Failure::conflict(format!("migration {id} was offered before")));
        }
        let _placing = agent.placing.lock().await;
        let problems = compare::check_offer(agent, &offer).await?;
        if !problems.is_empty() {
            return Ok(OfferAnswer { problems });
        }
        let definition = compare::place_offer(agent, &offer);
        let configuration = files::place(&definition.places.configuration, "configuration")?;
        let vm = Arc::new(Vm::new(
            definition.clone(),
            VmRecord {
                configuration: configuration.to_owned(),
                epoch: offer.epoch.next(),
                run: None,
            },
        ));
        vm.lock().await.migration = Some((id, Role::Destination));
        let job = Arc::new(Job::new(
            id,
            definition.name.clone(),
            Role::Destination,
            offer.source.clone(),
            agent.name.clone(),
        ));
        let record = MigrationRecord {
            stage: Stage::Preparing,
            epoch: offer.epoch.next(),
            paused: false,
            retain_source_disks: false,
            view: job.view(),
            definition: Some(definition.clone()),
            made: Vec::new(),
            run: None,
        };
        agent.add_vm(Arc::clone(&vm))?;
        let incoming = Arc::new(Self {
            agent: Arc::clone(agent),
            job: Arc::clone(&job),
            offer,
            vm: Arc::clone(&vm),
            inner: Mutex::new(Inner {
                record,
                definition,
                qemu: None,
                receiving: None,
                plane: None,
                events: None,
                failed: None,
            }),
        });
        if let Err(failure) = agent.migrations.add(job, Some(Arc::clone(&incoming))) {
            agent.drop_vm(&vm.name);
            return Err(failure);
        }
        incoming.spawn_cancel_watch();
        incoming.spawn_source_watch();
        if let Err(failure) = incoming.make_place().await {
            incoming.decline(&failure.to_string()).await;
            return Err(failure);
        }
        Ok(OfferAnswer { problems: Vec::new() })
    }

    /// An operator at this host may cancel, too.
    fn spawn_cancel_watch(self: &Arc<Self>) {
        let incoming = Arc::clone(self);
        tokio::spawn(async move {
            incoming.job.cancelled().await;
            incoming.decline("cancelled by an operator of the destination").await;
        });
    }

    async fn make_place(&self) -> Outcome<()> {
        let mut inner = self.inner.lock().await;
        // The record comes first, with all that could be made: a crash in
        // between must find what to remove.
        let mut expected = Vec::new();
        for (_, place) in inner.definition.places.each() {
            expected.extend(place.map(std::path::Path::to_owned));
        }
        expected.extend(inner.definition.disks.iter().filter_map(|disk| disk.path.clone()));
        inner.record.made = not_there_yet(&expected);
        self.agent.store.put(&self.id().to_string(), &inner.record)?;
        let mut made = Vec::new();
        files::make_places(&inner.definition.places, &mut made)?;
        let Inner { record, definition, .. } = &mut *inner;
        for (disk, facts) in definition.disks.iter().zip(&self.offer.disks) {
            let image = files::image(disk)?;
            crate::vm::create::make_image(
                &self.agent,
                image,
                disk.format,
                facts.virtual_bytes,
                &mut made,
            )
            .await?;
        }
        record.made = made;
        Ok(self.agent.store.put(&self.id().to_string(), &*record)?)
    }

    /// Takes a small file that moves beside the disks.
    pub(crate) async fn take_file(&self, name: &str, body: axum::body::Body) -> Outcome<()> {
        let mut inner = self.inner.lock().await;
        inner.expect_preparing()?;
        let expected = self.offer.files.iter().find(|(offered, _)| offered == name);
        let known = files::small_files(&inner.definition)?;
        let is_known = known.iter().any(|(known, _)| *known == name);
        let Some((_, size_bytes)) = expected.filter(|_| is_known) else {
            return Err(Failure::bad_request(format!("the offer names no file {name}")));
        };
        let folder =
            files::place(&inner.definition.places.configuration, "configuration")?.to_owned();
        let path = folder.join(name);
        inner.record.made.push(path.clone());
        self.agent.store.put(&self.id().to_string(), &inner.record)?;
        receive::write_file(&path, body, *size_bytes).await
    }

    /// Where this half stands.
    pub(crate) async fn view(&self) -> PeerView {
        let inner = self.inner.lock().await;
        view_of(&inner.record, inner.failed.clone())
    }

    /// Gives the offer back: ends what runs, removes what was made. Does
    /// nothing once the VM is owned here.
    pub(crate) async fn decline(&self, reason: &str) -> PeerView {
        let mut inner = self.inner.lock().await;
        if !matches!(inner.record.stage, Stage::Preparing | Stage::Ready) {
            return view_of(&inner.record, None);
        }
        self.give_back(&mut inner, reason).await;
        let view = view_of(&inner.record, None);
        drop(inner);
        forget_job(&self.agent, self.id());
        view
    }

    /// Records that the guest never ran here, then ends what runs and removes
    /// what was made. In this order: a crash in between must not find an owner
    /// without its files.
    async fn give_back(&self, inner: &mut Inner, reason: &str) {
        if let Some(plane) = inner.plane.take() {
            receive::end_plane(plane);
        }
        inner.receiving = None;
        let qemu = inner.qemu.take();
        let Inner { record, definition, .. } = inner;
        record.stage = Stage::Declined;
        record.view.reason = Some(reason.to_owned());
        let name = &self.vm.name;
        if let Err(error) = self.agent.store.put_migration_and_vm(record, name, None) {
            // What is on the disk is not known: nothing is removed, nothing runs.
            tracing::error!(migration = %self.id(), %error, "a decline was not recorded");
            return;
        }
        let left = free(&self.agent, definition, qemu.as_ref(), &record.made).await;
        let mut reason = reason.to_owned();
        if !left.is_empty() {
            reason = format!("{reason}; left here, to be removed by hand: {}", left.join("; "));
        }
        end_record(&self.job, record, End::Stayed, Some(reason), (None, Vec::new()));
        record.stage = Stage::Declined;
        record.made.clear();
        if let Err(error) = self.agent.store.put(&self.id().to_string(), record) {
            tracing::error!(migration = %self.id(), %error, "the end of a decline was not recorded");
        }
        self.agent.drop_vm(&self.vm.name);
    }

    /// Notes a failure and declines: the source finds out when it asks, or by
    /// its channels.
    async fn fail(&self, reason: String) {
        self.inner.lock().await.failed = Some(reason.clone());
        self.decline(&reason).await;
    }

    fn enter(&self, phase: Phase) {
        self.job.enter(phase);
    }
}

/// What an operator or the peer is told of a record.
pub(crate) fn view_of(record: &MigrationRecord, failed: Option<String>) -> PeerView {
    match record.stage {
        Stage::Preparing | Stage::Offered => PeerView::Preparing { failed },
        Stage::Ready => PeerView::Ready { epoch: record.epoch },
        Stage::Owner => PeerView::Owner { epoch: record.epoch },
        Stage::Done | Stage::HandedOver if record.view.outcome == Some(End::Moved) => {
            PeerView::Running { epoch: record.epoch }
        }
        Stage::Done | Stage::HandedOver | Stage::Declined => PeerView::Declined {
            reason: record.view.reason.clone().unwrap_or_else(|| "it gave up".to_owned()),
        },
    }
}

/// Ends an incoming QEMU and removes what was made for it. Says what stayed.
pub(crate) async fn free(
    agent: &Agent,
    definition: &VmDefinition,
    qemu: Option<&Qemu>,
    made: &[PathBuf],
) -> Vec<String> {
    if let Some(qemu) = qemu
        && let Err(failure) = run::end(qemu).await
    {
        return vec![failure.to_string()];
    }
    let mut left = Vec::new();
    let runtime = agent.runtime_folder(&definition.name);
    if runtime.exists()
        && let Err(error) = std::fs::remove_dir_all(&runtime)
    {
        left.push(format!("{}: {error}", runtime.display()));
    }
    let mut all = made.to_vec();
    if let Some(folder) = &definition.places.configuration {
        all.push(folder.join("qemu.log"));
        all.push(folder.join("vm.toml"));
    }
    left.extend(files::remove_made(&all));
    left
}

/// Paths and their parents that do not exist, parents first.
fn not_there_yet(paths: &[PathBuf]) -> Vec<PathBuf> {
    let mut missing = std::collections::BTreeSet::new();
    for path in paths {
        let mut at = Some(path.as_path());
        while let Some(path) = at.filter(|path| !path.exists()) {
            missing.insert(path.to_owned());
            at = path.parent();
        }
    }
    // A parent sorts before what is in it.
    missing.into_iter().collect()
}

/// Takes a data connection of a paired host, past its hello.
pub(crate) async fn accept_channel(
    agent: &Arc<Agent>,
    from: &HostName,
    mut stream: TlsStream<TcpStream>,
) -> anyhow::Result<()> {
    use limosa_protocol::peer::CHANNEL_HELLO_BYTES_MAX;
    let read = async {
        let length = stream.read_u16().await?;
        anyhow::ensure!(length <= CHANNEL_HELLO_BYTES_MAX, "a hello of {length} bytes");
        let mut text = vec![0; length.into()];
        stream.read_exact(&mut text).await?;
        Ok(serde_json::from_slice::<ChannelHello>(&text)?)
    };
    let hello = tokio::time::timeout(std::time::Duration::from_secs(10), read).await??;
    let incoming = agent
        .migrations
        .incoming(hello.migration, from)
        .ok_or_else(|| anyhow::anyhow!("a channel for a migration that is not under way"))?;
    incoming.add_channel(hello, stream).await.map_err(|failure| anyhow::anyhow!("{failure}"))
}

impl Incoming {
    async fn add_channel(
        self: &Arc<Self>,
        hello: ChannelHello,
        mut stream: TlsStream<TcpStream>,
    ) -> Outcome<()> {
        let mut inner = self.inner.lock().await;
        let receiving = inner
            .receiving
            .as_mut()
            .ok_or_else(|| Failure::conflict("no channels are waited for"))?;
        // Both are hexadecimal digests of a secret: equality of hashes leaks nothing.
        if blake3::hash(hello.token.as_bytes()) != blake3::hash(receiving.token.as_bytes()) {
            return Err(Failure::forbidden("a channel with a wrong token"));
        }
        let place = receiving.place(hello.role)?;
        stream.write_u8(1).await.or_fail("accepting a channel")?;
        stream.flush().await.or_fail("accepting a channel")?;
        let (socket, tls) = stream.into_inner();
        *place = Some(into_blocking(socket, tls.into()).or_fail("accepting a channel")?);
        if receiving.is_complete() {
            self.start_plane(&mut inner)?;
        }
        Ok(())
    }
}
