//! The command line of `limosad`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use limosa_documents::Shell;

/// The Limosa host agent.
///
/// Runs VMs with QEMU and moves them to other hosts. Ending it leaves its VMs
/// running; the next start finds them again.
#[derive(Debug, Parser)]
#[command(name = "limosad", version, max_term_width = 100, args_conflicts_with_subcommands = true)]
pub(crate) struct Arguments {
    /// Configuration file [default: /etc/limosa/limosad.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Print the OpenAPI document of the API and end
    #[arg(long)]
    pub(crate) openapi: bool,
    /// Log as JSON
    #[arg(long)]
    pub(crate) log_json: bool,
    #[command(subcommand)]
    pub(crate) document: Option<Document>,
}

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
