//! Names and numbers that identify things, each checked when it is made.
//!
//! A name becomes a folder, a bridge, a cgroup and a part of a URL: the rules
//! below keep it harmless in all of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Longest name of a VM or host, in bytes.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest name of a disk: QEMU's names of block nodes have 31 bytes, ours 10 more
/// than the disk's.
pub const DISK_ID_BYTES_MAX: usize = 21;
/// Longest name of a virtual switch: a bridge's name has 15 bytes and a prefix.
pub const SWITCH_NAME_BYTES_MAX: usize = 12;

/// A name that breaks the rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} name {name:?} is not valid: use 1 to {max} of a-z, A-Z, 0-9, '.', '_' and '-', \
     beginning with a letter or digit"
)]
pub struct BadName {
    what: &'static str,
    name: String,
    max: usize,
}

fn check(what: &'static str, name: &str, max: usize) -> Result<(), BadName> {
    let starts_well = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    let all_well =
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if starts_well && all_well && name.len() <= max {
        Ok(())
    } else {
        let shown = name.chars().take(80).collect();
        Err(BadName { what, name: shown, max })
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String)]
        pub struct $type(String);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $type {
            type Err = BadName;
            fn from_str(name: &str) -> Result<Self, BadName> {
                check($what, name, $max)?;
                Ok(Self(name.to_owned()))
            }
        }
        impl TryFrom<String> for $type {
            type Error = BadName;
            fn try_from(name: String) -> Result<Self, BadName> {
                check($what, &name, $max)?;
                Ok(Self(name))
            }
        }
        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name_type!(
    /// Name of a VM, unique on a host.
    VmName, "VM", NAME_BYTES_MAX
);
name_type!(
    /// Name by which hosts know each other.
    HostName, "host", NAME_BYTES_MAX
);
name_type!(
    /// Name by which a host knows an operator.
    OperatorName, "operator", NAME_BYTES_MAX
);
name_type!(
    /// Name of a disk within its VM.
    DiskId, "disk", DISK_ID_BYTES_MAX
);
name_type!(
    /// Name of a virtual switch, unique on a host.
    SwitchName, "switch", SWITCH_NAME_BYTES_MAX
);

/// One migration, the same number on both hosts. Sorts by the time of its start.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct MigrationId(pub Uuid);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for MigrationId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::parse_str(text).map(Self)
    }
}

/// Grows by one with each owner of a VM: the higher one is right.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Serialize,
    Deserialize,
    ToSchema,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of the next owner.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a name can never leave its folder or reach a shell.
    #[test]
    fn names_are_harmless() {
        for good in ["web1", "a", "Db-2.prod_x", &"x".repeat(63)] {
            assert_eq!(good.parse::<VmName>().unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?}");
            assert!(serde_json::from_value::<VmName>(bad.into()).is_err(), "{bad:?}");
        }
        assert!("thirteenbytes".parse::<SwitchName>().is_err());
        let told = "a b".parse::<OperatorName>().unwrap_err().to_string();
        assert!(told.starts_with("operator name"), "{told}");
    }
}
