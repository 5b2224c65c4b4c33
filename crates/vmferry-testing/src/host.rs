//! What this host can do, and what a test says when it cannot run here.

use std::io::Write;

/// Prints a line that the test harness shows even if the test passes.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Says that the running test is skipped, and why.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    say(&format!("SKIPPED: {test}: {why}"));
}

/// Returns whether virtual machines can run here. If they cannot, says that the running test is skipped.
pub fn has_kvm() -> bool {
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if let Err(error) = &kvm {
        skip(&format!("/dev/kvm cannot be opened: {error}"));
    }
    kvm.is_ok()
}

/// Returns whether the long campaigns are wanted: `VMFERRY_FULL=1`.
pub fn full_size() -> bool {
    std::env::var_os("VMFERRY_FULL").is_some_and(|value| value == "1")
}
