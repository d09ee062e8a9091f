//! limosa, the command: moves VMs and looks after the hosts they run on.
//!
//! ```text
//! args (what was typed) ─► command (one request or a few) ─► client ─► connect ─► limosad
//!                              └─► progress, summary, show (what people see)
//! ```
//!
//! **Invariants.** Results go to stdout, everything for people to stderr. Exit
//! codes are decided in [`exit`] alone. Nothing but [`client`] speaks HTTP and
//! nothing but [`connect`] opens a connection.

mod address;
mod args;
mod client;
mod command;
mod connect;
mod console;
mod events;
mod exit;
mod known;
mod progress;
mod prompt;
mod show;
mod summary;

use clap::Parser;

fn main() -> std::process::ExitCode {
    let arguments = args::Arguments::parse();
    let json = arguments.global.json;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::failed(&anyhow::Error::from(error), json),
    };
    let result = runtime.block_on(command::run(arguments));
    // A read of the terminal may still be under way; nobody waits for it.
    runtime.shutdown_background();
    match result {
        Ok(code) => code.into(),
        Err(error) => exit::failed(&error, json),
    }
}
