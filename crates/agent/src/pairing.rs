//! Pairing with another host, both sides, and the list of those it led to.
//!
//! ```text
//! operator at B: invite ─► code          operator at A: pair B, code
//! A ── TLS, any certificate ── POST /pair/v1/start  [`Start`]  ─► B
//!   ◄─ Answer: proves that B knows the code and sees A's certificate
//! A trusts B
//!   ── POST /pair/v1/finish  Confirmation: proves the same of A ─► B trusts A
//! ```
//!
//! **Invariant.** A certificate is trusted only after the proof, and is on the
//! disk before the other side is told.

use std::time::Duration;

use data_encoding::HEXLOWER;
use limosa_auth::pairing::{Answer, Confirmation, Initiator, Invitation, Offer, Responder};
use limosa_auth::{Fingerprint, PeerRole, TrustedPeer, tls};
use limosa_protocol::api::{self, BODY_BYTES_MAX, PairRequest, PairedHost};
use limosa_protocol::id::HostName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::agent::Agent;
use crate::caller::Caller;
use limosa_host::clock::now_unix_s;
use limosa_host::failure::{Failure, OrFail, Result, chain};
use limosa_host::store::PeerRecord;
use limosa_migration::peer::{USER_AGENT, connect, with_port};

/// Longest wait for the other host's answer to one request.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// First request of a pairing.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Start {
    offer: Offer,
    /// TCP port on which the initiator's agent answers.
    port: u16,
}

/// What one pairing connection is in the middle of.
#[derive(Default)]
pub(crate) struct Conversation(Mutex<Option<(Responder, u16)>>);

/// Answers the first request with the proof that this host knows the code.
pub(crate) async fn answer_start(
    agent: &Agent,
    conversation: &Conversation,
    caller: &Caller,
    start: Start,
) -> Result<Answer> {
    let (certificate_der, _) = stranger(caller)?;
    let code = agent
        .with_invitation(|invitation| {
            invitation.as_mut().map(|invitation| invitation.begin_attempt(now_unix_s()))
        })
        .ok_or_else(not_invited)?
        .map_err(|error| Failure::forbidden(error.to_string()))?;
    let peer = Fingerprint::of_certificate(&certificate_der);
    let own = agent.identity.fingerprint();
    let (responder, answer) =
        Responder::respond(&code, own, peer, agent.host.name.as_str(), &start.offer)
            .map_err(|error| Failure::bad_request(error.to_string()))?;
    *conversation.0.lock().await = Some((responder, start.port));
    Ok(answer)
}

/// Trusts the initiator once it has proven that it knows the code.
pub(crate) async fn answer_finish(
    agent: &Agent,
    conversation: &Conversation,
    caller: &Caller,
    confirmation: Confirmation,
) -> Result<()> {
    let (certificate_der, address) = stranger(caller)?;
    let (responder, port) = conversation
        .0
        .lock()
        .await
        .take()
        .ok_or_else(|| Failure::bad_request("a pairing begins with its start"))?;
    if responder.peer_fingerprint() != Fingerprint::of_certificate(&certificate_der) {
        return Err(Failure::forbidden("the pairing was begun with another certificate"));
    }
    let name =
        responder.finish(&confirmation).map_err(|error| Failure::forbidden(error.to_string()))?;
    agent
        .with_invitation(|invitation| {
            let used = invitation.as_mut().map(|open| open.complete(now_unix_s()));
            *invitation = None;
            used
        })
        .ok_or_else(not_invited)?
        .map_err(|error| Failure::forbidden(error.to_string()))?;
    let address = std::net::SocketAddr::new(address.ip().to_canonical(), port).to_string();
    record(agent, &name, certificate_der, address).map(drop)
}

fn not_invited() -> Failure {
    Failure::forbidden("no invitation is open there: run `limosa host invite` on that host first")
}

fn stranger(caller: &Caller) -> Result<(Vec<u8>, std::net::SocketAddr)> {
    match caller {
        Caller::Stranger { certificate_der, address } => Ok((certificate_der.clone(), *address)),
        _ => Err(Failure::forbidden("only for hosts that are not paired yet")),
    }
}

/// Opens an invitation, in place of one that was open.
pub(crate) fn invite(agent: &Agent) -> Result<api::Invitation> {
    let invitation = Invitation::new(now_unix_s()).or_fail("making a pairing code")?;
    let answer = api::Invitation {
        code: invitation.code().to_string(),
        expires_unix_s: invitation.expires_at_unix_s(),
    };
    agent.with_invitation(|open| *open = Some(invitation));
    Ok(answer)
}

/// Pairs with the host that shows the code.
pub(crate) async fn pair(agent: &Agent, request: &PairRequest) -> Result<PairedHost> {
    let code = request.code.parse().map_err(|error| {
        Failure::bad_request(format!("{error}: type it as `limosa host invite` shows it"))
    })?;
    let address = with_port(&request.address);
    let connector = tls::pairing_client_config(&agent.identity).into();
    let stream = connect(&address, &connector).await.map_err(|what| {
        Failure::peer(format!(
            "no pairing with {address}: {what} (an invitation must be open there: \
             `limosa host invite`)"
        ))
    })?;
    let certificate = tls::peer_certificate(stream.get_ref().1)
        .ok_or_else(|| Failure::peer(format!("{address} shows no certificate")))?
        .as_ref()
        .to_vec();
    let peer = Fingerprint::of_certificate(&certificate);
    // Both messages go over the connection whose certificate was read above.
    let client = limosa_http::Client::over(USER_AGENT, stream);
    let (initiator, offer) =
        Initiator::start(&code, agent.identity.fingerprint(), peer, agent.host.name.as_str())
            .map_err(|error| Failure::bad_request(error.to_string()))?;
    let port = agent.config.port();
    let answer: Answer = ask(&client, "/pair/v1/start", &Start { offer, port }).await?;
    let (confirmation, name) =
        initiator.finish(&answer).map_err(|error| Failure::forbidden(error.to_string()))?;
    let known = agent.trust.contains(&peer);
    // Should the last answer be lost, the other host may trust us, and we trust
    // it: so it is recorded before the confirmation leaves, and forgotten only
    // when the other host says that it refused.
    let recorded = record(agent, &name, certificate, address)?;
    match ask::<_, ()>(&client, "/pair/v1/finish", &confirmation).await {
        Ok(()) => Ok(recorded),
        Err(refused) if refused.0.code == api::FailureCode::Forbidden => {
            if !known {
                unpair(agent, &recorded.name)?;
            }
            Err(refused)
        }
        Err(lost) => Err(Failure::peer(format!(
            "{lost}; {name} is trusted here, but may not trust this host yet: pair again to be sure"
        ))),
    }
}

async fn ask<B: Serialize, R: DeserializeOwned>(
    client: &limosa_http::Client,
    path: &str,
    body: &B,
) -> Result<R> {
    let body = serde_json::to_vec(body).or_fail("writing a pairing message")?;
    let limits = limosa_http::Limits { wait: ANSWER_MAX, answer_bytes: BODY_BYTES_MAX };
    client.call(hyper::Method::POST, path, body.into(), limits).await.map_err(|error| match error {
        limosa_http::Error::Refused(failure) => Failure(failure),
        error => Failure::peer(format!("the pairing was cut off: {}", chain(&error))),
    })
}

fn record(agent: &Agent, name: &str, certificate: Vec<u8>, address: String) -> Result<PairedHost> {
    let name: HostName = name.parse().map_err(|error| Failure::bad_request(format!("{error}")))?;
    if name == agent.host.name {
        return Err(Failure::conflict(format!(
            "both hosts are called {name}: give one of them another `name` in its configuration"
        )));
    }
    let fingerprint = Fingerprint::of_certificate(&certificate);
    let known: Option<PeerRecord> = agent.host.store.get(name.as_str())?;
    if known.is_some_and(|known| known.fingerprint != fingerprint.to_string()) {
        return Err(Failure::conflict(format!(
            "another host is already paired as {name}: `limosa host unpair {name}` first, \
             if that one is gone"
        )));
    }
    let peer = PeerRecord {
        fingerprint: fingerprint.to_string(),
        certificate_hex: HEXLOWER.encode(&certificate),
        address: address.clone(),
    };
    // First what may be refused, then the disk: a record that cannot be trusted
    // would keep the agent from starting.
    agent
        .trust
        .insert(TrustedPeer::new(name.to_string(), PeerRole::Host, certificate))
        .map_err(|error| Failure::conflict(error.to_string()))?;
    if let Err(error) = agent.host.store.put(name.as_str(), &peer) {
        agent.trust.remove(name.as_str());
        return Err(error.into());
    }
    tracing::info!(peer = %name, %address, %fingerprint, "paired");
    Ok(PairedHost { name, address, fingerprint: peer.fingerprint })
}

/// Trusts a host no more.
pub(crate) fn unpair(agent: &Agent, name: &HostName) -> Result<()> {
    if let Some(migration) = agent.migrations.under_way_with(name) {
        let (id, vm) = (migration.id, migration.vm);
        return Err(Failure::conflict(match migration.outcome {
            None => format!(
                "a migration with {name} is under way: end it with `limosa migration cancel {id}`"
            ),
            Some(_) => format!(
                "the last move of VM {vm} waits for an answer of {name}: if that host is gone for \
                 good, `limosa vm recover {vm}` says what to do without it"
            ),
        }));
    }
    if agent.host.store.get::<PeerRecord>(name.as_str())?.is_none() {
        return Err(Failure::not_found(format!(
            "no host {name} is paired with this one: `limosa host list` shows those that are"
        )));
    }
    agent.trust.remove(name.as_str());
    agent.host.store.remove::<PeerRecord>(name.as_str())?;
    tracing::info!(peer = %name, "unpaired");
    Ok(())
}

/// All paired hosts.
pub(crate) fn list(agent: &Agent) -> Result<Vec<PairedHost>> {
    let peers = agent.host.store.all::<PeerRecord>()?;
    peers
        .into_iter()
        .map(|(name, peer)| {
            let name = name
                .parse()
                .map_err(|error| Failure::internal(format!("in the state store: {error}")))?;
            Ok(PairedHost { name, address: peer.address, fingerprint: peer.fingerprint })
        })
        .collect()
}
