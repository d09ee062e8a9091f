//! The messages to a paired host, one method for each.

use std::fmt::Display;
use std::time::Duration;

use hyper::body::Bytes;
use limosa_auth::{Fingerprint, Identity, tls};
use limosa_http::{BoxIo, Client, Limits};
use limosa_protocol::api::BODY_BYTES_MAX;
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::peer::{
    CHANNEL_ALPN, Commit, DestinationVote, Digests, FileReceived, Message, Method, Offer,
    OfferAnswer, ReadyRequest, Receive, Receiving, Retired, RetryRequest, RetryStarted,
    SourceDecision, Stays, VerifyRequest,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_rustls::TlsConnector;

use super::connect::connect;
use super::error::{NoPeer, PeerError};
use limosa_faults::{self as faults, Edge, Kind};
use limosa_host::failure::Result;
use limosa_host::store::{PeerRecord, Store, StoreError};

/// The agent's name in its requests.
pub const USER_AGENT: &str = concat!("limosad/", env!("CARGO_PKG_VERSION"));

/// A paired host, and the connections to it that are open.
///
/// A switchover must not wait for a TLS handshake, so connections are kept.
pub(crate) struct PeerClient {
    pub(super) name: HostName,
    pub(super) address: String,
    control: Client,
    pub(super) channel: TlsConnector,
}

impl PeerClient {
    /// A client of a paired host.
    ///
    /// - `own`: the identity of this host.
    pub(crate) fn open(store: &Store, own: &Identity, name: &HostName) -> Result<Self, NoPeer> {
        let recorded = store.get(name.as_str());
        let record: PeerRecord = match recorded {
            Ok(record) => record.ok_or_else(|| NoPeer::NotPaired(name.clone()))?,
            Err(StoreError::Record { .. }) => return Err(NoPeer::Damaged(name.clone())),
            Err(error) => return Err(NoPeer::Store(error)),
        };
        let expected: Fingerprint =
            record.fingerprint.parse().map_err(|_| NoPeer::Damaged(name.clone()))?;
        let connector = |alpn: &[u8]| TlsConnector::from(tls::client_config(own, expected, alpn));
        let control = control_client(record.address.clone(), connector(tls::ALPN_HTTP));
        let channel = connector(CHANNEL_ALPN);
        Ok(Self { name: name.clone(), address: record.address, control, channel })
    }

    /// The name of the host.
    pub(crate) fn name(&self) -> &HostName {
        &self.name
    }

    pub(crate) async fn compare(&self, offer: &Offer) -> Result<OfferAnswer, PeerError> {
        self.post(&Message::COMPARE, &[], offer).await
    }

    pub(crate) async fn offer(&self, offer: &Offer) -> Result<OfferAnswer, PeerError> {
        self.post(&Message::OFFER, &[], offer).await
    }

    /// Sends a part of the file `name`, from `offset_bytes` on.
    pub(crate) async fn send_file_part(
        &self,
        id: MigrationId,
        name: &str,
        offset_bytes: u64,
        part: Bytes,
    ) -> Result<FileReceived, PeerError> {
        let message = &Message::FILE;
        self.send(message, &[&id, &name, &offset_bytes], part, message.limit).await
    }

    pub(crate) async fn receive(
        &self,
        id: MigrationId,
        receive: &Receive,
    ) -> Result<Receiving, PeerError> {
        self.post(&Message::RECEIVE, &[&id], receive).await
    }

    pub(crate) async fn verify(
        &self,
        id: MigrationId,
        request: &VerifyRequest,
    ) -> Result<Digests, PeerError> {
        self.post(&Message::VERIFY, &[&id], request).await
    }

    /// Asks for the vote, and waits for it at most `limit`.
    pub(crate) async fn ready(
        &self,
        id: MigrationId,
        request: &ReadyRequest,
        limit: Duration,
    ) -> Result<DestinationVote, PeerError> {
        self.post_within(&Message::READY, &[&id], request, limit).await
    }

    pub(crate) async fn retry(
        &self,
        id: MigrationId,
        request: &RetryRequest,
    ) -> Result<RetryStarted, PeerError> {
        self.post(&Message::RETRY, &[&id], request).await
    }

    pub(crate) async fn commit(
        &self,
        id: MigrationId,
        commit: &Commit,
    ) -> Result<DestinationVote, PeerError> {
        self.post(&Message::COMMIT, &[&id], commit).await
    }

    pub(crate) async fn retired(
        &self,
        id: MigrationId,
        retired: &Retired,
    ) -> Result<DestinationVote, PeerError> {
        self.post(&Message::RETIRED, &[&id], retired).await
    }

    pub(crate) async fn stays(
        &self,
        id: MigrationId,
        stays: &Stays,
    ) -> Result<DestinationVote, PeerError> {
        self.post(&Message::STAYS, &[&id], stays).await
    }

    /// Reads the destination's vote as it is now.
    pub(crate) async fn vote(&self, id: MigrationId) -> Result<DestinationVote, PeerError> {
        self.vote_within(id, Message::VOTE.limit).await
    }

    /// Reads the destination's vote, and waits at most `limit`.
    pub(crate) async fn vote_within(
        &self,
        id: MigrationId,
        limit: Duration,
    ) -> Result<DestinationVote, PeerError> {
        self.send(&Message::VOTE, &[&id], Bytes::new(), limit).await
    }

    /// Reads the source's decision as it is now.
    pub(crate) async fn decision(&self, id: MigrationId) -> Result<SourceDecision, PeerError> {
        let message = &Message::DECISION;
        self.send(message, &[&id], Bytes::new(), message.limit).await
    }

    async fn post<R: DeserializeOwned>(
        &self,
        message: &'static Message,
        parameters: &[&(dyn Display + Sync)],
        body: &(impl Serialize + Sync),
    ) -> Result<R, PeerError> {
        self.post_within(message, parameters, body, message.limit).await
    }

    async fn post_within<R: DeserializeOwned>(
        &self,
        message: &'static Message,
        parameters: &[&(dyn Display + Sync)],
        body: &(impl Serialize + Sync),
        limit: Duration,
    ) -> Result<R, PeerError> {
        let body = serde_json::to_vec(body)
            .map_err(|error| PeerError::Here(format!("cannot write {}: {error}", message.name)))?;
        self.send(message, parameters, body.into(), limit).await
    }

    async fn send<R: DeserializeOwned>(
        &self,
        message: &'static Message,
        parameters: &[&(dyn Display + Sync)],
        body: Bytes,
        limit: Duration,
    ) -> Result<R, PeerError> {
        let method = match message.method {
            Method::Get => hyper::Method::GET,
            Method::Post => hyper::Method::POST,
            Method::Put => hyper::Method::PUT,
        };
        let limits = Limits { wait: limit, answer_bytes: BODY_BYTES_MAX };
        let uri = message.uri(parameters);
        faults::reach(Kind::Send, message.name, Edge::Before).await;
        let answer = self.control.call(method, &uri, body, limits).await;
        faults::reach(Kind::Send, message.name, Edge::After).await;
        answer.map_err(|error| {
            PeerError::from_http(&format!("{} at {}", self.name, self.address), error)
        })
    }
}

fn control_client(address: String, tls: TlsConnector) -> Client {
    Client::new(USER_AGENT, move || {
        let (address, tls) = (address.clone(), tls.clone());
        async move { Ok(Box::new(connect(&address, &tls).await?) as BoxIo) }
    })
}
