//! What each command does: one request or a few, and what is shown of the answer.

mod host;
mod migration;
mod operator;
mod session;
mod switch;
mod vm;

use anyhow::Result;
use serde_json::json;

use crate::args::{Arguments, Command};
use crate::client::Client;
use crate::exit::Exit;
use crate::show;
use session::Session;

/// Runs what was typed.
pub(crate) async fn run(arguments: Arguments) -> Result<Exit> {
    let global = arguments.global;
    let session =
        Session { client: Client::new(global.agent, global.fingerprint), json: global.json };
    match arguments.command {
        Command::Vm(command) => vm::run(&session, command).await,
        Command::Migration(command) => migration::run(&session, command).await,
        Command::Host(command) => host::run(&session, command).await,
        Command::Switch(command) => switch::run(&session, command).await,
        Command::Operator(command) => operator::run(&session, command).await,
        Command::Completions { shell } => {
            let script = limosa_documents::completions::<Arguments>(shell);
            let text = String::from_utf8_lossy(&script);
            let value = json!({ "shell": shell.to_string(), "script": text });
            session.result(&value, |_| show::raw(&script))
        }
        Command::Man { folder } => {
            limosa_documents::man_pages::<Arguments>(&folder)?;
            session.result(&json!({ "folder": folder }), |_| Ok(()))
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, ValueEnum};
    use limosa_documents::Shell;

    use super::*;

    /// Goal: no command is missing in what is generated from the command line.
    #[test]
    fn every_command_has_a_man_page_and_is_completed() {
        fn walk(command: &clap::Command, name: &str, pages: &mut Vec<String>) {
            pages.push(format!("{name}.1"));
            for below in command.get_subcommands() {
                walk(below, &format!("{name}-{}", below.get_name()), pages);
            }
        }
        let mut pages = Vec::new();
        walk(&Arguments::command(), "limosa", &mut pages);
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("man1");
        limosa_documents::man_pages::<Arguments>(&folder).unwrap();
        for page in &pages {
            let text = std::fs::read_to_string(folder.join(page)).unwrap();
            assert!(text.contains(".SH SYNOPSIS"), "{page}");
        }
        assert!(pages.contains(&"limosa-vm-move.1".to_owned()), "{pages:?}");
        for shell in Shell::value_variants() {
            let script = limosa_documents::completions::<Arguments>(*shell);
            let script = String::from_utf8(script).unwrap();
            for page in &pages {
                let (_, subcommand) =
                    page.trim_end_matches(".1").rsplit_once('-').unwrap_or(("", page));
                assert!(script.contains(subcommand.trim_end_matches(".1")), "{shell}: {page}");
            }
        }
    }
}
