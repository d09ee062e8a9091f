//! What a channel carries.
