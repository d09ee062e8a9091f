//! The scenario of a serial console at a terminal.
//!
//! ```text
//! scenario ── master ═ pseudo terminal ═ slave ── limosa vm console ── agent ── QEMU ── guest
//!   types, sees                └─ its settings are looked at
//! ```
//!
//! **Invariants.** The terminal is the controlling one of the command, so that a
//! Ctrl-C that is not passed on would end it. A raw terminal echoes nothing: what
//! is seen of the words that were typed comes from the guest.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use super::Scenario;
use crate::harness::host::{Host, LIMOSA_TIMEOUT_S};
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::wait;
use crate::harness::scene;
use crate::harness::steps::{self, Wanted};
use crate::harness::tiny;
use crate::harness::{client, exec, net, paths};

/// Ctrl-] leaves a console.
const ESCAPE: u8 = 0x1d;
/// Ctrl-C is the guest's.
const INTERRUPT: u8 = 0x03;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "console",
    proves: "a console shows the guest and takes every key; the terminal is as before on each way \
             out; a second console is told that there is one",
    topology: Topology::default,
    run: console,
}];

fn console(lab: &mut Lab) -> Result<()> {
    steps::agents_ready(lab)?;
    let wanted = Wanted { disks: vec![("qcow2", 16)], ..tiny::working()? };
    let (host, vm) = (lab.host("a"), &wanted.name);
    steps::create(host, &wanted)?;
    refused(host, vm, "is off").context("while it is off")?;
    steps::power(host, vm, "start")?;
    client::status::wait(lab.client(), net::guest_v4(0), scene::BOOT_TIMEOUT)?;
    piped(host, vm)?;

    let mut terminal = Terminal::open()?;
    let before = terminal.settings()?;
    let mut console = terminal.console(host, vm)?;
    terminal.types(b"first-word\r")?;
    terminal.sees("first-word")?;
    // It is the guest's line discipline that writes it like that.
    terminal.types(&[INTERRUPT])?;
    terminal.sees("^C")?;
    refused(host, vm, "open already").context("a second console")?;
    terminal.types(b"second-word\r")?;
    terminal.sees("second-word")?;
    ensure!(console.try_wait()?.is_none(), "the console ended by itself");
    terminal.types(&[ESCAPE])?;
    let status = terminal.left(console, &before)?;
    ensure!(status.code() == Some(0), "left by Ctrl-], it ended with {status}");

    let console = terminal.console(host, vm).context("again after it was left")?;
    terminal.types(b"third-word\r")?;
    terminal.sees("third-word")?;
    exec::signal_limited(&console, Signal::TERM)?;
    let status = terminal.left(console, &before)?;
    ensure!(status.code() == Some(1), "told to end, it ended with {status}");

    let console = terminal.console(host, vm).context("again after a signal")?;
    host.limosa(&["vm", "stop", vm])?;
    terminal.sees("LIMOSA-GUEST-DOWN")?;
    let status = terminal.left(console, &before)?;
    ensure!(status.code() == Some(0), "when the guest was off, it ended with {status}");
    Ok(())
}

/// A console that is not opened: it fails and says why.
fn refused(host: &Host, vm: &str, why: &str) -> Result<()> {
    let output = host.try_limosa(&["vm", "console", vm])?;
    let said = exec::lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "it ended with {}: {said}", output.status);
    ensure!(said.contains(why) && said.contains(vm), "it says {said}");
    Ok(())
}

/// Without a terminal, input is sent and what comes back is output.
fn piped(host: &Host, vm: &str) -> Result<()> {
    let limosa = paths::product("limosa")?;
    let args = format!("printf 'piped-word\\r' | {} vm console {vm}", limosa.display());
    let told = host.run(&["sh", "-c", &args])?;
    ensure!(told.contains("piped-word"), "the guest did not echo: {told:?}");
    Ok(())
}

/// A pseudo terminal, both ends of it.
struct Terminal {
    master: File,
    slave: OwnedFd,
    seen: String,
}

impl Terminal {
    fn open() -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = ptsname(&master, Vec::new())?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(path.as_c_str(), flags, Mode::empty())?;
        // Looking for what is not there yet must not wait for it.
        rustix::io::ioctl_fionbio(&master, true)?;
        Ok(Self { master: master.into(), slave, seen: String::new() })
    }

    /// Opens a console here and waits until it has the terminal for itself.
    fn console(&mut self, host: &Host, vm: &str) -> Result<Child> {
        self.seen.clear();
        let mut command = host.command(LIMOSA_TIMEOUT_S, "setsid");
        command.args(["--ctty", "--wait"]).arg(paths::product("limosa")?);
        command.args(["vm", "console", vm]);
        command.stdin(self.slave.try_clone()?).stdout(self.slave.try_clone()?);
        let child = command.stderr(self.slave.try_clone()?).spawn().context("starting limosa")?;
        self.sees("Ctrl-] leaves it")?;
        wait("setting the terminal", || {
            let modes = tcgetattr(&self.slave)?.local_modes;
            let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
            Ok((!modes.intersects(cooked)).then_some(()))
        })?;
        Ok(child)
    }

    /// Waits for the end of a console; fails unless the terminal is as before.
    fn left(&mut self, mut console: Child, before: &str) -> Result<ExitStatus> {
        let status = wait("the end of the console", || {
            self.look()?;
            Ok(console.try_wait()?)
        });
        if status.is_err() {
            console.kill()?;
            console.wait()?;
        }
        let status = status?;
        let after = self.settings()?;
        ensure!(after == before, "the terminal was {before} and is {after}");
        Ok(status)
    }

    /// Everything that can be set of a terminal, as text to be compared.
    fn settings(&self) -> Result<String> {
        Ok(format!("{:?}", tcgetattr(&self.slave)?))
    }

    fn types(&mut self, bytes: &[u8]) -> Result<()> {
        self.master.write_all(bytes).context("typing")
    }

    fn sees(&mut self, text: &str) -> Result<()> {
        let seen = wait(&format!("showing {text:?}"), || {
            self.look()?;
            Ok(self.seen.contains(text).then_some(()))
        });
        seen.with_context(|| format!("the terminal shows {:?}", self.seen))
    }

    /// Takes what has come to the screen since the last look.
    fn look(&mut self) -> Result<()> {
        let mut bytes = [0; 4096];
        loop {
            match self.master.read(&mut bytes) {
                Ok(length) => self.seen.push_str(&exec::lossy(&bytes[..length])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("reading the terminal"),
            }
        }
    }
}
