//! Man pages and completions of `limosad`.

use std::io::Write;

use crate::args::{Arguments, Document};

/// Prints or writes a document.
pub(crate) fn make(document: Document) -> anyhow::Result<()> {
    match document {
        Document::Completions { shell } => {
            let script = limosa_documents::completions::<Arguments>(shell);
            std::io::stdout().write_all(&script)?;
        }
        Document::Man { folder } => limosa_documents::man_pages::<Arguments>(&folder)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, ValueEnum};
    use limosa_documents::Shell;

    use super::*;

    /// Goal: what is made from the command line lists each option and command.
    #[test]
    fn every_option_is_in_the_documents() {
        Arguments::command().debug_assert();
        let folder = tempfile::tempdir().unwrap();
        limosa_documents::man_pages::<Arguments>(folder.path()).unwrap();
        let page = std::fs::read_to_string(folder.path().join("limosad.1")).unwrap();
        let scripts = Shell::value_variants().iter().map(|shell| {
            String::from_utf8(limosa_documents::completions::<Arguments>(*shell)).unwrap()
        });
        for text in scripts.chain([page.replace("\\-", "-")]) {
            for name in ["config", "openapi", "log-json", "completions", "man"] {
                assert!(text.contains(name), "{name} in {text}");
            }
        }
        assert!(folder.path().join("limosad-man.1").exists());
    }
}
