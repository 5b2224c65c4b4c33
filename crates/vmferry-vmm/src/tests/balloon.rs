//! A balloon in whole machines: free pages are not sent.

use std::sync::Mutex;

use vmferry_engine::seam::Guest;
use vmferry_engine::{Destination, Discipline, Observer, Parameters, Source, Status};

use super::migration::incoming;
use super::*;
use crate::config::BalloonConfig;

/// The queue of free pages, with statistics chosen, too.
const FREE_PAGES: u32 = 3;
const FEATURES: u32 = 1 << 1 | 1 << 3;
const ID: u64 = 0x50_0000;
/// Where the guest has pages that it has filled, of which the first half is free again.
const FILLED: u64 = 16 << 20;
const HALF: u64 = 16 << 20;

struct Quiet;

impl Observer for Quiet {
    fn status(&self, _: Status) {}
    fn pass(&self, _: u64) {}
}

/// A driver of the balloon, beside the guest.
struct Driver {
    machine: Arc<Machine>,
    /// Requests made so far.
    made: Mutex<u16>,
}

impl Driver {
    fn start(machine: Arc<Machine>) -> Self {
        start_device(&machine, FEATURES, FREE_PAGES);
        Driver {
            machine,
            made: Mutex::new(0),
        }
    }

    fn command(&self) -> u32 {
        command_id(&self.machine)
    }

    /// Makes a request of one buffer, and waits for its end.
    fn request(&self, at: u64, len: u32, flags: u16) {
        let memory = &self.machine.ram.memory;
        let mut made = self.made.lock().unwrap();
        memory.write_obj(at, GuestAddress(RINGS)).unwrap();
        memory.write_obj(len, GuestAddress(RINGS + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(RINGS + 12)).unwrap();
        *made += 1;
        memory
            .write_obj(*made, GuestAddress(RINGS + 0x1002))
            .unwrap();
        self.machine.devices.slots()[0].write(0x50, &FREE_PAGES.to_le_bytes());
        wait_for("the balloon", || {
            memory
                .read_obj::<u16>(GuestAddress(RINGS + 0x2002))
                .unwrap()
                == *made
        });
    }

    fn say(&self, id: u32) {
        let memory = &self.machine.ram.memory;
        memory.write_obj(id, GuestAddress(ID)).unwrap();
        self.request(ID, 4, 0);
    }
}

fn command_id(machine: &Machine) -> u32 {
    let mut id = [0; 4];
    machine.devices.slots()[0].read(0x108, &mut id);
    u32::from_le_bytes(id)
}

#[test]
fn free_pages_are_not_sent() {
    if !kvm() {
        return;
    }
    for discipline in Discipline::ALL {
        let dir = tempfile::tempdir().unwrap();
        let with_balloon = |config: MachineConfig| MachineConfig {
            balloon: Some(BalloonConfig::default()),
            ..config
        };
        let (source, _) = machine(with_balloon(config(1, &dir.path().join("here"))));
        let (destination, _) = machine(with_balloon(incoming(1, &dir.path().join("there"))));
        assert!(source.free_page_hinting().is_none(), "there is no driver");
        source.resume().unwrap();
        wait_for_progress(&source);
        let memory = &source.ram.memory;
        let filled = vec![7; 2 * HALF as usize];
        memory.write_slice(&filled, GuestAddress(FILLED)).unwrap();
        let driver = Driver::start(source.clone());
        assert!(source.free_page_hinting().is_some());

        let uri = "tcp:127.0.0.1:0".parse().unwrap();
        let arriving = Destination::start(destination.clone(), &uri, Box::new(Quiet)).unwrap();
        let parameters = Parameters {
            discipline,
            // Slow enough for the guest to say what is free before it is sent.
            max_bandwidth: Some(20 << 20),
            ..Parameters::default()
        };
        let leaving = Source::start(
            source.clone(),
            arriving.uri().clone(),
            parameters,
            Box::new(Quiet),
        )
        .unwrap();
        wait_for("a question", || driver.command() >= 2);
        let question = driver.command();
        driver.say(question);
        // From behind: the migration comes from the front.
        for piece in (0..4).rev() {
            driver.request(FILLED + piece * (HALF / 4), (HALF / 4) as u32, 2);
        }
        // The guest uses one page of them again.
        let again = GuestAddress(FILLED + 4096);
        memory.write_slice(&[9; 4096], again).unwrap();
        driver.say(0);
        wait_for("the end", || leaving.info().status.is_final());
        let hinted = leaving.info().ram.hinted;
        leaving.wait().unwrap();
        arriving.wait().unwrap();

        eprintln!("{discipline}: {hinted} pages saved");
        assert!(hinted >= HALF / 4096 / 2, "{discipline}: {hinted} saved");
        assert_eq!(command_id(&destination), 1, "the guest may use its pages");
        let mut pages = vec![0; 2 * HALF as usize];
        let arrived = &destination.ram.memory;
        arrived
            .read_slice(&mut pages, GuestAddress(FILLED))
            .unwrap();
        let (free, used) = pages.split_at(HALF as usize);
        assert!(used.iter().all(|byte| *byte == 7), "{discipline}");
        assert!(
            free[4096..8192].iter().all(|byte| *byte == 9),
            "{discipline}"
        );
        let absent = free.chunks(4096).filter(|page| page[0] == 0).count() as u64;
        assert!(absent >= HALF / 4096 / 2, "{discipline}: {absent}");
        wait_for_progress(&destination);
    }
}
