//! `prepare`: the destination makes room, and the channels are opened.

use std::io::SeekFrom;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use limosa_plane::{ChannelIo, EVENT_COUNT_MAX, RamBlockSpec, SourceDisk, SourcePlane, SourceSpec};
use limosa_protocol::migration::{Note, Queued};
use limosa_protocol::peer::{FILE_PART_BYTES_MAX, Receive};
use limosa_qemu::launch::RAM_BACKEND_ID;
use limosa_qemu::ram;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

use super::super::preflight::destination_full;
use super::link::{self, Connector, LinkEvents};
use super::outgoing::Outgoing;
use limosa_host::clock::now_unix_ms;
use limosa_host::failure::{Failure, OrFail, Result};

/// Pause between two offers to a destination that is full.
const OFFER_EVERY: Duration = Duration::from_secs(1);

impl Outgoing {
    pub(super) async fn prepare(&mut self) -> Result<()> {
        self.offer().await?;
        for (name, path) in limosa_host::vm::files::small_files(&self.offer.definition)? {
            self.send_file(name, &path).await?;
        }
        let channel_count = self.context.settings.channels;
        let token = self.receive(channel_count).await?;
        let connector = Connector {
            link: Arc::clone(&self.link),
            migration: self.job.id(),
            token,
            channel_count,
            set: Arc::default(),
        };
        let opened = self.retry().run(|| connector.open()).await?;
        let (channels, return_path) =
            opened.ok_or_else(|| Failure::peer("the destination expects no channels"))?;
        self.start_plane(connector, channels, return_path)
    }

    /// Offers the VM. A destination that took the offer takes it again.
    async fn offer(&self) -> Result<()> {
        let answer = loop {
            let answer = self.retry().run(|| self.link.offer(&self.offer)).await?;
            if !answer.is_full {
                break answer;
            }
            // It became full after preflight.
            self.wait_for_room().await;
        };
        self.job.report_queued(None);
        if answer.problems.is_empty() {
            return Ok(());
        }
        Err(Failure::problems(
            format!("{} found reasons against the move", self.link.name()),
            answer.problems,
        ))
    }

    /// Waits until a destination that is full may have room; it does not report that.
    async fn wait_for_room(&self) {
        let Note { code, message: reason } = destination_full(self.link.name());
        let since_unix_ms =
            self.job.view().queued.map_or_else(now_unix_ms, |queued| queued.since_unix_ms);
        self.job.report_queued(Some(Queued { code, reason, since_unix_ms }));
        tokio::time::sleep(OFFER_EVERY).await;
    }

    /// Sends a file that moves beside the disks, part by part.
    async fn send_file(&self, name: &str, path: &Path) -> Result<()> {
        let doing = format!("sending {}", path.display());
        let mut file = tokio::fs::File::open(path).await.or_fail(&doing)?;
        let size_bytes = file.metadata().await.or_fail(&doing)?.len();
        let mut sent_bytes = 0;
        loop {
            let mut part = Vec::new();
            file.seek(SeekFrom::Start(sent_bytes)).await.or_fail(&doing)?;
            (&mut file)
                .take(FILE_PART_BYTES_MAX as u64)
                .read_to_end(&mut part)
                .await
                .or_fail(&doing)?;
            let (id, part) = (self.job.id(), Bytes::from(part));
            let send = || self.link.send_file_part(id, name, sent_bytes, part.clone());
            match self.retry().run(send).await?.received_bytes {
                all if all == size_bytes => return Ok(()),
                more if more > sent_bytes && more < size_bytes => sent_bytes = more,
                other => {
                    return Err(Failure::peer(format!(
                        "{doing}: {} says that it has {other} of {size_bytes} bytes",
                        self.link.name()
                    )));
                }
            }
        }
    }

    /// Has the destination get ready for channels; gives their token.
    async fn receive(&self, channel_count: u8) -> Result<String> {
        let receive = Receive { channel_count };
        let receiving = self.retry().run(|| self.link.receive(self.job.id(), &receive)).await?;
        Ok(receiving.token)
    }

    fn start_plane(
        &mut self,
        connector: Connector,
        channels: Vec<ChannelIo>,
        return_path: ChannelIo,
    ) -> Result<()> {
        let spec = SourceSpec {
            channels,
            return_path,
            ram: self.ram()?,
            disks: self.disks(),
            settings: self.context.settings.plane(),
        };
        let (plane, from_plane) = SourcePlane::start(spec).or_fail("starting the data plane")?;
        let (sender, events) = mpsc::channel(EVENT_COUNT_MAX);
        self.events = Some(events);
        let link_events = LinkEvents {
            state: self.link_state.clone(),
            job: Arc::clone(&self.job),
            wait: self.context.settings.link_wait(),
            through: Arc::clone(&self.through),
        };
        self.job.spawn(link_events.run(from_plane, sender));
        self.plane = Some(Arc::new(plane));
        self.connector = Some(connector);
        self.keep_link();
        Ok(())
    }

    /// Has a lost link brought again, from now on.
    pub(super) fn keep_link(&mut self) {
        let (Some(connector), Some(plane)) = (self.connector.clone(), &self.plane) else { return };
        let (state, wait) = (self.link_state.clone(), self.context.settings.link_wait());
        self.link_keeper =
            Some(link::keep(connector, plane, state, wait, Arc::clone(&self.through)));
    }

    fn ram(&self) -> Result<Vec<RamBlockSpec>> {
        if !self.plan().moves_memory() {
            return Ok(Vec::new());
        }
        let size_bytes = self.qemu.accelerator.ram_bytes(self.offer.definition.memory_bytes());
        // Only a comparison of all contents sees a page that the guest gave back.
        let memory = self
            .plan()
            .verifies_fully()
            .then(|| ram::open(&self.qemu.process, size_bytes).map(Arc::new))
            .transpose()
            .or_fail("opening the guest's memory")?;
        Ok(vec![RamBlockSpec { name: RAM_BACKEND_ID.to_owned(), size_bytes, memory }])
    }

    fn disks(&self) -> Vec<SourceDisk> {
        let disks = self.plan().mirrored().zip(0..);
        disks
            .map(|(disk, index)| SourceDisk { index, size_bytes: disk.virtual_bytes, fresh: true })
            .collect()
    }
}
