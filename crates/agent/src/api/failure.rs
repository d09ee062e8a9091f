//! The HTTP answer of a failure. No other module decides on a status.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use limosa_protocol::api::FailureCode;

use limosa_host::failure::Failure;

/// A failure as the answer to a request.
#[derive(Debug)]
pub(crate) struct Rejection(Failure);

/// What a handler returns.
pub(super) type Result<T, E = Rejection> = std::result::Result<T, E>;

impl<E: Into<Failure>> From<E> for Rejection {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let Self(failure) = self;
        let status = status_of(failure.0.code);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(%failure, "request failed");
        }
        (status, Json(failure.0)).into_response()
    }
}

fn status_of(code: FailureCode) -> StatusCode {
    match code {
        FailureCode::BadRequest => StatusCode::BAD_REQUEST,
        FailureCode::Forbidden => StatusCode::FORBIDDEN,
        FailureCode::NotFound | FailureCode::NotPaired => StatusCode::NOT_FOUND,
        FailureCode::Conflict | FailureCode::VmLocked => StatusCode::CONFLICT,
        FailureCode::Problems => StatusCode::UNPROCESSABLE_ENTITY,
        FailureCode::Internal | FailureCode::StoreFailed | FailureCode::PairingDamaged => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
        FailureCode::PeerFailed | FailureCode::PeerUnreachable => StatusCode::BAD_GATEWAY,
    }
}
