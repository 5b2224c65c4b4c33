//! How far a stream has come, and what may follow.

/// What the decoder has seen last. The order of the variants is the order of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Nothing.
    Header,
    /// Magic and version.
    Configuration,
    /// The CONFIGURATION section: commands, descriptions and the START of RAM come now.
    Setup,
    /// RAM was set up, and the last PART is complete.
    Ram,
    /// In the records of a PART section.
    PartRecords,
    /// In the records of the END section.
    EndRecords,
    /// RAM is complete.
    Devices,
    /// The VMDESCRIPTION.
    Described,
    /// `HandoverRun`: the guest is ours.
    HandedOver,
    /// The EOF of a one-way stream without VMDESCRIPTION, which may still come.
    Ended,
    /// The last byte of a stream: its EOF, or `HandoverKeep`.
    Complete,
    /// An error.
    Failed,
}

/// Whether the sender can hear us: it decides how a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    /// No `OpenReturnPath` came: complete at the EOF.
    OneWay,
    /// The guest is ours at `HandoverRun`, and only then.
    TwoWay,
}

/// Whether the source has paused its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switchover {
    Ahead,
    Started,
}

impl Phase {
    /// What may come next, in words.
    pub(super) fn expected(self, channel: Channel) -> &'static str {
        match (self, channel) {
            (Phase::Header, _) => "the stream header",
            (Phase::Configuration, _) => "a CONFIGURATION section",
            (Phase::Setup, _) => "a command, a machine description or the START of the RAM section",
            (Phase::Ram, _) => "a PART or the END of the RAM section, or a command",
            (Phase::PartRecords | Phase::EndRecords, _) => "a RAM record",
            (Phase::Devices, Channel::OneWay) => "a device section, a VMDESCRIPTION or the EOF",
            (Phase::Devices, Channel::TwoWay) => "a device section or the VMDESCRIPTION",
            (Phase::Described, Channel::OneWay) => "the EOF",
            (Phase::Described, Channel::TwoWay) => "the command HANDOVER_RUN or HANDOVER_KEEP",
            (Phase::HandedOver, _) => "the EOF",
            (Phase::Ended, _) => "a VMDESCRIPTION or the end of the stream",
            (Phase::Complete | Phase::Failed, _) => "nothing more",
        }
    }
}
