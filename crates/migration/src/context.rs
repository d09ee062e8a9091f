//! What a migration needs of its host, whichever half it is.

use std::sync::Arc;

use limosa_auth::Identity;
use limosa_host::Host;

use crate::settings::MigrationSettings;

/// The host, its identity and its settings.
pub(crate) struct Context {
    pub(crate) host: Arc<Host>,
    /// Shown to peers
    pub(crate) identity: Identity,
    pub(crate) settings: MigrationSettings,
}
