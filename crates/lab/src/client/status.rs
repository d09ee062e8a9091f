//! Asks a guest how it is.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::namespace::Namespace;

/// Largest answer that is read, in bytes.
const STATUS_BYTES_MAX: u64 = 1 << 20;
/// Longest wait for an answer that takes no work.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait until a guest has compared all its memory.
const CHECK_TIMEOUT: Duration = Duration::from_secs(70);

/// The guest's own report, as JSON.
pub(crate) fn ask(namespace: &Namespace, guest: IpAddr) -> Result<Value> {
    question(namespace, guest, "/", TIMEOUT)
}

/// The same after the guest has compared all its memory.
pub(crate) fn check(namespace: &Namespace, guest: IpAddr) -> Result<Value> {
    question(namespace, guest, "/check", CHECK_TIMEOUT)
}

fn question(
    namespace: &Namespace,
    guest: IpAddr,
    path: &'static str,
    timeout: Duration,
) -> Result<Value> {
    namespace.enter(move || {
        let address = SocketAddr::new(guest, super::STATUS_PORT);
        let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)
            .with_context(|| format!("connecting to {address}"))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        match stream.take(STATUS_BYTES_MAX).read_to_string(&mut text) {
            Err(error) => Err(error).context("reading the status"),
            Ok(_) => parse(&text),
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

/// The JSON in an answer, after HTTP's header.
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

    /// Goal: a status is read, and half a one is not.
    #[test]
    fn whole_answers_are_read() {
        let told = parse("HTTP/1.0 200 OK\r\n\r\n{\"errors\": 0}\n").unwrap();
        assert_eq!(told["errors"], 0);
        assert!(parse("").is_err());
        assert!(parse("{\"errors\":").is_err());
    }
}
