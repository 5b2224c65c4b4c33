//! The `vmferry` command: runs KVM guests, and moves them while they run.

mod cancel;
mod cli;
mod demo;
mod dirty_rate;
mod docs;
mod migrate;
mod output;
mod progress;
mod report;
mod run;
mod status;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("VMFERRY_LOG")
                .unwrap_or_else(|_| "error".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let result = match cli.command {
        Command::Run(options) => run::run(options),
        Command::Migrate(options) => migrate::migrate(&options),
        Command::Status(options) => status::status(&options),
        Command::Cancel(options) => cancel::cancel(&options),
        Command::DirtyRate(options) => dirty_rate::dirty_rate(&options),
        Command::Demo(options) => demo::demo(&options),
        Command::Completions { shell } => docs::completions(shell),
        Command::Man { directory } => docs::man(&directory),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(format!("vmferry: {}", sentence(&error)));
            ExitCode::FAILURE
        }
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
