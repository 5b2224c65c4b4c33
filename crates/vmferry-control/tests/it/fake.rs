//! A handler that keeps a run state, parameters and capabilities, and a bare connection to talk to it.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use vmferry_control::schema::*;
use vmferry_control::{ErrorClass, EventBus, Handler, QmpError, QmpServer};
use vmferry_engine::{Discipline, Uri};

/// Far longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct FakeMachine {
    events: EventBus,
    state: Mutex<State>,
    quit: Mutex<Sender<()>>,
    /// `system_reset` takes this long.
    reset_takes: Duration,
}

struct State {
    status: RunState,
    parameters: MigrationParameters,
    migration: MigrationInfo,
    destinations: Vec<Uri>,
    measurement: Option<CalcDirtyRate>,
}

impl FakeMachine {
    fn migrate_to(&self, status: MigrationStatus) {
        self.state.lock().unwrap().migration.status = Some(status);
        self.events.emit(Event::Migration(MigrationData { status }));
    }

    pub fn destinations(&self) -> Vec<Uri> {
        self.state.lock().unwrap().destinations.clone()
    }

    pub fn measurement(&self) -> Option<CalcDirtyRate> {
        self.state.lock().unwrap().measurement
    }
}

impl Handler for FakeMachine {
    fn query_status(&self) -> Result<StatusInfo, QmpError> {
        let status = self.state.lock().unwrap().status;
        Ok(StatusInfo {
            status,
            running: status == RunState::Running,
        })
    }

    fn query_name(&self) -> Result<NameInfo, QmpError> {
        Ok(NameInfo::default())
    }

    fn query_cpus_fast(&self) -> Result<Vec<CpuInfoFast>, QmpError> {
        Ok(vec![CpuInfoFast {
            cpu_index: 0,
            qom_path: "/machine/unattached/device[0]".into(),
            thread_id: 4711,
            props: Some(CpuInstanceProperties {
                socket_id: 0,
                core_id: 0,
                thread_id: 0,
            }),
            target: "x86_64".into(),
        }])
    }

    fn announce_self(&self, _: AnnounceSelf) -> Result<(), QmpError> {
        Ok(())
    }

    fn query_block(&self) -> Result<Vec<BlockInfo>, QmpError> {
        let path = "/images/root.raw";
        let inserted = BlockDeviceInfo {
            file: path.into(),
            ro: false,
            drv: "raw".into(),
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
                filename: path.into(),
                format: "raw".into(),
                virtual_size: 1 << 30,
            },
            cache: BlockdevCacheInfo {
                writeback: true,
                direct: false,
                no_flush: false,
            },
            write_threshold: 0,
            active: true,
            x_vmferry_io: BlockIo::IoUring,
        };
        Ok(vec![BlockInfo {
            device: "root".into(),
            qdev: None,
            kind: "unknown".into(),
            removable: false,
            locked: false,
            inserted: Some(inserted),
        }])
    }

    fn block_resize(&self, _: BlockResize) -> Result<(), QmpError> {
        Ok(())
    }

    fn balloon(&self, _: Balloon) -> Result<(), QmpError> {
        Err(no_balloon())
    }

    fn query_balloon(&self) -> Result<BalloonInfo, QmpError> {
        Err(no_balloon())
    }

    fn query_kvm(&self) -> Result<KvmInfo, QmpError> {
        Ok(KvmInfo {
            enabled: false,
            present: true,
        })
    }

    fn stop(&self) -> Result<(), QmpError> {
        self.state.lock().unwrap().status = RunState::Paused;
        self.events.emit(Event::Stop);
        Ok(())
    }

    fn cont(&self, _: Cont) -> Result<(), QmpError> {
        self.state.lock().unwrap().status = RunState::Running;
        self.events.emit(Event::Resume);
        Ok(())
    }

    fn quit(&self) -> Result<(), QmpError> {
        self.events.emit(Event::Shutdown(ShutdownData {
            guest: false,
            reason: ShutdownCause::HostQmpQuit,
        }));
        let _ = self.quit.lock().unwrap().send(());
        // The server may well be on its way out before the reply is written.
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }

    fn system_reset(&self) -> Result<(), QmpError> {
        std::thread::sleep(self.reset_takes);
        self.events.emit(Event::Reset(ShutdownData {
            guest: false,
            reason: ShutdownCause::HostQmpSystemReset,
        }));
        Ok(())
    }

    fn system_powerdown(&self) -> Result<(), QmpError> {
        self.events.emit(Event::Powerdown);
        Ok(())
    }

    fn migrate(&self, arguments: Migrate) -> Result<(), QmpError> {
        self.state.lock().unwrap().destinations.push(arguments.uri);
        self.migrate_to(MigrationStatus::Setup);
        self.migrate_to(MigrationStatus::Active);
        self.events
            .emit(Event::MigrationPass(MigrationPassData { pass: 1 }));
        let mut state = self.state.lock().unwrap();
        state.migration.total_time = Some(12);
        state.migration.ram = Some(MigrationRamStats {
            total: 1 << 30,
            page_size: 4096,
            mbps: 12.5,
            ..MigrationRamStats::default()
        });
        state.migration.x_vmferry_discipline = Some(Discipline::LockFree);
        Ok(())
    }

    fn migrate_incoming(&self, _: MigrateIncoming) -> Result<(), QmpError> {
        Err(QmpError::generic(
            "'-incoming' was not specified on the command line",
        ))
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        Ok(())
    }

    fn migrate_continue(&self, arguments: MigrateContinue) -> Result<(), QmpError> {
        if arguments.state == MigrationStatus::WaitUnplug {
            panic!("a handler with a bug, on purpose");
        }
        Err(QmpError::generic("Migration not in expected state: none"))
    }

    fn query_migrate(&self) -> Result<MigrationInfo, QmpError> {
        Ok(self.state.lock().unwrap().migration.clone())
    }

    fn migrate_set_parameters(&self, arguments: MigrateSetParameters) -> Result<(), QmpError> {
        self.state.lock().unwrap().parameters.apply(arguments);
        Ok(())
    }

    fn query_migrate_parameters(&self) -> Result<MigrationParameters, QmpError> {
        Ok(self.state.lock().unwrap().parameters)
    }

    fn migrate_set_capabilities(&self, _: MigrateSetCapabilities) -> Result<(), QmpError> {
        Ok(())
    }

    fn query_migrate_capabilities(&self) -> Result<Vec<MigrationCapabilityStatus>, QmpError> {
        Ok(vec![MigrationCapabilityStatus {
            capability: MigrationCapability::ReturnPath,
            state: true,
        }])
    }

    fn calc_dirty_rate(&self, arguments: CalcDirtyRate) -> Result<(), QmpError> {
        self.state.lock().unwrap().measurement = Some(arguments);
        Ok(())
    }

    fn query_dirty_rate(&self, arguments: QueryDirtyRate) -> Result<DirtyRateInfo, QmpError> {
        let unit = arguments.calc_time_unit;
        let Some(measured) = self.state.lock().unwrap().measurement else {
            return Ok(DirtyRateInfo {
                calc_time_unit: unit,
                ..DirtyRateInfo::default()
            });
        };
        Ok(DirtyRateInfo {
            dirty_rate: Some(212),
            status: DirtyRateStatus::Measured,
            start_time: 1_700_000_000,
            calc_time: unit.count(measured.calc_time),
            calc_time_unit: unit,
            mode: measured.method.into(),
            vcpu_dirty_rate: Some(vec![DirtyRateVcpu {
                id: 0,
                dirty_rate: 212,
            }]),
            ..DirtyRateInfo::default()
        })
    }
}

fn no_balloon() -> QmpError {
    QmpError::new(
        ErrorClass::DeviceNotActive,
        "No balloon device has been activated",
    )
}

/// A server with a fake machine in a directory of its own.
pub struct Rig {
    // Dropped before the directory, which holds its socket.
    pub server: Option<QmpServer>,
    pub machine: Arc<FakeMachine>,
    pub events: EventBus,
    pub quit: Receiver<()>,
    pub path: PathBuf,
    _directory: TempDir,
}

impl Rig {
    pub fn new() -> Self {
        Rig::with_slow_reset(Duration::ZERO)
    }

    pub fn with_slow_reset(reset_takes: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let events = EventBus::new();
        let (sender, quit) = channel();
        let machine = Arc::new(FakeMachine {
            events: events.clone(),
            state: Mutex::new(State {
                status: RunState::Prelaunch,
                parameters: MigrationParameters {
                    announce_initial: 50,
                    announce_max: 550,
                    announce_rounds: 5,
                    announce_step: 100,
                    downtime_limit: 300,
                    max_bandwidth: 0,
                    x_vmferry_discipline: Discipline::LockFree,
                    x_vmferry_arming_chunk: 16 << 20,
                    x_vmferry_peer_timeout: 10_000,
                },
                migration: MigrationInfo::default(),
                destinations: Vec::new(),
                measurement: None,
            }),
            quit: Mutex::new(sender),
            reset_takes,
        });
        let server = QmpServer::bind(&path, machine.clone(), events.clone()).unwrap();
        Rig {
            server: Some(server),
            machine,
            events,
            quit,
            path,
            _directory: directory,
        }
    }

    /// A connection that has not negotiated.
    pub fn connect(&self) -> Wire {
        Wire::connect(&self.path)
    }

    /// A connection that has negotiated.
    pub fn negotiated(&self) -> Wire {
        let mut wire = self.connect();
        wire.negotiate();
        wire
    }
}

/// A bare connection: bytes out, lines in.
pub struct Wire {
    pub stream: UnixStream,
    pending: Vec<u8>,
}

impl Wire {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Wire {
            stream,
            pending: Vec::new(),
        }
    }

    pub fn negotiate(&mut self) {
        let greeting = self.read();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        assert_eq!(
            self.ask(r#"{"execute": "qmp_capabilities"}"#),
            serde_json::json!({"return": {}})
        );
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// The next line as text, none at the end.
    pub fn line(&mut self) -> io::Result<Option<String>> {
        let mut buffer = [0; 65536];
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(Some(String::from_utf8(line).unwrap().trim_end().to_owned()));
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Ok(length) => self.pending.extend_from_slice(&buffer[..length]),
                Err(error) => return Err(error),
            }
        }
    }

    pub fn read(&mut self) -> Value {
        let line = self.line().unwrap().expect("the connection ended");
        serde_json::from_str(&line).unwrap()
    }

    /// Sends, and reads one message that is no event.
    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> Value {
        self.send(request);
        // QEMU takes words to be finished by what follows them, and so does this server.
        self.send("\n");
        loop {
            let message = self.read();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    /// Whether the other side has closed the connection, once everything it sent has been read.
    pub fn ends(&mut self) -> bool {
        loop {
            match self.line() {
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }
}
