//! The line that each vCPU prints once a second; the guest writes it and the host reads it.

use core::fmt;

/// One heartbeat of one vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Heartbeat {
    /// The vCPU, from 0.
    pub vcpu: u32,
    /// Seconds since the guest was ready, by its time-stamp counter.
    pub t: u64,
    /// Pages rewritten, in total.
    pub written: u64,
    /// Pages verified, in total: before each rewrite, and by sweeps.
    pub verified: u64,
    /// Pages (and pages of the guest's own bookkeeping) found wrong, in total.
    pub corrupt: u64,
    /// The longest time between two turns of the main loop since the last heartbeat, in microseconds.
    pub gap_us: u64,
    /// The longest such time since the guest was ready, in microseconds.
    pub maxgap_us: u64,
    /// How often all pages of this vCPU have been verified, one after the other.
    pub sweeps: u64,
    /// Pages rewritten since the last heartbeat.
    pub rate: u64,
    /// Of a guest that tells its balloon which pages are free.
    pub hints: Option<Hints>,
}

/// What a guest has told its balloon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hints {
    /// Pages that this vCPU said are free, in total.
    pub hinted: u64,
    /// Questions that the guest's vCPUs have answered together.
    pub rounds: u64,
}

impl fmt::Display for Heartbeat {
    /// The line without the program's name in front.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self {
            vcpu,
            t,
            written,
            verified,
            corrupt,
            gap_us,
            maxgap_us,
            sweeps,
            rate,
            hints,
        } = self;
        write!(
            f,
            "vcpu={vcpu} t={t} written={written} verified={verified} corrupt={corrupt} gap_us={gap_us} \
             maxgap_us={maxgap_us} sweeps={sweeps} rate={rate}"
        )?;
        if let Some(Hints { hinted, rounds }) = hints {
            write!(f, " hinted={hinted} rounds={rounds}")?;
        }
        Ok(())
    }
}
