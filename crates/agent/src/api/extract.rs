//! What handlers take out of a request.

use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use limosa_host::failure::Failure;
use serde::de::DeserializeOwned;

use super::failure::{Rejection, Result};
use crate::agent::Agent;

/// A JSON body; what is wrong with it is a failure like any other.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<Agent>> for Body<T> {
    type Rejection = Rejection;
    async fn from_request(request: Request, agent: &Arc<Agent>) -> Result<Self> {
        match Json::<T>::from_request(request, agent).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(Failure::bad_request(rejection.body_text()).into()),
        }
    }
}

/// A part of the path, likewise.
pub(super) struct Named<T>(pub(super) T);

impl<T: DeserializeOwned + Send> FromRequestParts<Arc<Agent>> for Named<T> {
    type Rejection = Rejection;
    async fn from_request_parts(parts: &mut Parts, agent: &Arc<Agent>) -> Result<Self> {
        match axum::extract::Path::<T>::from_request_parts(parts, agent).await {
            Ok(axum::extract::Path(name)) => Ok(Self(name)),
            Err(rejection) => Err(Failure::bad_request(rejection.body_text()).into()),
        }
    }
}

/// The agent, for handlers.
pub(super) type Shared = State<Arc<Agent>>;
