//! Operators who may command from afar: their certificates in the store, and trusted.
//!
//! **Invariant.** A certificate is trusted exactly as long as it is recorded.

use data_encoding::HEXLOWER;
use limosa_auth::trust::{TrustStore, certificate_from_pem};
use limosa_auth::{Fingerprint, PeerRole, TrustedPeer};
use limosa_host::failure::{Failure, OrFail, Result};
use limosa_host::store::{OperatorRecord, Store};
use limosa_protocol::api::{Operator, OperatorRequest};
use limosa_protocol::id::OperatorName;

/// All operators, by name.
pub(crate) fn list(store: &Store) -> Result<Vec<Operator>> {
    let records = store.all::<OperatorRecord>()?;
    let operators = records.into_iter().map(|(name, record)| {
        let name = name.parse().or_fail("reading the state store")?;
        Ok(Operator { name, fingerprint: record.fingerprint })
    });
    operators.collect()
}

/// Lets a certificate in.
pub(crate) fn add(store: &Store, trust: &TrustStore, request: OperatorRequest) -> Result<Operator> {
    let der = certificate_from_pem(&request.certificate_pem).map_err(|error| {
        Failure::bad_request(format!(
            "{error}: send the file that `limosa operator identity` names"
        ))
    })?;
    let fingerprint = Fingerprint::of_certificate(&der);
    let name = request.name;
    if store.get::<OperatorRecord>(name.as_str())?.is_some() {
        return Err(Failure::conflict(format!(
            "there is an operator {name} already: remove that one first, or take another name"
        )));
    }
    if let Some(known) = trust.lookup(&fingerprint) {
        return Err(Failure::conflict(format!(
            "that certificate is {}'s already: give each operator one of their own",
            known.name
        )));
    }
    trust
        .insert(TrustedPeer::new(name.to_string(), PeerRole::Operator, der.clone()))
        .map_err(|error| Failure::conflict(error.to_string()))?;
    let record = OperatorRecord {
        fingerprint: fingerprint.to_string(),
        certificate_hex: HEXLOWER.encode(&der),
    };
    if let Err(error) = store.put(name.as_str(), &record) {
        trust.remove(name.as_str());
        return Err(error.into());
    }
    Ok(Operator { name, fingerprint: record.fingerprint })
}

/// Lets an operator in no more.
pub(crate) fn remove(store: &Store, trust: &TrustStore, name: &OperatorName) -> Result<()> {
    if store.get::<OperatorRecord>(name.as_str())?.is_none() {
        return Err(Failure::not_found(format!("no operator {name}")));
    }
    trust.remove(name.as_str());
    Ok(store.remove::<OperatorRecord>(name.as_str())?)
}

#[cfg(test)]
mod tests {
    use limosa_auth::Identity;
    use limosa_auth::identity::CERTIFICATE_FILE;

    use super::*;

    /// Goal: who is recorded is trusted, and nobody else, also after a refused request.
    #[test]
    fn what_is_recorded_is_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let trust = TrustStore::new();
        Identity::load_or_create(&folder.path().join("ann"), "ann").unwrap();
        let request = |name: &str| OperatorRequest {
            name: name.parse().unwrap(),
            certificate_pem: std::fs::read_to_string(
                folder.path().join("ann").join(CERTIFICATE_FILE),
            )
            .unwrap(),
        };
        let added = add(&store, &trust, request("ann")).unwrap();
        assert_eq!(list(&store).unwrap(), std::slice::from_ref(&added));
        let fingerprint: Fingerprint = added.fingerprint.parse().unwrap();
        assert!(trust.lookup(&fingerprint).is_some());
        for refused in [request("ann"), request("bob")] {
            assert!(add(&store, &trust, refused).unwrap_err().to_string().contains("already"));
        }
        remove(&store, &trust, &added.name).unwrap();
        assert!(trust.lookup(&fingerprint).is_none() && list(&store).unwrap().is_empty());
        assert!(remove(&store, &trust, &added.name).is_err());
    }
}
