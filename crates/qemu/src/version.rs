//! The version of a QEMU.

use std::fmt;

use serde::Deserialize;

/// A version, such as 7.2.22.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// First number
    pub major: u32,
    /// Second number
    pub minor: u32,
    /// Third number
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}
