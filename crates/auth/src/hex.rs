//! Bytes as lower-case hexadecimal text, for what crosses a process as JSON.
//!
//! **Invariant.** A text is measured before it is decoded, so that a peer
//! cannot make us allocate.

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use std::fmt;

/// Lower-case digits.
pub(crate) fn encode(bytes: &[u8]) -> String {
    HEXLOWER.encode(bytes)
}

/// Fills `bytes` from exactly twice as many digits of either case; `None` for anything else.
pub(crate) fn fill(digits: &[u8], bytes: &mut [u8]) -> Option<()> {
    if digits.len() != bytes.len().checked_mul(2)? {
        return None;
    }
    HEXLOWER_PERMISSIVE.decode_mut(digits, bytes).ok().map(drop)
}

/// Exactly `N` bytes, in JSON a string of `2 * N` digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct HexArray<const N: usize>(pub(crate) [u8; N]);

impl<const N: usize> fmt::Debug for HexArray<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(&self.0))
    }
}

impl<const N: usize> Serialize for HexArray<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(&self.0))
    }
}

impl<'de, const N: usize> Deserialize<'de> for HexArray<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let mut bytes = [0; N];
        fill(text.as_bytes(), &mut bytes)
            .ok_or_else(|| D::Error::custom(format_args!("expected {} hex digits", 2 * N)))?;
        Ok(Self(bytes))
    }
}
