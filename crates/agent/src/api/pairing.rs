//! Routes for strangers: pairing is all that they can do.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::post;
use axum::{Extension, Json, Router};
use limosa_auth::pairing::{Answer, Confirmation};

use super::failure::Result;
use crate::agent::Agent;
use crate::caller::Caller;
use crate::pairing::{self, Conversation, Start};

/// The routes of one connection: the state of a pairing is the connection's.
pub(crate) fn router(agent: Arc<Agent>) -> Router {
    Router::new()
        .route("/pair/v1/start", post(start))
        .route("/pair/v1/finish", post(finish))
        .with_state((agent, Arc::new(Conversation::default())))
}

type Shared = State<(Arc<Agent>, Arc<Conversation>)>;

async fn start(
    State((agent, conversation)): Shared,
    Extension(caller): Extension<Caller>,
    Json(start): Json<Start>,
) -> Result<Json<Answer>> {
    Ok(Json(pairing::answer_start(&agent, &conversation, &caller, start).await?))
}

async fn finish(
    State((agent, conversation)): Shared,
    Extension(caller): Extension<Caller>,
    Json(confirmation): Json<Confirmation>,
) -> Result<Json<()>> {
    Ok(Json(pairing::answer_finish(&agent, &conversation, &caller, confirmation).await?))
}
