//! Storage that is slow or fails when its test says so: a file system of this process, by FUSE, with one image in it. The
//! kernel asks it as it asks any file system, so the disks under test are the real ones.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};

/// Bytes of the image.
pub(crate) const IMAGE: u64 = 1 << 20;

const NAME: &str = "image";
const NODE: INodeNo = INodeNo(2);
/// Nothing is cached by the kernel: every request comes here.
const TTL: Duration = Duration::ZERO;

/// What can be made to fail.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    Read,
    Write,
    Flush,
}

#[derive(Default)]
struct State {
    /// The error of each kind of operation, by its number in [`Operation`].
    errors: [Option<i32>; 3],
    /// Flushes do not end.
    held: bool,
    /// Flushes that have begun.
    flushes: usize,
    /// Writes that no flush has made safe.
    at_risk: usize,
}

/// What the test and the file system share.
#[derive(Default)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn error(&self, operation: Operation) -> Option<Errno> {
        self.state().errors[operation as usize].map(Errno::from_i32)
    }

    /// Ends a flush that began with so many writes at risk.
    fn end_flush(&self, at_risk: usize, reply: ReplyEmpty) {
        let mut state = self.state();
        while state.held {
            state = self.changed.wait(state).unwrap();
        }
        match state.errors[Operation::Flush as usize] {
            Some(error) => reply.error(Errno::from_i32(error)),
            None => {
                state.at_risk -= at_risk;
                reply.ok();
            }
        }
    }
}

/// A mounted file system; gone with this process at the latest.
pub(crate) struct Storage {
    control: Arc<Control>,
    dir: tempfile::TempDir,
    /// Unmounts before the directory is removed.
    _session: BackgroundSession,
}

impl Storage {
    /// None, loudly, where there is no FUSE for this process.
    pub(crate) fn new() -> Option<Self> {
        match Self::mount() {
            Ok(storage) => Some(storage),
            Err(error) => {
                eprintln!("SKIPPED: no FUSE here: {error}");
                None
            }
        }
    }

    fn mount() -> std::io::Result<Self> {
        // A mount of this thread and of those that it starts: nothing is left behind, however the test ends.
        // SAFETY: no memory is shared less than before.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS)? };
        let private = rustix::mount::MountPropagationFlags::PRIVATE;
        let all = private | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", all)?;
        let dir = tempfile::tempdir()?;
        let content = tempfile::tempfile()?;
        content.set_len(IMAGE)?;
        let control = Arc::new(Control::default());
        let files = Files {
            content,
            control: control.clone(),
        };
        Ok(Storage {
            _session: fuser::spawn_mount(files, dir.path(), &Config::default())?,
            control,
            dir,
        })
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join(NAME)
    }

    /// Whether flushes that have begun wait, from now on.
    pub(crate) fn hold_flushes(&self, held: bool) {
        self.control.state().held = held;
        self.control.changed.notify_all();
    }

    /// Has operations of a kind fail from now on, or work again.
    pub(crate) fn fail(&self, operation: Operation, error: Option<i32>) {
        self.control.state().errors[operation as usize] = error;
    }

    /// Flushes that have begun.
    pub(crate) fn flushes(&self) -> usize {
        self.control.state().flushes
    }

    /// Writes that would be lost if the host went down now.
    pub(crate) fn writes_at_risk(&self) -> usize {
        self.control.state().at_risk
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.hold_flushes(false);
    }
}

/// The directory and the image in it.
struct Files {
    content: File,
    control: Arc<Control>,
}

fn attributes(node: INodeNo) -> FileAttr {
    let (kind, size, perm) = match node {
        NODE => (FileType::RegularFile, IMAGE, 0o600),
        _ => (FileType::Directory, 0, 0o700),
    };
    FileAttr {
        ino: node,
        size,
        blocks: size / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 512,
    }
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&TTL, &attributes(NODE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(node));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        len: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if let Some(error) = self.control.error(Operation::Read) {
            return reply.error(error);
        }
        let mut bytes = vec![0; len as usize];
        let read = self.content.read_at(&mut bytes, at).unwrap();
        reply.data(&bytes[..read]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        bytes: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if let Some(error) = self.control.error(Operation::Write) {
            return reply.error(error);
        }
        self.content.write_all_at(bytes, at).unwrap();
        self.control.state().at_risk += 1;
        reply.written(bytes.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let control = self.control.clone();
        let at_risk = {
            let mut state = control.state();
            state.flushes += 1;
            state.at_risk
        };
        // Other requests are served meanwhile.
        thread::spawn(move || control.end_flush(at_risk, reply));
    }
}
