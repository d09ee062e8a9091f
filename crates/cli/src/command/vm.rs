//! `limosa vm …`

use std::io::Read;

use anyhow::{Context, Result};
use limosa_protocol::api::{Comparison, Power, StopRequest, Vm as View};
use limosa_protocol::id::VmName;
use limosa_protocol::migration::{Migration, MoveRequest, Verify};
use limosa_protocol::vm::VmDefinition;
use serde_json::json;

use super::{Session, ask, migration};
use crate::args::{MoveOptions, Vm};
use crate::exit::Exit;
use crate::{console, show};

pub(super) async fn run(session: &Session, command: Vm) -> Result<Exit> {
    let client = &session.client;
    match command {
        Vm::Create { file } => create(session, &file).await,
        Vm::List => list(session).await,
        Vm::Show { vm } => one(session, &client.get(&path(&vm, "")).await?),
        Vm::Start { vm } => order(session, &vm, "start").await,
        Vm::Pause { vm } => order(session, &vm, "pause").await,
        Vm::Resume { vm } => order(session, &vm, "resume").await,
        Vm::Stop { vm, force, timeout } => {
            let request = StopRequest { force, timeout_seconds: timeout };
            if !force {
                show::note(&format!("asking the guest of {vm} to power off"));
            }
            let view: View = client.post(&path(&vm, "/stop"), &request).await?;
            told(session, &view)
        }
        Vm::Delete { vm, yes } => delete(session, &vm, yes).await,
        Vm::Console { vm } => {
            let stream = client.upgrade(&path(&vm, "/console")).await?;
            console::run(vm.as_str(), stream).await?;
            Ok(Exit::Done)
        }
        Vm::Compare(options) => compare(session, &options).await,
        Vm::Move { options, detach } => {
            let begun: Migration =
                client.post(&path(&options.vm, "/move"), &request(&options)).await?;
            if detach {
                if session.json {
                    show::json(&begun)?;
                } else {
                    show::line(&begun.id.to_string())?;
                    show::note(&format!("watch it with `limosa migration watch {}`", begun.vm));
                }
                return Ok(Exit::Done);
            }
            migration::watch(session, begun.id, true).await
        }
    }
}

fn path(vm: &VmName, what: &str) -> String {
    format!("/v1/vms/{vm}{what}")
}

fn request(options: &MoveOptions) -> MoveRequest {
    MoveRequest {
        to: options.to.clone(),
        storage_path: options.storage_path.clone(),
        disks: options.disks.iter().cloned().collect(),
        switches: options.switches.iter().cloned().collect(),
        downtime_limit_ms: options.downtime_limit_ms,
        verify: if options.verify == "full" { Verify::Full } else { Verify::Running },
        retain_source_disks: options.retain_source_disks,
    }
}

async fn create(session: &Session, file: &std::path::Path) -> Result<Exit> {
    let shown = file.display();
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("reading standard input")?;
        text
    } else {
        std::fs::read_to_string(file).with_context(|| format!("reading {shown}"))?
    };
    let definition: VmDefinition =
        toml::from_str(&text).with_context(|| format!("{shown} is not a VM's definition"))?;
    definition.check().with_context(|| format!("in {shown}"))?;
    let view: View = session.client.post("/v1/vms", &definition).await?;
    told(session, &view)
}

async fn order(session: &Session, vm: &VmName, what: &str) -> Result<Exit> {
    let view: View = session.client.post(&path(vm, &format!("/{what}")), &json!(null)).await?;
    told(session, &view)
}

fn told(session: &Session, view: &View) -> Result<Exit> {
    if session.json {
        show::json(view)?;
    } else {
        show::note(&format!("{} is {}", view.definition.name, power(view.power)));
    }
    Ok(Exit::Done)
}

async fn list(session: &Session) -> Result<Exit> {
    let views: Vec<View> = session.client.get("/v1/vms").await?;
    if session.json {
        show::json(&views)?;
        return Ok(Exit::Done);
    }
    let rows: Vec<Vec<String>> = views
        .iter()
        .map(|view| {
            let definition = &view.definition;
            let addresses: Vec<_> = view.addresses.iter().map(ToString::to_string).collect();
            vec![
                definition.name.to_string(),
                power(view.power).to_owned(),
                format!("{} MiB", definition.memory_mib),
                definition.vcpus.to_string(),
                definition.disks.len().to_string(),
                addresses.join(" "),
            ]
        })
        .collect();
    show::table(&["NAME", "POWER", "MEMORY", "VCPUS", "DISKS", "ADDRESSES"], &rows)?;
    Ok(Exit::Done)
}

fn one(session: &Session, view: &View) -> Result<Exit> {
    if session.json {
        show::json(view)?;
        return Ok(Exit::Done);
    }
    show::line(&format!("# power = {}, epoch {}", power(view.power), view.epoch))?;
    if let (Some(pid), Some(accelerator)) = (view.pid, &view.accelerator) {
        show::line(&format!("# QEMU is process {pid}, with {accelerator}"))?;
    }
    if let Some(migration) = &view.migration {
        show::line(&format!("# moving: `limosa migration watch {migration}`"))?;
    }
    if let Some(fault) = &view.fault {
        show::line(&format!("# fault: {fault}"))?;
    }
    show::line(toml::to_string_pretty(&view.definition)?.trim_end())?;
    Ok(Exit::Done)
}

async fn delete(session: &Session, vm: &VmName, yes: bool) -> Result<Exit> {
    if !yes {
        let answer = ask(&format!("Delete VM {vm} and the disks in its folder? Type its name:"))?;
        if answer != vm.as_str() {
            show::note("nothing was deleted");
            return Ok(Exit::Failed);
        }
    }
    session.client.delete(&path(vm, "")).await?;
    if session.json {
        show::json(&json!(null))?;
    } else {
        show::note(&format!("{vm} is deleted"));
    }
    Ok(Exit::Done)
}

async fn compare(session: &Session, options: &MoveOptions) -> Result<Exit> {
    let found: Comparison =
        session.client.post(&path(&options.vm, "/compare"), &request(options)).await?;
    let exit = if found.problems.is_empty() { Exit::Done } else { Exit::Failed };
    if session.json {
        show::json(&found)?;
        return Ok(exit);
    }
    if found.problems.is_empty() {
        show::line(&format!("nothing stands against moving {} to {}", found.vm, found.to))?;
    }
    for problem in &found.problems {
        show::line(&format!("- {}\n  mend: {}", problem.message, problem.mend))?;
    }
    Ok(exit)
}

fn power(power: Power) -> &'static str {
    match power {
        Power::Off => "off",
        Power::Running => "running",
        Power::Paused => "paused",
        Power::MovingOut => "moving out",
        Power::MovingIn => "moving in",
        Power::InDoubt => "in doubt",
        Power::Fault => "faulty",
    }
}
