//! Asks a guest how it is.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::harness::namespace::Namespace;

/// Largest answer that is read, in bytes.
const STATUS_BYTES_MAX: u64 = 1 << 20;
/// Longest wait for an answer that takes no work.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait until a guest has compared all its memory and disks.
const CHECK_TIMEOUT: Duration = Duration::from_secs(70);

/// The guest's own report, as JSON.
pub(crate) fn ask(namespace: &Namespace, guest: IpAddr) -> Result<Value> {
    question(namespace, guest, "/", TIMEOUT)
}

/// The same after the guest has compared all its memory and all its disks.
pub(crate) fn check(namespace: &Namespace, guest: IpAddr) -> Result<Value> {
    question(namespace, guest, "/check", CHECK_TIMEOUT)
}

/// The same after the guest has freed the memory that `limosa.freed_mib` filled.
pub(crate) fn free(namespace: &Namespace, guest: IpAddr) -> Result<Value> {
    question(namespace, guest, "/free", TIMEOUT)
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

/// How far the journal of each disk is durable, as a guest reported it.
pub(crate) fn durable(status: &Value) -> Result<Vec<u64>> {
    let disks = status["disks"].as_array().context("the guest does not tell of its disks")?;
    let durable = disks.iter().map(|disk| disk["durable"].as_u64());
    durable.collect::<Option<_>>().context("a disk's journal tells no number")
}

/// Fails unless a guest found on each disk, when it booted, all that was durable
/// before: it cannot know by itself that a disk is too old, or was emptied.
pub(crate) fn assert_recovered(status: &Value, durable: &[u64]) -> Result<()> {
    let disks = status["disks"].as_array().context("the guest does not tell of its disks")?;
    let recovered = disks.iter().map(|disk| disk["recovered"].as_u64().unwrap_or(0));
    let has_all = recovered.zip(durable).all(|(recovered, durable)| recovered >= *durable);
    ensure!(
        disks.len() == durable.len() && has_all,
        "the guest found less than was durable, {durable:?}: {status}"
    );
    Ok(())
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
    use serde_json::json;

    use super::*;

    /// Goal: a status is read, and half a one is not.
    #[test]
    fn whole_answers_are_read() {
        let told = parse("HTTP/1.0 200 OK\r\n\r\n{\"errors\": 0}\n").unwrap();
        assert_eq!(told["errors"], 0);
        assert!(parse("").is_err());
        assert!(parse("{\"errors\":").is_err());
    }

    /// Goal: a disk that is older than it was, emptied or missing is found.
    #[test]
    fn an_older_disk_is_found() {
        let before = json!({"disks": [{"durable": 7}, {"durable": 9}]});
        let durable = durable(&before).unwrap();
        let found = |disks| assert_recovered(&json!({"disks": disks}), &durable);
        found(json!([{"recovered": 7}, {"recovered": 12}])).unwrap();
        assert!(found(json!([{"recovered": 7}, {"recovered": 8}])).is_err());
        assert!(found(json!([{"recovered": 0}, {"recovered": 9}])).is_err());
        assert!(found(json!([{"recovered": 7}])).is_err());
    }
}
