//! Migrations: list, one, its events, cancel.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::Sse;
use axum::response::sse::{Event, KeepAlive};
use futures_util::stream::{self, Stream, StreamExt};
use limosa_protocol::api::Failure as ApiFailure;
use limosa_protocol::id::MigrationId;
use limosa_protocol::migration::Migration;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::extract::{Named, Shared};
use super::failure::Result;
use crate::agent::Agent;

/// Events of one migration come at most this often.
const EVENT_MS_MIN: u64 = 100;

pub(super) fn routes() -> OpenApiRouter<Arc<Agent>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(events))
        .routes(routes!(cancel))
}

/// All migrations, oldest first
#[utoipa::path(get, path = "/v1/migrations", tag = "migration", responses((status = 200, body = Vec<Migration>)))]
async fn list(State(agent): Shared) -> Result<Json<Vec<Migration>>> {
    Ok(Json(agent.migrations.list()?))
}

/// One migration
#[utoipa::path(get, path = "/v1/migrations/{id}", tag = "migration", params(("id" = String, Path)),
    responses((status = 200, body = Migration), (status = 404, body = ApiFailure)))]
async fn show(State(agent): Shared, Named(id): Named<MigrationId>) -> Result<Json<Migration>> {
    Ok(Json(agent.migrations.view(id)?))
}

/// Server-sent events: the migration at once, at each change, and at its end
#[utoipa::path(get, path = "/v1/migrations/{id}/events", tag = "migration", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = Migration), (status = 404, body = ApiFailure)))]
async fn events(
    State(agent): Shared,
    Named(id): Named<MigrationId>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>> {
    let first = agent.migrations.view(id)?;
    let later = match agent.migrations.subscribe(id) {
        Some(views) => tokio_stream::wrappers::WatchStream::from_changes(views).boxed(),
        None => stream::empty().boxed(),
    };
    let paced = stream::once(async { first }).chain(later).then(|view| async {
        // Whoever reads slowly gets the newest view, not a queue of old ones.
        tokio::time::sleep(Duration::from_millis(EVENT_MS_MIN)).await;
        view
    });
    let mut ended = false;
    let whole = paced.take_while(move |view| {
        let go_on = !ended;
        ended = view.outcome.is_some();
        std::future::ready(go_on)
    });
    let events = whole.map(|view| {
        let event = Event::default().event("migration");
        Ok(event.json_data(view).unwrap_or_else(|_| Event::default().comment("not shown")))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

/// End a migration; the VM stays at the source. Not possible after the commit point
#[utoipa::path(post, path = "/v1/migrations/{id}/cancel", tag = "migration", params(("id" = String, Path)),
    responses((status = 200, body = Migration), (status = 404, body = ApiFailure), (status = 409, body = ApiFailure)))]
async fn cancel(State(agent): Shared, Named(id): Named<MigrationId>) -> Result<Json<Migration>> {
    Ok(Json(agent.migrations.cancel(id)?))
}
