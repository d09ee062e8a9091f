//! The messages of the control link, in one table.
//!
//! The router of the agent, its `PeerClient`, the fault points and the lab read this table,
//! so a message has one path, one name, one limit and one retry policy.
//!
//! **Invariant.** Only [`Message::uri`] writes the path of a request.

use std::fmt::Display;
use std::time::Duration;

/// HTTP method of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    Get,
    Post,
    Put,
}

/// What the sender does when the peer does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetryPolicy {
    /// Reports the failure to its caller, who decides
    Never,
    /// Sends the message again for as long as a migration waits for a lost link
    WhileLinkIsLost,
    /// Sends the message again until the peer answers or an operator decides
    UntilAnswered,
}

/// A message from one agent to another: its name, its route, its limit and its retry policy.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    /// Name in logs and of the fault points
    pub name: &'static str,
    pub method: Method,
    /// Path of the route; parameters are in braces
    pub path: &'static str,
    /// Longest wait for the answer, if the caller gives no shorter one
    pub limit: Duration,
    /// What the sender does without an answer
    pub retry: RetryPolicy,
}

const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Longest wait until both hosts have read a VM again, or the destination has filled the
/// RAM of a new QEMU.
const CONTENTS_MAX: Duration = Duration::from_secs(30 * 60);

impl Message {
    /// The destination compares an offer with itself.
    pub const COMPARE: Self =
        Self::post("compare", "/peer/v1/compare", ANSWER_MAX, RetryPolicy::Never);
    /// The destination makes room for a VM.
    pub const OFFER: Self =
        Self::post("offer", "/peer/v1/migrations", ANSWER_MAX, RetryPolicy::WhileLinkIsLost);
    /// A part of a file that moves beside the disks.
    pub const FILE: Self = Self {
        name: "file",
        method: Method::Put,
        path: "/peer/v1/migrations/{id}/files/{name}/{offset}",
        limit: Duration::from_secs(60),
        retry: RetryPolicy::WhileLinkIsLost,
    };
    /// The destination starts QEMU and waits for channels.
    pub const RECEIVE: Self = Self::post(
        "receive",
        "/peer/v1/migrations/{id}/receive",
        Duration::from_secs(60),
        RetryPolicy::WhileLinkIsLost,
    );
    /// The destination reads RAM and images again.
    pub const VERIFY: Self = Self::post(
        "verify",
        "/peer/v1/migrations/{id}/verify",
        CONTENTS_MAX,
        RetryPolicy::WhileLinkIsLost,
    );
    /// The destination votes. The source limits the wait by the downtime limit.
    pub const READY: Self = Self::post(
        "ready",
        "/peer/v1/migrations/{id}/ready",
        CONTENTS_MAX,
        RetryPolicy::WhileLinkIsLost,
    );
    /// The destination starts another attempt with a new QEMU.
    pub const RETRY: Self = Self::post(
        "retry",
        "/peer/v1/migrations/{id}/retry",
        CONTENTS_MAX,
        RetryPolicy::WhileLinkIsLost,
    );
    /// The source has handed over.
    pub const COMMIT: Self = Self::post(
        "commit",
        "/peer/v1/migrations/{id}/commit",
        Duration::from_secs(15),
        RetryPolicy::UntilAnswered,
    );
    /// The source is out of the VM for good.
    pub const RETIRED: Self = Self::post(
        "retired",
        "/peer/v1/migrations/{id}/retired",
        Duration::from_secs(10),
        RetryPolicy::Never,
    );
    /// The VM stays at the source.
    pub const STAYS: Self = Self::post(
        "stays",
        "/peer/v1/migrations/{id}/stays",
        Duration::from_secs(10),
        RetryPolicy::UntilAnswered,
    );
    /// The source reads the vote of the destination.
    pub const VOTE: Self = Self::get("look", "/peer/v1/migrations/{id}", RetryPolicy::Never);
    /// The destination reads the decision of the source.
    pub const DECISION: Self = Self::get("ask", "/peer/v1/offers/{id}", RetryPolicy::UntilAnswered);

    /// All messages that a source sends.
    pub const OF_SOURCE: &[&Self] = &[
        &Self::COMPARE,
        &Self::OFFER,
        &Self::FILE,
        &Self::RECEIVE,
        &Self::VERIFY,
        &Self::READY,
        &Self::RETRY,
        &Self::COMMIT,
        &Self::RETIRED,
        &Self::STAYS,
        &Self::VOTE,
    ];
    /// All messages that a destination sends.
    pub const OF_DESTINATION: &[&Self] = &[&Self::DECISION];

    const fn post(
        name: &'static str,
        path: &'static str,
        limit: Duration,
        retry: RetryPolicy,
    ) -> Self {
        Self { name, method: Method::Post, path, limit, retry }
    }

    const fn get(name: &'static str, path: &'static str, retry: RetryPolicy) -> Self {
        Self { name, method: Method::Get, path, limit: ANSWER_MAX, retry }
    }

    /// The path of a request.
    ///
    /// # Panics
    /// If the path has another number of parameters.
    #[must_use]
    pub fn uri(&self, parameters: &[&(dyn Display + Sync)]) -> String {
        let mut rest = self.path;
        let mut uri = String::new();
        for parameter in parameters {
            let (before, from_brace) = rest.split_once('{').expect("one brace for each parameter");
            let (_, after) = from_brace.split_once('}').expect("the path closes its braces");
            uri.push_str(before);
            uri.push_str(&parameter.to_string());
            rest = after;
        }
        assert!(!rest.contains('{'), "{}: a parameter is missing", self.name);
        uri + rest
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn all() -> impl Iterator<Item = &'static &'static Message> {
        Message::OF_SOURCE.iter().chain(Message::OF_DESTINATION)
    }

    /// Goal: a name or a route means one message.
    #[test]
    fn no_message_is_listed_twice() {
        let names: BTreeSet<_> = all().map(|message| message.name).collect();
        let routes: BTreeSet<_> =
            all().map(|message| (message.path, message.method == Method::Get)).collect();
        assert_eq!((names.len(), routes.len()), (all().count(), all().count()));
    }

    /// Goal: a request goes to the path that the route matches.
    #[test]
    fn uris_fill_the_parameters() {
        assert_eq!(Message::COMPARE.uri(&[]), "/peer/v1/compare");
        assert_eq!(Message::COMMIT.uri(&[&"0190"]), "/peer/v1/migrations/0190/commit");
        let file = Message::FILE.uri(&[&"0190", &"kernel", &4096]);
        assert_eq!(file, "/peer/v1/migrations/0190/files/kernel/4096");
    }
}
