//! Disks.

use serde::{Deserialize, Serialize};

/// Arguments of `block_resize`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BlockResize {
    /// The disk's name.
    pub device: Option<String>,
    /// The same; `device` goes first.
    pub node_name: Option<String>,
    /// The new size in bytes. Signed, as QEMU has it.
    pub size: i64,
}

/// An entry of the answer to `query-block`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockInfo {
    /// The disk's name.
    pub device: String,
    /// The path of the guest's device in QEMU's object tree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qdev: Option<String>,
    /// Always `unknown`, as in QEMU.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether the medium can be changed.
    pub removable: bool,
    /// Whether the guest has locked the tray.
    pub locked: bool,
    /// What is in the drive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inserted: Option<BlockDeviceInfo>,
}

/// An image as a disk uses it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockDeviceInfo {
    /// Its path.
    pub file: String,
    /// Whether it is only read.
    pub ro: bool,
    /// Its format.
    pub drv: String,
    /// How many images it is based on.
    pub backing_file_depth: u64,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Whether zeroes that are written are looked for.
    pub detect_zeroes: DetectZeroes,
    /// Limit of bytes a second, 0 for none.
    pub bps: u64,
    /// The same for reads.
    pub bps_rd: u64,
    /// The same for writes.
    pub bps_wr: u64,
    /// Limit of requests a second, 0 for none.
    pub iops: u64,
    /// The same for reads.
    pub iops_rd: u64,
    /// The same for writes.
    pub iops_wr: u64,
    /// The image itself.
    pub image: ImageInfo,
    /// How it is cached.
    pub cache: BlockdevCacheInfo,
    /// Offset at which a client is warned, 0 for none.
    pub write_threshold: u64,
    /// Whether this side may use it: not before its guest has arrived, nor after it has left.
    pub active: bool,
    /// How the guest's requests reach the host.
    #[serde(rename = "x-vmferry-io")]
    pub x_vmferry_io: BlockIo,
}

/// How requests for a disk reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlockIo {
    /// Many at a time, by io_uring.
    IoUring,
    /// One after the other.
    Synchronous,
}

/// What to do about zeroes that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroes {
    /// Nothing.
    Off,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// Its path.
    pub filename: String,
    /// Its format.
    pub format: String,
    /// The disk's size in bytes.
    pub virtual_size: u64,
}

/// How a disk is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevCacheInfo {
    /// Whether writes are complete before they are safe.
    pub writeback: bool,
    /// Whether the host's page cache is left out.
    pub direct: bool,
    /// Whether flushes are ignored.
    pub no_flush: bool,
}
