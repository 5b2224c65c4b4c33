//! `vmferry run`: a machine, its monitor, and the migrations in and out of it.

mod balloon;
mod dirty_rate;
mod migrations;
mod monitor;
mod signals;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use anyhow::{anyhow, bail};
use vmferry_control::schema::{Event, ShutdownCause, ShutdownData};
use vmferry_control::{EventBus, QmpServer};
use vmferry_engine::room::Room;
use vmferry_vmm::{Backing, KernelSource, Machine, MachineConfig, MachineEvent, OnEvent, OnReset};

use crate::cli::{self, Incoming, Kernel};
use crate::logging::note;
use migrations::Migrations;
use monitor::Monitor;
pub use signals::Signals;

/// Why the process is to end.
#[derive(Debug)]
pub enum Exit {
    /// The guest or somebody outside wants it.
    ShutDown(ShutdownData),
    /// The guest that was to arrive did not.
    IncomingFailed(String),
}

impl Exit {
    /// Somebody outside wants it.
    pub fn host(reason: ShutdownCause) -> Self {
        Exit::ShutDown(ShutdownData {
            guest: false,
            reason,
        })
    }
}

/// Runs a guest until it shuts down or somebody ends it.
pub fn run(options: cli::Run, signals: Signals) -> anyhow::Result<()> {
    if options.kernel.is_none() && options.incoming.is_none() {
        bail!("nothing to run: give --kernel PATH, --kernel guest:NAME, or --incoming URI");
    }
    let waits_for_the_monitor = options.paused || matches!(options.incoming, Some(Incoming::Defer));
    if waits_for_the_monitor && options.qmp.is_none() {
        bail!("nobody could start the guest: --paused and --incoming defer need --qmp");
    }
    let events = EventBus::new();
    let (exit, exits) = channel();
    // Before there is anything that an end would leave behind.
    signals.watch(exit.clone())?;
    let on_event = on_event(
        events.clone(),
        exit.clone(),
        balloon::changes(events.clone())?,
    );
    warn_of_little_memory(options.memory);
    let machine = Machine::new(config(&options), on_event)?;
    if options.allow_changed_disks {
        machine.accept_changed_disks();
    }
    let migrations = Migrations::new(machine.clone(), events.clone(), exit.clone());
    let name = options.name.clone();
    let monitor = Arc::new(Monitor::new(
        machine.clone(),
        migrations.clone(),
        name,
        exit,
    ));
    if options.paused && options.incoming.is_some() {
        machine.pause()?;
    }
    let server = match &options.qmp {
        Some(path) => Some(QmpServer::bind(path, monitor, events.clone())?),
        None => None,
    };
    match &options.incoming {
        Some(Incoming::Uri(uri)) => {
            let uri = migrations.receive(uri, migrations::OnFailure::Exit)?;
            note(format!("vmferry: waiting for a guest at {uri}"));
        }
        Some(Incoming::Defer) => {}
        None if options.paused => {}
        None => machine.resume()?,
    }
    let result = match exits.recv()? {
        Exit::ShutDown(data) => {
            events.emit(Event::Shutdown(data));
            Ok(())
        }
        Exit::IncomingFailed(why) => Err(anyhow!("the guest did not arrive: {why}")),
    };
    // The last answers go out first, then migrations end, then the machine.
    drop(server);
    migrations.end();
    result
}

/// Says so if a guest has more memory than this process can ever get.
fn warn_of_little_memory(guest: u64) {
    match Room::look() {
        Ok(room) if room.tightest().limit < guest => note(format!(
            "vmferry: the guest has {} MiB of memory, this process may use {} MiB (by {}): the kernel ends it if the guest uses \
             more",
            guest >> 20,
            room.tightest().limit >> 20,
            room.tightest().source,
        )),
        Ok(_) => {}
        Err(error) => tracing::debug!("cannot tell how much memory there is: {error}"),
    }
}

fn config(options: &cli::Run) -> MachineConfig {
    MachineConfig {
        name: options.name.clone().unwrap_or_default(),
        cpus: options.cpus,
        memory: options.memory,
        backing: Backing::Private,
        dirty_log: options.dirty_log,
        kernel: options.kernel.clone().map(|kernel| match kernel {
            Kernel::Guest(elf) => KernelSource::Bytes(Cow::Borrowed(elf)),
            Kernel::Path(path) => KernelSource::Path(path),
        }),
        initrd: options.initrd.clone(),
        cmdline: options.cmdline.clone(),
        serial: options.serial.clone(),
        disks: options.disk.clone(),
        nets: options.net.clone(),
        console: options.console.clone(),
        rng: options.rng,
        balloon: options.balloon,
        on_reset: match options.no_reboot {
            true => OnReset::Shutdown,
            false => OnReset::Reset,
        },
        incoming: options.incoming.is_some(),
    }
}

/// Passes on what happens to the machine. Straight to the bus, so that clients see it before what is only caused by
/// it: STOP before the migration that goes on from there.
fn on_event(events: EventBus, exit: Sender<Exit>, balloon: Sender<u64>) -> OnEvent {
    Box::new(move |event| {
        let end = |guest, reason| {
            // Nobody listens any more when the process is ending already.
            let _ = exit.send(Exit::ShutDown(ShutdownData { guest, reason }));
        };
        match event {
            MachineEvent::Stop => events.emit(Event::Stop),
            MachineEvent::Resume => events.emit(Event::Resume),
            MachineEvent::Reset { guest } => {
                let reason = match guest {
                    true => ShutdownCause::GuestReset,
                    false => ShutdownCause::HostQmpSystemReset,
                };
                events.emit(Event::Reset(ShutdownData { guest, reason }));
            }
            MachineEvent::PowerButton => events.emit(Event::Powerdown),
            MachineEvent::Shutdown { cause } => match cause {
                vmferry_vmm::ShutdownCause::GuestShutdown => {
                    end(true, ShutdownCause::GuestShutdown)
                }
                vmferry_vmm::ShutdownCause::GuestReset => end(true, ShutdownCause::GuestReset),
                vmferry_vmm::ShutdownCause::User => end(false, ShutdownCause::HostQmpQuit),
            },
            MachineEvent::InternalError { vcpu, reason } => {
                note(format!("vmferry: the guest stopped: vCPU {vcpu}: {reason}"));
            }
            MachineEvent::BalloonChange { actual } => {
                // Whoever listens does so as long as this lives.
                let _ = balloon.send(actual);
            }
            MachineEvent::QuitKey => end(false, ShutdownCause::HostUi),
        }
    })
}
