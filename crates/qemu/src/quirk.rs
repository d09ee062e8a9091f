//! Differences between QEMU's versions and machine types, each with its reason.
//!
//! Everything else in this crate is written so that 7.2 and 10.x do the same.

use crate::version::Version;

/// Oldest QEMU that Limosa drives. Before it the migration stream, the block
/// exports or `-sandbox` differ, and no maintained distribution has it.
pub const VERSION_MIN: Version = Version { major: 7, minor: 2, micro: 0 };

/// QMP commands without which Limosa can neither run nor move a VM. A QEMU that
/// has them all is taken, however new it is; one that lacks some is named with
/// what it lacks.
pub const COMMANDS_NEEDED: [&str; 22] = [
    "announce-self",
    "block-export-add",
    "block-job-cancel",
    "blockdev-add",
    "blockdev-del",
    "blockdev-mirror",
    "cont",
    "migrate",
    "migrate-continue",
    "migrate-incoming",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "nbd-server-start",
    "nbd-server-stop",
    "query-block-jobs",
    "query-migrate",
    "query-named-block-nodes",
    "query-status",
    "quit",
    "stop",
    "system_powerdown",
];

/// What a RAM backend must be told so that its block in the stream is named by
/// its id. Machine types up to 4.0 name it by its path in the object tree,
/// `/objects/ram0`; the receiver of its pages would not know it.
pub(crate) const RAM_BACKEND_NAMED_BY_ID: &str = "x-use-canonical-path-for-ramblock-id=off";

/// Size of guest RAM as all versions read it alike. Without a unit it means MiB,
/// and a size rounded to that would differ from its backend's.
pub(crate) fn memory_argument(size_bytes: u64) -> String {
    format!("size={size_bytes}B")
}
