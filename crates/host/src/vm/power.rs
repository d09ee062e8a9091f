//! Pausing, resuming and stopping a VM.

use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::api::StopRequest;
use limosa_qemu::power::{self, RunState};
use limosa_qemu::process;

use super::announce::announce;
use super::run_state::stopped_by;
use super::{Qemu, Vm, run};
use crate::Host;
use crate::failure::{Failure, OrFail, Result};

/// Most seconds that a guest is waited for.
const STOP_SECONDS_MAX: u32 = 3600;

/// Stops the vCPUs.
pub async fn pause(vm: &Vm) -> Result<()> {
    let inner = vm.lock_for_change().await?;
    power::stop(&inner.running()?.qmp).await.or_fail(&format!("pausing VM {}", vm.name))
}

/// Lets the vCPUs run on. The guest is announced, because it may have been moved
/// while it was paused.
pub async fn resume(host: &Host, vm: &Vm) -> Result<()> {
    let inner = vm.lock_for_change().await?;
    inner.expect_owned()?;
    let qemu = inner.running()?;
    let doing = format!("resuming VM {}", vm.name);
    match power::query_status(&qemu.qmp).await.or_fail(&doing)? {
        // To QEMU it runs: `cont` would do nothing.
        RunState::Suspended => power::system_wakeup(&qemu.qmp).await,
        _ => power::cont(&qemu.qmp).await,
    }
    .or_fail(&doing)?;
    announce(&host.net, vm, &inner.definition, qemu).await;
    Ok(())
}

/// Stops a VM: asks its guest, or turns it off.
pub async fn stop(host: &Host, vm: &Arc<Vm>, request: &StopRequest) -> Result<()> {
    let mut inner = vm.lock_for_change().await?;
    let qemu = inner.running()?.clone();
    if request.force {
        run::end(&qemu).await?;
        // Whoever looks next sees a VM that is off.
        run::note_end(&host.store, vm, &mut inner, &qemu);
        return Ok(());
    }
    expect_listening(vm, &qemu).await?;
    power::system_powerdown(&qemu.qmp).await.or_fail(&format!("stopping VM {}", vm.name))?;
    // Others may look at the VM, and turn it off, while the guest takes its time.
    drop(inner);
    let limit = Duration::from_secs(request.timeout_seconds.min(STOP_SECONDS_MAX).into());
    process::wait_exit(&qemu.process, limit).await.map_err(|_| {
        Failure::conflict(format!(
            "the guest of VM {0} was asked to power off and still runs after {1} s: wait longer \
             with --timeout, or turn it off with `limosa vm stop --force {0}`",
            vm.name, request.timeout_seconds
        ))
    })?;
    let mut inner = vm.lock().await;
    // Its QEMU here also ends when the VM has moved meanwhile.
    if inner.has_left || inner.lock.as_ref().is_some_and(|lock| lock.moving().is_some()) {
        return Err(Failure::conflict(format!(
            "VM {0} was taken by a move before its guest powered off: `limosa migration list` says \
             where it is; stop it there",
            vm.name
        )));
    }
    run::note_end(&host.store, vm, &mut inner, &qemu);
    Ok(())
}

/// A guest whose vCPUs are stopped never hears of its power button.
async fn expect_listening(vm: &Vm, qemu: &Qemu) -> Result<()> {
    let doing = format!("stopping VM {}", vm.name);
    let why = match power::query_status(&qemu.qmp).await.or_fail(&doing)? {
        RunState::Running | RunState::Shutdown => return Ok(()),
        RunState::Paused | RunState::Prelaunch | RunState::Postmigrate => "is paused",
        RunState::Suspended => "sleeps",
        other => stopped_by(other).unwrap_or("does not run"),
    };
    Err(Failure::conflict(format!(
        "the guest of VM {0} {why} and cannot power itself off: `limosa vm resume {0}` first, or \
         turn it off with `limosa vm stop --force {0}`",
        vm.name
    )))
}
