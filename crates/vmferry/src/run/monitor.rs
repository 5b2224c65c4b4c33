//! The monitor's commands, carried out.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use vmferry_control::schema::{
    AnnounceSelf, Balloon, BalloonInfo, BlockDeviceInfo, BlockInfo, BlockIo, BlockResize,
    BlockdevCacheInfo, CalcDirtyRate, Cont, CpuInfoFast, CpuInstanceProperties, DetectZeroes,
    DirtyRateInfo, DirtyTracking, ImageInfo, KvmInfo, Migrate, MigrateContinue, MigrateIncoming,
    MigrateSetCapabilities, MigrateSetParameters, MigrationCapability, MigrationCapabilityStatus,
    MigrationInfo, MigrationParameters, MigrationRamStats, MigrationStatus, NameInfo,
    QueryDirtyRate, RunState, ShutdownCause, SocketAddress, StatusInfo, WaitingFor,
};
use vmferry_control::{ErrorClass, Handler, QmpError};
use vmferry_engine::{ArmingChunk, Info, Parameters, Status};
use vmferry_vmm::{Access, Announcement, Caching, DiskInfo, DiskIo, Machine, MachineError};

use super::Exit;
use super::migrations::{Migrations, OnFailure, Settings};

/// Carries out what the monitor's clients ask for.
pub struct Monitor {
    machine: Arc<Machine>,
    migrations: Arc<Migrations>,
    name: Option<String>,
    exit: Sender<Exit>,
}

impl Monitor {
    pub fn new(
        machine: Arc<Machine>,
        migrations: Arc<Migrations>,
        name: Option<String>,
        exit: Sender<Exit>,
    ) -> Self {
        Monitor {
            machine,
            migrations,
            name,
            exit,
        }
    }
}

impl Handler for Monitor {
    fn query_status(&self) -> Result<StatusInfo, QmpError> {
        let state = self.machine.run_state();
        Ok(StatusInfo {
            status: run_state(state),
            running: state == vmferry_vmm::RunState::Running,
        })
    }

    fn query_name(&self) -> Result<NameInfo, QmpError> {
        Ok(NameInfo {
            name: self.name.clone(),
        })
    }

    fn query_cpus_fast(&self) -> Result<Vec<CpuInfoFast>, QmpError> {
        let cpus = self.machine.vcpus().into_iter().map(|cpu| CpuInfoFast {
            cpu_index: cpu.index.into(),
            qom_path: format!("/machine/cpu[{}]", cpu.index),
            thread_id: cpu.thread_id.unsigned_abs().into(),
            props: Some(CpuInstanceProperties {
                socket_id: 0,
                core_id: cpu.index.into(),
                thread_id: 0,
            }),
            target: "x86_64".to_owned(),
        });
        Ok(cpus.collect())
    }

    fn query_block(&self) -> Result<Vec<BlockInfo>, QmpError> {
        Ok(self.machine.disks().iter().map(block_info).collect())
    }

    fn block_resize(&self, arguments: BlockResize) -> Result<(), QmpError> {
        let BlockResize {
            device,
            node_name,
            size,
        } = arguments;
        let id = device.as_deref().or(node_name.as_deref());
        let disks = self.machine.disks();
        let Some(disk) = disks.iter().find(|disk| Some(&disk.id[..]) == id) else {
            return Err(QmpError::generic(format!(
                "Cannot find device='{}' nor node-name='{}'",
                device.unwrap_or_default(),
                node_name.unwrap_or_default()
            )));
        };
        match u64::try_from(size) {
            Ok(size @ 1..) => self.machine.resize_disk(&disk.id, size).map_err(generic),
            _ => Err(QmpError::generic("Parameter 'size' expects a >0 size")),
        }
    }

    fn announce_self(&self, arguments: AnnounceSelf) -> Result<(), QmpError> {
        let times = [arguments.initial, arguments.step, arguments.max];
        let announcement = announcement(arguments.rounds, times);
        let interfaces = arguments.interfaces.as_deref();
        self.machine
            .announce(announcement, interfaces)
            .map_err(generic)
    }

    fn balloon(&self, arguments: Balloon) -> Result<(), QmpError> {
        if self.machine.config().balloon.is_none() {
            return Err(no_balloon());
        }
        self.machine.set_balloon(arguments.value).map_err(generic)
    }

    fn query_balloon(&self) -> Result<BalloonInfo, QmpError> {
        let info = self.machine.balloon().ok_or_else(no_balloon)?;
        let stats = info.statistics.into_iter();
        Ok(BalloonInfo {
            actual: info.actual,
            stats: stats
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        })
    }

    fn query_kvm(&self) -> Result<KvmInfo, QmpError> {
        Ok(KvmInfo {
            enabled: true,
            present: true,
        })
    }

    fn stop(&self) -> Result<(), QmpError> {
        self.machine.pause().map_err(generic)
    }

    fn cont(&self, arguments: Cont) -> Result<(), QmpError> {
        match self.machine.resume() {
            Err(MachineError::HandedOver) if arguments.x_vmferry_run_twice => {
                self.machine.resume_anyway().map_err(generic)
            }
            Err(error @ MachineError::HandedOver) => Err(generic(format!(
                "{error}; if you have made sure that it does not run there and never will, insist: \
                 {{\"execute\": \"cont\", \"arguments\": {{\"x-vmferry-run-twice\": true}}}}"
            ))),
            result => result.map_err(generic),
        }
    }

    fn quit(&self) -> Result<(), QmpError> {
        // Nobody listens any more when the process is ending already.
        let _ = self.exit.send(Exit::host(ShutdownCause::HostQmpQuit));
        Ok(())
    }

    fn system_reset(&self) -> Result<(), QmpError> {
        self.machine.reset().map_err(generic)
    }

    fn system_powerdown(&self) -> Result<(), QmpError> {
        self.machine.power_button().map_err(generic)
    }

    fn migrate(&self, arguments: Migrate) -> Result<(), QmpError> {
        self.migrations.send(arguments.uri)
    }

    fn migrate_incoming(&self, arguments: MigrateIncoming) -> Result<(), QmpError> {
        let on_failure = match arguments.exit_on_error {
            true => OnFailure::Exit,
            false => OnFailure::Stay,
        };
        if arguments.x_vmferry_allow_changed_disks {
            self.machine.accept_changed_disks();
        }
        let received = self.migrations.receive(&arguments.uri, on_failure);
        received.map(drop).map_err(generic)
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.migrations.cancel()
    }

    fn migrate_continue(&self, arguments: MigrateContinue) -> Result<(), QmpError> {
        self.migrations.proceed(arguments.state)
    }

    fn query_migrate(&self) -> Result<MigrationInfo, QmpError> {
        Ok(self
            .migrations
            .info()
            .map(migration_info)
            .unwrap_or_default())
    }

    fn migrate_set_parameters(&self, arguments: MigrateSetParameters) -> Result<(), QmpError> {
        self.migrations.change(|settings| {
            let mut all = parameters(settings, self.machine.announcement());
            all.apply(arguments);
            self.machine.set_announcement(announcement(
                all.announce_rounds,
                [all.announce_initial, all.announce_step, all.announce_max],
            ));
            settings.parameters = Parameters {
                downtime_limit: Duration::from_millis(all.downtime_limit),
                max_bandwidth: (all.max_bandwidth > 0).then_some(all.max_bandwidth),
                discipline: all.x_vmferry_discipline,
                arming_chunk: ArmingChunk::from_bytes(all.x_vmferry_arming_chunk as usize),
                peer_timeout: Duration::from_millis(all.x_vmferry_peer_timeout),
                ..settings.parameters
            };
        });
        Ok(())
    }

    fn query_migrate_parameters(&self) -> Result<MigrationParameters, QmpError> {
        let announcement = self.machine.announcement();
        Ok(parameters(&self.migrations.settings(), announcement))
    }

    fn migrate_set_capabilities(&self, arguments: MigrateSetCapabilities) -> Result<(), QmpError> {
        let wanted = arguments.capabilities;
        let no_return_path = |c: &MigrationCapabilityStatus| {
            c.capability == MigrationCapability::ReturnPath && !c.state
        };
        if wanted.iter().any(no_return_path) {
            let why =
                "Capability 'return-path' cannot be switched off: the guest is handed over on it";
            return Err(QmpError::generic(why));
        }
        self.migrations.change(|settings| {
            for MigrationCapabilityStatus { capability, state } in wanted {
                match capability {
                    MigrationCapability::Events => settings.events = state,
                    MigrationCapability::PauseBeforeSwitchover => {
                        settings.parameters.pause_before_switchover = state;
                    }
                    MigrationCapability::FreePageHints => {
                        settings.parameters.free_page_hints = state;
                    }
                    MigrationCapability::ReturnPath => {}
                }
            }
        });
        Ok(())
    }

    fn query_migrate_capabilities(&self) -> Result<Vec<MigrationCapabilityStatus>, QmpError> {
        let Settings { parameters, events } = self.migrations.settings();
        Ok([
            (MigrationCapability::Events, events),
            (MigrationCapability::ReturnPath, true),
            (
                MigrationCapability::PauseBeforeSwitchover,
                parameters.pause_before_switchover,
            ),
            (
                MigrationCapability::FreePageHints,
                parameters.free_page_hints,
            ),
        ]
        .map(|(capability, state)| MigrationCapabilityStatus { capability, state })
        .to_vec())
    }

    fn calc_dirty_rate(&self, arguments: CalcDirtyRate) -> Result<(), QmpError> {
        self.migrations.measure(arguments)
    }

    fn query_dirty_rate(&self, arguments: QueryDirtyRate) -> Result<DirtyRateInfo, QmpError> {
        self.migrations.measured(arguments.calc_time_unit)
    }
}

/// In QEMU's words.
fn no_balloon() -> QmpError {
    QmpError::new(
        ErrorClass::DeviceNotActive,
        "No balloon device has been activated",
    )
}

fn block_info(disk: &DiskInfo) -> BlockInfo {
    let path = disk.path.display().to_string();
    let format = "raw".to_owned();
    BlockInfo {
        device: disk.id.clone(),
        qdev: Some(format!("/machine/peripheral/{}", disk.id)),
        kind: "unknown".to_owned(),
        removable: false,
        locked: false,
        inserted: Some(BlockDeviceInfo {
            file: path.clone(),
            ro: disk.access == Access::ReadOnly,
            drv: format.clone(),
            backing_file_depth: 0,
            encrypted: false,
            detect_zeroes: DetectZeroes::Off,
            bps: 0,
            bps_rd: 0,
            bps_wr: 0,
            iops: 0,
            iops_rd: 0,
            iops_wr: 0,
            image: ImageInfo {
                filename: path,
                format,
                virtual_size: disk.bytes,
            },
            cache: BlockdevCacheInfo {
                writeback: true,
                direct: disk.caching == Caching::Direct,
                no_flush: false,
            },
            write_threshold: 0,
            active: disk.locked,
            x_vmferry_io: match disk.io {
                DiskIo::IoUring => BlockIo::IoUring,
                DiskIo::Synchronous => BlockIo::Synchronous,
            },
        }),
    }
}

/// An announcement of so many rounds; the times are in milliseconds.
fn announcement(rounds: u64, times: [u64; 3]) -> Announcement {
    let [initial, step, max] = times.map(Duration::from_millis);
    Announcement {
        // Within its range, which is small.
        rounds: rounds as u32,
        initial,
        step,
        max,
    }
}

fn parameters(settings: &Settings, announcement: Announcement) -> MigrationParameters {
    let engine = &settings.parameters;
    MigrationParameters {
        announce_initial: millis(announcement.initial),
        announce_max: millis(announcement.max),
        announce_rounds: announcement.rounds.into(),
        announce_step: millis(announcement.step),
        downtime_limit: millis(engine.downtime_limit),
        max_bandwidth: engine.max_bandwidth.unwrap_or(0),
        x_vmferry_discipline: engine.discipline,
        x_vmferry_arming_chunk: engine.arming_chunk.bytes() as u64,
        x_vmferry_peer_timeout: millis(engine.peer_timeout),
    }
}

fn migration_info(info: Info) -> MigrationInfo {
    /// Bytes of a page.
    const PAGE: u64 = 4096;
    let status = status(info.status);
    // A migration that failed while it connected has no figures.
    let copying = !matches!(info.status, Status::None | Status::Setup) && info.ram.total > 0;
    let ram = copying.then(|| MigrationRamStats {
        transferred: info.ram.transferred,
        remaining: info.ram.remaining,
        total: info.ram.total,
        duplicate: info.ram.duplicate,
        normal: info.ram.normal,
        normal_bytes: info.ram.normal * PAGE,
        dirty_pages_rate: info.ram.dirty_pages_rate,
        mbps: info.ram.transferred as f64 * 8.0 / 1e6 / info.total_time.as_secs_f64().max(1e-3),
        dirty_sync_count: info.ram.dirty_sync_count,
        page_size: PAGE,
        pages_per_second: info.ram.pages_per_second,
        precopy_bytes: info.ram.precopy_bytes,
        downtime_bytes: info.ram.downtime_bytes,
        x_vmferry_hinted_pages: info.ram.hinted,
        ..MigrationRamStats::default()
    });
    MigrationInfo {
        status: Some(status),
        ram,
        total_time: copying.then(|| millis(info.total_time)),
        // QEMU shows one of the two.
        expected_downtime: info
            .expected_downtime
            .filter(|_| copying && info.downtime.is_none())
            .map(millis),
        downtime: info.downtime.map(millis),
        setup_time: copying.then(|| millis(info.setup_time)),
        error_desc: info.error,
        socket_address: info.listening.as_ref().and_then(SocketAddress::list),
        x_vmferry_downtime_us: info.downtime.map(micros),
        x_vmferry_discipline: info.discipline,
        x_vmferry_dirty_tracking: info.discipline.map(|_| DirtyTracking {
            bitmap_us: micros(info.tracking.bitmap),
            arming_us: micros(info.tracking.arming),
            sync_us: micros(info.tracking.sync),
        }),
        x_vmferry_waiting_for: info.waiting.map(|waiting| WaitingFor {
            name: waiting.wait.as_str().to_owned(),
            description: waiting.wait.to_string(),
            time: millis(waiting.since.elapsed()),
        }),
        x_vmferry_bandwidth: (info.bandwidth > 0).then_some(info.bandwidth),
        ..MigrationInfo::default()
    }
}

/// An error in its own words.
pub fn generic(error: impl std::fmt::Display) -> QmpError {
    QmpError::generic(error.to_string())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The engine's state in the monitor's words.
pub fn status(status: Status) -> MigrationStatus {
    match status {
        Status::None => MigrationStatus::None,
        Status::Setup => MigrationStatus::Setup,
        Status::Active => MigrationStatus::Active,
        Status::PreSwitchover => MigrationStatus::PreSwitchover,
        Status::Device => MigrationStatus::Device,
        Status::Completed => MigrationStatus::Completed,
        Status::Failed => MigrationStatus::Failed,
        Status::Cancelling => MigrationStatus::Cancelling,
        Status::Cancelled => MigrationStatus::Cancelled,
    }
}

fn run_state(state: vmferry_vmm::RunState) -> RunState {
    use vmferry_vmm::RunState as Machine;
    match state {
        Machine::Prelaunch => RunState::Prelaunch,
        Machine::InMigrate => RunState::Inmigrate,
        Machine::Running => RunState::Running,
        Machine::Paused => RunState::Paused,
        Machine::FinishMigrate => RunState::FinishMigrate,
        Machine::PostMigrate => RunState::Postmigrate,
        Machine::Shutdown => RunState::Shutdown,
        Machine::InternalError => RunState::InternalError,
    }
}
