//! Man pages and shell completions, made from the definition of a program's command line.

use std::io;
use std::path::Path;

use clap::CommandFactory;
pub use clap_complete::Shell;

/// The completion script of a program.
#[must_use]
pub fn completions<A: CommandFactory>(shell: Shell) -> Vec<u8> {
    let mut command = A::command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    script
}

/// Writes a man page for a program and for each of its commands into a folder, which is made.
///
/// # Errors
/// When the folder or a page cannot be written; the error names the folder.
pub fn man_pages<A: CommandFactory>(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(A::command(), folder))
        .map_err(|error| {
            let text = format!("writing man pages into {}: {error}", folder.display());
            io::Error::new(error.kind(), text)
        })
}

#[cfg(test)]
mod tests {
    use clap::{Parser, ValueEnum};

    use super::*;

    #[derive(Parser)]
    #[command(name = "example")]
    enum Example {
        Show { name: String },
    }

    #[test]
    fn each_command_is_in_every_document() {
        let folder = tempfile::tempdir().unwrap();
        man_pages::<Example>(&folder.path().join("man1")).unwrap();
        for page in ["example.1", "example-show.1"] {
            let text = std::fs::read_to_string(folder.path().join("man1").join(page)).unwrap();
            assert!(text.contains(".SH SYNOPSIS"), "{page}");
        }
        for shell in Shell::value_variants() {
            let script = String::from_utf8(completions::<Example>(*shell)).unwrap();
            assert!(script.contains("example") && script.contains("show"), "{shell}");
        }
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(man_pages::<Example>(&file).unwrap_err().to_string().contains("file"));
    }
}
