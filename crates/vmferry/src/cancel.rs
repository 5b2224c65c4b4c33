//! `vmferry cancel`.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use serde_json::Value;
use vmferry_control::QmpClient;
use vmferry_control::schema::{MigrationStatus, RunState};

use crate::cli;
use crate::output::print;
use crate::progress::{PATIENCE, POLL, is_over};

/// Cancels the migration of a guest, and waits until it is.
pub fn cancel(options: &cli::Cancel) -> anyhow::Result<()> {
    let mut vm = QmpClient::connect(&options.monitor.qmp, PATIENCE)?;
    if vm.query_status()?.status == RunState::Inmigrate {
        bail!(
            "this guest is on its way in: cancel its migration on the host that it comes from, or end the wait for it \
             with 'quit' on this monitor"
        );
    }
    match vm.query_migrate()?.status {
        None | Some(MigrationStatus::None) => bail!("there is no migration to cancel"),
        Some(status) if is_over(status) => return Err(too_late(status)),
        Some(_) => vm.execute("migrate_cancel", Value::Null)?,
    };
    // A peer that hangs is noticed at the next write at the latest.
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let migration = vm.query_migrate()?;
        match migration.status {
            Some(MigrationStatus::Cancelled) => {
                let guest = vm.query_status()?.status;
                return print(format!(
                    "Cancelled. The guest is {}.\n",
                    crate::report::run_state(guest)
                ));
            }
            Some(MigrationStatus::Failed) => {
                let why = migration.error_desc.unwrap_or_default();
                bail!("the migration has failed: {why}");
            }
            Some(status) if is_over(status) => return Err(too_late(status)),
            _ if Instant::now() > end => bail!("the migration does not end; see vmferry status"),
            _ => std::thread::sleep(POLL),
        }
    }
}

fn too_late(status: MigrationStatus) -> anyhow::Error {
    anyhow!(
        "there is no migration to cancel: the last one is {}",
        crate::report::migration_status(status)
    )
}
