//! The networks of a lab: one for VMs and clients, and migration links.
//!
//! ```text
//!   host a             switch namespace              host b
//!  ┌────────┐      ┌────────────────────────┐      ┌────────┐
//!  │   lan0 ├──────┤ lan-a    lan     lan-b ├──────┤ lan0   │   VM network
//!  │   mig0 ├─htb──┤ mig0-a   mig0   mig0-b ├──htb─┤ mig0   │   migration links,
//!  │   mig1 ├─htb──┤ mig1-a   mig1   mig1-b ├──htb─┤ mig1   │   each with its speed
//!  └────────┘      │     lan-cl             │      └────────┘
//!                  └────────┬───────────────┘
//!                       eth0│ client namespace
//! ```
//!
//! Frames of VMs are captured at `lan-a` and `lan-b`, outside of the hosts.
//! Addresses are the same in every lab; namespaces keep labs apart.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::harness::exec;
use crate::harness::namespace::Namespace;

/// Longest wait for the carrier of a port, and how often to look.
const CARRIER_WAIT: Duration = Duration::from_secs(5);
const CARRIER_LOOK_EVERY: Duration = Duration::from_millis(50);

/// Most hosts of a lab.
pub(crate) const HOST_COUNT_MAX: usize = 8;
/// Most migration links of a lab.
pub(crate) const LINK_COUNT_MAX: usize = 4;
/// Longest burst that a link's shaper lets through at full speed, in KiB.
const BURST_KIB: u32 = 256;

/// The client's addresses on the VM network.
pub(crate) const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 100);
/// See [`CLIENT_V4`].
pub(crate) const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100);
/// Host part of IPv4 networks in the lab, in bits.
pub(crate) const PREFIX_V4_BITS: u8 = 24;
/// Host part of IPv6 networks in the lab, in bits.
pub(crate) const PREFIX_V6_BITS: u8 = 64;

/// The IPv4 address of the n-th guest (from 0) on the VM network.
pub(crate) fn guest_v4(n: u8) -> IpAddr {
    Ipv4Addr::new(10, 78, 0, 10 + n).into()
}

/// The IPv6 address of the n-th guest (from 0) on the VM network.
pub(crate) fn guest_v6(n: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(n)).into()
}

/// The address of the n-th host (from 0) on a migration link.
pub(crate) fn host_v4(host: usize, link: usize) -> Result<Ipv4Addr> {
    Ok(Ipv4Addr::new(10, 77, u8::try_from(link)?, u8::try_from(host + 1)?))
}

/// How a link is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The cable is out: the host sees its interface without carrier.
    Cable,
    /// The switch drops every frame and nobody is told.
    Silent,
}

/// Names of everything that makes up a lab's networks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Net {
    /// Holds the bridges
    pub switch: Namespace,
    /// Holds the outside client
    pub client: Namespace,
    /// One for each host, with the host's short name
    pub hosts: Vec<(String, Namespace)>,
    /// Number of migration links
    pub link_count: usize,
}

impl Net {
    /// Names for a lab; nothing is made yet.
    pub(crate) fn named(id: &str, hosts: &[&str], link_count: usize) -> Result<Self> {
        ensure!(hosts.len() <= HOST_COUNT_MAX, "a lab has at most {HOST_COUNT_MAX} hosts");
        ensure!(link_count <= LINK_COUNT_MAX, "a lab has at most {LINK_COUNT_MAX} links");
        let named = |part: &str| {
            Namespace::named(format!("{}{id}-{part}", crate::harness::namespace::PREFIX))
        };
        Ok(Self {
            switch: named("sw")?,
            client: named("cl")?,
            hosts: hosts
                .iter()
                .map(|host| Ok(((*host).to_owned(), named(host)?)))
                .collect::<Result<_>>()?,
            link_count,
        })
    }

    /// Makes namespaces, bridges, cables and addresses.
    pub(crate) fn create(&self) -> Result<()> {
        for namespace in self.namespaces() {
            namespace.create()?;
        }
        self.create_bridge("lan")?;
        self.plug(&self.client, "eth0", "lan", "cl")?;
        self.client.ip(&[
            "addr",
            "add",
            &format!("{CLIENT_V4}/{PREFIX_V4_BITS}"),
            "dev",
            "eth0",
        ])?;
        self.client.ip(&[
            "addr",
            "add",
            &format!("{CLIENT_V6}/{PREFIX_V6_BITS}"),
            "dev",
            "eth0",
        ])?;
        for link in 0..self.link_count {
            self.create_bridge(&link_name(link))?;
        }
        for (index, (host, namespace)) in self.hosts.iter().enumerate() {
            self.plug(namespace, "lan0", "lan", host)?;
            for link in 0..self.link_count {
                let name = link_name(link);
                self.plug(namespace, &name, &name, host)?;
                self.address(index, link)?;
            }
        }
        Ok(())
    }

    /// Sets the speed of a migration link in both directions, also while it is
    /// in use; `None` takes the limit away.
    pub(crate) fn set_speed(&self, link: usize, mbit: Option<u32>) -> Result<()> {
        ensure!(link < self.link_count, "the lab has no link {link}");
        let name = link_name(link);
        for (host, namespace) in &self.hosts {
            shape(namespace, &name, mbit)?;
            shape(&self.switch, &format!("{name}-{host}"), mbit)?;
        }
        Ok(())
    }

    /// Breaks one host's end of a migration link.
    pub(crate) fn cut(&self, link: usize, host: &str, how: Cut) -> Result<()> {
        let port = self.port(link, host)?;
        match how {
            Cut::Cable => self.switch.ip(&["link", "set", &port, "down"]).map(drop),
            // Nothing passes a port that is down, and it takes no other state.
            Cut::Silent if !self.is_up(&port)? => Ok(()),
            Cut::Silent => self.silence(&port, true).map(drop),
        }
    }

    /// Lets nothing more come to a host on a migration link whose speed is set;
    /// what it sends still arrives, and nobody is told.
    pub(crate) fn deafen(&self, link: usize, host: &str) -> Result<()> {
        let port = self.port(link, host)?;
        // A queue of one byte takes no frame.
        let order = ["qdisc", "replace", "dev", &port, "parent", "1:10", "handle", "10:"];
        self.switch.tc(&[&order[..], &["bfifo", "limit", "1"]].concat()).map(drop)
    }

    /// Repairs one host's end of a migration link, however it was broken.
    pub(crate) fn restore(&self, link: usize, host: &str) -> Result<()> {
        let port = self.port(link, host)?;
        // The state of a port can be set only while it is up.
        self.switch.ip(&["link", "set", &port, "up"])?;
        self.silence(&port, false)?;
        // Nothing to remove is the usual case.
        let _ = self.switch.tc(&["qdisc", "del", "dev", &port, "parent", "1:10"]);
        Ok(())
    }

    /// Takes a host's network away, which nobody uses any more, and makes it anew as
    /// it is after a boot. Migration links keep their ports at the switch, as they
    /// are, and lose their speed: see [`Net::set_speed`].
    pub(crate) fn renew(&self, index: usize) -> Result<()> {
        let (host, namespace) = &self.hosts[index];
        let cables: Vec<_> =
            ["lan0".to_owned()].into_iter().chain((0..self.link_count).map(link_name)).collect();
        let switch = self.switch.name();
        // Set aside, or the other ends would go with them, and captures with those.
        for cable in &cables {
            let aside = format!("{cable}-off-{host}");
            namespace.ip(&["link", "set", "dev", cable, "netns", switch, "name", &aside])?;
        }
        namespace.destroy()?;
        namespace.create()?;
        for cable in &cables {
            let aside = format!("{cable}-off-{host}");
            let order = ["link", "set", "dev", &aside, "netns", namespace.name(), "name", cable];
            self.switch.ip(&order)?;
            namespace.ip(&["link", "set", cable, "up"])?;
        }
        (0..self.link_count).try_for_each(|link| self.address(index, link))
    }

    fn address(&self, index: usize, link: usize) -> Result<()> {
        let address = format!("{}/{PREFIX_V4_BITS}", host_v4(index, link)?);
        self.hosts[index].1.ip(&["addr", "add", &address, "dev", &link_name(link)]).map(drop)
    }

    /// Bytes that a host has received and sent on a migration link.
    pub(crate) fn link_bytes(&self, link: usize, host: &str) -> Result<(u64, u64)> {
        let port = self.port(link, host)?;
        let text = self.switch.ip(&["-j", "-s", "link", "show", "dev", &port])?;
        let told: serde_json::Value = serde_json::from_str(&text).context("reading ip's JSON")?;
        let stats = &told[0]["stats64"];
        // What the switch port sends is what the host receives.
        let sent_by_port = stats["tx"]["bytes"].as_u64().context("no tx bytes")?;
        let sent_by_host = stats["rx"]["bytes"].as_u64().context("no rx bytes")?;
        Ok((sent_by_port, sent_by_host))
    }

    /// All namespaces, hosts first: their processes must go before the bridges.
    pub(crate) fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.hosts.iter().map(|(_, namespace)| namespace).chain([&self.client, &self.switch])
    }

    fn port(&self, link: usize, host: &str) -> Result<String> {
        ensure!(link < self.link_count, "the lab has no link {link}");
        ensure!(self.hosts.iter().any(|(name, _)| name == host), "the lab has no host {host}");
        Ok(format!("{}-{host}", link_name(link)))
    }

    fn is_up(&self, port: &str) -> Result<bool> {
        let text = self.switch.ip(&["-j", "link", "show", "dev", port])?;
        let shown: serde_json::Value = serde_json::from_str(&text).context("reading ip's JSON")?;
        let flags = shown[0]["flags"].as_array().context("no flags")?;
        Ok(flags.iter().any(|flag| flag == "UP"))
    }

    fn silence(&self, port: &str, silent: bool) -> Result<String> {
        // A disabled bridge port drops both ways and keeps its carrier, so that
        // neither side notices: 0 is disabled, 3 is forwarding.
        let state = if silent { "0" } else { "3" };
        let order = ["-n", self.switch.name(), "link", "set", "dev", port, "state", state];
        // A port that was just switched on refuses until it has its carrier.
        let until = Instant::now() + CARRIER_WAIT;
        loop {
            match exec::run("bridge", &order) {
                Err(_) if Instant::now() < until => std::thread::sleep(CARRIER_LOOK_EVERY),
                done => return done,
            }
        }
    }

    fn create_bridge(&self, name: &str) -> Result<()> {
        // Without snooping, neighbour discovery needs no querier.
        self.switch.ip(&[
            "link",
            "add",
            name,
            "type",
            "bridge",
            "forward_delay",
            "0",
            "stp_state",
            "0",
            "mcast_snooping",
            "0",
        ])?;
        self.switch.ip(&["link", "set", name, "up"]).map(drop)
    }

    fn plug(&self, namespace: &Namespace, interface: &str, bridge: &str, who: &str) -> Result<()> {
        let port = format!("{bridge}-{who}");
        self.switch.ip(&[
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            interface,
            "netns",
            namespace.name(),
        ])?;
        self.switch.ip(&["link", "set", &port, "master", bridge, "up"])?;
        namespace.ip(&["link", "set", interface, "up"]).map(drop)
    }
}

/// Name of a migration link: its bridge, and its interface in each host.
pub(crate) fn link_name(link: usize) -> String {
    format!("mig{link}")
}

/// Limits what an interface sends.
fn shape(namespace: &Namespace, device: &str, mbit: Option<u32>) -> Result<()> {
    let Some(mbit) = mbit else {
        let _ = namespace.tc(&["qdisc", "del", "dev", device, "root"]);
        return Ok(());
    };
    let rate = format!("{mbit}mbit");
    let burst = format!("{BURST_KIB}k");
    let class = |verb| {
        namespace.tc(&[
            "class", verb, "dev", device, "parent", "1:", "classid", "1:10", "htb", "rate", &rate,
            "burst", &burst, "cburst", &burst,
        ])
    };
    // Replacing the root while traffic flows would drop its queue: change the
    // class alone when it is there.
    if class("change").is_ok() {
        return Ok(());
    }
    namespace
        .tc(&["qdisc", "replace", "dev", device, "root", "handle", "1:", "htb", "default", "10"])?;
    class("add").map(drop)
}
