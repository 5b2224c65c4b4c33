//! Programs of the host.

use std::io;
use std::process::{Command, Output};

use crate::error::RigError;

/// Runs a program to its end and returns its standard output. `hint` says how to install it.
pub(crate) fn output(command: &mut Command, hint: &'static str) -> Result<String, RigError> {
    let done = raw_output(command, hint)?;
    if !done.status.success() {
        return Err(RigError::Program {
            command: words(command),
            status: done.status.to_string(),
            words: String::from_utf8_lossy(&done.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// The same, whatever its exit status.
pub(crate) fn raw_output(command: &mut Command, hint: &'static str) -> Result<Output, RigError> {
    // What it says is read by us.
    command
        .env("LC_ALL", "C")
        .output()
        .map_err(|e| not_started(command, e, hint))
}

/// The error of a program that could not be started.
pub(crate) fn not_started(command: &Command, error: io::Error, hint: &'static str) -> RigError {
    let program = command.get_program().to_string_lossy().into_owned();
    match error.kind() {
        io::ErrorKind::NotFound => RigError::NoProgram { program, hint },
        _ => RigError::Os {
            action: format!("start {program}"),
            source: error,
        },
    }
}

fn words(command: &Command) -> String {
    let parts = std::iter::once(command.get_program()).chain(command.get_args());
    let parts: Vec<_> = parts.map(|part| part.to_string_lossy()).collect();
    parts.join(" ")
}
