//! What paired hosts ask of this one; see [`limosa_protocol::peer`].

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::handler::Handler;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{MethodFilter, on};
use axum::{Extension, Json, Router, middleware};
use limosa_protocol::handover::DestinationEvent;
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::peer::{
    Commit, DestinationVote, Digests, FILE_PART_BYTES_MAX, FileReceived, Message, Method,
    OfferAnswer, ReadyRequest, Receive, Receiving, Retired, RetryRequest, RetryStarted,
    SourceDecision, Stays, VerifyRequest,
};
use serde_json::Value;

use super::extract::{Body, Named, Shared};
use super::failure::Result;
use crate::agent::Agent;
use crate::caller::Caller;
use limosa_faults::{self as faults, Edge, Kind};
use limosa_host::failure::Failure;
use limosa_migration::FilePart;

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
    let faults = middleware::from_fn(|request, next| with_faults(message.name, request, next));
    Router::new().route(message.path, on(method, handler).layer(faults))
}

/// Answers a message between its two fault points.
async fn with_faults(name: &'static str, request: Request, next: Next) -> Response {
    faults::reach(Kind::Answer, name, Edge::Before).await;
    let response = next.run(request).await;
    faults::reach(Kind::Answer, name, Edge::After).await;
    response
}

fn host(caller: Caller) -> Result<HostName> {
    match caller {
        Caller::Host { name } => Ok(name),
        _ => Err(Failure::forbidden("only for paired hosts").into()),
    }
}

async fn compare_offer(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Body(offer): Body<Value>,
) -> Result<Json<OfferAnswer>> {
    Ok(Json(agent.migrations.answer_compare(&host(caller)?, offer).await?))
}

async fn accept(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Body(offer): Body<Value>,
) -> Result<Json<OfferAnswer>> {
    Ok(Json(agent.migrations.answer_offer(&host(caller)?, offer).await?))
}

async fn take_file(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named((id, name, offset)): Named<(MigrationId, String, u64)>,
    part: axum::body::Bytes,
) -> Result<Json<FileReceived>> {
    let part = FilePart { name: &name, offset_bytes: offset, bytes: part };
    Ok(Json(agent.migrations.answer_file(id, &host(caller)?, part).await?))
}

async fn receive(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<Receive>,
) -> Result<Json<Receiving>> {
    Ok(Json(agent.migrations.answer_receive(id, &host(caller)?, &request).await?))
}

async fn verify(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<VerifyRequest>,
) -> Result<Json<Digests>> {
    Ok(Json(agent.migrations.answer_verify(id, &host(caller)?, &request).await?))
}

async fn ready(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<ReadyRequest>,
) -> Result<Json<DestinationVote>> {
    Ok(Json(agent.migrations.answer_ready(id, &host(caller)?, &request).await?))
}

async fn retry(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<RetryRequest>,
) -> Result<Json<RetryStarted>> {
    Ok(Json(agent.migrations.answer_retry(id, &host(caller)?, &request).await?))
}

async fn commit(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(commit): Body<Commit>,
) -> Result<Json<DestinationVote>> {
    let event = DestinationEvent::Commit { epoch: commit.epoch() };
    Ok(Json(agent.migrations.answer_event(id, &host(caller)?, event).await?))
}

async fn retired(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(Retired { epoch }): Body<Retired>,
) -> Result<Json<DestinationVote>> {
    let event = DestinationEvent::Retired { epoch };
    Ok(Json(agent.migrations.answer_event(id, &host(caller)?, event).await?))
}

async fn stays(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(Stays { epoch, reason }): Body<Stays>,
) -> Result<Json<DestinationVote>> {
    Ok(Json(agent.migrations.answer_stays(id, &host(caller)?, epoch, &reason).await?))
}

async fn vote(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
) -> Result<Json<DestinationVote>> {
    let event = DestinationEvent::Asked;
    Ok(Json(agent.migrations.answer_event(id, &host(caller)?, event).await?))
}

async fn decision(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
) -> Result<Json<SourceDecision>> {
    Ok(Json(agent.migrations.answer_decision(id, &host(caller)?).await?))
}
