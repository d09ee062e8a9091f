//! The serial console of a VM, for one reader at a time.

use std::sync::Arc;
use std::time::Duration;

use limosa_qemu::launch::CONSOLE_SOCKET;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::OwnedMutexGuard;

use super::Vm;
use crate::Folders;
use crate::failure::{Failure, OrFail, Result};

/// How long a console that is being left is waited for.
const FREE_WAIT: Duration = Duration::from_secs(1);

/// An open console.
pub struct Console {
    /// QEMU's serial line
    serial: UnixStream,
    /// Keeps others out
    _only: OwnedMutexGuard<()>,
}

impl Console {
    /// Connects to the serial line of a VM that runs.
    ///
    /// # Errors
    /// When the VM is off, its console is open already, or QEMU does not answer.
    pub async fn open(folders: &Folders, vm: &Vm) -> Result<Self> {
        vm.lock().await.running()?;
        let name = &vm.name;
        // QEMU would let a second reader connect, and keep it waiting without an answer.
        let only = tokio::time::timeout(FREE_WAIT, Arc::clone(&vm.console).lock_owned());
        let only = only.await.map_err(|_| {
            Failure::conflict(format!(
                "the console of VM {name} is open already: leave it there first, with Ctrl-]"
            ))
        })?;
        let socket = folders.runtime_of(name).join(CONSOLE_SOCKET);
        let serial = UnixStream::connect(&socket)
            .await
            .or_fail(&format!("connecting to the console of VM {name}"))?;
        Ok(Self { serial, _only: only })
    }

    /// Carries bytes both ways until either side ends, which is the normal end of a console.
    pub async fn serve(mut self, mut operator: impl AsyncRead + AsyncWrite + Unpin) {
        tokio::io::copy_bidirectional(&mut operator, &mut self.serial).await.ok();
    }
}
