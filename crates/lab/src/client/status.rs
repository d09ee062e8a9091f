//! Asks a guest how it is.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::namespace::Namespace;

/// Largest answer that is read, in bytes.
const STATUS_BYTES_MAX: u64 = 1 << 20;
/// Longest wait for one answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The guest's own report, as JSON.
pub(crate) fn ask(namespace: &Namespace, guest: IpAddr) -> Result<Value> {
    namespace.enter(move || {
        let address = SocketAddr::new(guest, super::STATUS_PORT);
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)
            .with_context(|| format!("connecting to {address}"))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        // Guests answer to anybody who connects; one that speaks HTTP needs a question.
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        match stream.take(STATUS_BYTES_MAX).read_to_string(&mut text) {
            // A guest that does not read the question resets after its answer.
            Err(error) if text.is_empty() => Err(error).context("reading the status"),
            _ => parse(&text),
        }
    })
}

/// Asks again and again until the guest answers; it may still be booting.
pub(crate) fn wait(namespace: &Namespace, guest: IpAddr, timeout: Duration) -> Result<Value> {
    let deadline = Instant::now() + timeout;
    loop {
        match ask(namespace, guest) {
            Ok(status) => return Ok(status),
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("the guest does not tell how it is");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// The JSON in an answer, with or without HTTP's header.
fn parse(text: &str) -> Result<Value> {
    let Some(start) = text.find('{') else { bail!("no JSON in {text:?}") };
    let value: Value = serde_json::from_str(text[start..].trim())
        .with_context(|| format!("reading the status {text:?}"))?;
    ensure!(value.is_object(), "the status is no object");
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a status is read whether or not the guest speaks HTTP.
    #[test]
    fn both_forms_are_read() {
        let told = parse("HTTP/1.0 200 OK\r\n\r\n{\"errors\": 0}\n").unwrap();
        assert_eq!(told, parse("{\"errors\":0}").unwrap());
        assert!(parse("").is_err());
        assert!(parse("{\"errors\":").is_err());
    }
}
