//! What is migrated: guests with different habits.

use serde::Serialize;

/// RAM of every guest of `peers`, in MiB.
pub const MEMORY_MIB: u64 = 2048;

/// A guest, and so a kind of migration.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Case {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it is like.
    pub about: &'static str,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// The command line of the guest `dirtier`.
    pub cmdline: &'static str,
}

/// All cases, in the order in which they are run.
pub const CASES: &[Case] = &[
    Case {
        name: "idle",
        about: "1.5 GiB of incompressible memory that nobody writes to",
        memory_mib: MEMORY_MIB,
        cmdline: "ws=1M rate=1 pattern=random fill=random cold=1536M cold_fill=random seed=1",
    },
    Case {
        name: "busy",
        about: "256 MiB of incompressible memory, rewritten at random at 50,000 pages a second",
        memory_mib: MEMORY_MIB,
        cmdline: "ws=256M rate=50000 pattern=random fill=random cold=0 seed=1",
    },
    Case {
        name: "zero",
        about: "memory that was hardly ever touched",
        memory_mib: MEMORY_MIB,
        cmdline: "ws=1M rate=1 pattern=random fill=random cold=0 seed=1",
    },
];

/// The case of that name.
///
/// # Errors
/// There is none; the error names those that there are.
pub fn parse(name: &str) -> Result<Case, String> {
    let found = CASES.iter().find(|case| case.name == name);
    found.copied().ok_or_else(|| {
        let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
        format!("there is no case '{name}': there is {}", names.join(", "))
    })
}
