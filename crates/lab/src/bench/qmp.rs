//! Just enough of QMP to drive a stock QEMU as an operator's script would.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Longest wait for an answer or an event.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait for QEMU to open its socket.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A QMP connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects, waiting for the socket to appear.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + START_TIMEOUT;
        let writer = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("QEMU does not open its QMP socket");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        writer.set_read_timeout(Some(TIMEOUT))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { reader, writer, events: Vec::new() };
        qmp.next().context("reading QEMU's greeting")?;
        qmp.ask("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns its answer. Events meanwhile are kept.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments});
        writeln!(self.writer, "{line}")?;
        loop {
            let mut told = self.next()?;
            if told.get("event").is_some() {
                self.events.push(told);
            } else if let Some(error) = told.get("error") {
                bail!("QEMU refused {command}: {error}");
            } else {
                return Ok(told["return"].take());
            }
        }
    }

    /// Waits for an event of that name, also one that has already come.
    pub(crate) fn wait(&mut self, name: &str) -> Result<Value> {
        let is_it = |event: &Value| event["event"] == name;
        if let Some(at) = self.events.iter().position(is_it) {
            return Ok(self.events.remove(at));
        }
        loop {
            let told = self.next()?;
            if is_it(&told) {
                return Ok(told);
            }
            self.events.push(told);
        }
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        let bytes = self.reader.read_line(&mut line).context("reading from QEMU")?;
        if bytes == 0 {
            bail!("QEMU has closed its QMP socket");
        }
        serde_json::from_str(&line).context("reading QEMU's JSON")
    }
}
