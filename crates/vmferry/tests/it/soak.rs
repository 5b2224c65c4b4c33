//! Many migrations in a row, and every second one is disturbed at a random moment: nothing is lost, nothing is left over.
//!
//! `VMFERRY_FULL=1` runs 1,000, which takes an hour or less; `VMFERRY_SOAK` sets another number, and `VMFERRY_SEED`
//! repeats the choices of a run. Without either it is skipped.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use vmferry_control::schema::{MigrationInfo, MigrationStatus, RunState};
use vmferry_testing::host::full_size;
use vmferry_testing::proxy::{Effect, Proxy, Way};

use crate::common::command::on_vm;
use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::outcome::gives_up;
use crate::common::vm::Vm;
use crate::common::{Random, eventually, say};

/// A guest starts afresh after so many migrations, so that its history does not grow without end.
const MIGRATIONS_OF_A_GUEST: usize = 50;

/// How long the peers of these migrations may be silent.
const PEER_TIMEOUT: Duration = Duration::from_secs(1);

/// Half of all migrations go no faster than this: the first pass takes about half a second.
const BANDWIDTH_CAP: u64 = 96 << 20;

/// Random moments lie within the time that a migration takes.
const LONGEST: Duration = Duration::from_millis(700);

/// The downtime limit, which is not changed here.
const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// How much longer a pause may be because the host is busy with something else.
const SCHEDULING: Duration = Duration::from_secs(5);

/// What disturbs a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disturbance {
    /// The user cancels it.
    Cancel,
    /// `kill -9` of the destination.
    KillDestination,
    /// `kill -9` of the command that asked for it.
    KillClient,
    /// The connection is cut.
    Cut,
    /// The network falls silent.
    Silence,
    /// The destination is stopped for longer than anybody waits for it.
    Stop,
}

const DISTURBANCES: [Disturbance; 6] = [
    Disturbance::Cancel,
    Disturbance::KillDestination,
    Disturbance::KillClient,
    Disturbance::Cut,
    Disturbance::Silence,
    Disturbance::Stop,
];

/// What a process holds: it must be the same before and after a migration that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
}

impl Holdings {
    fn of(vm: &Vm) -> Self {
        let count =
            |what| fs::read_dir(format!("/proc/{}/{what}", vm.pid())).map_or(0, Iterator::count);
        Holdings {
            descriptors: count("fd"),
            threads: count("task"),
        }
    }

    /// Waits until a process holds no more than this.
    #[track_caller]
    fn are_all_of(self, vm: &Vm) {
        let mut now = Holdings::of(vm);
        let is_more =
            |now: Holdings| now.descriptors > self.descriptors || now.threads > self.threads;
        let end = Instant::now() + Duration::from_secs(10);
        while is_more(now) {
            assert!(
                Instant::now() < end,
                "left over: {self:?} have become {now:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
            now = Holdings::of(vm);
        }
    }
}

/// What came of all migrations.
#[derive(Debug, Default)]
struct Tally {
    migrations: usize,
    disturbed: usize,
    arrived: usize,
    ran_on: usize,
    undecided: usize,
    lost_with_their_host: usize,
    /// Of those that were not disturbed.
    downtimes: Vec<Duration>,
}

/// One guest, its processes, and what has been done to them.
struct Campaign<'a> {
    guest: Guest<'a>,
    lab: &'a Lab,
    /// Processes that were killed: they leave the files of their sockets.
    killed: usize,
    /// What a process holds after a guest has arrived in it.
    arrived: Option<Holdings>,
}

fn shape() -> Shape {
    Shape {
        memory: "128M",
        cpus: 1,
        dirty_log: "auto",
        load: "ws=16M rate=5000 pattern=random fill=random cold=32M cold_fill=random sweep=20000"
            .to_owned(),
        more: Vec::new(),
    }
}

impl<'a> Campaign<'a> {
    fn begin(lab: &'a Lab) -> Self {
        Campaign {
            guest: Guest::boot(lab, shape()),
            lab,
            killed: 0,
            arrived: None,
        }
    }

    fn migration(&mut self, number: usize, random: &mut Random, tally: &mut Tally) {
        let name = format!("migration{number}");
        let incoming = match random.below(2) {
            0 => "tcp:127.0.0.1:0".to_owned(),
            _ => self.lab.uri("unix", &name),
        };
        let cap = *random.one_of(&[0, BANDWIDTH_CAP]);
        self.guest.vm.set_parameters(json!({
            "max-bandwidth": cap,
            "x-vmferry-peer-timeout": PEER_TIMEOUT.as_millis() as u64,
        }));
        let destination = self.guest.destination(&incoming);
        tally.migrations += 1;
        if number.is_multiple_of(2) {
            self.undisturbed(destination, tally);
        } else {
            let disturbance = *random.one_of(&DISTURBANCES);
            let moment = random.up_to(LONGEST);
            println!("{number}: {incoming}, cap {cap}, {disturbance:?} after {moment:?}");
            tally.disturbed += 1;
            self.disturbed(destination, disturbance, moment, random, tally);
        }
        // A killed destination leaves its socket.
        let _ = fs::remove_file(self.lab.path(&name));
        self.nothing_is_left();
    }

    fn undisturbed(&mut self, mut destination: Vm, tally: &mut Tally) {
        let info = self.guest.vm.migrate(&destination.uri());
        let downtime = info.x_vmferry_downtime_us.expect("it is known at the end");
        tally.downtimes.push(Duration::from_micros(downtime));
        self.arrives(destination, tally);
    }

    fn arrives(&mut self, mut destination: Vm, tally: &mut Tally) {
        destination.wait_for_state(RunState::Running);
        self.guest.moved_to(destination);
        self.guest.works();
        tally.arrived += 1;
        let first = *self
            .arrived
            .get_or_insert_with(|| Holdings::of(&self.guest.vm));
        first.are_all_of(&self.guest.vm);
    }

    fn disturbed(
        &mut self,
        mut destination: Vm,
        disturbance: Disturbance,
        moment: Duration,
        random: &mut Random,
        tally: &mut Tally,
    ) {
        let before = Holdings::of(&self.guest.vm);
        let proxy = Proxy::to(destination.uri()).start();
        if disturbance == Disturbance::KillClient {
            let client = on_vm("migrate", &self.guest.vm.socket, &[&proxy.uri]);
            let vm = &mut self.guest.vm;
            eventually("the migration to begin", || vm.info().status);
            std::thread::sleep(moment);
            drop(client);
        } else {
            let uri = &proxy.uri;
            self.guest.vm.execute("migrate", json!({"uri": uri}));
            std::thread::sleep(moment);
        }
        match disturbance {
            Disturbance::KillClient => {}
            // Refused when it is too late.
            Disturbance::Cancel => {
                drop(self.guest.vm.qmp.execute("migrate_cancel", Value::Null));
            }
            Disturbance::KillDestination => {
                destination.kill();
                self.killed += 1;
            }
            Disturbance::Cut => proxy.strike(Effect::Cut),
            Disturbance::Silence => {
                let ways = [Way::Forward, Way::Back];
                proxy.strike(Effect::Stall(*random.one_of(&ways)));
            }
            Disturbance::Stop => destination.signal(Signal::STOP),
        }
        let info = self.guest.vm.migration_ends();
        drop(proxy);
        if disturbance == Disturbance::Stop {
            destination.signal(Signal::CONT);
        }
        if disturbance == Disturbance::KillClient {
            assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
        }
        self.settle(destination, disturbance, &info, before, tally);
    }

    /// Sees to it that the guest goes on, on the one side where it may.
    fn settle(
        &mut self,
        mut destination: Vm,
        disturbance: Disturbance,
        info: &MigrationInfo,
        before: Holdings,
        tally: &mut Tally,
    ) {
        let is_killed = disturbance == Disturbance::KillDestination;
        if info.status == Some(MigrationStatus::Completed) {
            if !is_killed {
                return self.arrives(destination, tally);
            }
            // Its new host has taken it along.
            tally.lost_with_their_host += 1;
            self.guest.story().check();
            let source = std::mem::replace(&mut self.guest, Guest::boot(self.lab, shape())).vm;
            assert!(source.quit().success());
            return;
        }
        if self.guest.vm.run_state() == RunState::Running {
            tally.ran_on += 1;
            if !is_killed {
                gives_up(&mut destination);
            }
        } else {
            tally.undecided += 1;
            let why = info.error_desc.as_deref().unwrap_or_default();
            assert!(why.contains("during the hand-over"), "{info:?}");
            if !is_killed && runs_there(&mut destination) {
                return self.arrives(destination, tally);
            }
        }
        if destination.lives() {
            destination.quit();
        }
        if self.guest.vm.run_state() != RunState::Running {
            self.guest.vm.execute("cont", Value::Null);
        }
        self.guest.runs_on();
        before.are_all_of(&self.guest.vm);
    }

    /// One process runs the guest, and the files are those of the processes that there have been.
    #[track_caller]
    fn nothing_is_left(&mut self) {
        let directory = self.lab.path("");
        let directory = directory.to_str().expect("a plain name");
        let processes = eventually("other processes to end", || {
            let processes = processes_of(directory);
            (processes.len() <= 1).then_some(processes)
        });
        assert_eq!(processes, [self.guest.vm.pid()]);
        let (mut sockets, mut others) = (0, Vec::new());
        for entry in fs::read_dir(directory).expect("the directory") {
            let name = entry.expect("an entry").file_name();
            let name = name.to_string_lossy().into_owned();
            match name.rsplit_once('.') {
                Some((_, "qmp")) => sockets += 1,
                Some((_, "serial" | "stderr")) => {}
                _ => others.push(name),
            }
        }
        assert_eq!(others, Vec::<String>::new(), "files are left over");
        assert_eq!(sockets, 1 + self.killed, "sockets are left over");
    }

    fn end(mut self) {
        self.guest.verifies_all();
        let allowed = DOWNTIME_LIMIT + PEER_TIMEOUT + SCHEDULING;
        let story = self.guest.story();
        story.check_continuity(0, allowed.as_micros() as u64);
        self.nothing_is_left();
    }
}

/// Returns whether the guest of an undecided hand-over runs at its destination. Waits until that is known.
fn runs_there(destination: &mut Vm) -> bool {
    eventually("the destination to know", || {
        if !destination.lives() {
            return Some(false);
        }
        // It may end between two looks.
        let state = destination.qmp.query_status().ok()?.status;
        if state == RunState::Running {
            return Some(true);
        }
        let status = destination.qmp.query_migrate().ok()?.status;
        (status == Some(MigrationStatus::Failed)).then_some(false)
    })
}

/// The processes whose command lines speak of this directory.
fn processes_of(directory: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(directory)
    })
    .collect()
}

#[test]
fn many_migrations_half_of_them_disturbed() {
    let count = match std::env::var("VMFERRY_SOAK") {
        Ok(count) => count.parse().expect("VMFERRY_SOAK is a number"),
        Err(_) if full_size() => 1000,
        Err(_) => {
            say("SKIPPED: the soak runs with VMFERRY_FULL=1, or with VMFERRY_SOAK=NUMBER");
            return;
        }
    };
    let mut random = Random::new("soak");
    let (start, mut tally) = (Instant::now(), Tally::default());
    while tally.migrations < count {
        let Some(lab) = Lab::new() else { return };
        let mut campaign = Campaign::begin(&lab);
        for number in 0..MIGRATIONS_OF_A_GUEST.min(count - tally.migrations) {
            campaign.migration(number, &mut random, &mut tally);
        }
        campaign.end();
    }
    tally.downtimes.sort_unstable();
    let longest = *tally
        .downtimes
        .last()
        .expect("half of them were not disturbed");
    say(&format!(
        "soak: {} migrations in {:.0} s, {} disturbed: {} arrived, {} ran on, {} undecided, {} lost with their killed \
         host; downtime {:.1} ms (median) {:.1} ms (longest); corrupt 0, left over 0",
        tally.migrations,
        start.elapsed().as_secs_f64(),
        tally.disturbed,
        tally.arrived,
        tally.ran_on,
        tally.undecided,
        tally.lost_with_their_host,
        tally.downtimes[tally.downtimes.len() / 2].as_secs_f64() * 1e3,
        longest.as_secs_f64() * 1e3,
    ));
    assert!(
        longest <= DOWNTIME_LIMIT + SCHEDULING,
        "a pause of {longest:?}"
    );
}
