//! The connections of a migration, gathered until a set is whole.

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_host::failure::{Failure, Result};
use limosa_plane::ChannelIo;
use limosa_protocol::peer::{ChannelHello, ChannelRole};
use subtle::ConstantTimeEq;

/// What is known of the connections of a migration.
#[derive(Default)]
pub(super) struct Connections(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    /// Secret of the migration, once channels are waited for.
    token: Option<String>,
    /// Number of the last set that was whole.
    set: u32,
    gathered: Gathered,
    have_ended: bool,
    /// A set has come in this attempt
    have_come: bool,
}

/// A set that is not whole yet, if it has a number.
#[derive(Default)]
struct Gathered {
    set: u32,
    channels: Vec<Option<ChannelIo>>,
    return_path: Option<ChannelIo>,
}

impl Gathered {
    fn clear(&mut self) {
        self.channels.iter_mut().for_each(|channel| *channel = None);
        self.return_path = None;
    }
}

/// All connections of a plane.
pub(crate) struct ConnectionGroup {
    pub(crate) channels: Vec<ChannelIo>,
    pub(crate) return_path: ChannelIo,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes connections with that token from now on.
    pub(super) fn expect(&self, token: String, channel_count: u8) {
        let mut inner = self.lock();
        inner.token = Some(token);
        inner.gathered.channels = (0..channel_count).map(|_| None).collect();
    }

    /// The token and the number of channels, if some are waited for.
    pub(super) fn expected(&self) -> Option<(String, u8)> {
        let inner = self.lock();
        let count = u8::try_from(inner.gathered.channels.len()).expect("set by `expect` from a u8");
        inner.token.clone().map(|token| (token, count))
    }

    /// Whether a whole set has come, in this attempt.
    pub(super) fn have_come(&self) -> bool {
        self.lock().have_come
    }

    /// Connections are needed again, for another attempt.
    pub(super) fn begin_retry(&self) {
        let mut inner = self.lock();
        inner.have_ended = false;
        inner.have_come = false;
    }

    /// Everything is here: no connection is needed any more.
    pub(super) fn end(&self) {
        let mut inner = self.lock();
        inner.have_ended = true;
        inner.gathered.clear();
    }

    pub(super) fn have_ended(&self) -> bool {
        self.lock().have_ended
    }

    /// Whether a connection may be one of this migration.
    pub(super) fn check(&self, hello: &ChannelHello) -> Result<()> {
        self.lock().check(hello)
    }

    /// Adds a connection that was checked; gives the set once it is whole.
    pub(super) fn add(
        &self,
        hello: &ChannelHello,
        io: ChannelIo,
    ) -> Result<Option<ConnectionGroup>> {
        let mut inner = self.lock();
        // Others may have come since, or everything.
        inner.check(hello)?;
        if inner.have_ended {
            return Err(Failure::conflict("no connection is needed any more"));
        }
        let Inner { set, gathered, have_come, .. } = &mut *inner;
        if gathered.set < hello.set {
            gathered.set = hello.set;
            gathered.clear();
        }
        let place = match hello.role {
            ChannelRole::Channel(index) => gathered
                .channels
                .get_mut(usize::from(index))
                .ok_or_else(|| Failure::bad_request(format!("no channel {index} is expected")))?,
            ChannelRole::ReturnPath => &mut gathered.return_path,
        };
        if place.is_some() {
            return Err(Failure::conflict("that channel is connected already"));
        }
        *place = Some(io);
        if gathered.channels.iter().any(Option::is_none) {
            return Ok(None);
        }
        let Some(return_path) = gathered.return_path.take() else { return Ok(None) };
        *set = hello.set;
        *have_come = true;
        let channels = gathered.channels.iter_mut().filter_map(Option::take).collect();
        Ok(Some(ConnectionGroup { channels, return_path }))
    }
}

impl Inner {
    fn check(&self, hello: &ChannelHello) -> Result<()> {
        let token =
            self.token.as_ref().ok_or_else(|| Failure::conflict("no channels are waited for"))?;
        // In constant time: how long it takes says nothing of the token.
        if !bool::from(hello.token.as_bytes().ct_eq(token.as_bytes())) {
            return Err(Failure::forbidden("a channel with a wrong token"));
        }
        if hello.set <= self.set || hello.set < self.gathered.set {
            return Err(Failure::conflict("a channel of a set that is no more"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use limosa_protocol::id::MigrationId;
    use uuid::Uuid;

    use super::*;

    fn hello(set: u32, role: ChannelRole) -> ChannelHello {
        ChannelHello { migration: MigrationId(Uuid::nil()), token: "secret".to_owned(), set, role }
    }

    fn io() -> ChannelIo {
        let (_, io) = std::os::unix::net::UnixStream::pair().unwrap();
        ChannelIo { io: Box::new(io), shutdown: Box::new(|| ()) }
    }

    /// Goal: sets are never mixed, and an old one never comes back.
    #[test]
    fn a_set_is_whole_or_nothing() {
        let connections = Connections::default();
        let first = hello(1, ChannelRole::Channel(0));
        assert!(connections.check(&first).is_err(), "nobody waits for it");
        connections.expect("secret".to_owned(), 1);
        let other = ChannelHello { token: "guessed".to_owned(), ..first.clone() };
        assert!(connections.check(&other).is_err(), "a wrong token");
        let add = |set, role| connections.add(&hello(set, role), io());
        assert!(add(1, ChannelRole::Channel(0)).unwrap().is_none());
        assert!(add(1, ChannelRole::Channel(0)).is_err(), "twice");
        assert!(add(1, ChannelRole::Channel(1)).is_err(), "one too many");
        assert!(add(2, ChannelRole::ReturnPath).unwrap().is_none(), "the other is of set 1");
        assert!(add(1, ChannelRole::ReturnPath).is_err(), "set 1 is no more");
        assert!(add(2, ChannelRole::Channel(0)).unwrap().is_some());
        assert!(add(2, ChannelRole::Channel(0)).is_err(), "set 2 is in use");
        assert!(add(3, ChannelRole::Channel(0)).unwrap().is_none());
        assert!(add(3, ChannelRole::ReturnPath).unwrap().is_some());
        assert!(connections.have_come());
        assert!(add(4, ChannelRole::Channel(0)).unwrap().is_none());
        connections.end();
        assert!(add(4, ChannelRole::ReturnPath).is_err(), "everything is there");
        connections.begin_retry();
        assert!(!connections.have_come() && !connections.have_ended());
        assert!(add(3, ChannelRole::Channel(0)).is_err(), "set 3 was in use");
    }
}
