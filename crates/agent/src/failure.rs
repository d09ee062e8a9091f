//! Failures as the API tells them: one type from the place of the fault to the
//! HTTP answer.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use limosa_protocol::api::{self, FailureCode};
use limosa_protocol::migration::Problem;

/// A failed request. Made where the cause is known, so that the message can
/// name it and the next step.
#[derive(Debug, Clone)]
pub(crate) struct Failure(pub(crate) api::Failure);

/// A result whose error is a [`Failure`], if no other is given.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self(api::Failure { code, message: message.into(), problems: Vec::new() })
    }
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(FailureCode::BadRequest, message)
    }
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Forbidden, message)
    }
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(FailureCode::NotFound, message)
    }
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Conflict, message)
    }
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(FailureCode::Internal, message)
    }
    pub(crate) fn peer(message: impl Into<String>) -> Self {
        Self::new(FailureCode::PeerFailed, message)
    }
    pub(crate) fn problems(message: impl Into<String>, problems: Vec<Problem>) -> Self {
        Self(api::Failure { code: FailureCode::Problems, message: message.into(), problems })
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.message)?;
        for problem in &self.0.problems {
            write!(f, "; {} ({})", problem.message, problem.remedy)?;
        }
        Ok(())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            FailureCode::BadRequest => StatusCode::BAD_REQUEST,
            FailureCode::Forbidden => StatusCode::FORBIDDEN,
            FailureCode::NotFound => StatusCode::NOT_FOUND,
            FailureCode::Conflict => StatusCode::CONFLICT,
            FailureCode::Problems => StatusCode::UNPROCESSABLE_ENTITY,
            FailureCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            FailureCode::PeerFailed => StatusCode::BAD_GATEWAY,
        };
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(failure = %self, "request failed");
        }
        (status, Json(self.0)).into_response()
    }
}

/// Joins an error and its sources to one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Turns an error of a library into a [`Failure`], with what was being done.
pub(crate) trait OrFail<T> {
    /// Something that should work did not.
    fn or_fail(self, doing: &str) -> Result<T>;
}

impl<T, E: std::error::Error> OrFail<T> for Result<T, E> {
    fn or_fail(self, doing: &str) -> Result<T> {
        self.map_err(|error| Failure::internal(format!("{doing}: {}", chain(&error))))
    }
}
