//! Pages of zeros: they carry no data in the stream, and must become zero all the same; and memory that is given back
//! because only zeros arrived must not take data with it.

use std::collections::VecDeque;
use std::io::Write;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_memory::mmap::MmapRegionBuilder;
use vmferry_dirty::{BlockIndex, DirtyLog, LogError, PAGE_SIZE, PageIndex, PageRange};
use vmferry_engine::seam::{Activity, DeviceState, Guest, GuestError, PauseError};
use vmferry_engine::{Destination, Parameters, RamBlock, Source, Uri};
use vmferry_wire::{Command, DescribedSection, Encoder, RamLayout, vm_description};

use crate::common::{Random, any_port, parameters, wait_until};
use crate::toy::Quiet;

/// Four regions of 2 MiB: so large are the pieces of memory that a destination populates and gives back.
const PAGES: usize = 4 * REGION;
const REGION: usize = 512;

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zero,
    /// This byte, everywhere.
    Data(u8),
}

/// What the guest writes between two passes.
type Writes = Vec<(usize, Content)>;

/// A guest that writes only when the engine looks at its log, so that each write has its place between two passes.
struct Scripted {
    ram: [RamBlock; 1],
    script: Script,
}

struct Script {
    block: RamBlock,
    to_come: Mutex<VecDeque<Writes>>,
}

impl Script {
    fn is_over(&self) -> bool {
        self.to_come.lock().unwrap().is_empty()
    }
}

fn write(block: &RamBlock, page: usize, content: Content) {
    match content {
        Content::Zero => block.write_zeros(PageIndex(page)),
        Content::Data(byte) => block.write_page(PageIndex(page), &[byte; PAGE_SIZE]),
    }
}

impl Scripted {
    fn new(script: impl IntoIterator<Item = Writes>) -> Arc<Self> {
        let region = MmapRegionBuilder::<()>::new(PAGES * PAGE_SIZE)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map(Arc::new)
            .expect("8 MiB of memory");
        let start = region.as_ptr();
        // SAFETY: the region is mapped as long as the Arc lives, and nobody has a reference into it.
        let block = unsafe { RamBlock::new("scripted.ram", start, PAGES * PAGE_SIZE, region) };
        let block = block.unwrap();
        Arc::new(Scripted {
            ram: [block.clone()],
            script: Script {
                block,
                to_come: Mutex::new(script.into_iter().collect()),
            },
        })
    }

    /// What its pages hold.
    fn contents(&self) -> Vec<Content> {
        let mut bytes = [0; PAGE_SIZE];
        let content = |page| {
            self.ram[0].read_page(PageIndex(page), &mut bytes);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "{page} is torn");
            match bytes[0] {
                0 => Content::Zero,
                byte => Content::Data(byte),
            }
        };
        (0..PAGES).map(content).collect()
    }
}

impl DirtyLog for Script {
    fn start(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn stop(&self) -> Result<(), LogError> {
        Ok(())
    }

    fn fetch(&self, _: BlockIndex, into: &mut [u64]) -> Result<(), LogError> {
        let writes = self.to_come.lock().unwrap().pop_front();
        for (page, content) in writes.unwrap_or_default() {
            write(&self.block, page, content);
            into[page / 64] |= 1 << (page % 64);
        }
        Ok(())
    }

    fn needs_arming(&self) -> bool {
        false
    }

    fn arm(&self, _: BlockIndex, _: PageRange, _: &[u64]) -> Result<(), LogError> {
        Ok(())
    }
}

impl Guest for Scripted {
    fn ram(&self) -> &[RamBlock] {
        &self.ram
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.script
    }

    fn describe(&self) -> Result<DeviceState, GuestError> {
        Ok(DeviceState {
            idstr: "vmferry/scripted".to_owned(),
            instance_id: 0,
            version_id: 1,
            data: Vec::new(),
        })
    }

    fn check_description(&self, _: &DeviceState) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&self, _: Duration) -> Result<Activity, PauseError> {
        Ok(Activity::Paused)
    }

    fn resume(&self, _: Activity) -> Result<(), GuestError> {
        Ok(())
    }

    fn save_devices(&self) -> Result<Vec<DeviceState>, GuestError> {
        Ok(Vec::new())
    }

    fn load_devices(&self, _: &[DeviceState]) -> Result<(), GuestError> {
        Ok(())
    }

    fn start(&self, _: Activity, _: Duration) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Every page has a history of its own over five passes: in each it stays as it is, becomes zero, or becomes other data.
#[test]
fn pages_become_zero_and_data_again_from_pass_to_pass() {
    const PASSES: u32 = 5;
    let script = (0..PASSES).map(|pass| {
        let content = |page: usize| match page / 3_usize.pow(pass) % 3 {
            0 => None,
            1 => Some((page, Content::Zero)),
            _ => Some((page, Content::Data(pass as u8 + 1))),
        };
        (0..PAGES).filter_map(content).collect()
    });
    let (here, there) = (Scripted::new(script), Scripted::new([]));
    let incoming = Destination::start(there.clone(), &any_port(), Box::new(Quiet)).unwrap();
    // Nobody pauses the guest as long as something is dirty, and then it may take its time.
    let endless = Parameters {
        downtime_limit: Duration::from_nanos(1),
        ..parameters()
    };
    let uri = incoming.uri().clone();
    let outgoing = Source::start(here.clone(), uri, endless, Box::new(Quiet)).unwrap();
    wait_until("the guest has written all", || {
        here.script.is_over() || outgoing.info().status.is_final()
    });
    outgoing.set_parameters(parameters());
    wait_until("the migration ends", || outgoing.info().status.is_final());
    let ram = outgoing.info().ram;
    outgoing.wait().unwrap();
    incoming.wait().unwrap();
    assert!(here.script.is_over(), "the guest has not written all");
    assert_eq!(here.contents(), there.contents());
    // A third of the pages in each pass after the first, and more in that.
    let zeros = u64::from(PASSES) * PAGES as u64 / 4;
    assert!(ram.duplicate >= zeros, "{} pages of zeros", ram.duplicate);
}

/// Sends pages to a new guest, one after the other; returns it when it has arrived.
fn arrive(pages: &Writes) -> Arc<Scripted> {
    let there = Scripted::new([]);
    let layout = RamLayout::new([("scripted.ram", (PAGES * PAGE_SIZE) as u64)]).unwrap();
    let mut encoder = Encoder::new(layout);
    let mut stream = Vec::new();
    encoder.stream_header(&mut stream);
    encoder.configuration(&mut stream, "microvm").unwrap();
    let description = there.describe().unwrap();
    encoder.device_state(&mut stream, &description).unwrap();
    encoder.ram_start(&mut stream);
    encoder.ram_part(&mut stream);
    for &(page, content) in pages {
        let offset = (page * PAGE_SIZE) as u64;
        match content {
            Content::Zero => encoder.zero_page(&mut stream, 0, offset),
            Content::Data(byte) => {
                encoder.page(&mut stream, 0, offset);
                stream.extend_from_slice(&[byte; PAGE_SIZE]);
            }
        }
    }
    encoder.end_of_ram_records(&mut stream);
    encoder.command(&mut stream, Command::SwitchoverStart);
    encoder.ram_end(&mut stream);
    encoder.end_of_ram_records(&mut stream);
    let state = DeviceState {
        idstr: "vmferry/run-state".to_owned(),
        instance_id: 0,
        version_id: 1,
        data: b"paused".to_vec(),
    };
    encoder.device_state(&mut stream, &state).unwrap();
    let sections = [DescribedSection::from(&state)];
    let description = vm_description("microvm", &sections);
    encoder.vm_description(&mut stream, &description).unwrap();
    encoder.eof(&mut stream);

    let incoming = Destination::start(there.clone(), &any_port(), Box::new(Quiet)).unwrap();
    let Uri::Tcp { port, .. } = *incoming.uri() else {
        panic!("{} is not TCP", incoming.uri());
    };
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.write_all(&stream).unwrap();
    drop(socket);
    incoming.wait().expect("the guest has arrived");
    there
}

/// What a guest holds when these pages have arrived, last word last.
fn expected(pages: &Writes) -> Vec<Content> {
    let mut contents = vec![Content::Zero; PAGES];
    for &(page, content) in pages {
        contents[page] = content;
    }
    contents
}

#[test]
fn zeros_replace_data_and_data_replaces_zeros() {
    let pages = vec![
        (7, Content::Data(1)),
        (8, Content::Data(1)),
        (9, Content::Zero),
        (7, Content::Zero),
        (9, Content::Data(2)),
        (8, Content::Zero),
        (8, Content::Data(3)),
    ];
    assert_eq!(arrive(&pages).contents(), expected(&pages));
}

/// Zeros come to a region of memory and go on to another one, so the first may be given back: but not if it holds data,
/// wherever in it, and whether that came before the zeros or among them.
#[test]
fn memory_with_data_is_not_given_back() {
    for data in [0, 1, REGION / 2, REGION - 1] {
        let zero = (data + 1) % REGION;
        let pages = vec![
            (REGION + data, Content::Data(1)),
            (REGION + zero, Content::Zero),
            (2 * REGION + zero, Content::Zero),
            (2 * REGION + data, Content::Data(2)),
            (zero, Content::Zero),
            (3 * REGION, Content::Zero),
        ];
        assert_eq!(arrive(&pages).contents(), expected(&pages), "{data}");
    }
}

#[test]
fn data_and_zeros_in_any_order() {
    let mut random = Random::new("data_and_zeros_in_any_order");
    for _ in 0..10 {
        // Few pages, so that each has a history; in all regions.
        let mut write = || {
            let page = random.below(4) as usize * REGION + random.below(8) as usize * 73;
            let content = match random.below(3) {
                0 => Content::Data(random.below(255) as u8 + 1),
                _ => Content::Zero,
            };
            (page % PAGES, content)
        };
        let pages = (0..200).map(|_| write()).collect();
        assert_eq!(arrive(&pages).contents(), expected(&pages));
    }
}
