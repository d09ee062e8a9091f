//! Virtual switches and the NICs plugged into them: bridges and TAPs by netlink.
//!
//! ```text
//! guest ─ virtio-net ─ TAP (fd in QEMU) ─ bridge (the switch) ─ uplink ─ network
//! ```
//!
//! **Invariants.** A TAP lives exactly as long as the QEMU that holds its
//! descriptor: nothing is left behind by a crash. Only bridges whose name has
//! [`BRIDGE_PREFIX`] are made or removed here.

pub mod announce;
pub mod learn;
mod packet;
pub mod tap;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use limosa_protocol::id::SwitchName;
use limosa_protocol::vm::Mac;
use rtnetlink::packet_route::link::{BridgeStpState, InfoBridge};
use rtnetlink::{Handle, LinkBridge, LinkUnspec};
use uuid::Uuid;

use crate::failure::{Failure, OrFail, Result};

/// Beginning of the name of every bridge that the agent makes.
pub const BRIDGE_PREFIX: &str = "ls-";

/// Longest wait for a TAP that the kernel has not let go of, and how often to look.
const TAP_FREE_WAIT: Duration = Duration::from_secs(2);
const TAP_LOOK_EVERY: Duration = Duration::from_millis(20);

/// The host's links, as far as the agent works with them.
#[derive(Clone)]
pub struct Net {
    netlink: Handle,
}

impl Net {
    /// Opens a netlink socket in the network namespace of the agent.
    pub fn open() -> std::io::Result<Self> {
        let (connection, netlink, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { netlink })
    }

    /// Name of a switch's bridge.
    pub fn bridge_name(switch: &SwitchName) -> String {
        format!("{BRIDGE_PREFIX}{switch}")
    }

    /// The index of a link, if it exists.
    pub async fn index(&self, name: &str) -> Result<Option<u32>> {
        let mut links = self.netlink.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => {
                Ok(None)
            }
            Err(error) => {
                Err(Failure::internal(format!("looking for the link {name} by netlink: {error}")))
            }
        }
    }

    /// Makes a switch's bridge if it is missing, and joins the uplink to it.
    pub async fn ensure_bridge(&self, switch: &SwitchName, uplink: Option<&str>) -> Result<u32> {
        let name = Self::bridge_name(switch);
        let doing = format!("making the bridge {name}");
        if self.index(&name).await?.is_none() {
            // A new port must forward at once: a forward delay would be blackout.
            let bridge = LinkBridge::new(&name)
                .append_info_data(InfoBridge::ForwardDelay(0))
                .append_info_data(InfoBridge::StpState(BridgeStpState::Disabled))
                .append_info_data(InfoBridge::MulticastSnooping(false))
                .up()
                .build();
            self.netlink.link().add(bridge).execute().await.or_fail(&doing)?;
        }
        let bridge = self
            .index(&name)
            .await?
            .ok_or_else(|| Failure::internal(format!("{doing}: it is gone again")))?;
        if let Some(uplink) = uplink {
            self.plug(uplink, bridge).await?;
        }
        Ok(bridge)
    }

    /// The index of a link that must exist.
    pub async fn link(&self, name: &str) -> Result<u32> {
        self.index(name).await?.ok_or_else(|| {
            Failure::bad_request(format!(
                "the host has no network interface {name}: see `ip link` for those it has"
            ))
        })
    }

    /// Makes a link a port of a bridge, and sets it up.
    pub async fn plug(&self, link: &str, bridge: u32) -> Result<()> {
        let index = self.link(link).await?;
        let message = LinkUnspec::new_with_index(index).controller(bridge).up().build();
        self.netlink
            .link()
            .set(message)
            .execute()
            .await
            .or_fail(&format!("plugging {link} into its bridge"))
    }

    /// Removes a switch's bridge. Its ports stay, unplugged.
    pub async fn remove_bridge(&self, switch: &SwitchName) -> Result<()> {
        let name = Self::bridge_name(switch);
        if let Some(index) = self.index(&name).await? {
            let doing = format!("removing the bridge {name}");
            self.netlink.link().del(index).execute().await.or_fail(&doing)?;
        }
        Ok(())
    }

    /// Makes a TAP for a NIC and plugs it into its switch.
    ///
    /// Returns the descriptor for QEMU; when it is closed, the TAP is gone.
    pub async fn make_tap(&self, name: &str, switch: &SwitchName) -> Result<OwnedFd> {
        let bridge = self.index(&Self::bridge_name(switch)).await?.ok_or_else(|| {
            Failure::conflict(format!(
                "the virtual switch {switch} has no bridge: make it with \
                 `limosa switch create {switch}`"
            ))
        })?;
        let tap = open_tap(name).await.or_fail(&format!("making the TAP {name}"))?;
        self.plug(name, bridge).await?;
        Ok(tap)
    }
}

/// Makes a TAP. The kernel lets go of one whose QEMU was just killed a moment
/// after the process is gone.
async fn open_tap(name: &str) -> std::io::Result<OwnedFd> {
    let until = Instant::now() + TAP_FREE_WAIT;
    loop {
        match tap::open(name) {
            Err(error)
                if error.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < until =>
            {
                tokio::time::sleep(TAP_LOOK_EVERY).await;
            }
            done => return done,
        }
    }
}

/// Name of a NIC's TAP: the same on every host, so that logs can be compared.
pub fn tap_name(vm: Uuid, nic: usize) -> String {
    let simple = vm.simple().to_string();
    // The last digits of a UUID are its most random ones.
    format!("lm{}-{nic}", &simple[simple.len() - 10..])
}

/// The hardware address of a NIC that was given none: it follows from the VM's
/// identity, so that it never changes and (with 40 random bits) meets no other.
pub fn deterministic_mac(vm: Uuid, nic: usize) -> Mac {
    let mut hasher = blake3::Hasher::new_derive_key("limosa mac address v1");
    hasher.update(vm.as_bytes());
    hasher.update(&nic.to_le_bytes());
    let digest = hasher.finalize();
    let bytes = digest.as_bytes();
    // 0x52: locally administered, one station; the rest is free.
    Mac([0x52, bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_follow_from_the_identity() {
        let vm = Uuid::from_u128(7);
        assert_eq!(deterministic_mac(vm, 0), deterministic_mac(vm, 0));
        assert_ne!(deterministic_mac(vm, 0), deterministic_mac(vm, 1));
        assert!(Mac::try_from(deterministic_mac(vm, 0).to_string()).is_ok());
        assert!(tap_name(vm, 7).len() <= 15);
        let longest: SwitchName = "abcdefghijkl".parse().unwrap();
        assert!(Net::bridge_name(&longest).len() <= 15);
    }
}
