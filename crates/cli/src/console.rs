//! The serial console: the terminal and the guest's serial port, byte by byte.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use anyhow::Result;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::show;

/// Ctrl-] leaves the console.
const ESCAPE: u8 = 0x1d;
/// How long output is waited for after the end of piped input.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// A terminal in raw mode; as it was before, whenever this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
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
    let raw = Raw::enter()?;
    if raw.is_some() {
        show::note(&format!("console of {vm}; Ctrl-] leaves it\r"));
    }
    let result = join(console, raw.is_some()).await;
    drop(raw);
    show::note("");
    result
}

async fn join(console: impl AsyncRead + AsyncWrite + Unpin, escapes: bool) -> Result<()> {
    let (mut from, mut to) = tokio::io::split(console);
    let mut stdin = tokio::io::stdin();
    let mut stdout = tokio::io::stdout();
    let output = async {
        let mut buffer = [0; 4096];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                return anyhow::Ok(());
            }
            stdout.write_all(&buffer[..length]).await?;
            stdout.flush().await?;
        }
    };
    let input = async {
        let mut buffer = [0; 1024];
        loop {
            let length = stdin.read(&mut buffer).await?;
            let typed = &buffer[..length];
            let leave = typed.iter().position(|byte| escapes && *byte == ESCAPE);
            to.write_all(&typed[..leave.unwrap_or(length)]).await?;
            to.flush().await?;
            if leave.is_some() {
                return anyhow::Ok(());
            }
            if length == 0 {
                tokio::time::sleep(DRAIN).await;
                return Ok(());
            }
        }
    };
    tokio::select! {
        result = output => result,
        result = input => result,
    }
}
