//! Following a migration until it is over.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vmferry_control::schema::{MigrationInfo, MigrationStatus};
use vmferry_control::units::{format_bandwidth, format_size};
use vmferry_control::{ClientError, QmpClient};

/// How long a monitor may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How often a monitor is asked.
pub const POLL: Duration = Duration::from_millis(50);

/// How often a line is printed where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Shorter waits come and go too often to be read.
const WORTH_MENTIONING_MS: u64 = 500;

/// Whether a migration in this state is over.
pub fn is_over(status: MigrationStatus) -> bool {
    use MigrationStatus::{Cancelled, Completed, Failed};
    matches!(status, Completed | Failed | Cancelled)
}

/// Who is shown the progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Whoever reads standard error: a live line on a terminal, else a line a second.
    Person,
    /// Nobody.
    Nobody,
}

/// Waits until the VM's migration is over, and shows how it goes.
pub fn follow(vm: &mut QmpClient, audience: Audience) -> Result<MigrationInfo, ClientError> {
    let mut display = Display::new(audience);
    loop {
        let info = vm.query_migrate()?;
        if info.status.is_some_and(is_over) {
            display.finish();
            return Ok(info);
        }
        display.show(&info);
        std::thread::sleep(POLL);
    }
}

enum Display {
    Live(ProgressBar),
    Lines { last: Option<Instant> },
    Nothing,
}

impl Display {
    fn new(audience: Audience) -> Self {
        match audience {
            Audience::Nobody => Display::Nothing,
            Audience::Person if std::io::stderr().is_terminal() => {
                let style = ProgressStyle::with_template("{spinner} {wide_msg}")
                    .expect("the template is a constant");
                Display::Live(ProgressBar::new_spinner().with_style(style))
            }
            Audience::Person => Display::Lines { last: None },
        }
    }

    fn show(&mut self, info: &MigrationInfo) {
        match self {
            Display::Live(bar) => {
                bar.set_message(line(info));
                bar.tick();
            }
            Display::Lines { last } if last.is_none_or(|l| l.elapsed() >= LINE_INTERVAL) => {
                *last = Some(Instant::now());
                crate::logging::note(line(info));
            }
            Display::Lines { .. } | Display::Nothing => {}
        }
    }

    fn finish(&mut self) {
        if let Display::Live(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// One line: pass, what remains, how fast it goes, how fast the guest writes, how long it would stop.
fn line(info: &MigrationInfo) -> String {
    let state = info.status.map_or("none", crate::report::migration_status);
    let waiting = info
        .x_vmferry_waiting_for
        .as_ref()
        .filter(|waiting| waiting.time >= WORTH_MENTIONING_MS)
        .map(|waiting| format!(", waits for {}", crate::report::wait(waiting)))
        .unwrap_or_default();
    let Some(ram) = &info.ram else {
        return format!("{state} ...{waiting}");
    };
    let mut line = format!(
        "{state}: pass {}, {} of {} remaining",
        ram.dirty_sync_count,
        format_size(ram.remaining),
        format_size(ram.total),
    );
    if let Some(bandwidth) = info.x_vmferry_bandwidth {
        line += &format!(", {}", format_bandwidth(bandwidth));
    }
    if ram.dirty_pages_rate > 0 {
        line += &format!(
            ", guest dirties {}",
            format_bandwidth(ram.dirty_pages_rate * ram.page_size)
        );
    }
    // The first pass has nothing to go by.
    if let Some(downtime) = info.expected_downtime
        && ram.dirty_sync_count > 1
    {
        line += &format!(", expected downtime {downtime} ms");
    }
    line + &waiting
}
