//! Where an agent is, as an operator types it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use hyper::Uri;
use limosa_protocol::api::PORT;

/// Where an agent is: `unix:PATH` or `https://HOST[:PORT]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// The socket's path
    Local(PathBuf),
    /// `HOST:PORT`
    Remote(String),
}

/// Text that names no agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write it as unix:/PATH or https://HOST[:PORT]")]
pub(crate) struct BadAddress;

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(BadAddress) } else { Ok(Self::Local(path.into())) };
        }
        let uri: Uri = text.parse().map_err(|_| BadAddress)?;
        let authority = uri.authority().ok_or(BadAddress)?;
        let plain = uri.scheme_str() == Some("https")
            && uri.path() == "/"
            && uri.query().is_none()
            && !authority.as_str().contains('@')
            && !authority.host().is_empty();
        let port = match authority.as_str().strip_prefix(authority.host()) {
            Some("") => Some(PORT),
            _ => authority.port_u16(),
        };
        match port {
            Some(port) if plain => Ok(Self::Remote(format!("{}:{port}", authority.host()))),
            _ => Err(BadAddress),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => write!(f, "unix:{}", path.display()),
            Self::Remote(address) => write!(f, "https://{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_or_refused() {
        for (text, meant) in [
            ("unix:/run/x.sock", Address::Local("/run/x.sock".into())),
            ("https://host2", Address::Remote("host2:6600".to_owned())),
            ("https://host2:7000/", Address::Remote("host2:7000".to_owned())),
            ("https://[fe80::1]", Address::Remote("[fe80::1]:6600".to_owned())),
        ] {
            assert_eq!(text.parse(), Ok(meant), "{text:?}");
        }
        for bad in ["", "host2", "unix:", "http://host2", "https://", "https://a/b", "https://u@a"]
        {
            assert_eq!(bad.parse::<Address>(), Err(BadAddress), "{bad:?}");
        }
        assert_eq!("https://a:99999".parse::<Address>(), Err(BadAddress));
    }
}
