//! The guest at the destination: paused until it is ours, then resumed.

use std::path::Path;

use limosa_host::failure::{Failure, OrFail, Result, chain};
use limosa_host::vm::Qemu;
use limosa_qemu::{block, power, process};

/// Where QEMU exports the disks, in the VM's folder for sockets.
pub(super) const NBD_SOCKET: &str = "nbd.sock";

/// Makes a guest that is to stay paused one like any other: it may move on as it is.
///
/// - `runtime`: the VM's folder for sockets.
pub(crate) async fn expect_paused(qemu: &Qemu, runtime: &Path) -> Result<()> {
    block::activate_loaded(&qemu.qmp, &runtime.join(NBD_SOCKET))
        .await
        .or_fail("taking the paused guest's disks")
}

/// Lets the guest run, unless it does. An error means that it surely did not.
pub(crate) async fn resume_guest(qemu: &Qemu) -> Result<()> {
    let doing = "running the guest at the destination";
    if !process::is_alive(&qemu.process) {
        return Err(Failure::internal(format!("{doing}: its QEMU ended; see qemu.log")));
    }
    let Err(refused) = power::cont(&qemu.qmp).await else { return Ok(()) };
    match power::query_status(&qemu.qmp).await {
        Ok(power::RunState::Running) => Ok(()),
        Ok(_) => Err(Failure::internal(format!("{doing}: {}", chain(&refused)))),
        // It ended while or after it ran: the VM is off, and here.
        Err(_) => Ok(()),
    }
}
