//! Any bytes as what the driver of a device does, and as what comes from outside.
//!
//! The input is a list of steps; what is missing at its end is zero. After each step that lets the device work, all that
//! has changed in guest memory must be marked as written; what was saved must be loadable; hints must lie in RAM. A
//! panic, a hang or memory without bounds are for the fuzzer to notice.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmferry_dirty::{PAGE_SIZE, PageIndex};

use super::driver::{Bench, RUNNING, VERSION_1, written};
use super::{
    Announcement, Announcer, Balloon, BalloonPort, Block, Console, Disk, Kicks, Network, Rng,
    SavedTransport,
};
use crate::config::{
    Access, Backing, BalloonConfig, Caching, DiskConfig, ImageFormat, MacAddress, NetBackend,
    SerialConfig,
};
use crate::devices::MmioDevice;
use crate::memory::GuestRam;
use crate::vcpu::Wanted;

/// Guest memory: rings, and not much beside them.
const RAM: u64 = 512 << 10;
/// Bytes of the disk's image.
const IMAGE: u64 = 64 << 10;
/// The most queues that a device has.
const QUEUES: usize = 5;

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A disk.
    Block,
    /// A network interface, connected to a Unix socket.
    Network,
    /// A console.
    Console,
    /// Random numbers.
    Rng,
    /// A balloon with all that it can have.
    Balloon,
}

impl Target {
    /// All of them, with the names of their fuzz targets.
    pub const ALL: [(Target, &str); 5] = [
        (Target::Block, "virtio_blk"),
        (Target::Network, "virtio_net"),
        (Target::Console, "virtio_console"),
        (Target::Rng, "virtio_rng"),
        (Target::Balloon, "virtio_balloon"),
    ];
}

/// Files that all runs share.
struct Outside {
    // Keeps the files.
    _dir: tempfile::TempDir,
    image: std::path::PathBuf,
    socket: std::path::PathBuf,
    listener: UnixListener,
}

fn outside() -> &'static Outside {
    static OUTSIDE: OnceLock<Outside> = OnceLock::new();
    OUTSIDE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("the host has room for temporary files");
        let (image, socket) = (dir.path().join("image"), dir.path().join("socket"));
        let file = File::create(&image).expect("the directory is ours");
        file.set_len(IMAGE).expect("the image is small");
        Outside {
            listener: UnixListener::bind(&socket).expect("the directory is ours"),
            _dir: dir,
            image,
            socket,
        }
    })
}

/// The bytes of an input, one after the other.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A guest address: mostly in RAM, but any can be.
    fn address(&mut self) -> u64 {
        match self.u8() {
            0xff => self.u64(),
            high => u64::from(high & 7) << 16 | u64::from(self.u16()),
        }
    }

    fn queue(&mut self) -> usize {
        usize::from(self.u8()) % QUEUES
    }
}

/// A device, its driver, and what is outside.
struct World {
    target: Target,
    ram: GuestRam,
    bench: Bench,
    queues: usize,
    peer: Option<UnixStream>,
    announcer: Option<Announcer>,
    balloon: Option<BalloonPort>,
}

impl World {
    fn new(target: Target) -> Self {
        let ram = GuestRam::new(RAM, Backing::Private).expect("it is small");
        let (mut peer, mut announcer, mut balloon) = (None, None, None);
        let no_error = "the device's surroundings are fine";
        let (bench, queues) = match target {
            Target::Block => {
                let config = DiskConfig {
                    path: outside().image.clone(),
                    id: None,
                    access: Access::ReadWrite,
                    caching: Caching::Cached,
                    format: ImageFormat::Raw,
                };
                let disk = Disk::open(&config, "disk".into()).expect(no_error);
                let kicks = Kicks::new(Block::QUEUES).expect(no_error);
                let device = Block::new(Arc::new(disk), &kicks);
                (Bench::new(&ram, Box::new(device), kicks), Block::QUEUES)
            }
            Target::Network => {
                let backend = NetBackend::UnixStream(outside().socket.clone());
                let mac = MacAddress::default_of(0);
                let device = Network::new(&backend, "net", mac).expect(no_error);
                let (socket, _) = outside().listener.accept().expect(no_error);
                socket.set_nonblocking(true).expect(no_error);
                (peer, announcer) = (Some(socket), Some(device.announcer()));
                let kicks = Kicks::new(Network::QUEUES).expect(no_error);
                (Bench::new(&ram, Box::new(device), kicks), Network::QUEUES)
            }
            Target::Console => {
                let kicks = Kicks::new(Console::QUEUES).expect(no_error);
                let device = Console::new(&SerialConfig::Null, &kicks, Box::new(|| {}));
                let (device, _) = device.expect(no_error);
                (Bench::new(&ram, Box::new(device), kicks), Console::QUEUES)
            }
            Target::Rng => {
                let kicks = Kicks::new(Rng::QUEUES).expect(no_error);
                (Bench::new(&ram, Box::new(Rng), kicks), Rng::QUEUES)
            }
            Target::Balloon => {
                let config = BalloonConfig {
                    deflate_on_oom: true,
                    free_page_hint: true,
                    free_page_reporting: true,
                };
                let device = Balloon::new(config, RAM, Box::new(|_| {}));
                let (port, queues) = (device.port(), Balloon::queues(config));
                let kicks = Kicks::new(queues).expect(no_error);
                let bench = Bench::new(&ram, Box::new(device), kicks);
                balloon = Some(port(bench.slot.clone()));
                (bench, queues)
            }
        };
        World {
            target,
            ram,
            bench,
            queues,
            peer,
            announcer,
            balloon,
        }
    }

    fn contents(&self) -> Vec<u8> {
        self.bench.bytes(0, RAM as usize)
    }

    /// Lets the device work at a queue. All that it writes must be marked.
    fn serve(&self, queue: usize) {
        let before = self.contents();
        written(&self.ram);
        self.bench.serve_all(queue);
        let marked = written(&self.ram);
        let after = self.contents();
        let (before, after) = (before.chunks(PAGE_SIZE), after.chunks(PAGE_SIZE));
        for (page, (before, after)) in (0..).zip(before.zip(after)) {
            // What is given back to the host reads as zero and has no content that anybody could miss.
            let given_back = || self.target == Target::Balloon && after.iter().all(|b| *b == 0);
            assert!(
                before == after || marked.contains(&page) || given_back(),
                "page {page} was written and is not marked"
            );
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let bench = &self.bench;
        match input.u8() % 14 {
            0 => bench.write(u32::from(input.u8()) * 4, input.u32()),
            1 => {
                let (offset, len) = (input.u16() % 0x200, input.u8() % 9);
                let mut data = [0; 8];
                bench
                    .slot
                    .read(offset.into(), &mut data[..usize::from(len)]);
            }
            2 => {
                let (offset, len) = (input.u16() % 0x200, input.u8() % 9);
                let data = input.bytes(len.into());
                bench.slot.write(offset.into(), data);
            }
            3 => {
                let (address, len) = (input.address() % RAM, input.u8());
                let data = input.bytes(len.into());
                // What lies behind the end of RAM is left out.
                let _ = bench.memory.write(data, GuestAddress(address));
            }
            4 => self.serve(input.queue() % self.queues),
            5 => {
                // As a driver that means well begins.
                bench.negotiate(VERSION_1 | bench.offered() & input.u64());
                (0..self.queues).for_each(|queue| bench.set_up(queue));
                bench.set_status(RUNNING);
            }
            6 => {
                let (queue, index) = (input.queue(), u16::from(input.u8() % 16));
                let (address, len) = (input.address(), input.u32());
                let len = if len >> 24 == 0 { len & 0xffff } else { len };
                let (flags, next) = (u16::from(input.u8()) & 7, u16::from(input.u8()));
                bench.store(queue, index, Descriptor::new(address, len, flags, next));
            }
            7 => bench.publish(input.queue(), u16::from(input.u8())),
            8 => {
                // A migration to the same place.
                let saved = bench.slot.save();
                let loaded = bench.slot.load(&saved);
                assert!(loaded.is_ok(), "{loaded:?} {saved:?}");
            }
            9 => {
                let len = input.u16();
                if let Ok(saved) = postcard::from_bytes::<SavedTransport>(input.bytes(len.into())) {
                    let _ = bench.slot.load(&saved);
                }
            }
            10 => {
                let len = input.u8();
                let saved = bench.slot.save().with_device(input.bytes(len.into()));
                let _ = bench.slot.load(&saved);
            }
            11 => {
                let wanted = match input.u8() % 4 {
                    0 => Wanted::Hold,
                    _ => Wanted::Run,
                };
                bench.gate.set(wanted);
            }
            12 => bench.slot.reset(),
            _ => self.outside(input),
        }
    }

    /// Something happens that is not the driver's doing.
    fn outside(&mut self, input: &mut Input<'_>) {
        if let (Some(peer), Some(announcer)) = (&mut self.peer, &self.announcer) {
            match input.u8() % 4 {
                0 => {
                    let frame = vec![0x5a; usize::from(input.u16())];
                    let length = (frame.len() as u32).to_be_bytes();
                    // It may have hung up, or be slow.
                    let _ = peer.write(&[&length, &frame[..]].concat());
                }
                1 => {
                    let len = input.u8();
                    let _ = peer.write(input.bytes(len.into()));
                }
                2 => {
                    let _ = peer.read(&mut vec![0; 1 << 16]);
                }
                _ => announcer.start(Announcement {
                    rounds: 2,
                    initial: Duration::ZERO,
                    ..Announcement::default()
                }),
            }
        }
        if let Some(balloon) = &self.balloon {
            match input.u8() % 5 {
                0 => balloon.set_target(input.u32().into()),
                1 => {
                    balloon.info();
                }
                2 => balloon.ask(Arc::new(|pages| {
                    let all = PageIndex(RAM as usize / PAGE_SIZE);
                    assert!(pages.start <= pages.end && pages.end <= all, "{pages:?}");
                })),
                3 => vmferry_engine::seam::FreePageHinting::stop(balloon),
                _ => vmferry_engine::seam::FreePageHinting::done(balloon),
            }
        }
    }
}

/// Drives a device by `input`.
pub fn drive(target: Target, input: &[u8]) {
    /// More steps tell nothing new.
    const MOST_STEPS: usize = 200;
    let mut world = World::new(target);
    let mut input = Input(input);
    for _ in 0..MOST_STEPS {
        if input.0.is_empty() {
            return;
        }
        world.step(&mut input);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// What the fuzzer has found worth keeping still does no harm.
    #[test]
    fn the_fuzzers_finds_do_no_harm() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
        for (target, name) in Target::ALL {
            let mut inputs = 0;
            let folder = fuzz.join("corpus").join(name);
            for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder:?}: {e}")) {
                drive(target, &fs::read(entry.unwrap().path()).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "{folder:?} is empty");
        }
    }
}
