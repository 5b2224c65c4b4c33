//! `vmferry run`: a machine, its monitor, and the migrations in and out of it.

mod migrations;
mod monitor;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Context, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmferry_control::schema::{Event, ShutdownCause, ShutdownData};
use vmferry_control::{EventBus, QmpServer};
use vmferry_vmm::{Backing, KernelSource, Machine, MachineConfig, MachineEvent, OnReset};

use crate::cli::{self, Incoming, Kernel};
use migrations::Migrations;
use monitor::Monitor;

/// Why the process is to end.
#[derive(Debug)]
pub enum Exit {
    /// The monitor's user wants it.
    Quit,
    /// A signal came.
    Signal,
    /// The guest that was to arrive did not.
    IncomingFailed(String),
}

/// Runs a guest until it shuts down or somebody ends it.
pub fn run(options: cli::Run) -> anyhow::Result<()> {
    if options.kernel.is_none() && options.incoming.is_none() {
        bail!("nothing to run: give --kernel PATH, --kernel guest:NAME, or --incoming URI");
    }
    let events = EventBus::new();
    let (exit, exits) = channel();
    let (machine_events, from_machine) = channel();
    let machine = Machine::new(config(&options), machine_events)?;
    let migrations = Migrations::new(machine.clone(), events.clone(), exit.clone());
    let name = options.name.clone();
    let monitor = Arc::new(Monitor::new(
        machine.clone(),
        migrations.clone(),
        name,
        exit.clone(),
    ));
    let server = match &options.qmp {
        Some(path) => Some(QmpServer::bind(path, monitor, events.clone())?),
        None => None,
    };
    end_on_signals(exit)?;
    match &options.incoming {
        Some(Incoming::Uri(uri)) => {
            let uri = migrations.receive(uri, migrations::OnFailure::Exit)?;
            eprintln!("vmferry: waiting for a guest at {uri}");
        }
        Some(Incoming::Defer) => {}
        None if options.paused => {}
        None => machine.resume()?,
    }
    let result = serve(&from_machine, &exits, &events);
    // The last answers go out first, then migrations end, then the machine.
    drop(server);
    migrations.end();
    result
}

fn config(options: &cli::Run) -> MachineConfig {
    MachineConfig {
        name: options.name.clone().unwrap_or_default(),
        cpus: options.cpus,
        memory: options.memory,
        backing: Backing::Private,
        kernel: options.kernel.clone().map(|kernel| match kernel {
            Kernel::Guest(elf) => KernelSource::Bytes(Cow::Borrowed(elf)),
            Kernel::Path(path) => KernelSource::Path(path),
        }),
        initrd: options.initrd.clone(),
        cmdline: options.cmdline.clone(),
        serial: options.serial.clone(),
        on_reset: match options.no_reboot {
            true => OnReset::Shutdown,
            false => OnReset::Reset,
        },
        incoming: options.incoming.is_some(),
    }
}

fn end_on_signals(exit: Sender<Exit>) -> anyhow::Result<()> {
    let mut signals =
        Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch for signals")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for _ in signals.forever() {
                // The process may be ending already.
                let _ = exit.send(Exit::Signal);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// Passes on what happens to the machine, until the process is to end.
fn serve(
    from_machine: &Receiver<MachineEvent>,
    exits: &Receiver<Exit>,
    events: &EventBus,
) -> anyhow::Result<()> {
    let shut_down = |guest, reason| events.emit(Event::Shutdown(ShutdownData { guest, reason }));
    loop {
        match exits.try_recv() {
            Ok(Exit::Quit) => {
                shut_down(false, ShutdownCause::HostQmpQuit);
                return Ok(());
            }
            Ok(Exit::Signal) => {
                shut_down(false, ShutdownCause::HostSignal);
                return Ok(());
            }
            Ok(Exit::IncomingFailed(why)) => bail!("the guest did not arrive: {why}"),
            Err(_) => {}
        }
        match from_machine.recv_timeout(Duration::from_millis(20)) {
            Ok(MachineEvent::Stop) => events.emit(Event::Stop),
            Ok(MachineEvent::Resume) => events.emit(Event::Resume),
            Ok(MachineEvent::Reset { guest }) => {
                let reason = match guest {
                    true => ShutdownCause::GuestReset,
                    false => ShutdownCause::HostQmpSystemReset,
                };
                events.emit(Event::Reset(ShutdownData { guest, reason }));
            }
            Ok(MachineEvent::Shutdown { guest }) => {
                let reason = match guest {
                    true => ShutdownCause::GuestShutdown,
                    false => ShutdownCause::HostQmpQuit,
                };
                shut_down(guest, reason);
                return Ok(());
            }
            Ok(MachineEvent::InternalError { vcpu, reason }) => {
                eprintln!("vmferry: the guest stopped: vCPU {vcpu}: {reason}");
            }
            Ok(MachineEvent::QuitKey) => {
                shut_down(false, ShutdownCause::HostUi);
                return Ok(());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}
