//! The name that cannot be borrowed: the digest of a whole certificate.
//!
//! SHA-256 of the DER, because an operator can then compare it with any other
//! tool, e.g. `openssl x509 -in identity.crt -noout -fingerprint -sha256`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

use crate::hex;

/// Bytes of one group in the text form.
const GROUP_BYTES: usize = 2;

/// SHA-256 of a certificate's DER: what a peer is pinned by.
///
/// As text (and in JSON): 64 hex digits in groups of four, joined by `-`.
/// Parsing takes either case, and `-`, `:` or spaces wherever they stand.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// A text that is no fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a fingerprint: expected 64 hex digits, in groups or not")]
pub struct BadFingerprint;

impl Fingerprint {
    /// The fingerprint of a certificate, given as DER.
    #[must_use]
    pub fn of_certificate(certificate_der: &[u8]) -> Self {
        Self(Sha256::digest(certificate_der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::with_capacity(79);
        for (index, group) in self.0.chunks(GROUP_BYTES).enumerate() {
            if index > 0 {
                text.push('-');
            }
            text.push_str(&hex::encode(group));
        }
        f.pad(&text)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = BadFingerprint;

    fn from_str(text: &str) -> Result<Self, BadFingerprint> {
        let mut digits = [0; 64];
        let mut digit_count = 0;
        for byte in text.bytes().filter(|byte| !matches!(byte, b'-' | b':' | b' ')) {
            *digits.get_mut(digit_count).ok_or(BadFingerprint)? = byte;
            digit_count += 1;
        }
        let mut bytes = [0; 32];
        hex::fill(&digits[..digit_count], &mut bytes).ok_or(BadFingerprint)?;
        Ok(Self(bytes))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: it is the SHA-256 that other tools print, and survives its text.
    #[test]
    fn is_sha256_and_round_trips() {
        let fingerprint = Fingerprint::of_certificate(b"abc");
        let text = fingerprint.to_string();
        assert_eq!(
            text,
            "ba78-16bf-8f01-cfea-4141-40de-5dae-2223-b003-61a3-9617-7a9c-b410-ff61-f200-15ad"
        );
        assert_eq!(text.parse(), Ok(fingerprint));
        assert_eq!(text.to_uppercase().replace('-', ":").parse(), Ok(fingerprint));
        assert_eq!(text.replace('-', "").parse(), Ok(fingerprint));
        let json = serde_json::to_string(&fingerprint).unwrap();
        assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
        for bad in ["", "-", &text[1..], &format!("{text}0"), &text.replace('b', "g")] {
            assert_eq!(bad.parse::<Fingerprint>(), Err(BadFingerprint), "{bad}");
        }
    }
}
