//! Time: the time-stamp counter, its frequency, and the hypervisor's clock.

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{Ordering, fence};

use super::{cpu, lapic, traps};

/// The frequency of the time-stamp counter.
#[derive(Clone, Copy)]
pub struct Frequency {
    /// Thousand ticks a second.
    pub khz: u64,
}

impl Frequency {
    /// Ticks in `us` microseconds.
    pub fn ticks_us(self, us: u64) -> u64 {
        us * self.khz / 1000
    }

    /// Whole microseconds in `ticks`.
    pub fn us(self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1000 / u128::from(self.khz)) as u64
    }

    /// Ticks a second.
    pub fn hz(self) -> u64 {
        self.khz * 1000
    }

    /// Spins for `us` microseconds.
    pub fn wait_us(self, us: u64) {
        let end = cpu::tsc() + self.ticks_us(us);
        while cpu::tsc() < end {
            core::hint::spin_loop();
        }
    }
}

/// Finds the frequency: from kvmclock if there is one, else from CPUID, else with the local APIC's
/// timer. `None` if none of them works.
pub fn frequency(kvmclock: Option<&KvmClock>) -> Option<Frequency> {
    let khz = kvmclock
        .map(KvmClock::tsc_khz)
        .or_else(cpuid_khz)
        .or_else(lapic_khz)?;
    (khz > 0).then_some(Frequency { khz })
}

/// CPUID leaf 0x15 (crystal and ratio), or the hypervisors' leaf 0x40000010 (kHz in EAX).
fn cpuid_khz() -> Option<u64> {
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid(0x15);
        let crystal = u64::from(leaf.ecx) * u64::from(leaf.ebx);
        if leaf.eax != 0 && crystal != 0 {
            return Some(crystal / u64::from(leaf.eax) / 1000);
        }
    }
    let hypervisor = __cpuid(1).ecx >> 31 == 1;
    if hypervisor && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz != 0).then_some(u64::from(khz));
    }
    None
}

/// Counts ticks against the local APIC's timer.
fn lapic_khz() -> Option<u64> {
    const MS: u32 = 50;
    // No processor counts as far in 50 ms, if there is a timer at all.
    const HOPELESS: u64 = 10_000_000_000;

    lapic::start_countdown();
    let start = cpu::tsc();
    while lapic::counted_ns() < MS * 1_000_000 {
        if cpu::tsc() - start > HOPELESS {
            return None;
        }
    }
    Some((cpu::tsc() - start) / u64::from(MS))
}

/// The page that KVM keeps up to date: `struct pvclock_vcpu_time_info`.
#[repr(C, align(64))]
pub struct KvmClock {
    version: u32,
    reserved: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    reserved2: [u8; 2],
}

static mut KVMCLOCK: KvmClock = KvmClock {
    version: 0,
    reserved: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
    reserved2: [0; 2],
};

/// What [`KVMCLOCK`] said at one moment.
struct Reading {
    tsc_timestamp: u64,
    system_time: u64,
    mul: u32,
    shift: i8,
}

impl KvmClock {
    /// Switches kvmclock on for this processor. `None` if the hypervisor has none.
    pub fn enable() -> Option<&'static Self> {
        const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
        const CLOCKSOURCE2: u32 = 1 << 3;
        if __cpuid(1).ecx >> 31 == 0 {
            return None;
        }
        let signature = __cpuid(0x4000_0000);
        if [signature.ebx, signature.ecx, signature.edx] != [0x4b4d_564b, 0x564b_4d56, 0x0000_004d]
            || __cpuid(0x4000_0001).eax & CLOCKSOURCE2 == 0
        {
            return None;
        }
        let page = &raw mut KVMCLOCK;
        // SAFETY: makes KVM write to `KVMCLOCK` and to nothing else; the guest only reads it, and
        // volatile.
        unsafe { traps::write_msr(SYSTEM_TIME_NEW, page as u64 | 1) };
        // SAFETY: a static, valid for ever, of which no mutable reference is ever made.
        let clock = unsafe { &*page };
        (clock.read().mul != 0).then_some(clock)
    }

    /// Reads all fields as of one update: the version is odd while KVM writes.
    fn read(&self) -> Reading {
        let this = &raw const *self;
        loop {
            // SAFETY: all reads are from `self`; volatile because KVM changes it.
            let before = unsafe { (&raw const (*this).version).read_volatile() };
            fence(Ordering::Acquire);
            // SAFETY: as above.
            let reading = unsafe {
                Reading {
                    tsc_timestamp: (&raw const (*this).tsc_timestamp).read_volatile(),
                    system_time: (&raw const (*this).system_time).read_volatile(),
                    mul: (&raw const (*this).tsc_to_system_mul).read_volatile(),
                    shift: (&raw const (*this).tsc_shift).read_volatile(),
                }
            };
            fence(Ordering::Acquire);
            // SAFETY: as above.
            let after = unsafe { (&raw const (*this).version).read_volatile() };
            if before == after && before & 1 == 0 {
                return reading;
            }
        }
    }

    /// Nanoseconds since the clock's start, as the hypervisor counts them.
    pub fn ns(&self) -> u64 {
        let reading = self.read();
        let ticks = cpu::tsc().wrapping_sub(reading.tsc_timestamp);
        let scaled = if reading.shift >= 0 {
            ticks << reading.shift
        } else {
            ticks >> -reading.shift
        };
        let ns = (u128::from(scaled) * u128::from(reading.mul)) >> 32;
        reading.system_time.wrapping_add(ns as u64)
    }

    /// The frequency that the clock's multiplier stands for.
    fn tsc_khz(&self) -> u64 {
        let reading = self.read();
        let unshifted = (1_000_000u64 << 32) / u64::from(reading.mul);
        if reading.shift >= 0 {
            unshifted >> reading.shift
        } else {
            unshifted << -reading.shift
        }
    }
}
