//! Stories of people at their terminals: following migrations, commanding from
//! afar, the serial console.

use std::io::{Read, Write};
use std::process::{Child, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use limosa_protocol::migration::{Migration, Outcome};
use serde_json::Value;

use super::points::wait;
use super::scene::Scene;
use super::steps::{self, Wanted};
use super::{Story, tiny};
use crate::lab::{Lab, Plan};
use crate::{exec, net, paths};

/// Longest life of a console, in seconds.
const CONSOLE_TIMEOUT_S: u32 = 120;

pub(super) const STORIES: &[Story] = &[
    Story {
        name: "migration-commands",
        proves: "a move that was let go is listed, shown, watched and cancelled by its id, its \
                 beginning or its VM; exit codes tell the outcome",
        plan: || Plan { links_mbit: vec![Some(100)], ..Plan::default() },
        run: migration_commands,
    },
    Story {
        name: "remote-operator",
        proves: "an operator whose certificate was let in commands a host from afar, once its \
                 fingerprint is confirmed; nobody else does",
        plan: Plan::default,
        run: remote_operator,
    },
    Story {
        name: "console",
        proves: "the console shows what the guest says and is typed, is left by Ctrl-], and the \
                 terminal is as it was",
        plan: Plan::default,
        run: console,
    },
];

fn migration_commands(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    let a = lab.host("a");
    let vm = scene.vm.as_str();
    let begun: Migration = a.limosa_json(&["vm", "move", vm, "--to", "b", "--detach"])?;
    ensure!(begun.outcome.is_none(), "--detach waited: {:?}", begun.outcome);
    let id = begun.id.to_string();
    // The beginning of an id is its time: both would begin alike were it too short.
    for word in [id.as_str(), &id[..18], vm] {
        let shown: Migration = a.limosa_json(&["migration", "show", word])?;
        ensure!(shown.id == begun.id, "{word} showed {}", shown.id);
    }
    let listed = a.limosa(&["migration", "list"])?;
    ensure!(listed.contains(&id) && listed.contains(vm), "not listed: {listed}");
    let second = a.try_limosa(&["vm", "move", vm, "--to", "b"])?;
    ended(&second, 1, "being moved")?;
    ended(&a.try_limosa(&["migration", "watch", "nothing"])?, 1, "migration list")?;

    let mut watching = a.command(CONSOLE_TIMEOUT_S, paths::product("limosa")?);
    watching.args(["migration", "watch", &id]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let watching = watching.spawn().context("watching")?;
    a.limosa(&["migration", "cancel", &id])?;
    ended(&watching.wait_with_output()?, 3, "")?;
    let shown = a.limosa(&["migration", "show", &id])?;
    ensure!(shown.contains("cancelled by an operator"), "the end is not told: {shown}");
    ensure!(a.limosa(&["migration", "list"])?.contains("stayed"), "the list does not tell");
    ended(&a.try_limosa(&["migration", "cancel", &id])?, 1, "ended")?;

    lab.net().set_speed(0, None)?;
    let id = a.limosa(&["vm", "move", vm, "--to", "b", "--detach"])?;
    let watched = a.try_limosa(&["migration", "watch", id.trim(), "--json"])?;
    ended(&watched, 0, "\"phase\":\"retire\"")?;
    let view: Migration = serde_json::from_slice(&watched.stdout).context("the summary")?;
    ensure!(view.outcome == Some(Outcome::Moved) && view.summary.is_some(), "{view:?}");
    scene.end(lab, "b").map(drop)
}

/// Fails unless a command ended with that code, and said that on stderr.
fn ended(output: &Output, code: i32, said: &str) -> Result<()> {
    let stderr = exec::lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "{}, not {code}: {stderr}", output.status);
    ensure!(stderr.contains(said), "it does not say {said:?}: {stderr}");
    Ok(())
}

fn remote_operator(lab: &mut Lab) -> Result<()> {
    steps::agents_ready(lab)?;
    let wanted = Wanted { disks: vec![("qcow2", 16)], ..tiny::working()? };
    steps::create(lab.host("b"), &wanted)?;
    let (a, b) = (lab.host("a"), lab.host("b"));
    let agent = format!("https://{}", net::host_v4(1, 0)?);
    let fingerprint: Value = b.limosa_json(&["host", "show"])?;
    let fingerprint = fingerprint["fingerprint"].as_str().context("b tells no fingerprint")?;
    // A person at a, with a home of their own.
    let homes = ["anna", "other"].map(|name| a.run_dir().join(name));
    let operator = |home: &std::path::Path, words: &[&str]| -> Result<Output> {
        let mut command = a.command(CONSOLE_TIMEOUT_S, paths::product("limosa")?);
        command.args(words).env("XDG_CONFIG_HOME", home).stdin(Stdio::null());
        exec::output(&mut command)
    };
    let list = ["--agent", &agent, "vm", "list"];
    let trusting = ["--agent", &agent, "--fingerprint", fingerprint, "vm", "list"];
    for home in &homes {
        ended(&operator(home, &["operator", "identity"])?, 0, "")?;
        ended(&operator(home, &list)?, 1, "fingerprint")?;
        let before = operator(home, &trusting)?;
        ensure!(before.status.code() == Some(1), "b let a stranger in: {before:?}");
    }
    let wrong = fingerprint.replace(|digit: char| digit.is_ascii_hexdigit(), "0");
    let words = ["--agent", &agent, "--fingerprint", &wrong, "vm", "list"];
    ended(&operator(&homes[0], &words)?, 1, "")?;

    let told = operator(&homes[0], &["operator", "identity", "--json"])?;
    let told: Value = serde_json::from_slice(&told.stdout)?;
    let certificate = told["certificate"].as_str().context("no certificate")?;
    b.limosa(&["operator", "add", "anna", "--certificate", certificate])?;
    let listed = operator(&homes[0], &trusting)?;
    ended(&listed, 0, "")?;
    ensure!(exec::lossy(&listed.stdout).contains(&wanted.name), "b's VMs are not listed");
    // The fingerprint was confirmed once.
    ended(&operator(&homes[0], &["--agent", &agent, "vm", "start", &wanted.name])?, 0, "")?;
    ensure!(b.qemu_pids().len() == 1, "b started nothing");
    ended(
        &operator(&homes[0], &["--agent", &agent, "vm", "stop", &wanted.name, "--force"])?,
        0,
        "is off",
    )?;
    ensure!(operator(&homes[1], &trusting)?.status.code() == Some(1), "b let another one in");
    b.limosa(&["operator", "remove", "anna"])?;
    ensure!(operator(&homes[0], &list)?.status.code() == Some(1), "b still lets anna in");
    Ok(())
}

/// A program in a pseudo terminal.
struct Terminal {
    program: Child,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn open(lab: &Lab, line: &str) -> Result<Self> {
        let mut command = lab.host("a").command(CONSOLE_TIMEOUT_S, "script");
        command.args(["-q", "-e", "-c", line, "/dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut program = command.spawn().context("starting a terminal")?;
        let mut output = program.stdout.take().context("no output")?;
        let shown = Arc::<Mutex<Vec<u8>>>::default();
        let screen = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                let mut screen = screen.lock().unwrap_or_else(PoisonError::into_inner);
                screen.extend_from_slice(&buffer[..length]);
            }
        });
        Ok(Self { program, shown })
    }

    fn shown(&self) -> String {
        exec::lossy(&self.shown.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait_for(&self, text: &str) -> Result<()> {
        let shown = wait(text, || Ok(self.shown().contains(text).then_some(())));
        shown.with_context(|| format!("the terminal shows {:?}", self.shown()))
    }

    fn type_in(&mut self, text: &[u8]) -> Result<()> {
        let input = self.program.stdin.as_mut().context("no input")?;
        input.write_all(text)?;
        Ok(input.flush()?)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.program.kill().ok();
        self.program.wait().ok();
    }
}

fn console(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::working()?)?;
    let limosa = paths::product("limosa")?;
    let line = format!(
        "stty -echo; stty -g; {} vm console {}; echo left with $?; stty -g; echo over",
        limosa.display(),
        scene.vm
    );
    let mut terminal = Terminal::open(lab, &line)?;
    terminal.wait_for("Ctrl-] leaves it")?;
    // This terminal echoes nothing, so it is the guest's that does.
    terminal.type_in(b"is anybody there?")?;
    terminal.wait_for("is anybody there?")?;
    terminal.type_in(b"\x1d")?;
    terminal.wait_for("over")?;
    let shown = terminal.shown();
    ensure!(shown.contains("left with 0"), "{shown:?}");
    let modes: Vec<&str> =
        shown.lines().map(str::trim).filter(|line| line.matches(':').count() > 20).collect();
    ensure!(modes.len() == 2 && modes[0] == modes[1], "the terminal's mode: {modes:?}");
    drop(terminal);
    scene.end(lab, "a").map(drop)
}
