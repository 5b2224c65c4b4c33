//! Payload guests.
