//! Stops a guest that another host owns.

use limosa_qemu::{power, process};

use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::store::RunRecord;
use limosa_host::vm::{Qemu, Vm};

/// Stops the vCPUs of a VM that another host owns, by ending its QEMU if need be:
/// two of them must not run.
pub(super) async fn stop_guest(vm: &Vm) {
    let of_vm = vm.lock().await;
    let stopped = match &of_vm.qemu {
        Some(qemu) => power::stop(&qemu.qmp).await.or_fail("stopping the guest"),
        None => Err(Failure::internal("its QEMU does not answer")),
    };
    let Err(failure) = stopped else { return };
    let process = match (&of_vm.qemu, &of_vm.record.run) {
        (Some(qemu), _) => Some(&qemu.process),
        (None, run) => run.as_ref().map(|run| &run.process),
    };
    let Some(process) = process else { return };
    tracing::error!(vm = %vm.name, %failure, "another host owns the VM: its QEMU here is ended");
    if let Err(error) = process::kill(process).await {
        tracing::error!(vm = %vm.name, %error, "QEMU of a VM that another host owns was not ended");
    }
}

/// Ends a QEMU that was started and does not answer, known only by its record.
pub(super) async fn end_unanswering(qemu: Option<&Qemu>, run: Option<&RunRecord>) -> Result<()> {
    match (qemu, run) {
        (None, Some(run)) => {
            process::kill(&run.process).await.or_fail("ending a QEMU that does not answer")
        }
        _ => Ok(()),
    }
}
