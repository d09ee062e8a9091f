//! The virtual switches of a host: Linux bridges that are recorded.

use limosa_protocol::api::Switch;
use limosa_protocol::id::SwitchName;

use crate::Host;
use crate::failure::{Failure, Result};
use crate::net::Net;

impl Host {
    /// Makes the bridges of all recorded switches that are missing, as after a
    /// reboot. One that cannot be made is logged; its VMs say so when started.
    pub async fn restore_switches(&self) -> anyhow::Result<()> {
        for (name, switch) in self.store.all::<Switch>()? {
            let made = self.net.ensure_bridge(&switch.name, switch.uplink.as_deref()).await;
            if let Err(failure) = made {
                tracing::error!(switch = name, %failure, "a virtual switch could not be restored");
            }
        }
        Ok(())
    }

    /// All virtual switches, by name.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn switches(&self) -> Result<Vec<Switch>> {
        let recorded = self.store.all::<Switch>()?;
        Ok(recorded.into_iter().map(|(_, switch)| switch).collect())
    }

    /// Makes a virtual switch and its bridge, and records it.
    ///
    /// # Errors
    /// When the name is taken, the uplink is missing, or the bridge cannot be made.
    pub async fn create_switch(&self, mut switch: Switch) -> Result<Switch> {
        let name = switch.name.clone();
        let _allocating = self.allocation_lock.lock().await;
        if self.store.get::<Switch>(name.as_str())?.is_some() {
            return Err(Failure::conflict(format!("there is a virtual switch {name} already")));
        }
        let bridge = Net::bridge_name(&name);
        if let Some(uplink) = &switch.uplink {
            self.net.link(uplink).await?;
        }
        let was_there = self.net.index(&bridge).await?.is_some();
        switch.bridge = Some(bridge);
        let made = self.net.ensure_bridge(&name, switch.uplink.as_deref()).await;
        if let Err(failure) = made.and_then(|_| Ok(self.store.put(name.as_str(), &switch)?)) {
            // One that was there before may carry VMs.
            if !was_there {
                self.net.remove_bridge(&name).await?;
            }
            return Err(failure);
        }
        Ok(switch)
    }

    /// Removes a virtual switch and its bridge.
    ///
    /// # Errors
    /// When there is no such switch, or a VM is plugged into it.
    pub async fn delete_switch(&self, name: &SwitchName) -> Result<()> {
        let _allocating = self.allocation_lock.lock().await;
        if self.store.get::<Switch>(name.as_str())?.is_none() {
            return Err(Failure::not_found(format!("no virtual switch {name}")));
        }
        for vm in self.vms.all() {
            if vm.reserved.nics.iter().any(|nic| nic.switch == *name) {
                return Err(Failure::conflict(format!("VM {} is plugged into {name}", vm.name)));
            }
        }
        self.net.remove_bridge(name).await?;
        Ok(self.store.remove::<Switch>(name.as_str())?)
    }
}
