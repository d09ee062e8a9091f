//! QMP: QEMU's JSON protocol over a unix socket.
//!
//! A client of our own: the published ones fix their types to one QEMU's schema,
//! and Limosa speaks to several versions at once. Commands go out with a number,
//! answers are matched by it, events go to whoever listens.
//!
//! **Invariants.** A line longer than [`LINE_BYTES_MAX`] ends the connection. A
//! command is answered, fails, or ends with the connection; it never waits
//! longer than [`COMMAND_MAX`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};

/// Longest line that QEMU may send, in bytes.
pub const LINE_BYTES_MAX: u64 = 16 << 20;
/// Longest wait for the answer to a command.
pub const COMMAND_MAX: Duration = Duration::from_secs(30);
/// Events that a slow listener may be behind before it loses the oldest.
const EVENT_COUNT_MAX: usize = 256;
/// How often a socket that is not there yet is tried.
const CONNECT_EVERY: Duration = Duration::from_millis(10);

/// Why a command gave no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// QEMU ended, or closed the connection.
    #[error("QEMU closed its QMP connection")]
    Closed,
    /// No answer in time.
    #[error("QEMU did not answer {command} within {} s", limit.as_secs())]
    Timeout {
        /// What was asked
        command: String,
        /// How long it was waited for
        limit: Duration,
    },
    /// QEMU refused.
    #[error("QEMU refused {command}: {desc}")]
    Command {
        /// What was asked
        command: String,
        /// QEMU's class of error
        class: String,
        /// QEMU's own words
        desc: String,
    },
    /// What came is not what QMP promises.
    #[error("an answer of QEMU to {command} is not understood: {what}")]
    Protocol {
        /// What was asked
        command: String,
        /// What is wrong with the answer
        what: String,
    },
    /// The socket could not be reached.
    #[error("no QMP connection at {}", path.display())]
    Connect {
        /// The socket
        path: PathBuf,
        /// Why
        #[source]
        source: Arc<std::io::Error>,
    },
}

/// Something that happened in QEMU.
#[derive(Debug, Clone)]
pub struct QmpEvent {
    /// Its name, such as `STOP`
    pub name: String,
    /// What it says, by event
    pub data: Value,
}

type Answer = Result<Value, (String, String)>;

/// A connection to one QEMU. Clones share it.
#[derive(Clone, Debug)]
pub struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    next: AtomicU64,
    events: broadcast::Sender<QmpEvent>,
    closed: watch::Sender<bool>,
}

impl Qmp {
    /// Connects, waiting up to `limit` for the socket to appear and answer.
    ///
    /// # Errors
    /// [`QmpError::Connect`], or as for a command.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let until = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= until => {
                    return Err(QmpError::Connect {
                        path: path.to_owned(),
                        source: Arc::new(error),
                    });
                }
                Err(_) => tokio::time::sleep(CONNECT_EVERY).await,
            }
        };
        let (reader, writer) = stream.into_split();
        let mut lines = BufReader::new(reader);
        let greeting = tokio::time::timeout(limit.max(CONNECT_EVERY), read_line(&mut lines)).await;
        let bad = |what: &str| QmpError::Protocol {
            command: "the greeting".to_owned(),
            what: what.to_owned(),
        };
        let greeting = match greeting {
            Ok(Some(value)) => value,
            Ok(None) => return Err(QmpError::Closed),
            Err(_) => {
                return Err(QmpError::Timeout { command: "the greeting".to_owned(), limit });
            }
        };
        if greeting.get("QMP").is_none() {
            return Err(bad("it is not QMP's"));
        }
        let shared = Arc::new(Shared {
            writer: tokio::sync::Mutex::new(writer),
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
            events: broadcast::Sender::new(EVENT_COUNT_MAX),
            closed: watch::Sender::new(false),
        });
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            while let Some(value) = read_line(&mut lines).await {
                match weak.upgrade() {
                    Some(shared) => shared.take(value),
                    None => return,
                }
            }
            if let Some(shared) = weak.upgrade() {
                shared.end();
            }
        });
        let qmp = Self { shared };
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and gives its result.
    ///
    /// # Errors
    /// QEMU's refusal, or no answer: then it may or may not have been done.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        if self.is_closed() {
            return Err(QmpError::Closed);
        }
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.shared.lock().insert(id, sender);
        let mut text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        tracing::trace!(command, %arguments, "qmp");
        let exchange = async {
            let mut writer = self.shared.writer.lock().await;
            writer.write_all(text.as_bytes()).await.map_err(|_| QmpError::Closed)?;
            drop(writer);
            match receiver.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err((class, desc))) => {
                    Err(QmpError::Command { command: command.to_owned(), class, desc })
                }
                Err(_) => Err(QmpError::Closed),
            }
        };
        tokio::time::timeout(COMMAND_MAX, exchange).await.unwrap_or_else(|_| {
            self.shared.lock().remove(&id);
            Err(QmpError::Timeout { command: command.to_owned(), limit: COMMAND_MAX })
        })
    }

    /// Events from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<QmpEvent> {
        self.shared.events.subscribe()
    }

    /// Whether the connection ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.shared.closed.borrow()
    }

    /// Ends when the connection ends, which is when QEMU does.
    pub async fn wait_closed(&self) {
        // The sender lives in `self`, so the channel cannot be gone.
        self.shared.closed.subscribe().wait_for(|closed| *closed).await.ok();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, mut value: Value) {
        if let Some(name) = value.get("event").and_then(Value::as_str) {
            let event = QmpEvent { name: name.to_owned(), data: value["data"].clone() };
            tracing::trace!(event = event.name, data = %event.data, "qmp");
            // Nobody listening is no fault.
            self.events.send(event).ok();
            return;
        }
        let Some(id) = value.get("id").and_then(Value::as_u64) else { return };
        let Some(sender) = self.lock().remove(&id) else { return };
        let answer = match value.get_mut("return") {
            Some(result) => Ok(result.take()),
            None => {
                let word = |key: &str| value["error"][key].as_str().unwrap_or("unknown").to_owned();
                Err((word("class"), word("desc")))
            }
        };
        // The asker may have given up.
        sender.send(answer).ok();
    }

    fn end(&self) {
        self.closed.send_replace(true);
        self.lock().clear();
        // Listeners must wake up; `closed` tells them why.
        self.events.send(QmpEvent { name: CLOSED_EVENT.to_owned(), data: Value::Null }).ok();
    }
}

/// Name of the event that this client adds when the connection ends.
pub const CLOSED_EVENT: &str = "LIMOSA_CLOSED";

/// The next line as JSON; `None` at the end, or when it is not QMP any more.
async fn read_line(lines: &mut BufReader<OwnedReadHalf>) -> Option<Value> {
    let mut line = Vec::new();
    let read = lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await.ok()?;
    if read == 0 || line.last() != Some(&b'\n') {
        return None;
    }
    serde_json::from_slice(&line).ok()
}

/// Reads a part of an answer, or says what is wrong with it.
pub(crate) fn part<T: serde::de::DeserializeOwned>(
    command: &str,
    value: Value,
) -> Result<T, QmpError> {
    serde_json::from_value(value).map_err(|error| QmpError::Protocol {
        command: command.to_owned(),
        what: error.to_string(),
    })
}
