//! Printing, in a process that must not end half-way because its reader has.

use std::fmt::Display;
use std::io::Write;

use anyhow::Context;

/// Prints a result, whole lines, to standard output.
pub fn print(text: impl Display) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    write!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .context("cannot write to standard output")
}
