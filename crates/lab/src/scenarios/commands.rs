//! The scenario of `limosa migration …`: what a person or a script types, what
//! comes back on which stream, and the exit code.
//!
//! ```text
//! vm move --detach ─► id ─► list, show, watch ──────────────┐
//!                                        └─ cancel ─► stayed ┴─► watch ends: 3
//! vm move, Ctrl-C ─► stayed: 3           vm move --detach ─► watch ends: 0
//! ```
//!
//! **Invariant.** Every command here is the real program in a process of its own.

use std::fs::File;
use std::path::PathBuf;
use std::process::Child;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::Scenario;
use crate::harness::host::{Host, LIMOSA_TIMEOUT_S};
use crate::harness::lab::{Lab, Topology};
use crate::harness::points::wait;
use crate::harness::scene::Scene;
use crate::harness::steps;
use crate::harness::tiny;
use crate::harness::{exec, paths};

/// A link on which mirroring takes long enough to type commands meanwhile.
const HELD_LINK_MBIT: u32 = 40;
/// Exit codes, as `limosa --help` lists them.
const DONE: i32 = 0;
const FAILED: i32 = 1;
const WRONG_USAGE: i32 = 2;
const STAYED: i32 = 3;
const LEFT: i32 = 130;

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "migration-commands",
    proves: "moves are detached, listed, shown, watched and cancelled by commands; exit codes and \
             JSON say how they ended",
    topology: || Topology { links_mbit: vec![Some(HELD_LINK_MBIT)], ..Topology::default() },
    run: commands,
}];

fn commands(lab: &mut Lab) -> Result<()> {
    let scene = Scene::set(lab, &tiny::heavy()?)?;
    unknown_names(lab.host("a"))?;
    let cancelled = detached_and_cancelled(lab, &scene.vm)?;
    interrupted(lab, &scene.vm)?;
    lab.net().set_speed(0, None)?;
    let moved = detached_and_moved(lab, &scene.vm)?;
    afterwards(lab, &cancelled, &moved)?;
    scene.end(lab, "b").map(drop)
}

/// What a command said and how it ended.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Said {
    fn ended(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "it should end with {code}: {self:?}");
        Ok(self)
    }

    fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("this is no JSON: {self:?}"))
    }
}

fn say(host: &Host, args: &[&str]) -> Result<Said> {
    let output = host.try_limosa(args)?;
    Ok(Said {
        code: output.status.code(),
        stdout: exec::lossy(&output.stdout),
        stderr: exec::lossy(&output.stderr),
    })
}

/// A command that runs beside the scenario; what it says goes to the host's logs.
struct Beside {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Beside {
    fn begin(host: &Host, name: &str, args: &[&str]) -> Result<Self> {
        let path = |stream: &str| host.log_dir().join(format!("{name}.{stream}"));
        let (stdout, stderr) = (path("out"), path("err"));
        let mut command = host.command(LIMOSA_TIMEOUT_S, paths::product("limosa")?);
        command.args(args).stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        Ok(Self { child: command.spawn().context("starting limosa")?, stdout, stderr })
    }

    /// Waits until it has told of the migration's progress.
    fn wait_for_output(&self) -> Result<()> {
        wait("telling of a move", || Ok((std::fs::metadata(&self.stderr)?.len() > 0).then_some(())))
    }

    /// Ctrl-C, once.
    fn interrupt(&self) -> Result<()> {
        exec::signal_limited(&self.child, Signal::INT)
    }

    /// Waits for its end.
    fn said(mut self) -> Result<Said> {
        let status = self.child.wait().context("waiting for limosa")?;
        Ok(Said {
            code: status.code(),
            stdout: std::fs::read_to_string(&self.stdout)?,
            stderr: std::fs::read_to_string(&self.stderr)?,
        })
    }
}

/// What nobody knows, and what nobody could mean.
fn unknown_names(host: &Host) -> Result<()> {
    let none = say(host, &["migration", "list", "--json"])?.ended(DONE)?.json()?;
    ensure!(none == Value::Array(Vec::new()), "migrations before the first one: {none}");
    let never = "01890000-0000-7000-8000-000000000000";
    for (args, named) in [
        (&["migration", "show", "never"][..], "never"),
        (&["migration", "show", never], never),
        (&["migration", "watch", "never"], "never"),
        (&["migration", "cancel", "never"], "never"),
        (&["vm", "move", "never", "--to", "b"], "never"),
        (&["vm", "move", "web1", "--to", "nowhere"], "nowhere"),
        (&["vm", "move", "web1", "--to", "nowhere", "--detach"], "nowhere"),
    ] {
        let said = say(host, args)?.ended(FAILED).with_context(|| args.join(" "))?;
        ensure!(said.stdout.is_empty(), "a result of nothing: {said:?}");
        ensure!(said.stderr.contains(named), "{args:?} does not name it: {said:?}");
        let said = say(host, &[args, &["--json"]].concat())?.ended(FAILED)?;
        let (failure, told) = (said.json()?, serde_json::from_str::<Value>(&said.stderr)?);
        ensure!(told["error"].is_string(), "{args:?} with --json tells {told}");
        ensure!(
            failure["code"].is_string() && failure["message"].is_string(),
            "{args:?} with --json says {failure}"
        );
    }
    for args in [
        &["migration", "show"][..],
        &["migration", "stop", "web1"],
        &["vm", "move", "web1"],
        &["vm", "move", "web1", "--to", "b", "--detatch"],
    ] {
        say(host, args)?.ended(WRONG_USAGE).with_context(|| args.join(" "))?;
    }
    Ok(())
}

fn show(host: &Host, selector: &str) -> Result<Value> {
    say(host, &["migration", "show", selector, "--json"])?.ended(DONE)?.json()
}

/// Waits until a migration mirrors disks.
fn mirrors(host: &Host, selector: &str) -> Result<()> {
    wait("coming to mirror", || {
        let view = show(host, selector)?;
        ensure!(view["outcome"].is_null(), "it ended: {view}");
        Ok((view["phase"] == "mirror").then_some(()))
    })
}

/// Detaches a move, looks at it in all ways, and cancels it. Returns its id.
fn detached_and_cancelled(lab: &Lab, vm: &str) -> Result<String> {
    let host = lab.host("a");
    let said = say(host, &["vm", "move", vm, "--to", "b", "--detach"])?.ended(DONE)?;
    let id = said.stdout.trim().to_owned();
    ensure!(id.len() == 36, "the id should be all of stdout: {said:?}");
    // It was not waited for.
    mirrors(host, &id)?;
    let second = say(host, &["vm", "move", vm, "--to", "b"])?.ended(FAILED)?;
    ensure!(second.stderr.contains(&id), "what moves already is moved again: {second:?}");

    let listed = say(host, &["migration", "list"])?.ended(DONE)?.stdout;
    let row = listed.lines().find(|line| line.contains(&id)).context("it is not listed")?;
    ensure!(row.contains(vm) && row.contains("mirror"), "it is listed as {row}");
    for host in lab.hosts() {
        let listed = say(host, &["migration", "list", "--json"])?.ended(DONE)?.json()?;
        ensure!(listed[0]["id"] == *id, "{} lists {listed}", host.name());
    }
    // By its id, by the beginning of it, by its VM.
    for selector in [&id, &id[..18], vm] {
        let view = show(host, selector)?;
        ensure!(view["id"] == *id && view["phase"] == "mirror", "{selector} is {view}");
        let shown = say(host, &["migration", "show", selector])?.ended(DONE)?.stdout;
        ensure!(shown.contains(&id) && shown.contains("mirror"), "{selector} is shown as {shown}");
    }

    let left = Beside::begin(host, "left", &["migration", "watch", &id])?;
    left.wait_for_output()?;
    left.interrupt()?;
    left.said()?.ended(LEFT).context("a watch that was left")?;
    let left = Beside::begin(host, "left-json", &["migration", "watch", &id, "--json"])?;
    left.wait_for_output()?;
    left.interrupt()?;
    let left = left.said()?.ended(LEFT).context("a watch with --json that was left")?;
    ensure!(left.json()?["id"] == *id, "a watch that was left has no result: {left:?}");
    assert_lines(&left, &id)?;
    let watch = Beside::begin(host, "watch", &["migration", "watch", &id])?;
    let watch_json = Beside::begin(host, "watch-json", &["migration", "watch", vm, "--json"])?;
    watch.wait_for_output()?;
    watch_json.wait_for_output()?;
    // Nobody's watching or leaving has ended it.
    ensure!(show(host, &id)?["outcome"].is_null(), "it ended by itself: {}", show(host, &id)?);
    say(host, &["migration", "cancel", &id])?.ended(DONE)?;
    let watched = watch.said()?.ended(STAYED)?;
    ensure!(watched.stdout.contains("stayed at a"), "the watch ended with {watched:?}");
    assert_ended(&watch_json.said()?.ended(STAYED)?, &id, "stayed")?;
    let view = show(host, &id)?;
    let why = view["reason"].as_str().unwrap_or_default();
    ensure!(why.contains("cancelled by an operator"), "it stayed because {view}");
    steps::assert_only_at(lab, vm, "a")?;
    Ok(id)
}

/// With `--json`, stdout is the migration's end and stderr a line for each moment.
fn assert_ended(said: &Said, id: &str, outcome: &str) -> Result<()> {
    let end = said.json()?;
    ensure!(end["id"] == *id && end["outcome"] == outcome, "it ended as {end}");
    ensure!(end["summary"].is_object(), "it ended without a summary: {end}");
    assert_lines(said, id)
}

fn assert_lines(said: &Said, id: &str) -> Result<()> {
    for line in said.stderr.lines() {
        let view: Value = serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))?;
        ensure!(view["id"] == *id, "a line of another migration: {line}");
    }
    Ok(())
}

/// Ctrl-C in a move that is not detached cancels it.
fn interrupted(lab: &Lab, vm: &str) -> Result<()> {
    let host = lab.host("a");
    let moving = Beside::begin(host, "move", &["vm", "move", vm, "--to", "b"])?;
    moving.wait_for_output()?;
    mirrors(host, vm)?;
    moving.interrupt()?;
    let said = moving.said()?.ended(STAYED)?;
    ensure!(said.stdout.contains("cancelled by an operator"), "it ended with {said:?}");
    steps::assert_only_at(lab, vm, "a")
}

/// Detaches a move and watches it to its good end. Returns its id.
fn detached_and_moved(lab: &Lab, vm: &str) -> Result<String> {
    let host = lab.host("a");
    let args = ["vm", "move", vm, "--to", "b", "--detach", "--json"];
    let begun = say(host, &args)?.ended(DONE)?.json()?;
    let id = begun["id"].as_str().context("no id")?.to_owned();
    assert_ended(&say(host, &["migration", "watch", &id, "--json"])?.ended(DONE)?, &id, "moved")?;
    steps::assert_only_at(lab, vm, "b")?;
    Ok(id)
}

/// What has ended can be looked at, on both hosts, and not be cancelled.
fn afterwards(lab: &Lab, cancelled: &str, moved: &str) -> Result<()> {
    for host in lab.hosts() {
        for (id, code, outcome) in [(cancelled, STAYED, "stayed"), (moved, DONE, "moved")] {
            let args = ["migration", "watch", id, "--json"];
            let said = say(host, &args)?.ended(code).with_context(|| host.name().to_owned())?;
            assert_ended(&said, id, outcome).with_context(|| host.name().to_owned())?;
            let late = say(host, &["migration", "cancel", id])?.ended(FAILED)?;
            ensure!(late.stderr.contains(outcome), "a cancel too late says {late:?}");
        }
        let listed = say(host, &["migration", "list", "--json"])?.ended(DONE)?.json()?;
        let ids: Vec<&str> = listed
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|view| view["id"].as_str())
            .collect();
        // Oldest first; between the two is the one that Ctrl-C ended.
        ensure!(
            ids.len() == 3 && ids[0] == cancelled && ids[2] == moved,
            "{} lists {ids:?}",
            host.name()
        );
    }
    Ok(())
}
