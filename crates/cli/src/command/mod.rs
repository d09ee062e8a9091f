//! What each command does.

mod host;
mod migration;
mod vm;

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::args::{Arguments, Command};
use crate::client::Client;
use crate::exit::Exit;

/// A command with its agent.
pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) json: bool,
}

/// Runs what was typed.
pub(crate) async fn run(arguments: Arguments) -> Result<Exit> {
    let global = &arguments.global;
    let session = || {
        let client = Client::new(&global.agent, global.fingerprint.as_deref())?;
        anyhow::Ok(Session { client, json: global.json })
    };
    match arguments.command {
        Command::Vm(command) => vm::run(&session()?, command).await,
        Command::Migration(command) => migration::run(&session()?, command).await,
        Command::Host(command) => host::run(&session()?, command).await,
        Command::Switch(command) => host::switch(&session()?, command).await,
        Command::Operator(command) => host::operator(&session, command).await,
        Command::Completions { shell } => {
            let mut command = Arguments::command();
            clap_complete::generate(shell, &mut command, "limosa", &mut std::io::stdout());
            Ok(Exit::Done)
        }
        Command::Man { folder } => {
            std::fs::create_dir_all(&folder)
                .with_context(|| format!("making {}", folder.display()))?;
            clap_mangen::generate_to(Arguments::command(), &folder)
                .with_context(|| format!("writing man pages into {}", folder.display()))?;
            Ok(Exit::Done)
        }
    }
}

/// Asks a question on the terminal.
pub(crate) fn ask(question: &str) -> Result<String> {
    use std::io::{BufRead, IsTerminal, Write};
    anyhow::ensure!(
        std::io::stdin().is_terminal(),
        "there is no terminal to ask on: give the answer as an option"
    );
    write!(std::io::stderr(), "{question} ")?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}
