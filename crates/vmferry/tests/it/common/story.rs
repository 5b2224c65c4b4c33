//! What a guest says about itself, on all the hosts that it has been on.

use std::path::PathBuf;

use vmferry_guests::Heartbeat;

/// The serial output of a guest, in order.
pub struct Story(String);

impl Story {
    /// Puts the output of several hosts together. A line may begin on one and end on the next.
    pub fn read(parts: &[PathBuf]) -> Self {
        let mut bytes = Vec::new();
        for part in parts {
            bytes.extend(std::fs::read(part).unwrap_or_default());
        }
        Story(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Lines that are complete.
    fn lines(&self) -> impl Iterator<Item = &str> {
        let complete = self.0.rfind('\n').map_or("", |end| &self.0[..end]);
        complete.lines()
    }

    /// Whether the guest has filled its memory and works.
    pub fn is_ready(&self) -> bool {
        self.lines()
            .any(|line| line.contains("ready filled_pages="))
    }

    /// The heartbeats of one vCPU.
    pub fn beats(&self, vcpu: u32) -> Vec<Heartbeat> {
        let all = self.lines().filter_map(Heartbeat::parse);
        all.filter(|beat| beat.vcpu == vcpu).collect()
    }

    /// The last heartbeat of one vCPU.
    pub fn last(&self, vcpu: u32) -> Option<Heartbeat> {
        self.beats(vcpu).pop()
    }

    /// Panics if the guest complains about anything, or says something that it cannot have meant.
    #[track_caller]
    pub fn check(&self) {
        for line in self.lines() {
            let known = Heartbeat::parse(line).is_some_and(|beat| beat.corrupt == 0)
                || line.starts_with("dirtier: start ")
                || line.starts_with("dirtier: ready ");
            assert!(known, "the guest says: {line}\n{}", self.0);
        }
    }

    /// Panics if seconds are missing in a vCPU's life but those of which the vCPU itself noticed that it stood
    /// still, or if it stood still for longer than `allowed_us`.
    #[track_caller]
    pub fn check_continuity(&self, vcpu: u32, allowed_us: u64) {
        let beats = self.beats(vcpu);
        for pair in beats.windows(2) {
            let [before, after] = pair else {
                unreachable!()
            };
            assert!(after.t > before.t, "back in time: {before} -> {after}");
            let missing = after.t - before.t - 1;
            assert!(
                missing * 1_000_000 <= after.gap_us,
                "{missing} seconds are missing: {before} -> {after}"
            );
            assert!(
                after.gap_us <= allowed_us,
                "stood still for more than {allowed_us} us: {after}"
            );
            assert!(
                after.written >= before.written && after.sweeps >= before.sweeps,
                "undone: {before} -> {after}"
            );
        }
    }
}
