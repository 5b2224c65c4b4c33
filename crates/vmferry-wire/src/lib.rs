//! The migration stream: QEMU's version 3, encoded and decoded.
//!
//! No sockets and no threads here: an [`Encoder`] appends bytes to a `Vec<u8>`, a [`Decoder`] reads
//! [`Event`]s from anything that is [`std::io::Read`], and [`ReturnPathMessage`] is what travels the other
//! way. Every number is QEMU's (its documentation, `docs/devel/migration/`, and streams written by QEMU 10)
//! unless its documentation says that it is vmferry's.
//!
//! # The order of a stream
//!
//! | what | section | when |
//! |---|---|---|
//! | magic `QEVM`, version 3 | | first |
//! | machine type | CONFIGURATION | |
//! | [`Command::OpenReturnPath`] | COMMAND | only on a two-way channel |
//! | description of the machine | FULL `vmferry/machine` | before RAM, so that a wrong machine is refused early |
//! | names and sizes of the RAM blocks | START `ram` | |
//! | pages | PART `ram`, many | the guest runs |
//! | [`Command::SwitchoverStart`] | COMMAND | the guest has been paused |
//! | the last pages | PART `ram`, any number, then END `ram` | |
//! | device states | FULL `vmferry/...` | |
//! | description of the sections, JSON | VMDESCRIPTION | two-way: says "that was everything" |
//! | [`Command::HandoverRun`] | COMMAND | two-way only: see below |
//! | end | EOF | |
//! | description of the sections, JSON | VMDESCRIPTION | one-way: behind the EOF, where QEMU puts it |
//!
//! START, PART, END and FULL sections end in a footer that repeats their section id. A one-way stream (a
//! file, a pipe) is complete at its EOF. QEMU's `analyze-migration.py` looks for the JSON as the last thing
//! in a file, hence its place there; the decoder takes it on either side of the EOF of a one-way stream.
//!
//! # The hand-over
//!
//! On a two-way channel the guest changes its owner at one point only, so that no failure, wherever it
//! comes, leaves it running twice:
//!
//! ```text
//!  source                                                      destination
//!    |  header, CONFIGURATION, COMMAND OpenReturnPath               |
//!    |------------------------------------------------------------->|
//!    |  FULL vmferry/machine, START ram, PART ram ...               |
//!    |------------------------------------------------------------->|
//!  guest paused                                                     |
//!    |  COMMAND SwitchoverStart, PART ram ..., END ram              |
//!    |------------------------------------------------------------->|
//!    |  FULL vmferry/..., VMDESCRIPTION                             |
//!    |------------------------------------------------------------->|
//!    |                                            loads the devices |
//!    |                                               HandoverLoaded |
//!    |<-------------------------------------------------------------|
//!  COMMITS: never again starts the guest by itself                  |
//!    |  COMMAND HandoverRun, EOF                                    |
//!    |------------------------------------------------------------->|
//!    |                                                  runs the guest
//!    |                                                      Shut(0) |
//!    |<-------------------------------------------------------------|
//!  discards its copy
//! ```
//!
//! Up to its commit the source may resume the guest at any failure; the destination may give up at any time
//! up to its `HandoverLoaded`, with [`ReturnPathMessage::Error`] and then `Shut(1)`. A source that keeps its
//! guest after that (cancelled at the last moment) says so with [`Command::HandoverKeep`]. Otherwise a lost
//! channel leaves the one who lost it unable to know whether the other runs the guest. It keeps the guest,
//! paused, and its user decides: nothing is lost, and nothing runs twice. In states:
//!
//! ```text
//!  source:       Sending --VMDESCRIPTION--> Waiting --HandoverLoaded--> Committed --Shut(0)--> Gone
//!                   |                         |                            |
//!                   | any failure             | any failure, Shut(not 0)   | Shut(not 0), lost channel
//!                   v                         v                            v
//!                Resumed                   Resumed                      Undecided: paused
//!
//!  destination:  Loading --HandoverLoaded--> Loaded --HandoverRun--> Running
//!                   |                        |    |
//!                   | any failure            |    | lost channel
//!                   v                        |    v
//!                Given up <--HandoverKeep----+  Undecided: paused
//! ```
//!
//! The decoder holds a two-way stream to it: an EOF without `HandoverRun` is an error there, as is a
//! `HandoverRun` before the VMDESCRIPTION or on a one-way stream.

#![forbid(unsafe_code)]

mod command;
mod decode;
mod device;
mod encode;
mod error;
mod format;
mod layout;
pub mod limits;
mod return_path;
mod text;
mod vmdesc;

pub use command::Command;
pub use decode::{Decoder, Event};
pub use device::DeviceState;
pub use encode::{EncodeError, Encoder};
pub use error::{EofPlace, StreamError};
pub use format::PAGE_SIZE;
pub use layout::{LayoutError, LayoutMismatch, RamBlockLayout, RamLayout};
pub use return_path::{ReturnPathError, ReturnPathMessage};
pub use vmdesc::{DescribedSection, vm_description};
