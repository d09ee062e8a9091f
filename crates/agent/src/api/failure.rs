//! The HTTP answer of a failure. No other module decides on a status.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use limosa_protocol::api::FailureCode;

use crate::failure::Failure;

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = status_of(self.0.code);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(failure = %self, "request failed");
        }
        (status, Json(self.0)).into_response()
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
