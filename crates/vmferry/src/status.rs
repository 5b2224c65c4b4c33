//! `vmferry status`.

use std::time::Duration;

use serde_json::json;
use vmferry_control::schema::{MigrationInfo, MigrationStatus, StatusInfo};
use vmferry_control::{ClientError, QmpClient};

use crate::cli;
use crate::output;
use crate::progress::{PATIENCE, is_over};
use crate::report;

/// Shows what a guest and its migration are doing.
pub fn status(options: &cli::Status) -> anyhow::Result<()> {
    let mut vm = QmpClient::connect(&options.monitor.qmp, PATIENCE)?;
    let mut shown = false;
    loop {
        let (guest, migration) = match look(&mut vm) {
            // It is over: the source of a migration usually ends when the guest has left.
            Err(ClientError::Closed { .. }) if shown => return Ok(()),
            look => look?,
        };
        print(options, &guest, &migration)?;
        shown = true;
        if !options.watch || migration.status.is_some_and(is_over) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn look(vm: &mut QmpClient) -> Result<(StatusInfo, MigrationInfo), ClientError> {
    Ok((vm.query_status()?, vm.query_migrate()?))
}

fn print(
    options: &cli::Status,
    guest: &StatusInfo,
    migration: &MigrationInfo,
) -> anyhow::Result<()> {
    if options.json {
        return output::print(format!(
            "{}\n",
            json!({"status": guest, "migration": migration})
        ));
    }
    let mut text = format!("guest: {}\n", report::run_state(guest.status));
    match migration.status {
        None | Some(MigrationStatus::None) => text += "migration: none\n",
        Some(status) => {
            text += &format!("migration: {}\n", report::migration_status(status));
            text += &report::migration_table(migration).to_string();
        }
    }
    if options.watch {
        text += "\n";
    }
    output::print(text)
}
