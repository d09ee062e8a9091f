//! What scenarios, chaos, demo and benchmarks build on.
//!
//! ```text
//! scene ─► steps, tiny, points        a VM that moves, watched from outside
//!   └────► client, capture            a client of the guest; frames at the switch ports
//! lab ─► host, net ─► namespace       namespaces, links, agents and CLI as processes
//!  └───► record, signals              teardown, also after a crash or a signal
//! ```
//!
//! **Invariant.** The product is reached only by its programs, its API and its files.

pub(crate) mod api;
pub(crate) mod capture;
pub(crate) mod client;
pub(crate) mod exec;
pub(crate) mod guest;
pub(crate) mod heartbeat;
pub(crate) mod host;
pub(crate) mod lab;
pub(crate) mod namespace;
pub(crate) mod net;
pub(crate) mod paths;
pub(crate) mod points;
pub(crate) mod process;
pub(crate) mod record;
pub(crate) mod scene;
pub(crate) mod signals;
pub(crate) mod steps;
pub(crate) mod tiny;
