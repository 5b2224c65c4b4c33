//! The `vmferry` command: runs KVM guests, and moves them while they run.

mod cancel;
mod cli;
mod demo;
mod dirty_rate;
mod docs;
mod logging;
mod migrate;
mod output;
mod progress;
mod report;
mod run;
mod status;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use logging::{Logging, note};
use run::Signals;

fn main() -> ExitCode {
    let work = work(Cli::parse().command);
    // Ends last: the last lines are about the end.
    let (_logging, result) = match Logging::start() {
        Ok(logging) => (Some(logging), work()),
        Err(error) => (None, Err(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            note(format!("vmferry: {}", sentence(&error)));
            ExitCode::FAILURE
        }
    }
}

/// What the command does, once there is a log.
fn work(command: Command) -> Box<dyn FnOnce() -> anyhow::Result<()>> {
    match command {
        Command::Run(options) => {
            // Now, as there is no second thread yet that a signal could go to.
            let signals = Signals::take();
            Box::new(|| run::run(options, signals))
        }
        Command::Migrate(options) => Box::new(move || migrate::migrate(&options)),
        Command::Status(options) => Box::new(move || status::status(&options)),
        Command::Cancel(options) => Box::new(move || cancel::cancel(&options)),
        Command::DirtyRate(options) => Box::new(move || dirty_rate::dirty_rate(&options)),
        Command::Demo(options) => Box::new(move || demo::demo(&options)),
        Command::Completions { shell } => Box::new(move || docs::completions(shell)),
        Command::Man { directory } => Box::new(move || docs::man(&directory)),
    }
}

/// An error and its causes in one line. Many errors have their cause in their own words already.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for part in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = part;
        } else if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
    }
    text
}
