//! What paired hosts ask of this one; see [`limosa_protocol::peer`].

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::handler::Handler;
use axum::routing::{MethodFilter, on};
use axum::{Extension, Json, Router, middleware};
use limosa_protocol::handover::{DestinationEvent, Stage};
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::migration::Role;
use limosa_protocol::peer::{
    Commit, DestinationVote, Digests, FILE_PART_BYTES_MAX, FileReceived, Message, Method,
    OfferAnswer, ReadyRequest, Receive, Receiving, Retired, RetryRequest, RetryStarted,
    SourceDecision, Stays, VerifyRequest,
};
use serde_json::Value;
use tracing::Instrument;

use super::{Body, Named, Shared};
use crate::agent::Agent;
use crate::caller::Caller;
use crate::failure::{Failure, Result};
use crate::fault;
use crate::migration::compare;
use crate::migration::handover::{DestinationDriver, Handover};
use crate::migration::incoming::Incoming;
use crate::store::MigrationRecord;

pub(super) fn routes() -> Router<Arc<Agent>> {
    let part = DefaultBodyLimit::max(FILE_PART_BYTES_MAX);
    Router::new()
        .merge(route(&Message::COMPARE, compare_offer))
        .merge(route(&Message::OFFER, accept))
        .merge(route(&Message::FILE, take_file).layer(part))
        .merge(route(&Message::RECEIVE, receive))
        .merge(route(&Message::VERIFY, verify))
        .merge(route(&Message::READY, ready))
        .merge(route(&Message::RETRY, retry))
        .merge(route(&Message::COMMIT, commit))
        .merge(route(&Message::RETIRED, retired))
        .merge(route(&Message::STAYS, stays))
        .merge(route(&Message::VOTE, vote))
        .merge(route(&Message::DECISION, decision))
}

/// The route of a message, between its fault points.
fn route<H, T>(message: &'static Message, handler: H) -> Router<Arc<Agent>>
where
    H: Handler<T, Arc<Agent>>,
    T: 'static,
{
    let method = match message.method {
        Method::Get => MethodFilter::GET,
        Method::Post => MethodFilter::POST,
        Method::Put => MethodFilter::PUT,
    };
    let faults = middleware::from_fn(|request, next| fault::answer(message.name, request, next));
    Router::new().route(message.path, on(method, handler).layer(faults))
}

fn host(caller: Caller) -> Result<HostName> {
    match caller {
        Caller::Host { name } => Ok(name),
        _ => Err(Failure::forbidden("only for paired hosts")),
    }
}

fn incoming(agent: &Agent, id: MigrationId, caller: Caller) -> Result<Arc<Incoming>> {
    agent.migrations.incoming(id, &host(caller)?).ok_or_else(|| {
        Failure::not_found(format!("migration {id} is not under way at {}", agent.host.name))
    })
}

/// The record of an ended or recovered migration with the caller.
fn recorded(
    agent: &Agent,
    id: MigrationId,
    caller: Caller,
    role: Role,
) -> Result<Option<MigrationRecord>> {
    let caller = host(caller)?;
    let record: Option<MigrationRecord> = agent.host.store.get(&id.to_string())?;
    Ok(record.filter(|record| *record.peer() == caller && record.view.role == role))
}

async fn compare_offer(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Body(offer): Body<Value>,
) -> Result<Json<OfferAnswer>> {
    let problems = match compare::read_offer(&agent.migrations, &host(caller)?, offer)? {
        Ok(offer) => compare::check_offer(&agent.migrations, &offer).await?,
        Err(problem) => vec![problem],
    };
    Ok(Json(OfferAnswer { problems, is_full: agent.migrations.is_full() }))
}

async fn accept(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Body(offer): Body<Value>,
) -> Result<Json<OfferAnswer>> {
    let from = host(caller)?;
    match compare::read_offer(&agent.migrations, &from, offer)? {
        Ok(offer) => Incoming::accept(&agent.migrations, &from, offer).await.map(Json),
        Err(problem) => Ok(Json(OfferAnswer { problems: vec![problem], is_full: false })),
    }
}

async fn take_file(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named((id, name, offset)): Named<(MigrationId, String, u64)>,
    part: axum::body::Bytes,
) -> Result<Json<FileReceived>> {
    let incoming = incoming(&agent, id, caller)?;
    incoming.take_file(&name, offset, part).instrument(incoming.span()).await.map(Json)
}

async fn receive(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<Receive>,
) -> Result<Json<Receiving>> {
    let incoming = incoming(&agent, id, caller)?;
    incoming.receive(&request).instrument(incoming.span()).await.map(Json)
}

async fn verify(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<VerifyRequest>,
) -> Result<Json<Digests>> {
    let incoming = incoming(&agent, id, caller)?;
    incoming.verify(&request).instrument(incoming.span()).await.map(Json)
}

async fn ready(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<ReadyRequest>,
) -> Result<Json<DestinationVote>> {
    match incoming(&agent, id, caller.clone()) {
        Ok(incoming) => Ok(Json(incoming.ready(&request).instrument(incoming.span()).await)),
        Err(_) => answer(&agent, id, caller, DestinationEvent::Asked).await,
    }
}

async fn retry(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<RetryRequest>,
) -> Result<Json<RetryStarted>> {
    if let Ok(incoming) = incoming(&agent, id, caller.clone()) {
        return incoming.begin_retry(request.attempt).instrument(incoming.span()).await.map(Json);
    }
    let reason = format!("limosad on {} was restarted: the move cannot go on", agent.host.name);
    if let Some(driver) = driver(&agent, id, caller)? {
        driver.give_up(&reason).await;
    }
    Err(Failure::conflict(reason))
}

async fn commit(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(commit): Body<Commit>,
) -> Result<Json<DestinationVote>> {
    answer(&agent, id, caller, DestinationEvent::Commit { epoch: commit.epoch() }).await
}

async fn retired(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(Retired { epoch }): Body<Retired>,
) -> Result<Json<DestinationVote>> {
    answer(&agent, id, caller, DestinationEvent::Retired { epoch }).await
}

async fn stays(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(Stays { epoch, reason }): Body<Stays>,
) -> Result<Json<DestinationVote>> {
    match driver(&agent, id, caller.clone())? {
        Some(driver) => Ok(Json(driver.receive_stays(epoch, &reason).await)),
        None => answer(&agent, id, caller, DestinationEvent::Asked).await,
    }
}

async fn vote(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
) -> Result<Json<DestinationVote>> {
    answer(&agent, id, caller, DestinationEvent::Asked).await
}

/// Gives the source's word to the handover and answers with the destination's;
/// what has ended is answered from its record.
async fn answer(
    agent: &Agent,
    id: MigrationId,
    caller: Caller,
    event: DestinationEvent,
) -> Result<Json<DestinationVote>> {
    if let Some(driver) = driver(agent, id, caller.clone())? {
        return Ok(Json(driver.receive(event).await));
    }
    let record = recorded(agent, id, caller, Role::Destination)?;
    Ok(Json(record.map_or(DestinationVote::Unknown, |record| {
        let epoch = record.handover.epoch;
        match record.handover.stage {
            Stage::Done => DestinationVote::Running { epoch },
            Stage::Stayed | Stage::Superseded => DestinationVote::Declined {
                epoch,
                reason: record.view.reason.unwrap_or_else(|| "it gave up".to_owned()),
            },
            _ => DestinationVote::Undecided,
        }
    })))
}

fn driver(
    agent: &Agent,
    id: MigrationId,
    caller: Caller,
) -> Result<Option<Arc<DestinationDriver>>> {
    Ok(match agent.migrations.handover(id, &host(caller)?) {
        Some(Handover::Destination(driver)) => Some(driver),
        _ => None,
    })
}

async fn decision(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
) -> Result<Json<SourceDecision>> {
    if let Some(Handover::Source(driver)) = agent.migrations.handover(id, &host(caller.clone())?) {
        return Ok(Json(driver.answer().await));
    }
    let record = recorded(&agent, id, caller, Role::Source)?;
    Ok(Json(record.map_or(SourceDecision::Unknown, |record| {
        let epoch = record.handover.epoch;
        match record.handover.stage {
            Stage::Done | Stage::Superseded => SourceDecision::Retired { epoch },
            Stage::Stayed => SourceDecision::Stays { epoch },
            _ => SourceDecision::Undecided,
        }
    })))
}
