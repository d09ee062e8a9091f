//! A certificate as hexadecimal text, for `#[serde(with)]`.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

use crate::hex::{encode, fill};

/// Longest certificate that is kept, in bytes; ours have about 500.
pub const DER_BYTES_MAX: usize = 64 << 10;

pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(bytes))
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    if text.len() > 2 * DER_BYTES_MAX {
        return Err(D::Error::custom(format_args!(
            "a certificate has at most {DER_BYTES_MAX} bytes"
        )));
    }
    let mut bytes = vec![0; text.len() / 2];
    fill(text.as_bytes(), &mut bytes).ok_or_else(|| D::Error::custom("expected hex digits"))?;
    Ok(bytes)
}
