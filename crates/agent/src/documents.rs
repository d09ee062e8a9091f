//! Man pages and completions of `limosad`, made from its command line.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use crate::args::{Arguments, Document};

/// Prints or writes a document.
pub(crate) fn make(document: Document) -> anyhow::Result<()> {
    match document {
        Document::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Arguments::command(),
                "limosad",
                &mut std::io::stdout(),
            );
            Ok(())
        }
        Document::Man { folder } => man_pages(&folder),
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
    use clap_complete::Shell;

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
            for name in ["config", "openapi", "log-json", "completions", "man"] {
                assert!(text.contains(name), "{name} in {text}");
            }
        }
        assert!(folder.path().join("limosad-man.1").exists());
    }
}
