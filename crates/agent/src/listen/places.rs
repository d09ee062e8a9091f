//! How many may come in over TCP at a time: few until they are known, many after.
//!
//! ```text
//! accepted ─► handshake (limits: all, one address) ─┬─► host       (its own places)
//!                                                   ├─► operator   (its own places)
//!                                                   └─► pairs      (its own places)
//! ```
//!
//! **Invariant.** Whoever has proven nothing never takes the place of one who has,
//! and one address leaves most places of handshakes to others.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most connections at a time of which nobody knows yet whose they are.
const HANDSHAKE_COUNT_MAX: usize = 256;
/// Most of them from one address. A host opens those of all its migrations at
/// once when a link comes back.
const ADDRESS_HANDSHAKE_COUNT_MAX: usize = 96;
/// Most connections of paired hosts.
const HOST_COUNT_MAX: usize = 512;
/// Most connections of operators.
const OPERATOR_COUNT_MAX: usize = 128;
/// Most connections that pair, while an invitation is open.
const PAIRING_COUNT_MAX: usize = 16;

/// The places of one address that the agent listens on.
pub(super) struct Places {
    handshakes: Arc<Semaphore>,
    by_address: Arc<ByAddress>,
    pub(super) hosts: Arc<Semaphore>,
    pub(super) operators: Arc<Semaphore>,
    pub(super) pairing: Arc<Semaphore>,
}

type ByAddress = Mutex<HashMap<IpAddr, usize>>;

/// The place of one handshake, free again when this is dropped.
pub(super) struct Handshake {
    address: IpAddr,
    by_address: Arc<ByAddress>,
    _place: OwnedSemaphorePermit,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            handshakes: Arc::new(Semaphore::new(HANDSHAKE_COUNT_MAX)),
            by_address: Arc::default(),
            hosts: Arc::new(Semaphore::new(HOST_COUNT_MAX)),
            operators: Arc::new(Semaphore::new(OPERATOR_COUNT_MAX)),
            pairing: Arc::new(Semaphore::new(PAIRING_COUNT_MAX)),
        }
    }

    /// Waits until there is a place for one handshake more.
    pub(super) async fn handshake(&self) -> anyhow::Result<OwnedSemaphorePermit> {
        Ok(Arc::clone(&self.handshakes).acquire_owned().await?)
    }

    /// Gives the place to a connection from that address, unless too many others
    /// from there have one.
    pub(super) fn begin(&self, address: IpAddr, place: OwnedSemaphorePermit) -> Option<Handshake> {
        let address = network_of(address);
        let mut by_address = lock(&self.by_address);
        let count = by_address.entry(address).or_default();
        if *count >= ADDRESS_HANDSHAKE_COUNT_MAX {
            return None;
        }
        *count += 1;
        Some(Handshake { address, by_address: Arc::clone(&self.by_address), _place: place })
    }
}

/// A place among those of one kind; nobody waits for it with a handshake's place.
pub(super) fn take(places: &Arc<Semaphore>) -> anyhow::Result<OwnedSemaphorePermit> {
    Arc::clone(places).try_acquire_owned().context("too many connections of this kind are open")
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut by_address = lock(&self.by_address);
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

fn lock(by_address: &ByAddress) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
    by_address.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What counts as one address: of IPv6 its /64, all of which one machine may have.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & (u128::MAX << 64)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: one address cannot keep another one out, and gives its places back.
    #[tokio::test]
    async fn one_address_leaves_places_to_others() {
        let places = Places::new();
        let mut held = Vec::new();
        for host in 0..ADDRESS_HANDSHAKE_COUNT_MAX {
            let address = format!("fd00::{host:x}").parse().unwrap();
            let place = places.handshake().await.unwrap();
            held.push(places.begin(address, place).expect("a place"));
        }
        let crowded = "fd00::ffff".parse().unwrap();
        let place = places.handshake().await.unwrap();
        assert!(places.begin(crowded, place).is_none());
        let place = places.handshake().await.unwrap();
        assert!(places.begin("10.0.0.1".parse().unwrap(), place).is_some());
        held.clear();
        assert!(lock(&places.by_address).is_empty());
        assert_eq!(places.handshakes.available_permits(), HANDSHAKE_COUNT_MAX);
        let place = places.handshake().await.unwrap();
        assert!(places.begin(crowded, place).is_some());
    }
}
