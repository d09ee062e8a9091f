//! `prepare`: the destination makes room, and the channels are opened.

use std::sync::Arc;

use limosa_plane::{PlaneSettings, RamBlockSpec, SourceDisk, SourcePlane, SourceSpec};
use limosa_protocol::peer::{ChannelHello, ChannelRole, OfferAnswer, Receive, Receiving};
use limosa_protocol::vm::DiskKind;
use limosa_qemu::launch::RAM_BACKEND_ID;
use tokio::sync::mpsc;

use super::{EVENT_COUNT_MAX, Source};
use crate::agent::Agent;
use crate::failure::{Failure, OrFail, Outcome};
use crate::peer_link::into_blocking;

/// Longest wait until the destination's QEMU is up, in milliseconds.
const RECEIVE_MS_MAX: u64 = 60_000;

impl Source {
    pub(super) async fn prepare(&mut self) -> Outcome<()> {
        let answer: OfferAnswer = self.link.post("/peer/v1/migrations", &self.offer).await?;
        if !answer.problems.is_empty() {
            return Err(Failure::problems(
                format!("{} found reasons against the move", self.link.name()),
                answer.problems,
            ));
        }
        for (name, path) in crate::vm::files::small_files(&self.offer.definition)? {
            self.link.put_file(&self.path(&format!("files/{name}")), &path).await?;
        }
        let channel_count = self.agent.config.migration.channels;
        let receiving: Receiving = self
            .link
            .post_within(&self.path("receive"), &Receive { channel_count }, RECEIVE_MS_MAX)
            .await?;
        let mut channels = Vec::new();
        for index in 0..channel_count {
            channels.push(self.open(&receiving, ChannelRole::Channel(index)).await?);
        }
        let return_path = self.open(&receiving, ChannelRole::ReturnPath).await?;
        let (sender, events) = mpsc::channel(EVENT_COUNT_MAX);
        self.events = Some(events);
        let spec = SourceSpec {
            channels,
            return_path,
            ram: self.ram(),
            disks: self.disks(),
            settings: plane_settings(&self.agent),
            on_event: Arc::new(move |event| {
                if sender.try_send(event).is_err() {
                    tracing::debug!("a plane event came after the migration's end");
                }
            }),
        };
        self.plane = Some(SourcePlane::start(spec).or_fail("starting the data plane")?);
        Ok(())
    }

    async fn open(
        &self,
        receiving: &Receiving,
        role: ChannelRole,
    ) -> Outcome<limosa_plane::ChannelIo> {
        let hello = ChannelHello { migration: self.job.id(), token: receiving.token.clone(), role };
        let stream = self.link.open_channel(&hello).await?;
        let (socket, tls) = stream.into_inner();
        into_blocking(socket, tls.into()).or_fail("opening a data channel")
    }

    fn ram(&self) -> Vec<RamBlockSpec> {
        if !self.offer.running {
            return Vec::new();
        }
        vec![RamBlockSpec {
            name: RAM_BACKEND_ID.to_owned(),
            size_bytes: self.qemu.accelerator.ram_bytes(self.offer.definition.memory_bytes()),
        }]
    }

    fn disks(&self) -> Vec<SourceDisk> {
        let disks = self.offer.definition.disks.iter();
        disks
            .filter(|disk| disk.kind == DiskKind::Disk)
            .zip(&self.offer.disks)
            .zip(0..)
            .map(|((_, facts), index)| SourceDisk {
                index,
                size_bytes: facts.virtual_bytes,
                fresh: true,
            })
            .collect()
    }
}

/// Settings of the plane that the configuration makes.
pub(crate) fn plane_settings(agent: &Agent) -> PlaneSettings {
    let migration = &agent.config.migration;
    PlaneSettings {
        window_bytes: usize::try_from(migration.window_kib).unwrap_or(usize::MAX >> 10) << 10,
        page_versions_bytes_max: u64::from(migration.page_versions_mib) << 20,
        compression: migration.compression,
        ..PlaneSettings::default()
    }
}
