//! The payload guest `dirtier`, wherever it is.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use vmferry_control::schema::{MigrationInfo, MigrationStatus, RunState};
use vmferry_guests::Heartbeat;

use super::eventually;
use super::lab::Lab;
use super::story::Story;
use super::vm::Vm;

/// What a guest is like.
#[derive(Clone, Debug)]
pub struct Shape {
    pub memory: &'static str,
    pub cpus: u32,
    /// `--dirty-log` of the machines that it runs on.
    pub dirty_log: &'static str,
    /// The guest's own parameters, without the number of its vCPUs.
    pub load: String,
    /// Further arguments of the machines that it runs on.
    pub more: Vec<String>,
}

impl Shape {
    /// A guest that is quickly moved, and rewrites some of its memory.
    pub fn small() -> Self {
        Shape {
            memory: "256M",
            cpus: 1,
            dirty_log: "auto",
            load: "ws=32M rate=10000 pattern=random cold=64M sweep=20000".to_owned(),
            more: Vec::new(),
        }
    }

    /// A guest whose migration takes some time.
    pub fn medium() -> Self {
        Shape {
            memory: "512M",
            cpus: 2,
            dirty_log: "auto",
            load: "ws=64M rate=20000 pattern=random cold=256M sweep=30000".to_owned(),
            more: Vec::new(),
        }
    }

    /// The arguments of a machine for such a guest.
    fn machine<'a>(&'a self, cpus: &'a str) -> Vec<&'a str> {
        let (memory, dirty_log) = (self.memory, self.dirty_log);
        let always = ["--memory", memory, "--cpus", cpus, "--dirty-log", dirty_log];
        let more = self.more.iter().map(String::as_str);
        always.into_iter().chain(more).collect()
    }
}

/// A guest and its history.
pub struct Guest<'a> {
    pub lab: &'a Lab,
    pub shape: Shape,
    /// Where it is now.
    pub vm: Vm,
    /// Its output there and on all hosts before.
    parts: Vec<PathBuf>,
}

impl<'a> Guest<'a> {
    /// Starts a guest and waits until it is at work.
    pub fn boot(lab: &'a Lab, shape: Shape) -> Self {
        let cmdline = format!("vcpus={} {}", shape.cpus, shape.load);
        let cpus = shape.cpus.to_string();
        let kernel = ["--kernel", "guest:dirtier", "--cmdline", &cmdline];
        let vm = Vm::start(lab, &[&shape.machine(&cpus)[..], &kernel].concat());
        let guest = Guest {
            lab,
            shape,
            parts: vec![vm.serial.clone()],
            vm,
        };
        eventually("the guest's memory to be filled", || {
            guest.story().is_ready().then_some(())
        });
        guest
    }

    /// A machine of the same shape that waits for it.
    pub fn destination(&self, incoming: &str) -> Vm {
        let cpus = self.shape.cpus.to_string();
        let machine = self.shape.machine(&cpus);
        Vm::start(
            self.lab,
            &[&machine[..], &["--incoming", incoming]].concat(),
        )
    }

    /// A machine of the same shape that waits for it at a TCP port.
    pub fn tcp_destination(&self) -> Vm {
        self.destination("tcp:127.0.0.1:0")
    }

    /// Its migrations give up on a peer that is silent for three seconds.
    pub fn be_impatient(&mut self) {
        self.vm
            .set_parameters(json!({"x-vmferry-peer-timeout": 3000}));
    }

    /// Begins a migration that takes as long as its bandwidth limit makes it, until somebody lifts that. Gives back where the guest goes,
    /// and the address there.
    pub fn begin_slow_migration(&mut self) -> (Vm, String) {
        self.vm.set_parameters(json!({"max-bandwidth": 4 << 20}));
        let mut destination = self.tcp_destination();
        let uri = destination.uri();
        self.vm.execute("migrate", json!({"uri": uri}));
        self.vm.wait_for_status(MigrationStatus::Active);
        (destination, uri)
    }

    /// Takes note that the guest now is there. The process where it was ends.
    pub fn moved_to(&mut self, vm: Vm) {
        let before = std::mem::replace(&mut self.vm, vm);
        let status = before.quit();
        assert!(status.success(), "the source ends with {status}");
        self.parts.push(self.vm.serial.clone());
    }

    /// Moves the guest to a new process.
    #[track_caller]
    pub fn hop(&mut self) -> MigrationInfo {
        let mut destination = self.tcp_destination();
        let info = self.vm.migrate(&destination.uri());
        destination.wait_for_state(RunState::Running);
        self.moved_to(destination);
        info
    }

    /// What it has said so far.
    pub fn story(&self) -> Story {
        Story::read(&self.parts)
    }

    fn last(&self, vcpu: u32) -> Heartbeat {
        self.story().last(vcpu).unwrap_or_default()
    }

    /// Waits until every vCPU has said, where the guest is now, that it works, and that nothing is wrong.
    #[track_caller]
    pub fn works(&self) {
        for vcpu in 0..self.shape.cpus {
            let before = self.last(vcpu);
            eventually(&format!("a sign of life of vCPU {vcpu}"), || {
                let now = self.last(vcpu);
                (now.t > before.t && now.written > before.written).then_some(())
            });
        }
        self.story().check();
    }

    /// Waits until all of its memory has been verified, starting from now.
    #[track_caller]
    pub fn verifies_all(&self) {
        for vcpu in 0..self.shape.cpus {
            let before = self.last(vcpu);
            eventually(&format!("vCPU {vcpu} to verify its memory"), || {
                // One sweep may be under way.
                (self.last(vcpu).sweeps >= before.sweeps + 2).then_some(())
            });
        }
        self.story().check();
    }

    /// The guest is here, runs, and works.
    #[track_caller]
    pub fn runs_on(&mut self) {
        assert_eq!(self.vm.run_state(), RunState::Running);
        self.works();
    }

    /// The guest is here, stopped: not one more page is written.
    #[track_caller]
    pub fn stands_still(&mut self) {
        let state = self.vm.run_state();
        assert_ne!(state, RunState::Running);
        // What it printed last may still be on its way to the file.
        std::thread::sleep(Duration::from_millis(100));
        let before = self.last(0);
        std::thread::sleep(Duration::from_millis(1200));
        assert_eq!(before, self.last(0), "it is {state:?} and speaks");
    }
}
