//! The one export of a server.

/// A disk that a server offers to its clients.
#[derive(Debug, Clone)]
pub struct Export {
    /// The name under which clients ask for it; they may leave it empty
    pub name: String,
    /// Bytes of the disk
    pub size_bytes: u64,
}
