//! What paired hosts ask of this one; see [`limosa_protocol::peer`].

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use limosa_protocol::id::{HostName, MigrationId};
use limosa_protocol::migration::Role;
use limosa_protocol::peer::{
    Abort, Commit, Offer, OfferAnswer, PeerView, Ready, ReadyRequest, Receive, Receiving, Running,
    SourceView,
};

use super::{Body, Named, Shared};
use crate::agent::Agent;
use crate::failure::{Failure, Outcome};
use crate::listen::Caller;
use crate::migration::compare;
use crate::migration::incoming::{Incoming, view_of};
use crate::store::{MigrationRecord, Stage};

pub(super) fn routes() -> Router<Arc<Agent>> {
    Router::new()
        .route("/peer/v1/compare", post(compare_offer))
        .route("/peer/v1/migrations", post(accept))
        .route("/peer/v1/migrations/{id}", get(view))
        .route(
            "/peer/v1/migrations/{id}/files/{name}",
            put(take_file).layer(DefaultBodyLimit::disable()),
        )
        .route("/peer/v1/migrations/{id}/receive", post(receive))
        .route("/peer/v1/migrations/{id}/ready", post(ready))
        .route("/peer/v1/migrations/{id}/commit", post(commit))
        .route("/peer/v1/migrations/{id}/abort", post(abort))
        .route("/peer/v1/offers/{id}", get(offer))
}

fn host(caller: Caller) -> Outcome<HostName> {
    match caller {
        Caller::Host { name } => Ok(name),
        _ => Err(Failure::forbidden("only for paired hosts")),
    }
}

fn incoming(agent: &Agent, id: MigrationId, caller: Caller) -> Outcome<Arc<Incoming>> {
    agent.migrations.incoming(id, &host(caller)?).ok_or_else(|| {
        Failure::not_found(format!("migration {id} is not under way at {}", agent.name))
    })
}

/// The record of an ended or recovered migration with the caller.
fn recorded(
    agent: &Agent,
    id: MigrationId,
    caller: Caller,
    role: Role,
) -> Outcome<Option<MigrationRecord>> {
    let caller = host(caller)?;
    let record: Option<MigrationRecord> = agent.store.get(&id.to_string())?;
    Ok(record.filter(|record| *record.peer() == caller && record.view.role == role))
}

async fn compare_offer(
    State(agent): Shared,
    Body(offer): Body<Offer>,
) -> Outcome<Json<OfferAnswer>> {
    let problems = compare::check_offer(&agent, &offer).await?;
    Ok(Json(OfferAnswer { problems }))
}

async fn accept(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Body(offer): Body<Offer>,
) -> Outcome<Json<OfferAnswer>> {
    Incoming::accept(&agent, &host(caller)?, offer).await.map(Json)
}

async fn take_file(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named((id, name)): Named<(MigrationId, String)>,
    body: axum::body::Body,
) -> Outcome<Json<()>> {
    incoming(&agent, id, caller)?.take_file(&name, body).await.map(Json)
}

async fn receive(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<Receive>,
) -> Outcome<Json<Receiving>> {
    incoming(&agent, id, caller)?.receive(&request).await.map(Json)
}

async fn ready(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<ReadyRequest>,
) -> Outcome<Json<Ready>> {
    incoming(&agent, id, caller)?.ready(&request).await.map(Json)
}

async fn commit(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<Commit>,
) -> Outcome<Json<Running>> {
    if let Ok(incoming) = incoming(&agent, id, caller.clone()) {
        return incoming.commit(&request).await.map(Json);
    }
    // Repeated after the job ended: the record answers.
    match recorded(&agent, id, caller, Role::Destination)? {
        Some(record) => match view_of(&record, None) {
            PeerView::Running { epoch } if epoch == request.epoch => Ok(Json(Running { epoch })),
            PeerView::Ready { .. } => Err(Failure::conflict(
                "the restarted destination is about to ask whether the VM was handed over",
            )),
            PeerView::Declined { reason } => Err(Failure::conflict(reason)),
            _ => Err(Failure::conflict("this migration is not ready")),
        },
        None => Err(Failure::not_found(format!("no migration {id} at {}", agent.name))),
    }
}

async fn abort(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
    Body(request): Body<Abort>,
) -> Outcome<Json<PeerView>> {
    if let Ok(incoming) = incoming(&agent, id, caller.clone()) {
        let reason = format!("the source gave up: {}", request.reason);
        return Ok(Json(incoming.decline(&reason).await));
    }
    let record = recorded(&agent, id, caller, Role::Destination)?;
    Ok(Json(record.map_or(PeerView::Unknown, |record| view_of(&record, None))))
}

async fn view(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
) -> Outcome<Json<PeerView>> {
    if let Ok(incoming) = incoming(&agent, id, caller.clone()) {
        return Ok(Json(incoming.view().await));
    }
    let record = recorded(&agent, id, caller, Role::Destination)?;
    Ok(Json(record.map_or(PeerView::Unknown, |record| view_of(&record, None))))
}

async fn offer(
    State(agent): Shared,
    Extension(caller): Extension<Caller>,
    Named(id): Named<MigrationId>,
) -> Outcome<Json<SourceView>> {
    let record = recorded(&agent, id, caller, Role::Source)?;
    let view = match record {
        Some(record) => match record.stage {
            Stage::Offered => SourceView::Offered,
            Stage::HandedOver => SourceView::HandedOver { epoch: record.epoch },
            // Done as moved was handed over as well: the destination ran, and
            // asks because it lost its own record of it.
            Stage::Done
                if record.view.outcome == Some(limosa_protocol::migration::Outcome::Moved) =>
            {
                SourceView::HandedOver { epoch: record.epoch }
            }
            _ => SourceView::Unknown,
        },
        None => SourceView::Unknown,
    };
    Ok(Json(view))
}
