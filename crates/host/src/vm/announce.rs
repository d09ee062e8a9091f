//! Tells the network that a VM is on this host: by frames of the agent's own for
//! every address that is known, and by QEMU.

use limosa_protocol::vm::VmDefinition;
use limosa_qemu::power;

use super::{Qemu, Vm, run};
use crate::failure::chain;
use crate::net::{Net, announce};

/// Announces each card of a VM with the addresses that were seen with it. What
/// fails is logged: the guest runs either way.
pub async fn announce(net: &Net, vm: &Vm, definition: &VmDefinition, qemu: &Qemu) {
    let mut cards = Vec::new();
    for nic in &definition.nics {
        if let (Some(mac), Some(link)) = (nic.mac, run::switch_link(net, &nic.switch).await) {
            cards.push((link, mac));
        }
    }
    for (link, mac, addresses) in announce::by_card(&cards, &vm.addresses.seen()) {
        announce::announce(link, mac, &addresses);
    }
    if let Err(error) = power::announce_self(&qemu.qmp).await {
        let error = chain(&error);
        tracing::warn!(vm = %vm.name, error, "QEMU did not announce itself");
    }
}
