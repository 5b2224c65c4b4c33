//! What can go wrong, in words that say what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why the rig could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// A program of the host is not there.
    #[error("{program} is not installed: {hint}")]
    NoProgram {
        /// Its name.
        program: String,
        /// How to get it.
        hint: &'static str,
    },
    /// A program of the host has failed.
    #[error("'{command}' failed ({status}): {words}")]
    Program {
        /// The program with its arguments.
        command: String,
        /// How it ended.
        status: String,
        /// What it said.
        words: String,
    },
    /// Debian's package lists do not have what is needed.
    #[error(
        "{what} is not among the packages that apt knows: this host must be Debian (or have its package sources), \
         with lists that are up to date (apt-get update)"
    )]
    NoPackage {
        /// What was looked for.
        what: String,
    },
    /// A package cannot be downloaded.
    #[error(
        "cannot download the package {package}: {words}; is the network there, and are apt's lists up to date \
         (apt-get update)?"
    )]
    NoDownload {
        /// Its name.
        package: String,
        /// What apt said.
        words: String,
    },
    /// A package does not hold what it should.
    #[error("the kernel package in {} has no {what}", dir.display())]
    NotInPackage {
        /// What was looked for.
        what: String,
        /// Where.
        dir: PathBuf,
    },
    /// The system has refused something.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was attempted, on what.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A library of a program that should run in the first level is missing on this host.
    #[error("{program} needs {library}, which this host does not have")]
    NoLibrary {
        /// The program.
        program: PathBuf,
        /// The library.
        library: String,
    },
    /// The first level has ended before its command.
    #[error(
        "the first level ended before its command did ({qemu}); its console's last lines:\n{console}"
    )]
    Died {
        /// How QEMU ended and what it said.
        qemu: String,
        /// The end of what the first level's kernel has printed.
        console: String,
    },
    /// The command was not over in time.
    #[error(
        "the command was not over after {} s; the first level's console's last lines:\n{console}",
        after.as_secs()
    )]
    TimedOut {
        /// How long it had.
        after: Duration,
        /// The end of what the first level's kernel has printed.
        console: String,
    },
}

impl RigError {
    /// Whether this host lacks something that the rig is made of. A test that needs the rig is skipped then.
    pub fn is_missing_prerequisite(&self) -> bool {
        matches!(
            self,
            RigError::NoProgram { .. } | RigError::NoPackage { .. } | RigError::NoDownload { .. }
        )
    }
}

/// Turns the system's answers into errors that say what was attempted.
pub(crate) trait Attempt<T> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, RigError>;
}

impl<T> Attempt<T> for io::Result<T> {
    fn attempt(self, action: impl FnOnce() -> String) -> Result<T, RigError> {
        self.map_err(|source| RigError::Os {
            action: action(),
            source,
        })
    }
}
