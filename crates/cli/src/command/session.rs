//! What all commands share: the agent, and how a result is shown.

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::client::Client;
use crate::exit::Exit;
use crate::show;

/// A command with its agent.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) json: bool,
}

impl Session {
    /// Shows a result: as JSON, or as `text` writes it.
    pub(super) fn result<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> Result<()>,
    ) -> Result<Exit> {
        if self.json {
            show::json(value)?
        } else {
            text(value)?
        }
        Ok(Exit::Done)
    }

    /// Reports that something is done which has no result.
    pub(super) fn done(&self, text: &str) -> Result<Exit> {
        self.result(&json!(null), |_| {
            show::note(text);
            Ok(())
        })
    }
}
