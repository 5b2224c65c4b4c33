//! virtio-blk: requests, images, locks; with each engine.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk as blk;

use super::*;
use crate::config::{Access, Caching, DiskConfig, ImageFormat};
use crate::error::MachineError;
use crate::virtio::blk::Durability;
use crate::virtio::{Block, Disk, DiskIo, Settled};

mod in_flight;

const FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
/// Of the images here.
const SECTORS: u64 = 256;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;
const OK: u8 = blk::VIRTIO_BLK_S_OK as u8;
const ERROR: u8 = blk::VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = blk::VIRTIO_BLK_S_UNSUPP as u8;

struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    /// An image whose sectors are filled with their number.
    fn new() -> Self {
        let image = Image {
            dir: tempfile::tempdir().unwrap(),
        };
        let content: Vec<u8> = (0..SECTORS).flat_map(|n| [n as u8; 512]).collect();
        fs::write(image.path(), content).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn config(&self) -> DiskConfig {
        DiskConfig {
            path: self.path(),
            id: None,
            access: Access::ReadWrite,
            caching: Caching::Cached,
            format: ImageFormat::Unsaid,
        }
    }

    fn disk(&self) -> Disk {
        Disk::open(&self.config(), "root".into()).unwrap()
    }

    fn sector(&self, number: u64) -> Vec<u8> {
        let mut sector = vec![0; 512];
        let file = File::open(self.path()).unwrap();
        file.read_exact_at(&mut sector, number * 512).unwrap();
        sector
    }
}

fn bench(ram: &GuestRam, disk: impl Into<Arc<Disk>>, io: DiskIo) -> Bench {
    let (disk, kicks) = (disk.into(), Kicks::new(Block::QUEUES).unwrap());
    let device = match io {
        DiskIo::IoUring => Block::new(disk, &kicks),
        DiskIo::Synchronous => Block::synchronous(disk),
    };
    Bench::new(ram, Box::new(device), kicks)
}

/// Whether this host has io_uring for this process.
fn has_ring() -> bool {
    let kicks = Kicks::new(Block::QUEUES).unwrap();
    let block = Block::new(Arc::new(Image::new().disk()), &kicks);
    let has = block.io() == DiskIo::IoUring;
    if !has {
        eprintln!("SKIPPED: no io_uring here");
    }
    has
}

/// Runs a test with each engine that this host has.
fn with_each(test: impl Fn(DiskIo)) {
    if has_ring() {
        test(DiskIo::IoUring);
    }
    test(DiskIo::Synchronous);
}

/// The kernel tells of a write that it has lost once; whoever asks afterwards has to hear of it, too.
#[test]
fn a_failed_flush_is_never_forgotten() {
    let failure = || Err::<(), _>(io::Error::from_raw_os_error(libc::EIO));
    with_each(|io| {
        let (ram, image) = (ram(), Image::new());
        let disk = Arc::new(image.disk());
        settle(&disk).unwrap();
        disk.learn(&failure());
        let why = settle(&disk).unwrap_err().to_string();
        assert!(
            why.contains("flush the disk 'root'") && why.contains("lost"),
            "{why}"
        );
        let bench = bench(&ram, disk, io);
        bench.start(FLUSH, 1);
        assert_eq!(request(&bench, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), ERROR);
    });
    // Nothing is cached of a disk with direct I/O.
    let (pipe, _) = std::io::pipe().unwrap();
    let direct = Disk::of_pipe(File::from(OwnedFd::from(pipe)), SECTORS, Caching::Direct);
    direct.learn(&failure());
    direct.has_all_writes().unwrap();
    // And an interrupted flush is tried again.
    let image = Image::new();
    let disk = Arc::new(image.disk());
    disk.learn(&Err::<(), _>(io::Error::from_raw_os_error(libc::EINTR)));
    settle(&disk).unwrap();
}

/// What the host has answered after a flush began may not be in it.
#[test]
fn a_flush_makes_safe_what_was_written_before_it() {
    // A pipe cannot be flushed, which tells whether that was tried.
    let (pipe, _) = std::io::pipe().unwrap();
    let file = File::from(OwnedFd::from(pipe));
    let disk = Arc::new(Disk::of_pipe(file, SECTORS, Caching::Direct));
    settle(&disk).unwrap();
    let covered = disk.covered_now();
    disk.hear_write(Durability::Written, &Ok(512));
    disk.hear_flush(covered, Ok(())).unwrap();
    settle(&disk).unwrap_err();
    disk.hear_flush(disk.covered_now(), Ok(())).unwrap();
    settle(&disk).unwrap();
    disk.hear_write(Durability::Safe, &Ok(512));
    settle(&disk).unwrap();
    let failed: io::Result<()> = Err(io::Error::from_raw_os_error(libc::EIO));
    for durability in [Durability::Written, Durability::Safe] {
        disk.hear_write(durability, &failed);
        settle(&disk).unwrap_err();
        disk.hear_flush(disk.covered_now(), Ok(())).unwrap();
    }
}

/// Makes everything safe that was written.
fn settle(disk: &Arc<Disk>) -> Result<Settled, MachineError> {
    let wanted = disk.begin_to_settle()?;
    disk.settled_by(wanted, None)
}

/// Puts a request into the ring.
fn ask(bench: &Bench, kind: u32, sector: u64, data: &[(u64, u32, u16)]) {
    let mut header = [kind.to_le_bytes(), [0; 4]].concat();
    header.extend(sector.to_le_bytes());
    bench.put(HEADER, &header);
    bench.put(STATUS, &[0xee]);
    let mut buffers = vec![(HEADER, 16, 0)];
    buffers.extend(data);
    buffers.push((STATUS, 1, WRITE));
    bench.offer(0, &buffers);
}

/// Has a request served. Returns its status.
fn request(bench: &Bench, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
    ask(bench, kind, sector, data);
    let before = bench.used(0).0;
    bench.serve_all(0);
    assert_eq!(bench.used(0).0, before.wrapping_add(1), "not served");
    bench.bytes(STATUS, 1)[0]
}

fn read(bench: &Bench, sector: u64, len: u32) -> u8 {
    request(bench, blk::VIRTIO_BLK_T_IN, sector, &[(DATA, len, WRITE)])
}

fn write(bench: &Bench, sector: u64, len: u32) -> u8 {
    request(bench, blk::VIRTIO_BLK_T_OUT, sector, &[(DATA, len, 0)])
}

/// A discard or write-zeroes request of one piece.
fn change(bench: &Bench, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
    let mut segment = sector.to_le_bytes().to_vec();
    segment.extend(sectors.to_le_bytes());
    segment.extend(flags.to_le_bytes());
    bench.put(DATA, &segment);
    request(bench, kind, 0, &[(DATA, 16, 0)])
}

#[test]
fn what_is_written_is_read_again() {
    with_each(|io| {
        let (image, ram) = (Image::new(), ram());
        let bench = bench(&ram, image.disk(), io);
        assert_ne!(bench.offered() & 1 << blk::VIRTIO_BLK_F_DISCARD, 0);
        assert_eq!(bench.read(0x100), SECTORS as u32);
        bench.start(FLUSH, 1);

        // Into two pieces, one of which is not aligned to anything.
        let pieces = [(DATA + 0x2003, 512, WRITE), (DATA, 1024, WRITE)];
        written(&ram);
        ask(&bench, blk::VIRTIO_BLK_T_IN, 7, &pieces);
        written(&ram);
        bench.serve_all(0);
        assert_eq!(bench.used(0), (1, 1537));
        let pages = written(&ram);
        let used = rings(0).used.raw_value();
        for address in [DATA, DATA + 0x2003, STATUS, used] {
            assert!(has(&pages, address), "{address:#x} is not in {pages:x?}");
        }
        assert_eq!(bench.bytes(STATUS, 1), [OK]);
        assert_eq!(bench.bytes(DATA + 0x2003, 512), [7; 512]);
        assert_eq!(bench.bytes(DATA, 512), [8; 512]);
        assert_eq!(bench.bytes(DATA + 512, 512), [9; 512]);

        bench.put(DATA, &[0xaa; 1024]);
        assert_eq!(write(&bench, 100, 1024), OK);
        assert_eq!(image.sector(99), [99; 512]);
        assert_eq!(image.sector(100), [0xaa; 512]);
        assert_eq!(image.sector(101), [0xaa; 512]);
        assert_eq!(image.sector(102), [102; 512]);
        assert_eq!(request(&bench, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        let id = request(&bench, blk::VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]);
        assert_eq!(id, OK);
        assert_eq!(bench.bytes(DATA, 5), b"root\0");
        // Without FLUSH, too.
        bench.start(0, 1);
        bench.put(RINGS, &[0; 0x3000]);
        bench.start(0, 1);
        assert_eq!(write(&bench, 3, 512), OK);
    });
}

#[test]
fn direct_io_takes_buffers_wherever_they_are() {
    with_each(|io| {
        let (image, ram) = (Image::new(), ram());
        let config = DiskConfig {
            caching: Caching::Direct,
            ..image.config()
        };
        let disk = match Disk::open(&config, "direct".into()) {
            Ok(disk) => disk,
            Err(error) => {
                eprintln!("SKIPPED: no direct I/O here: {error}");
                return;
            }
        };
        let bench = bench(&ram, disk, io);
        bench.start(FLUSH, 1);
        for at in [DATA, DATA + 1] {
            bench.put(at, &[at as u8 + 0x11; 4096]);
            let kind = blk::VIRTIO_BLK_T_OUT;
            assert_eq!(request(&bench, kind, 8, &[(at, 4096, 0)]), OK);
            assert_eq!(image.sector(15), [at as u8 + 0x11; 512]);
            let kind = blk::VIRTIO_BLK_T_IN;
            assert_eq!(request(&bench, kind, 16, &[(at, 4096, WRITE)]), OK);
            assert_eq!(bench.bytes(at, 512), [16; 512]);
            assert_eq!(bench.bytes(at + 7 * 512, 512), [23; 512]);
        }
    });
}

#[test]
fn sectors_are_discarded_and_zeroed() {
    with_each(|io| {
        let (image, ram) = (Image::new(), ram());
        let bench = bench(&ram, image.disk(), io);
        bench.start(FLUSH, 1);
        let (zero, discard) = (blk::VIRTIO_BLK_T_WRITE_ZEROES, blk::VIRTIO_BLK_T_DISCARD);
        assert_eq!(change(&bench, zero, 10, 3, 0), OK);
        assert_eq!(change(&bench, zero, 20, 2, 1), OK);
        assert_eq!(change(&bench, discard, 32, 8, 0), OK);
        assert_eq!(change(&bench, zero, 0, 0, 0), OK);
        for sector in [10, 11, 12, 20, 21] {
            assert_eq!(image.sector(sector), [0; 512], "{sector}");
        }
        for sector in [9, 13, 19, 22, 31, 40] {
            assert_eq!(image.sector(sector), [sector as u8; 512], "{sector}");
        }
        for (kind, sector, sectors, flags, status) in [
            (zero, SECTORS - 1, 2, 0, ERROR),
            (discard, SECTORS, 1, 0, ERROR),
            (discard, u64::MAX, 1, 0, ERROR),
            (zero, 0, u32::MAX, 0, ERROR),
            (zero, 0, 1, 2, UNSUPPORTED),
            (discard, 0, 1, 1, UNSUPPORTED),
        ] {
            assert_eq!(change(&bench, kind, sector, sectors, flags), status);
        }
        assert_eq!(request(&bench, zero, 0, &[(DATA, 15, 0)]), ERROR);
        assert_eq!(request(&bench, zero, 0, &[]), ERROR);
        assert_eq!(fs::metadata(image.path()).unwrap().len(), SECTORS * 512);
    });
}

#[test]
fn requests_that_cannot_be_fail_and_the_device_goes_on() {
    with_each(|io| {
        let (image, ram) = (Image::new(), ram());
        let bench = bench(&ram, image.disk(), io);
        bench.start(FLUSH, 1);
        for (sector, len) in [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (0, 511),
            (0, 513),
        ] {
            assert_eq!(read(&bench, sector, len), ERROR, "{len} at {sector}");
            assert_eq!(write(&bench, sector, len), ERROR, "{len} at {sector}");
        }
        for kind in [2, 3, 14, 99, u32::MAX] {
            assert_eq!(request(&bench, kind, 0, &[]), UNSUPPORTED);
        }
        assert_eq!(read(&bench, SECTORS - 1, 512), OK);
        // The image became shorter behind our back.
        File::options()
            .write(true)
            .open(image.path())
            .unwrap()
            .set_len(512)
            .unwrap();
        assert_eq!(read(&bench, 5, 512), ERROR);
        assert_eq!(read(&bench, 0, 512), OK);
        assert_eq!(bench.status(), RUNNING);
    });
}

#[test]
fn requests_without_header_or_status_stop_the_device() {
    with_each(|io| {
        for buffers in [
            &[(HEADER, 15, 0), (STATUS, 1, WRITE)][..],
            &[(HEADER, 16, 0)],
            &[(STATUS, 1, WRITE)],
        ] {
            let (image, ram) = (Image::new(), ram());
            let bench = bench(&ram, image.disk(), io);
            bench.start(FLUSH, 1);
            bench.offer(0, buffers);
            bench.serve_all(0);
            assert_eq!(bench.status(), RUNNING | NEEDS_RESET);
        }
    });
}

#[test]
fn a_read_only_disk_is_not_written() {
    with_each(|io| {
        let (image, ram) = (Image::new(), ram());
        let config = DiskConfig {
            access: Access::ReadOnly,
            ..image.config()
        };
        let bench = bench(&ram, Disk::open(&config, "ro".into()).unwrap(), io);
        assert_ne!(bench.offered() & 1 << blk::VIRTIO_BLK_F_RO, 0);
        assert_eq!(bench.offered() & 1 << blk::VIRTIO_BLK_F_DISCARD, 0);
        bench.start(FLUSH, 1);
        assert_eq!(write(&bench, 0, 512), ERROR);
        assert_eq!(change(&bench, blk::VIRTIO_BLK_T_DISCARD, 0, 1, 0), ERROR);
        assert_eq!(read(&bench, 3, 512), OK);
        assert_eq!(bench.bytes(DATA, 512), [3; 512]);
        assert_eq!(request(&bench, blk::VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    });
}

#[test]
fn requests_move_with_the_guest() {
    with_each(|io| {
        let (image, ram) = (Image::new(), ram());
        let here = bench(&ram, image.disk(), io);
        here.start(FLUSH, 1);
        assert_eq!(read(&here, 1, 512), OK);
        ask(&here, blk::VIRTIO_BLK_T_IN, 42, &[(DATA, 512, WRITE)]);
        here.gate.set(Wanted::Hold);
        here.serve_all(0);
        let there = bench(&ram, image.disk(), io);
        there.slot.load(&here.slot.save()).unwrap();
        there.serve_all(0);
        assert_eq!(there.used(0), (2, 513));
        assert_eq!(there.bytes(DATA, 512), [42; 512]);
    });
}

#[test]
fn what_is_no_disk_is_refused_with_the_reason() {
    let image = Image::new();
    let refusal = |path: &Path| {
        let config = DiskConfig {
            path: path.to_owned(),
            ..image.config()
        };
        Disk::open(&config, "root".into())
            .err()
            .unwrap()
            .to_string()
    };
    let missing = refusal(Path::new("/no/such/image"));
    assert!(missing.contains("'root' (/no/such/image)"), "{missing}");
    assert!(refusal(Path::new("/dev/null")).contains("neither a file"));
    let odd = image.dir.path().join("odd");
    fs::write(&odd, [0; 513]).unwrap();
    assert!(refusal(&odd).contains("truncate --size=%512"));
    fs::write(&odd, []).unwrap();
    assert!(refusal(&odd).contains("0 bytes"));
}

#[test]
fn one_writer_or_many_readers() {
    let image = Image::new();
    let read_only = || {
        let config = DiskConfig {
            access: Access::ReadOnly,
            ..image.config()
        };
        Disk::open(&config, "b".into()).unwrap()
    };
    let (one, other) = (image.disk(), image.disk());
    assert!(one.lock().unwrap());
    assert!(!one.lock().unwrap());
    one.check_lock().unwrap();
    let refused = other.lock().unwrap_err().to_string();
    assert!(refused.contains("another process uses"), "{refused}");
    assert!(other.check_lock().is_err() && read_only().lock().is_err());
    one.unlock().unwrap();
    other.check_lock().unwrap();
    assert!(one.lock().unwrap());
    drop(one);
    let readers = [read_only(), read_only()];
    assert!(readers.iter().all(|reader| reader.lock().unwrap()));
    assert!(other.lock().is_err());
    drop(readers);
    other.lock().unwrap();
}
