//! What can be typed. The help, the man pages and the completions come from here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use limosa_protocol::api::SOCKET_PATH;
use limosa_protocol::id::{DiskId, HostName, SwitchName, VmName};
use limosa_protocol::migration::DOWNTIME_LIMIT_MS_DEFAULT;

/// Move running virtual machines between Linux hosts, with their disks.
///
/// Exit codes: 0 done or moved, 1 failed, 2 wrong usage, 3 the VM stayed at its
/// source, 4 in doubt.
#[derive(Debug, Parser)]
#[command(name = "limosa", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print results as JSON on stdout
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The agent to command: a local socket, or https://HOST[:PORT]
    #[arg(long, global = true, env = "LIMOSA_AGENT", value_name = "AGENT", default_value_t = format!("unix:{SOCKET_PATH}"))]
    pub(crate) agent: String,
    /// Fingerprint of the remote agent's certificate, as `limosa host show` prints it there
    #[arg(long, global = true, env = "LIMOSA_FINGERPRINT", value_name = "FINGERPRINT")]
    pub(crate) fingerprint: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Virtual machines: make, run, move
    #[command(subcommand)]
    Vm(Vm),
    /// Migrations: list, look, cancel
    #[command(subcommand)]
    Migration(Migration),
    /// This host and those it is paired with
    #[command(subcommand)]
    Host(Host),
    /// Virtual switches
    #[command(subcommand)]
    Switch(Switch),
    /// Operators who may command from afar
    #[command(subcommand)]
    Operator(Operator),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// The folder
        folder: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    /// Make a VM from its definition
    Create {
        /// TOML file, or - for standard input
        file: PathBuf,
    },
    /// List all VMs of the host
    List,
    /// Show one VM
    Show { vm: VmName },
    /// Start a VM
    Start { vm: VmName },
    /// Stop a VM: ask its guest to power off
    Stop {
        vm: VmName,
        /// Turn it off at once; the guest is not asked
        #[arg(long)]
        force: bool,
        /// How long to wait for the guest, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u32,
    },
    /// Stop the vCPUs
    Pause { vm: VmName },
    /// Let the vCPUs run on
    Resume { vm: VmName },
    /// Delete a VM that is off, with the files in its own places
    Delete {
        vm: VmName,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Open the serial console; Ctrl-] leaves it
    Console { vm: VmName },
    /// Find everything that stands against a move; touches nothing
    Compare(MoveOptions),
    /// Move a VM to another host, running or off, with its disks
    ///
    /// Exit codes: 0 moved, 1 refused or failed, 3 stayed on the source, 4 in
    /// doubt. Ctrl-C cancels the move; pressed again it leaves the move to go on.
    Move {
        #[command(flatten)]
        options: MoveOptions,
        /// Return at once; the move goes on
        #[arg(long)]
        detach: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MoveOptions {
    /// VM to move
    pub(crate) vm: VmName,
    /// Host to move it to
    #[arg(long, value_name = "HOST")]
    pub(crate) to: HostName,
    /// Folder at the destination for all of the VM's files
    #[arg(long, value_name = "DIR")]
    pub(crate) storage_path: Option<PathBuf>,
    /// Image path at the destination of one disk; may be repeated
    #[arg(long = "disk", value_name = "ID=PATH", value_parser = pair::<DiskId, PathBuf>)]
    pub(crate) disks: Vec<(DiskId, PathBuf)>,
    /// What a virtual switch is called at the destination; may be repeated
    #[arg(long = "switch", value_name = "FROM=TO", value_parser = pair::<SwitchName, SwitchName>)]
    pub(crate) switches: Vec<(SwitchName, SwitchName)>,
    /// Longest stop of the guest to aim for, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = DOWNTIME_LIMIT_MS_DEFAULT)]
    pub(crate) downtime_limit_ms: u32,
    /// What is compared before the VM runs there: `running` costs no blackout,
    /// `full` reads all of RAM and disks again while the guest is stopped
    #[arg(long, value_name = "HOW", default_value = "running", value_parser = ["running", "full"])]
    pub(crate) verify: String,
    /// Keep the disk images at the source
    #[arg(long)]
    pub(crate) retain_source_disks: bool,
}

fn pair<A, B>(text: &str) -> Result<(A, B), String>
where
    A: std::str::FromStr<Err: std::fmt::Display>,
    B: std::str::FromStr<Err: std::fmt::Display>,
{
    let (first, second) = text.split_once('=').ok_or("write it as ONE=OTHER")?;
    Ok((
        first.parse().map_err(|error: A::Err| error.to_string())?,
        second.parse().map_err(|error: B::Err| error.to_string())?,
    ))
}

#[derive(Debug, Subcommand)]
pub(crate) enum Migration {
    /// List all migrations, oldest first
    List,
    /// Show one migration
    Show {
        /// Its id, the beginning of it, or its VM for the latest
        id: String,
    },
    /// Watch a migration until it ends
    Watch {
        /// Its id, the beginning of it, or its VM for the latest
        id: String,
    },
    /// End a migration; the VM stays at its source
    Cancel {
        /// Its id, the beginning of it, or its VM for the latest
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Host {
    /// Show what the host is and can do
    Show,
    /// List the hosts it is paired with
    List,
    /// Show a one-time code with which another host may pair
    Invite,
    /// Pair with the host that shows a code
    Pair {
        /// ADDRESS or ADDRESS:PORT of the other host
        address: String,
        /// The code; asked for when missing
        #[arg(long)]
        code: Option<String>,
    },
    /// Trust a host no more
    Unpair { host: HostName },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Switch {
    /// List all virtual switches
    List,
    /// Make a virtual switch
    Create {
        switch: SwitchName,
        /// Network interface that joins it to a network
        #[arg(long, value_name = "INTERFACE")]
        uplink: Option<String>,
    },
    /// Remove a virtual switch that no VM uses
    Delete { switch: SwitchName },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Operator {
    /// List the operators that the host lets in
    List,
    /// Let an operator's certificate in
    Add {
        /// Name for the operator
        name: HostName,
        /// The operator's certificate, as `limosa operator identity` names it
        #[arg(long, value_name = "FILE")]
        certificate: PathBuf,
    },
    /// Let an operator in no more
    Remove { name: HostName },
    /// Show your own certificate; made when missing
    Identity,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
