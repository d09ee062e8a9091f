//! How long, how often and how many times a shown code may be used.
//!
//! ```text
//! open ─begin_attempt (at most 3)─► open ─complete─► closed
//!   └─ 10 minutes, or no attempt left ─────────────────┘
//! ```
//!
//! **Invariant.** One invitation pairs at most one peer, and whatever it does a
//! stranger tries at most [`ATTEMPTS_MAX`] of 10⁸ codes against it.

use super::code::{PairingCode, RandomFailed};

/// How long a code may be used, in seconds.
pub const LIFETIME_S: u64 = 600;
/// How often a code may be tried.
pub const ATTEMPTS_MAX: u8 = 3;

/// A code that this host shows. One at a time is enough: a second one would
/// give a guesser three more attempts.
///
/// Time is an argument, in seconds since 1970 by one and the same clock.
#[derive(Debug)]
pub struct Invitation {
    code: PairingCode,
    expires_at_unix_s: u64,
    attempts_left: u8,
    used: bool,
}

/// Why an invitation cannot be used. Ask for a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvitationClosed {
    /// Its time is over.
    #[error("the pairing code has expired: ask for a new one")]
    Expired,
    /// It was tried too often.
    #[error("the pairing code was tried too often: ask for a new one")]
    NoAttemptLeft,
    /// It has paired a peer.
    #[error("the pairing code was used already: ask for a new one")]
    Used,
}

impl Invitation {
    /// A new code, to be shown to the operator.
    pub fn new(now_unix_s: u64) -> Result<Self, RandomFailed> {
        Ok(Self {
            code: PairingCode::generate()?,
            expires_at_unix_s: now_unix_s.saturating_add(LIFETIME_S),
            attempts_left: ATTEMPTS_MAX,
            used: false,
        })
    }

    /// The code, for the operator's eyes.
    #[must_use]
    pub fn code(&self) -> &PairingCode {
        &self.code
    }

    /// From this second on the code is worth nothing.
    #[must_use]
    pub fn expires_at_unix_s(&self) -> u64 {
        self.expires_at_unix_s
    }

    /// How many attempts may still begin.
    #[must_use]
    pub fn attempts_left(&self) -> u8 {
        self.attempts_left
    }

    /// Whether an attempt may begin now.
    pub fn check(&self, now_unix_s: u64) -> Result<(), InvitationClosed> {
        self.check_unused(now_unix_s)?;
        if self.attempts_left == 0 { Err(InvitationClosed::NoAttemptLeft) } else { Ok(()) }
    }

    /// Counts an attempt and hands out the code for it. Call it when an offer
    /// has come, *before* [`Responder::respond`](super::Responder::respond): a
    /// guesser who has the answer need not come back for his failure to count.
    pub fn begin_attempt(&mut self, now_unix_s: u64) -> Result<PairingCode, InvitationClosed> {
        self.check(now_unix_s)?;
        self.attempts_left -= 1;
        Ok(self.code.clone())
    }

    /// Uses the invitation up, for a peer whose confirmation was right. Trust
    /// the peer only on `Ok`: of two that finish at once, the second is refused.
    pub fn complete(&mut self, now_unix_s: u64) -> Result<(), InvitationClosed> {
        self.check_unused(now_unix_s)?;
        self.used = true;
        Ok(())
    }

    fn check_unused(&self, now_unix_s: u64) -> Result<(), InvitationClosed> {
        if self.used {
            Err(InvitationClosed::Used)
        } else if now_unix_s >= self.expires_at_unix_s {
            Err(InvitationClosed::Expired)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_700_000_000;

    /// Goal: three attempts, also when none of them ever comes back.
    #[test]
    fn attempts_are_counted_when_they_begin() {
        let mut invitation = Invitation::new(NOW).unwrap();
        for left in [2, 1, 0] {
            invitation.begin_attempt(NOW).unwrap();
            assert_eq!(invitation.attempts_left(), left);
        }
        assert_eq!(invitation.begin_attempt(NOW).unwrap_err(), InvitationClosed::NoAttemptLeft);
        // The third attempt may still come to its good end.
        invitation.complete(NOW).unwrap();
    }

    /// Goal: ten minutes, for beginning and for ending.
    #[test]
    fn time_ends_it() {
        let mut invitation = Invitation::new(NOW).unwrap();
        assert_eq!(invitation.expires_at_unix_s(), NOW + 600);
        invitation.begin_attempt(NOW + 599).unwrap();
        assert_eq!(invitation.complete(NOW + 600), Err(InvitationClosed::Expired));
        assert_eq!(invitation.begin_attempt(NOW + 600).unwrap_err(), InvitationClosed::Expired);
        assert_eq!(invitation.attempts_left(), 2);
    }

    /// Goal: one code pairs one peer, though two attempts overlap.
    #[test]
    fn it_pairs_one_peer() {
        let mut invitation = Invitation::new(NOW).unwrap();
        invitation.begin_attempt(NOW).unwrap();
        invitation.begin_attempt(NOW).unwrap();
        invitation.complete(NOW).unwrap();
        assert_eq!(invitation.complete(NOW), Err(InvitationClosed::Used));
        assert_eq!(invitation.begin_attempt(NOW).unwrap_err(), InvitationClosed::Used);
    }
}
