//! The tiny guest as scenarios want it.

use anyhow::Result;

use super::steps::{Boot, Wanted};
use crate::harness::guest;

/// A guest with a moderate load: 256 MiB, one disk, 20 MB/s dirtied.
pub(crate) fn working() -> Result<Wanted> {
    wanted("web1", 256, 20)
}

/// A guest whose move takes a few seconds in each phase on a slow link.
pub(crate) fn heavy() -> Result<Wanted> {
    wanted("web1", 384, 10)
}

/// A tiny guest of that size that dirties that much memory a second.
pub(crate) fn wanted(name: &str, memory_mib: u64, dirty_mb_s: u32) -> Result<Wanted> {
    let guest = guest::tiny()?;
    let boot = Boot {
        kernel: guest.kernel,
        initrd: guest.initrd,
        append: format!("console=ttyS0 quiet panic=-1 limosa.dirty_mb_s={dirty_mb_s}"),
        uefi: false,
    };
    Ok(Wanted {
        name: name.to_owned(),
        memory_mib,
        vcpus: 1,
        disks: vec![("qcow2", 192)],
        machine: "q35".to_owned(),
        boot,
    })
}
