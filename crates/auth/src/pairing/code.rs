//! The code that a person reads on one host and types on the other.

use std::fmt;
use std::str::FromStr;

/// Digits of a code.
const DIGIT_COUNT: usize = 8;
/// Number of different codes.
const CODE_COUNT: u32 = 100_000_000;
/// The largest multiple of [`CODE_COUNT`] that 32 bits hold: random numbers
/// from here on would make small codes likelier, so they are drawn again.
const UNBIASED_END: u32 = u32::MAX - u32::MAX % CODE_COUNT;
const _: () = assert!(UNBIASED_END.is_multiple_of(CODE_COUNT) && 10u32.pow(8) == CODE_COUNT);

/// Eight random digits, shown as `1234-5678`. A secret: not for logs.
#[derive(Clone)]
pub struct PairingCode([u8; DIGIT_COUNT]);

/// A text that is no pairing code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a pairing code: expected eight digits, such as 1234-5678")]
pub struct BadCode;

/// The kernel gave no random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system has no random numbers")]
pub struct RandomFailed(#[source] getrandom::Error);

impl PairingCode {
    /// A new code, each of the 10⁸ equally likely.
    pub fn generate() -> Result<Self, RandomFailed> {
        loop {
            let number = getrandom::u32().map_err(RandomFailed)?;
            if number < UNBIASED_END {
                return Ok(Self::from_number(number % CODE_COUNT));
            }
        }
    }

    fn from_number(mut number: u32) -> Self {
        let mut digits = [0; DIGIT_COUNT];
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + u8::try_from(number % 10).expect("a digit is less than 10");
            number /= 10;
        }
        Self(digits)
    }

    /// What goes into SPAKE2: the digits alone, however they were written.
    pub(super) fn secret(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (left, right) = self.0.split_at(DIGIT_COUNT / 2);
        let text =
            |digits: &[u8]| digits.iter().map(|digit| char::from(*digit)).collect::<String>();
        write!(f, "{}-{}", text(left), text(right))
    }
}

impl fmt::Debug for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairingCode(secret)")
    }
}

impl FromStr for PairingCode {
    type Err = BadCode;

    /// Takes the digits with `-` and spaces wherever they stand.
    fn from_str(text: &str) -> Result<Self, BadCode> {
        let mut digits = [0; DIGIT_COUNT];
        let mut digit_count = 0;
        for byte in text.bytes().filter(|byte| !matches!(byte, b'-' | b' ')) {
            if !byte.is_ascii_digit() {
                return Err(BadCode);
            }
            *digits.get_mut(digit_count).ok_or(BadCode)? = byte;
            digit_count += 1;
        }
        if digit_count == DIGIT_COUNT { Ok(Self(digits)) } else { Err(BadCode) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a code survives being read aloud and typed; anything else is refused.
    #[test]
    fn codes_round_trip() {
        assert_eq!(PairingCode::from_number(1_234).to_string(), "0000-1234");
        assert_eq!(PairingCode::from_number(CODE_COUNT - 1).to_string(), "9999-9999");
        let code = PairingCode::generate().unwrap();
        for typed in [code.to_string(), code.to_string().replace('-', ""), format!(" {code} ")] {
            assert_eq!(typed.parse::<PairingCode>().unwrap().secret(), code.secret());
        }
        for bad in ["", "1234-567", "1234-56789", "1234-567x", "1234_5678", "１２３４５６７８"]
        {
            assert!(bad.parse::<PairingCode>().is_err(), "{bad}");
        }
        assert!(!format!("{code:?}").contains(|c: char| c.is_ascii_digit()));
    }
}
