//! Answers the messages of paired hosts.
//!
//! A message about a migration that is under way goes to its driver or to the half that
//! receives; one about a migration that has ended is answered from its record.

use std::sync::Arc;

use hyper::body::Bytes;
use limosa_host::failure::{Failure, Result};
use limosa_host::store::MigrationRecord;
use limosa_host::vm::Vm;
use limosa_protocol::api::Comparison;
use limosa_protocol::handover::{DestinationEvent, Stage};
use limosa_protocol::id::{Epoch, HostName, MigrationId};
use limosa_protocol::migration::{MoveRequest, Role};
use limosa_protocol::peer::{
    DestinationVote, Digests, FileReceived, OfferAnswer, ReadyRequest, Receive, Receiving,
    RetryRequest, RetryStarted, SourceDecision, VerifyRequest,
};
use serde_json::Value;
use tracing::Instrument;

use crate::destination::Incoming;
use crate::handover::{DestinationDriver, Handover};
use crate::migrations::Migrations;
use crate::preflight;

/// A part of a small file, as it arrives.
#[derive(Debug)]
pub struct FilePart<'a> {
    pub name: &'a str,
    pub offset_bytes: u64,
    pub bytes: Bytes,
}

impl Migrations {
    /// Compares a VM with a destination; nothing is touched.
    ///
    /// # Errors
    /// When the VM cannot be looked at.
    pub async fn compare(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        request: MoveRequest,
    ) -> Result<Comparison> {
        let preflight::Preflight { problems, notes, .. } =
            preflight::preflight(self, vm, &request).await?;
        Ok(Comparison { vm: vm.name.clone(), to: request.to, problems, notes })
    }

    /// Compares an offer with this host; nothing is touched.
    ///
    /// # Errors
    /// When the host cannot be looked at.
    pub async fn answer_compare(
        self: &Arc<Self>,
        from: &HostName,
        offer: Value,
    ) -> Result<OfferAnswer> {
        let problems = match preflight::read_offer(self, from, offer)? {
            Ok(offer) => preflight::check_offer(self, &offer).await?,
            Err(problem) => vec![problem],
        };
        Ok(OfferAnswer { problems, is_full: self.is_full() })
    }

    /// Accepts an offer, unless something speaks against it.
    ///
    /// # Errors
    /// When the host cannot be looked at, or the acceptance cannot be recorded.
    pub async fn answer_offer(
        self: &Arc<Self>,
        from: &HostName,
        offer: Value,
    ) -> Result<OfferAnswer> {
        match preflight::read_offer(self, from, offer)? {
            Ok(offer) => Incoming::accept(self, from, offer).await,
            Err(problem) => Ok(OfferAnswer { problems: vec![problem], is_full: false }),
        }
    }

    /// Takes a part of a small file.
    ///
    /// # Errors
    /// When the migration is not under way, or the part cannot be written.
    pub async fn answer_file(
        &self,
        id: MigrationId,
        from: &HostName,
        part: FilePart<'_>,
    ) -> Result<FileReceived> {
        let incoming = self.receiving(id, from)?;
        let FilePart { name, offset_bytes, bytes } = part;
        incoming.take_file(name, offset_bytes, bytes).instrument(incoming.span()).await
    }

    /// Makes this host ready to receive.
    ///
    /// # Errors
    /// When the migration is not under way, or something it needs cannot be made.
    pub async fn answer_receive(
        &self,
        id: MigrationId,
        from: &HostName,
        request: &Receive,
    ) -> Result<Receiving> {
        let incoming = self.receiving(id, from)?;
        incoming.receive(request).instrument(incoming.span()).await
    }

    /// Reads contents again, and answers with their digests.
    ///
    /// # Errors
    /// When the migration is not under way, or the contents cannot be read.
    pub async fn answer_verify(
        &self,
        id: MigrationId,
        from: &HostName,
        request: &VerifyRequest,
    ) -> Result<Digests> {
        let incoming = self.receiving(id, from)?;
        incoming.verify(request).instrument(incoming.span()).await
    }

    /// The receiving half of a migration from a host.
    fn receiving(&self, id: MigrationId, from: &HostName) -> Result<Arc<Incoming>> {
        self.incoming(id, from).ok_or_else(|| {
            Failure::not_found(format!(
                "migration {id} is not under way at {}",
                self.context.host.name
            ))
        })
    }

    /// The vote, once everything has arrived.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn answer_ready(
        &self,
        id: MigrationId,
        from: &HostName,
        request: &ReadyRequest,
    ) -> Result<DestinationVote> {
        match self.incoming(id, from) {
            Some(incoming) => Ok(incoming.ready(request).instrument(incoming.span()).await),
            None => self.answer_event(id, from, DestinationEvent::Asked).await,
        }
    }

    /// Begins another attempt.
    ///
    /// # Errors
    /// When this host has nothing to begin it with; then it gives up the migration.
    pub async fn answer_retry(
        &self,
        id: MigrationId,
        from: &HostName,
        request: &RetryRequest,
    ) -> Result<RetryStarted> {
        if let Some(incoming) = self.incoming(id, from) {
            return incoming.begin_retry(request.attempt).instrument(incoming.span()).await;
        }
        let reason =
            format!("limosad on {} was restarted: the move cannot go on", self.context.host.name);
        if let Some(driver) = self.destination_driver(id, from) {
            driver.give_up(&reason).await;
        }
        Err(Failure::conflict(reason))
    }

    /// Gives an event of the source to the driver, and answers with the vote.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn answer_event(
        &self,
        id: MigrationId,
        from: &HostName,
        event: DestinationEvent,
    ) -> Result<DestinationVote> {
        if let Some(driver) = self.destination_driver(id, from) {
            return Ok(driver.receive(event).await);
        }
        let record = self.recorded(id, from, Role::Destination)?;
        Ok(record.map_or(DestinationVote::Unknown, |record| {
            let epoch = record.handover.epoch;
            match record.handover.stage {
                Stage::Done => DestinationVote::Running { epoch },
                Stage::Stayed | Stage::Superseded => DestinationVote::Declined {
                    epoch,
                    reason: record.view.reason.unwrap_or_else(|| "it gave up".to_owned()),
                },
                _ => DestinationVote::Undecided,
            }
        }))
    }

    /// The vote, after the source decided that the VM stays there.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn answer_stays(
        &self,
        id: MigrationId,
        from: &HostName,
        epoch: Epoch,
        reason: &str,
    ) -> Result<DestinationVote> {
        match self.destination_driver(id, from) {
            Some(driver) => Ok(driver.receive_stays(epoch, reason).await),
            None => self.answer_event(id, from, DestinationEvent::Asked).await,
        }
    }

    /// The source's decision, for a destination that asks.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn answer_decision(
        &self,
        id: MigrationId,
        from: &HostName,
    ) -> Result<SourceDecision> {
        if let Some(Handover::Source(driver)) = self.handover(id, from) {
            return Ok(driver.answer().await);
        }
        let record = self.recorded(id, from, Role::Source)?;
        Ok(record.map_or(SourceDecision::Unknown, |record| {
            let epoch = record.handover.epoch;
            match record.handover.stage {
                Stage::Done | Stage::Superseded => SourceDecision::Retired { epoch },
                Stage::Stayed => SourceDecision::Stays { epoch },
                _ => SourceDecision::Undecided,
            }
        }))
    }

    fn destination_driver(
        &self,
        id: MigrationId,
        from: &HostName,
    ) -> Option<Arc<DestinationDriver>> {
        match self.handover(id, from) {
            Some(Handover::Destination(driver)) => Some(driver),
            _ => None,
        }
    }

    /// The record of an ended or recovered migration with a host.
    fn recorded(
        &self,
        id: MigrationId,
        with: &HostName,
        role: Role,
    ) -> Result<Option<MigrationRecord>> {
        let record: Option<MigrationRecord> = self.context.host.store.get(&id.to_string())?;
        Ok(record.filter(|record| record.peer() == with && record.view.role == role))
    }
}
