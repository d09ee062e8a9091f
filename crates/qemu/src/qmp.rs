//! QMP: QEMU's JSON protocol over a unix socket.
//!
//! A client of our own: the published ones fix their types to one QEMU's schema,
//! and Limosa speaks to several versions at once. Commands go out with a number,
//! answers are matched by it, events go to whoever listens.
//!
//! ```text
//! execute ─► lines ─► writer task ─► QEMU ─► reader task ─┬► the asker, by number
//!                                                         └► events
//! ```
//!
//! **Invariants.** A line longer than [`LINE_BYTES_MAX`] ends the connection. A
//! command is answered, fails, or ends with the connection; it never waits
//! longer than [`COMMAND_MAX`]. A caller that gives up half-way leaves no half
//! a line behind, because only the writer task writes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

#[cfg(feature = "faults")]
use crate::watch::{self as watcher, Moment};

/// Longest line that QEMU may send, in bytes.
pub const LINE_BYTES_MAX: u64 = 16 << 20;
/// Longest wait for the answer to a command.
pub const COMMAND_MAX: Duration = Duration::from_secs(30);
/// Events that a slow listener may be behind before it loses the oldest.
const EVENT_COUNT_MAX: usize = 256;
/// Commands that may wait to be written.
const QUEUE_COUNT_MAX: usize = 64;
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
    /// When QEMU saw it, in microseconds since 1970 by its host's clock
    pub at_us: u64,
}

type Answer = Result<Value, (String, String)>;

/// A connection to one QEMU. Clones share it.
#[derive(Clone, Debug)]
pub struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    lines: mpsc::Sender<String>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    next: AtomicU64,
    events: broadcast::Sender<QmpEvent>,
    closed: watch::Sender<bool>,
    peer: Option<u32>,
}

/// A command that waits for its answer; forgotten when its asker gives up.
struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.lock().remove(&self.id);
    }
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
        let peer = stream.peer_cred().ok().and_then(|cred| u32::try_from(cred.pid()?).ok());
        let (reader, writer) = stream.into_split();
        Self::over(reader, writer, peer, limit).await
    }

    /// Speaks QMP over any pair of streams.
    ///
    /// - `peer`: number of the process at the other end, if known.
    ///
    /// # Errors
    /// As for a command.
    pub async fn over(
        reader: impl AsyncRead + Send + Unpin + 'static,
        mut writer: impl AsyncWrite + Send + Unpin + 'static,
        peer: Option<u32>,
        limit: Duration,
    ) -> Result<Self, QmpError> {
        let mut reader = BufReader::new(reader);
        greeting(&mut reader, limit.max(CONNECT_EVERY)).await?;
        let (lines, mut queue) = mpsc::channel::<String>(QUEUE_COUNT_MAX);
        let shared = Arc::new(Shared {
            lines,
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
            events: broadcast::Sender::new(EVENT_COUNT_MAX),
            closed: watch::Sender::new(false),
            peer,
        });
        // Both tasks hold it weakly: the connection ends with its last user.
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            while let Some(value) = read_line(&mut reader).await {
                match weak.upgrade() {
                    Some(shared) => shared.take(value),
                    None => return,
                }
            }
            if let Some(shared) = weak.upgrade() {
                shared.end();
            }
        });
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            while let Some(line) = queue.recv().await {
                if writer.write_all(line.as_bytes()).await.is_err() {
                    break;
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
        #[cfg(feature = "faults")]
        watcher::command(command, Moment::Before).await;
        let answer = self.exchange(command, arguments).await;
        #[cfg(feature = "faults")]
        watcher::command(command, Moment::After).await;
        answer
    }

    async fn exchange(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let shared = &*self.shared;
        let id = shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        shared.lock().insert(id, sender);
        let _waiting = Waiting { shared, id };
        // Looked at after the entry is made: the end of the connection clears
        // the entries after it says so, so one of the two is always seen.
        if self.is_closed() {
            return Err(QmpError::Closed);
        }
        tracing::trace!(command, %arguments, "qmp");
        let mut text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        text.push('\n');
        let exchange = async {
            shared.lines.send(text).await.map_err(|_| QmpError::Closed)?;
            match receiver.await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err((class, desc))) => {
                    Err(QmpError::Command { command: command.to_owned(), class, desc })
                }
                Err(_) => Err(QmpError::Closed),
            }
        };
        tokio::time::timeout(COMMAND_MAX, exchange).await.unwrap_or_else(|_| {
            Err(QmpError::Timeout { command: command.to_owned(), limit: COMMAND_MAX })
        })
    }

    /// Number of the process at the other end, as the kernel knows it.
    #[must_use]
    pub fn peer_pid(&self) -> Option<u32> {
        self.shared.peer
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
            let time = |part: &str| value["timestamp"][part].as_u64().unwrap_or_default();
            let event = QmpEvent {
                name: name.to_owned(),
                data: value["data"].clone(),
                at_us: time("seconds").saturating_mul(1_000_000) + time("microseconds") % 1_000_000,
            };
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
                let field =
                    |key: &str| value["error"][key].as_str().unwrap_or("unknown").to_owned();
                Err((field("class"), field("desc")))
            }
        };
        // The asker may have given up.
        sender.send(answer).ok();
    }

    fn end(&self) {
        if self.closed.send_replace(true) {
            return;
        }
        self.lock().clear();
        // Listeners must wake up; `closed` tells them why.
        let last = QmpEvent { name: CLOSED_EVENT.to_owned(), data: Value::Null, at_us: 0 };
        self.events.send(last).ok();
    }
}

/// Name of the event that this client adds when the connection ends.
pub const CLOSED_EVENT: &str = "LIMOSA_CLOSED";

async fn greeting(
    reader: &mut BufReader<impl AsyncRead + Unpin>,
    limit: Duration,
) -> Result<(), QmpError> {
    let command = || "the greeting".to_owned();
    match tokio::time::timeout(limit, read_line(reader)).await {
        Ok(Some(value)) if value.get("QMP").is_some() => Ok(()),
        Ok(Some(_)) => {
            Err(QmpError::Protocol { command: command(), what: "it is not QMP's".to_owned() })
        }
        Ok(None) => Err(QmpError::Closed),
        Err(_) => Err(QmpError::Timeout { command: command(), limit }),
    }
}

/// The next line as JSON; `None` at the end, or when it is not QMP any more.
async fn read_line(lines: &mut BufReader<impl AsyncRead + Unpin>) -> Option<Value> {
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
