//! The serial console: the terminal and the guest's serial port, byte by byte.
//!
//! ```text
//! stdin ─► typed ──queue──► console ─► stdout
//!            └─ Ctrl-] leaves, even if the guest takes no more bytes
//! ```
//!
//! **Invariants.** The terminal is as it was before on every way out: the end
//! of either side, a failure, a panic, a signal that asks us to end. What the
//! guest prints goes to the terminal as it is, as a serial line would.

use std::io::{ErrorKind, IsTerminal};
use std::os::fd::AsFd;
use std::pin::pin;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};

use crate::show;

/// Ctrl-] leaves the console.
const ESCAPE: u8 = 0x1d;
/// Bytes that are read at once.
const READ_BYTES: usize = 4096;
/// Reads of stdin that may wait for the guest to take them.
const QUEUE_COUNT_MAX: usize = 64;
/// How long what was typed before Ctrl-] may take to be let out.
const ESCAPE_MAX: Duration = Duration::from_millis(200);
/// After the end of piped input, a console that is silent for so long is left …
const SILENCE_MAX: Duration = Duration::from_secs(1);
/// … and after so long whatever it says.
const DRAIN_MAX: Duration = Duration::from_secs(10);

/// A terminal in raw mode; as it was before, whenever this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd()).context("reading the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        // Made before the mode is set: also a failure half-way is undone.
        let guard = Self(before);
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).context("setting the terminal")?;
        Ok(Some(guard))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that went away needs no mode.
        tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.0).ok();
    }
}

/// Joins the terminal and the console until one of them ends.
pub(crate) async fn run(vm: &str, console: impl AsyncRead + AsyncWrite + Unpin) -> Result<()> {
    // In place before the mode changes, so that no signal can come between.
    let asked_to_end = asked_to_end()?;
    if std::io::stdin().is_terminal() {
        show::note(&format!("Console of {vm}. Ctrl-] leaves it."));
    }
    let raw = Raw::enter()?;
    let on_terminal = raw.is_some();
    let result = tokio::select! {
        result = join(console, on_terminal) => result,
        signal = asked_to_end => Err(anyhow::anyhow!("ended by {signal}")),
    };
    drop(raw);
    if on_terminal {
        show::note(&format!("\nLeft the console of {vm}."));
    }
    result
}

/// Waits for a signal that ends programs. Raw mode sends none for Ctrl-C: that goes to the guest.
fn asked_to_end() -> Result<impl Future<Output = &'static str>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut quit = signal(SignalKind::quit())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
            _ = hangup.recv() => "SIGHUP",
            _ = quit.recv() => "SIGQUIT",
        }
    })
}

async fn join(console: impl AsyncRead + AsyncWrite + Unpin, on_terminal: bool) -> Result<()> {
    let (from, to) = tokio::io::split(console);
    let (queue, queued) = mpsc::channel(QUEUE_COUNT_MAX);
    let said = Notify::new();
    let input = async {
        let mut typing = pin!(typed(queue, on_terminal));
        let mut writing = pin!(write(to, queued));
        let end = tokio::select! {
            end = &mut typing => end?,
            // The guest's side is gone; its last words may still be on the way.
            result = &mut writing => {
                result?;
                tokio::time::sleep(SILENCE_MAX).await;
                return Ok(());
            }
        };
        match end {
            // What was typed before is let out, but a stuck guest holds nobody.
            End::Escape => tokio::time::timeout(ESCAPE_MAX, writing).await.unwrap_or(Ok(())),
            End::Input => {
                writing.await?;
                let silence = async {
                    while tokio::time::timeout(SILENCE_MAX, said.notified()).await.is_ok() {}
                };
                tokio::time::timeout(DRAIN_MAX, silence).await.ok();
                Ok(())
            }
        }
    };
    tokio::select! {
        result = print(from, &said) => result,
        result = input => result,
    }
}

/// Prints what the console says, to its end.
async fn print(mut from: impl AsyncRead + Unpin, said: &Notify) -> Result<()> {
    let mut stdout = tokio::io::stdout();
    let mut buffer = [0; READ_BYTES];
    loop {
        let length = from.read(&mut buffer).await.context("reading the console")?;
        if length == 0 {
            return Ok(());
        }
        let written = async {
            stdout.write_all(&buffer[..length]).await?;
            stdout.flush().await
        };
        match written.await {
            // Whoever read our output had enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("writing the console's output")?,
        }
        said.notify_one();
    }
}

/// Why nothing more is typed.
enum End {
    /// Ctrl-]
    Escape,
    /// Standard input has ended
    Input,
}

/// Reads standard input into the queue.
async fn typed(queue: mpsc::Sender<Vec<u8>>, on_terminal: bool) -> Result<End> {
    let mut stdin = tokio::io::stdin();
    let mut buffer = [0; READ_BYTES];
    loop {
        let length = stdin.read(&mut buffer).await.context("reading standard input")?;
        let typed = &buffer[..length];
        if typed.is_empty() {
            return Ok(End::Input);
        }
        if !on_terminal {
            if queue.send(typed.to_vec()).await.is_err() {
                return Ok(End::Input);
            }
            continue;
        }
        let escape = typed.iter().position(|byte| *byte == ESCAPE);
        // As on a serial line, what a stuck guest does not take is lost: waiting
        // here would keep Ctrl-] from being seen.
        queue.try_send(typed[..escape.unwrap_or(length)].to_vec()).ok();
        if escape.is_some() {
            return Ok(End::Escape);
        }
    }
}

/// Writes the queue to the console, until the queue is closed and empty or the
/// console takes no more.
async fn write(mut to: impl AsyncWrite + Unpin, mut queued: mpsc::Receiver<Vec<u8>>) -> Result<()> {
    while let Some(bytes) = queued.recv().await {
        let written = async {
            to.write_all(&bytes).await?;
            to.flush().await
        };
        match written.await {
            Err(error)
                if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) =>
            {
                return Ok(());
            }
            written => written.context("writing to the console")?,
        }
    }
    Ok(())
}
