//! Tests of [`super`]: the right code pairs two hosts, and nothing else does.

use super::*;

const ONE: Fingerprint = Fingerprint([1; 32]);
const TWO: Fingerprint = Fingerprint([2; 32]);
const MIDDLE: Fingerprint = Fingerprint([9; 32]);

fn code(text: &str) -> PairingCode {
    text.parse().unwrap()
}

fn start(typed: &str, peer: Fingerprint) -> (Initiator, Offer) {
    Initiator::start(&code(typed), ONE, peer, "one").unwrap()
}

fn respond(shown: &str, peer: Fingerprint, offer: &Offer) -> (Responder, Answer) {
    Responder::respond(&code(shown), TWO, peer, "two", offer).unwrap()
}

/// What JSON on a wire makes of a message.
fn wire<T: Serialize + for<'de> Deserialize<'de>>(message: &T) -> T {
    serde_json::from_slice(&serde_json::to_vec(message).unwrap()).unwrap()
}

/// Goal: the right code pairs, each side learns the other's name.
#[test]
fn the_right_code_pairs() {
    let (initiator, offer) = start("12345678", TWO);
    let (responder, answer) = respond("1234-5678", ONE, &wire(&offer));
    let (confirmation, responder_name) = initiator.finish(&wire(&answer)).unwrap();
    assert_eq!(responder_name, "two");
    assert_eq!(responder.peer_fingerprint(), ONE);
    assert_eq!(responder.finish(&wire(&confirmation)).unwrap(), "one");
}

/// Goal: a wrong code fails on both sides, whichever hears of it first.
#[test]
fn a_wrong_code_fails() {
    let (initiator, offer) = start("1234-5679", TWO);
    let (responder, answer) = respond("1234-5678", ONE, &offer);
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
    // An initiator that goes on regardless can only echo or invent.
    let confirmation = Confirmation { mac: answer.mac };
    assert_eq!(responder.finish(&confirmation).unwrap_err(), PairingError::NotConfirmed);
}

/// Goal: somebody in the middle, with certificates of his own, gains nothing by
/// relaying the messages of two hosts that hold the right code.
#[test]
fn a_man_in_the_middle_fails_with_the_right_code() {
    // Each host sees his certificate instead of the other's.
    let (initiator, offer) = start("1234-5678", MIDDLE);
    let (responder, answer) = respond("1234-5678", MIDDLE, &offer);
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
    let confirmation = Confirmation { mac: answer.mac };
    assert_eq!(responder.finish(&confirmation).unwrap_err(), PairingError::NotConfirmed);

    // He shows his certificate to only one of them.
    let (initiator, offer) = start("1234-5678", MIDDLE);
    let (_, answer) = respond("1234-5678", ONE, &offer);
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
    let (initiator, offer) = start("1234-5678", TWO);
    let (_, answer) = respond("1234-5678", MIDDLE, &offer);
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
}

/// Goal: he cannot change a single part of what he relays, names included.
#[test]
fn changed_messages_fail() {
    let (initiator, offer) = start("1234-5678", TWO);
    let renamed = Offer { name: "root".parse().unwrap(), ..offer.clone() };
    let (responder, answer) = respond("1234-5678", ONE, &renamed);
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
    drop(responder);

    let (initiator, offer) = start("1234-5678", TWO);
    let (_, answer) = respond("1234-5678", ONE, &offer);
    let renamed = Answer { name: "root".parse().unwrap(), ..answer };
    assert_eq!(initiator.finish(&renamed).unwrap_err(), PairingError::NotConfirmed);

    let (initiator, offer) = start("1234-5678", TWO);
    let (responder, answer) = respond("1234-5678", ONE, &offer);
    let (mut confirmation, _) = initiator.finish(&answer).unwrap();
    confirmation.mac.0[31] ^= 1;
    assert_eq!(responder.finish(&confirmation).unwrap_err(), PairingError::NotConfirmed);
}

/// Goal: messages of an earlier pairing with the same code are worth nothing.
#[test]
fn replays_fail() {
    let (initiator, offer) = start("1234-5678", TWO);
    let (responder, answer) = respond("1234-5678", ONE, &offer);
    let (confirmation, _) = initiator.finish(&answer).unwrap();
    responder.finish(&confirmation).unwrap();

    // The old offer and confirmation to the responder.
    let (responder, _) = respond("1234-5678", ONE, &offer);
    assert_eq!(responder.finish(&confirmation).unwrap_err(), PairingError::NotConfirmed);
    // The old answer to the initiator.
    let (initiator, _) = start("1234-5678", TWO);
    assert_eq!(initiator.finish(&answer).unwrap_err(), PairingError::NotConfirmed);
}

/// Goal: sending a host its own messages back leads nowhere.
#[test]
fn reflections_fail() {
    let (initiator, offer) = start("1234-5678", TWO);
    let echo = Answer { element: offer.element, name: offer.name.clone(), mac: HexArray([0; 32]) };
    assert_eq!(initiator.finish(&echo).unwrap_err(), PairingError::BadMessage);
    assert_eq!(
        Initiator::start(&code("1234-5678"), ONE, ONE, "one").unwrap_err(),
        PairingError::Itself
    );
    assert_eq!(
        Responder::respond(&code("1234-5678"), TWO, TWO, "two", &offer).unwrap_err(),
        PairingError::Itself
    );
}

/// Goal: hostile messages are refused, by the type or by the step, without a panic.
#[test]
fn hostile_messages_are_refused() {
    let (_, offer) = start("1234-5678", TWO);
    let good = serde_json::to_value(&offer).unwrap();
    for (field, value) in [
        ("element", serde_json::json!("")),
        ("element", serde_json::json!("41".repeat(34))),
        ("element", serde_json::json!("zz".repeat(33))),
        ("element", serde_json::json!([65, 1])),
        ("name", serde_json::json!("../etc")),
        ("name", serde_json::json!("x".repeat(64))),
        ("more", serde_json::json!(1)),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        assert!(serde_json::from_value::<Offer>(bad.clone()).is_err(), "{bad}");
    }
    // Well-formed text, yet the wrong side, or no point of the curve (y = 2).
    let mut off_curve = [0; ELEMENT_BYTES];
    off_curve[..2].copy_from_slice(&[0x41, 2]);
    for element in [[0x42; ELEMENT_BYTES], off_curve] {
        let offer = Offer { element: HexArray(element), name: "x".parse().unwrap() };
        let refused = Responder::respond(&code("1234-5678"), TWO, ONE, "two", &offer);
        assert_eq!(refused.unwrap_err(), PairingError::BadMessage);
    }
}
