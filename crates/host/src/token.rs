//! Secrets for data channels.

use data_encoding::HEXLOWER;

use crate::failure::{Failure, Result};

/// 128 random bits, as hexadecimal digits.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::internal(format!("the kernel gives no random bytes: {error}")))?;
    Ok(HEXLOWER.encode(&bytes))
}
