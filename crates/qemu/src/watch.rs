//! Lets a test wait at every QMP command of this process.

use std::pin::Pin;
use std::sync::OnceLock;

/// When a watcher is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The command is not sent yet
    Before,
    /// It was answered, or cannot be
    After,
}

/// Is called with the name of a command, and awaited.
pub type Watcher = fn(String, Moment) -> Pin<Box<dyn Future<Output = ()> + Send>>;

static WATCHER: OnceLock<Watcher> = OnceLock::new();

/// Lets `watcher` wait at every command; only the first call counts.
pub fn watch_commands(watcher: Watcher) {
    WATCHER.get_or_init(|| watcher);
}

pub(crate) async fn command(name: &str, moment: Moment) {
    if let Some(watcher) = WATCHER.get() {
        watcher(name.to_owned(), moment).await;
    }
}
