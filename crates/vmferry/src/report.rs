//! Figures for people: tables and names.

use std::fmt::Write;

use vmferry_control::schema::{MigrationInfo, MigrationStatus, RunState, WaitingFor};
use vmferry_control::units::{format_bandwidth, format_size};

/// Rows of a name and a value, aligned.
#[derive(Default)]
pub struct Table {
    rows: Vec<(String, String)>,
}

impl Table {
    /// Adds a row.
    pub fn row(&mut self, name: &str, value: impl Into<String>) {
        self.rows.push((name.to_owned(), value.into()));
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = self
            .rows
            .iter()
            .map(|(name, _)| name.len())
            .max()
            .unwrap_or(0);
        for (name, value) in &self.rows {
            writeln!(f, "  {name:width$}  {value}")?;
        }
        Ok(())
    }
}

/// The figures of a migration.
pub fn migration_table(info: &MigrationInfo) -> Table {
    let mut table = Table::default();
    if let Some(total) = info.total_time {
        table.row("total time", millis(total));
    }
    match (info.x_vmferry_downtime_us, info.expected_downtime) {
        (Some(downtime), _) => table.row("downtime", micros(downtime)),
        (None, Some(expected)) => table.row("expected downtime", millis(expected)),
        (None, None) => {}
    }
    if let Some(ram) = &info.ram {
        table.row("RAM", format_size(ram.total));
        let mut sent = format!(
            "{} in {} passes",
            format_size(ram.transferred),
            ram.dirty_sync_count
        );
        if let Some(bandwidth) = info.x_vmferry_bandwidth {
            let _ = write!(sent, ", channel takes {}", format_bandwidth(bandwidth));
        }
        table.row("sent", sent);
        let pages = format!("{} with data, {} all zero", ram.normal, ram.duplicate);
        table.row("pages", pages);
        if ram.x_vmferry_hinted_pages > 0 {
            let saved = format!("{} that the guest does not use", ram.x_vmferry_hinted_pages);
            table.row("pages saved", saved);
        }
        if ram.remaining > 0 {
            table.row("remaining", format_size(ram.remaining));
        }
    }
    if let Some(waiting) = &info.x_vmferry_waiting_for {
        table.row("waits for", wait(waiting));
    }
    if let Some(discipline) = info.x_vmferry_discipline {
        table.row("discipline", discipline.to_string());
    }
    if let (Some(spent), Some(total)) = (info.x_vmferry_dirty_tracking, info.total_time) {
        let share = |us: u64| us as f64 / 10.0 / total.max(1) as f64;
        let shares = format!(
            "{:.2} % of the time in the bitmap, {:.2} % arming the log, {:.2} % fetching it",
            share(spent.bitmap_us),
            share(spent.arming_us),
            share(spent.sync_us)
        );
        table.row("tracking", shares);
    }
    if let Some(error) = &info.error_desc {
        table.row("error", error);
    }
    table
}

/// What a migration waits for, and since when.
pub fn wait(waiting: &WaitingFor) -> String {
    format!("{} ({})", waiting.description, millis(waiting.time))
}

/// A time in milliseconds.
pub fn millis(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        _ => format!("{:.1} s", ms as f64 / 1e3),
    }
}

/// A time in microseconds.
pub fn micros(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1e3)
}

/// QEMU's name of a migration's state.
pub fn migration_status(status: MigrationStatus) -> &'static str {
    use MigrationStatus as S;
    match status {
        S::None => "none",
        S::Setup => "setup",
        S::Cancelling => "cancelling",
        S::Cancelled => "cancelled",
        S::Active => "active",
        S::PostcopyActive => "postcopy-active",
        S::PostcopyPaused => "postcopy-paused",
        S::PostcopyRecoverSetup => "postcopy-recover-setup",
        S::PostcopyRecover => "postcopy-recover",
        S::Completed => "completed",
        S::Failed => "failed",
        S::Colo => "colo",
        S::PreSwitchover => "pre-switchover",
        S::Device => "device",
        S::WaitUnplug => "wait-unplug",
    }
}

/// A run state in words.
pub fn run_state(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Prelaunch => "not started yet (prelaunch)",
        RunState::Inmigrate => "waiting to arrive (inmigrate)",
        RunState::FinishMigrate => "paused by its migration (finish-migrate)",
        RunState::Postmigrate => "stopped here: its migration is complete (postmigrate)",
        RunState::Shutdown => "shut down",
        RunState::InternalError => "stopped by an internal error",
        _ => "in a state that this vmferry does not know",
    }
}
