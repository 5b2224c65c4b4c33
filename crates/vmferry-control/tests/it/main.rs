//! The server and the client over real sockets, with a handler that only pretends.

mod clients;
mod conversation;
mod dirty_rate;
mod fake;
mod lifetime;
mod qemu_wording;
mod qmp_client;
mod qmp_python;
