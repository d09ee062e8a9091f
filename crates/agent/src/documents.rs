//! Man pages and completions of `limosad`, made from its command line.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{CommandFactory, Subcommand};
use clap_complete::Shell;

use crate::Arguments;

/// What is printed or written instead of running the agent.
#[derive(Debug, Subcommand)]
pub(crate) enum Document {
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// The folder; made when missing
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
}

impl Document {
    pub(crate) fn make(self) -> anyhow::Result<()> {
        match self {
            Self::Completions { shell } => {
                clap_complete::generate(
                    shell,
                    &mut Arguments::command(),
                    "limosad",
                    &mut std::io::stdout(),
                );
                Ok(())
            }
            Self::Man { folder } => man_pages(&folder),
        }
    }
}

fn man_pages(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    clap_mangen::generate_to(Arguments::command(), folder)
        .with_context(|| format!("writing man pages into {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    /// Goal: what is made from the command line lists each option and command.
    #[test]
    fn every_option_is_in_the_documents() {
        Arguments::command().debug_assert();
        let folder = tempfile::tempdir().unwrap();
        man_pages(folder.path()).unwrap();
        let page = std::fs::read_to_string(folder.path().join("limosad.1")).unwrap();
        let scripts = Shell::value_variants().iter().map(|shell| {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "limosad", &mut script);
            String::from_utf8(script).unwrap()
        });
        for text in scripts.chain([page.replace("\\-", "-")]) {
            for part in ["config", "openapi", "log-json", "completions", "man"] {
                assert!(text.contains(part), "{part} in {text}");
            }
        }
        assert!(folder.path().join("limosad-man.1").exists());
    }
}
