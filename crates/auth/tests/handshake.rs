//! Whole handshakes over in-memory pipes: who gets in, and that nobody else
//! reads or says a single byte.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up may panic")]

use std::io::{Read, Write};
use std::sync::Arc;

use limosa_auth::pairing::{Confirmation, Initiator, Offer, PairingCode, PairingError, Responder};
use limosa_auth::{Fingerprint, Identity, PeerRole, TrustStore, TrustedPeer, tls};
use rustls::client::{ClientConfig, ClientConnection};
use rustls::server::{Acceptor, ServerConnection};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{AlertDescription, CertificateError, Error, ProtocolVersion};

/// What the server says to whoever comes in.
const GREETING: &[u8] = b"the memory of your guests";
/// What the client says.
const REQUEST: &[u8] = b"let me in";

/// A host or an operator of a test.
struct Party {
    identity: Identity,
    name: &'static str,
    _folder: tempfile::TempDir,
}

impl Party {
    fn new(name: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(folder.path(), name).unwrap();
        Self { identity, name, _folder: folder }
    }

    fn fingerprint(&self) -> Fingerprint {
        self.identity.fingerprint()
    }

    fn as_peer(&self, role: PeerRole) -> TrustedPeer {
        TrustedPeer::new(self.name.to_owned(), role, self.identity.certificate_der().to_vec())
    }

    fn client(&self, server: &Party) -> Arc<ClientConfig> {
        tls::client_config(&self.identity, server.fingerprint(), tls::ALPN_CHANNEL)
    }
}

/// A host, and those that it trusts.
fn host_trusting(peers: &[TrustedPeer]) -> (Party, TrustStore) {
    let trust = TrustStore::new();
    for peer in peers {
        trust.insert(peer.clone()).unwrap();
    }
    (Party::new("server"), trust)
}

/// How a connection went, on both sides.
#[derive(Debug)]
struct Meeting {
    client: ClientConnection,
    server: Option<ServerConnection>,
    client_error: Option<Error>,
    server_error: Option<Error>,
    client_read: Vec<u8>,
    server_read: Vec<u8>,
}

impl Meeting {
    /// Nobody got in: no byte was readable on either side.
    #[track_caller]
    fn assert_refused(&self) {
        assert!(self.client_error.is_some() || self.server_error.is_some(), "{self:?}");
        assert!(self.client_read.is_empty(), "{self:?}");
        assert!(self.server_read.is_empty(), "{self:?}");
    }

    /// Both sides read what the other said, and each knows the other.
    #[track_caller]
    fn assert_met(&self, client: &Party, server: &Party, alpn: &[u8]) {
        assert_eq!((&self.client_error, &self.server_error), (&None, &None));
        assert_eq!(self.client_read, GREETING);
        assert_eq!(self.server_read, REQUEST);
        let server_end = self.server.as_ref().unwrap();
        assert_eq!(tls::peer_fingerprint(server_end), Some(client.fingerprint()));
        assert_eq!(tls::peer_fingerprint(&self.client), Some(server.fingerprint()));
        assert_eq!(server_end.alpn_protocol(), Some(alpn));
        assert_eq!(server_end.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(self.client.tls13_tickets_received(), 0);
    }
}

/// Bytes on their way, at most a buffer's worth.
fn carry(bytes: &mut Vec<u8>, mut read: impl FnMut(&mut &[u8]) -> std::io::Result<usize>) -> bool {
    let mut rest = &bytes[..];
    let moved = !rest.is_empty() && read(&mut rest).is_ok_and(|count| count > 0);
    *bytes = rest.to_vec();
    moved
}

/// Connects a client to the listener of `host`, as the agent does: the client's
/// first message chooses between the two settings.
fn meet(config: Arc<ClientConfig>, host: &Identity, trust: &TrustStore) -> Meeting {
    let client = ClientConnection::new(config, tls::server_name()).unwrap();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    let mut acceptor = Acceptor::default();
    let mut meeting = Meeting {
        client,
        server: None,
        client_error: None,
        server_error: None,
        client_read: Vec::new(),
        server_read: Vec::new(),
    };
    meeting.client.writer().write_all(REQUEST).unwrap();

    for _ in 0..100 {
        let client = &mut meeting.client;
        while client.wants_write() {
            client.write_tls(&mut to_server).unwrap();
        }
        let mut moved = false;
        if let Some(server) = &mut meeting.server {
            moved |= carry(&mut to_server, |rest| server.read_tls(rest));
            let result = server.process_new_packets();
            meeting.server_error = meeting.server_error.or(result.err());
            let _ = server.reader().read_to_end(&mut meeting.server_read);
        } else if meeting.server_error.is_none() {
            moved |= carry(&mut to_server, |rest| acceptor.read_tls(rest));
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let config = if tls::wants_pairing(&accepted.client_hello()) {
                        tls::pairing_server_config(host)
                    } else {
                        tls::server_config(host, trust)
                    };
                    match accepted.into_connection(config) {
                        Ok(mut server) => {
                            server.writer().write_all(GREETING).unwrap();
                            meeting.server = Some(server);
                        }
                        Err((error, mut alert)) => {
                            meeting.server_error = Some(error);
                            alert.write_all(&mut to_client).unwrap();
                        }
                    }
                    moved = true;
                }
                Err((error, _)) => meeting.server_error = Some(error),
            }
        }
        if let Some(server) = &mut meeting.server {
            while server.wants_write() {
                server.write_tls(&mut to_client).unwrap();
            }
        }
        moved |= carry(&mut to_client, |rest| client.read_tls(rest));
        let result = client.process_new_packets();
        meeting.client_error = meeting.client_error.or(result.err());
        let _ = client.reader().read_to_end(&mut meeting.client_read);
        if !moved && !client.wants_write() {
            return meeting;
        }
    }
    panic!("the two talk without end: {meeting:?}");
}

/// A certificate with a key that is not its own.
fn stolen(certificate: &Identity, key: &Identity) -> SingleCertAndKey {
    let key = rustls::crypto::ring::sign::any_supported_type(key.key_der()).unwrap();
    CertifiedKey::new(vec![certificate.certificate_der().clone()], key).into()
}

/// Goal: paired peers meet, hosts and operators, on channels and on the API.
#[test]
fn paired_peers_meet() {
    let (host, operator) = (Party::new("one"), Party::new("alice"));
    let peers = [host.as_peer(PeerRole::Host), operator.as_peer(PeerRole::Operator)];
    let (server, trust) = host_trusting(&peers);
    for (party, alpn, role) in [
        (&host, tls::ALPN_CHANNEL, PeerRole::Host),
        (&operator, tls::ALPN_HTTP, PeerRole::Operator),
    ] {
        let config = tls::client_config(&party.identity, server.fingerprint(), alpn);
        let meeting = meet(config, &server.identity, &trust);
        meeting.assert_met(party, &server, alpn);
        let fingerprint = tls::peer_fingerprint(meeting.server.as_ref().unwrap()).unwrap();
        assert_eq!(trust.lookup(&fingerprint).map(|peer| peer.role), Some(role));
    }
}

/// Goal: who is not paired gets nothing and is told so; a removal counts at once.
#[test]
fn an_unpaired_client_gets_nothing() {
    let (stranger, friend) = (Party::new("stranger"), Party::new("one"));
    let (server, trust) = host_trusting(&[friend.as_peer(PeerRole::Host)]);
    let denied = |party: &Party| {
        let meeting = meet(party.client(&server), &server.identity, &trust);
        meeting.assert_refused();
        let denied = AlertDescription::AccessDenied;
        assert_eq!(meeting.client_error, Some(Error::AlertReceived(denied)));
    };
    denied(&stranger);
    let config = friend.client(&server);
    meet(config.clone(), &server.identity, &trust).assert_met(&friend, &server, tls::ALPN_CHANNEL);
    trust.remove("one").unwrap();
    // The same settings again: no ticket of the first meeting may help.
    meet(config, &server.identity, &trust).assert_refused();
    denied(&friend);
}

/// Goal: the name of a paired host, in a certificate of somebody else, is worth nothing.
#[test]
fn a_paired_name_with_another_certificate_gets_nothing() {
    let (real, impostor) = (Party::new("one"), Party::new("one"));
    let (server, trust) = host_trusting(&[real.as_peer(PeerRole::Host)]);
    meet(impostor.client(&server), &server.identity, &trust).assert_refused();
    assert!(trust.insert(impostor.as_peer(PeerRole::Host)).is_err());
    meet(impostor.client(&server), &server.identity, &trust).assert_refused();
}

/// Goal: without a certificate there is no way in, not even to pairing.
#[test]
fn a_client_without_a_certificate_gets_nothing() {
    let (server, trust) = host_trusting(&[]);
    for alpn in [tls::ALPN_CHANNEL, tls::ALPN_HTTP, tls::ALPN_PAIR] {
        let somebody = Party::new("somebody");
        let mut config = ClientConfig::clone(&somebody.client(&server));
        config.alpn_protocols = vec![alpn.to_vec()];
        config.client_auth_cert_resolver = Arc::new(Nothing);
        let meeting = meet(Arc::new(config), &server.identity, &trust);
        meeting.assert_refused();
        assert_eq!(meeting.server_error, Some(Error::NoCertificatesPresented));
    }
}

/// Shows no certificate.
#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }
    fn has_certs(&self) -> bool {
        false
    }
}

/// Goal: a certificate alone is public; without its key it opens nothing, not
/// even pairing, and a server's alone fools no client.
#[test]
fn a_certificate_without_its_key_is_worth_nothing() {
    let (friend, thief) = (Party::new("one"), Party::new("thief"));
    let (server, trust) = host_trusting(&[friend.as_peer(PeerRole::Host)]);
    for config in [friend.client(&server), tls::pairing_client_config(&friend.identity)] {
        let mut config = ClientConfig::clone(&config);
        config.client_auth_cert_resolver = Arc::new(stolen(&friend.identity, &thief.identity));
        let meeting = meet(Arc::new(config), &server.identity, &trust);
        meeting.assert_refused();
        let bad = Error::InvalidCertificate(CertificateError::BadSignature);
        assert_eq!(meeting.server_error, Some(bad));
    }

    let mut settings = rustls::ServerConfig::clone(&tls::server_config(&server.identity, &trust));
    settings.cert_resolver = Arc::new(stolen(&server.identity, &thief.identity));
    let mut client = ClientConnection::new(friend.client(&server), tls::server_name()).unwrap();
    let mut fake = ServerConnection::new(Arc::new(settings)).unwrap();
    let (mut hello, mut reply) = (Vec::new(), Vec::new());
    client.write_tls(&mut hello).unwrap();
    fake.read_tls(&mut &hello[..]).unwrap();
    fake.process_new_packets().unwrap();
    while fake.wants_write() {
        fake.write_tls(&mut reply).unwrap();
    }
    client.read_tls(&mut &reply[..]).unwrap();
    let error = client.process_new_packets().unwrap_err();
    assert_eq!(error, Error::InvalidCertificate(CertificateError::BadSignature));
    assert_eq!(tls::peer_fingerprint(&client), None);
}

/// Goal: TLS 1.2 is not spoken, whoever asks.
#[test]
fn tls12_is_refused() {
    let friend = Party::new("one");
    let (server, trust) = host_trusting(&[friend.as_peer(PeerRole::Host)]);
    for alpn in [tls::ALPN_CHANNEL, tls::ALPN_PAIR] {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_client_auth_cert(
                vec![friend.identity.certificate_der().clone()],
                friend.identity.key_der().clone_key(),
            )
            .unwrap();
        config.alpn_protocols = vec![alpn.to_vec()];
        let meeting = meet(Arc::new(config), &server.identity, &trust);
        meeting.assert_refused();
        let alert = Error::AlertReceived(AlertDescription::ProtocolVersion);
        assert_eq!(meeting.client_error, Some(alert));
    }
}

/// Goal: a client talks to the pinned host and to no other, although that one
/// trusts the client.
#[test]
fn another_server_than_the_pinned_one_is_left() {
    let (friend, expected) = (Party::new("one"), Party::new("server"));
    let (server, trust) = host_trusting(&[friend.as_peer(PeerRole::Host)]);
    let meeting = meet(friend.client(&expected), &server.identity, &trust);
    meeting.assert_refused();
    let message = meeting.client_error.unwrap().to_string();
    assert!(message.contains(&expected.fingerprint().to_string()), "{message}");
    assert!(message.contains(&server.fingerprint().to_string()), "{message}");
}

/// Goal: the way for strangers leads to pairing and nowhere else: a client that
/// offers it beside the API lands in pairing, and no other protocol is agreed.
#[test]
fn the_pairing_way_leads_nowhere_else() {
    let stranger = Party::new("stranger");
    let (server, trust) = host_trusting(&[]);
    let mut config = ClientConfig::clone(&tls::pairing_client_config(&stranger.identity));
    config.alpn_protocols = vec![tls::ALPN_HTTP.to_vec(), tls::ALPN_PAIR.to_vec()];
    let meeting = meet(Arc::new(config.clone()), &server.identity, &trust);
    meeting.assert_met(&stranger, &server, tls::ALPN_PAIR);

    for alpn in [vec![], vec![tls::ALPN_HTTP.to_vec()], vec![b"h2".to_vec()]] {
        config.alpn_protocols = alpn;
        meet(Arc::new(config.clone()), &server.identity, &trust).assert_refused();
    }
}

/// Both ends of a pairing connection, as each of them sees it.
fn pairing_connection(client: &Party, server: &Party) -> (Fingerprint, Fingerprint) {
    let config = tls::pairing_client_config(&client.identity);
    let meeting = meet(config, &server.identity, &TrustStore::new());
    meeting.assert_met(client, server, tls::ALPN_PAIR);
    let seen_by_client = tls::peer_fingerprint(&meeting.client).unwrap();
    (seen_by_client, tls::peer_fingerprint(meeting.server.as_ref().unwrap()).unwrap())
}

/// Scenario: two hosts that never met pair over the network; then each lets the
/// other in.
#[test]
fn pairing_opens_both_ways() {
    let (one, two) = (Party::new("one"), Party::new("two"));
    let code = PairingCode::generate().unwrap();
    let (two_seen, one_seen) = pairing_connection(&one, &two);
    let (initiator, offer) =
        Initiator::start(&code, one.fingerprint(), two_seen, one.name).unwrap();
    let (responder, answer) =
        Responder::respond(&code, two.fingerprint(), one_seen, two.name, &offer).unwrap();
    let (confirmation, two_name) = initiator.finish(&answer).unwrap();
    let one_name = responder.finish(&confirmation).unwrap();
    assert_eq!((one_name.as_str(), two_name.as_str()), ("one", "two"));

    for (client, server) in [(&one, &two), (&two, &one)] {
        let trust = TrustStore::new();
        trust.insert(client.as_peer(PeerRole::Host)).unwrap();
        meet(client.client(server), &server.identity, &trust).assert_met(
            client,
            server,
            tls::ALPN_CHANNEL,
        );
    }
}

/// Scenario: somebody between the hosts ends both TLS connections himself and
/// relays every message. Both operators hold the right code.
/// Expect: neither host trusts anybody.
#[test]
fn a_relay_between_the_hosts_is_found_out() {
    let (one, two, middle) = (Party::new("one"), Party::new("two"), Party::new("two"));
    let code = PairingCode::generate().unwrap();
    let (seen_by_one, _) = pairing_connection(&one, &middle);
    let (_, seen_by_two) = pairing_connection(&middle, &two);

    let (initiator, offer) =
        Initiator::start(&code, one.fingerprint(), seen_by_one, one.name).unwrap();
    let relayed: Offer = serde_json::from_value(serde_json::to_value(&offer).unwrap()).unwrap();
    let (responder, answer) =
        Responder::respond(&code, two.fingerprint(), seen_by_two, two.name, &relayed).unwrap();
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
    // The best he has to confirm with is the MAC that two sent him.
    let mac = &serde_json::to_value(&answer).unwrap()["mac"];
    let confirmation: Confirmation =
        serde_json::from_value(serde_json::json!({ "mac": mac })).unwrap();
    assert_eq!(responder.finish(&confirmation).unwrap_err(), PairingError::NotConfirmed);
}
