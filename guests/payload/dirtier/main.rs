//! `dirtier`: a guest that rewrites its memory at a chosen rate and notices when any page is not what
//! it should be - above all a page that a migration lost and that is therefore an old one.
//!
//! The boot processor reads the command line, starts the others and divides the memory; then every
//! vCPU is a [`worker`] of its own, and they share nothing but the serial line.

#![no_std]
#![no_main]
#![warn(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

#[path = "../rt/mod.rs"]
mod rt;

mod answer;
mod balloon;
mod churn;
mod heartbeat;
mod ledger;
mod memory;
mod order;
mod pacer;
mod page;
mod params;
mod plan;
mod random;
mod worker;

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use balloon::Balloon;
use params::{Hints, Params};
use plan::Plan;
use rt::clock::{self, Frequency, KvmClock};
use rt::once::Once;
use rt::pvh::{self, RamMap};
use rt::serial::{self, say};
use rt::{paging, smp, traps};

/// What every line begins with.
const NAME: &str = "dirtier";

/// What all vCPUs know.
struct Shared {
    params: Params,
    plan: Plan,
    vcpus: u64,
    tsc: Frequency,
    kvmclock: Option<&'static KvmClock>,
    /// If pages are freed.
    balloon: Option<Balloon>,
    /// Where the vCPUs wait for each other.
    filled: Barrier,
    done: Barrier,
    totals: Totals,
}

/// What the vCPUs found, in the end.
#[derive(Default)]
struct Totals {
    written: AtomicU64,
    verified: AtomicU64,
    corrupt: AtomicU64,
}

/// Lets each vCPU go on when all have come.
#[derive(Default)]
struct Barrier(AtomicUsize);

impl Barrier {
    fn wait(&self, vcpus: u64) {
        self.0.fetch_add(1, Ordering::AcqRel);
        while (self.0.load(Ordering::Acquire) as u64) < vcpus {
            core::hint::spin_loop();
        }
    }
}

static SHARED: Once<Shared> = Once::new();

/// The boot processor.
fn main(start_info: u64) -> ! {
    match prepare(start_info) {
        Ok(shared) => {
            // SAFETY: the only call; the boot processor comes here once.
            unsafe { SHARED.set(shared) };
            run(0)
        }
        Err(Reported) => traps::reset(),
    }
}

/// An error that has been printed.
struct Reported;

/// Prints an error; the guest ends then.
macro_rules! give_up {
    ($($error:tt)*) => {{
        say!("error: {}", format_args!($($error)*));
        Reported
    }};
}

fn prepare(start_info: u64) -> Result<Shared, Reported> {
    // SAFETY: this is what the VMM passed in, and nothing has been overwritten yet.
    let boot = unsafe { pvh::read(start_info) }.map_err(|error| give_up!("{error}"))?;
    let params = Params::parse(boot.command_line).map_err(|error| give_up!("{error}"))?;
    let kvmclock = KvmClock::enable();
    let tsc = clock::frequency(kvmclock).ok_or_else(|| {
        give_up!("neither kvmclock, CPUID nor the APIC timer tells the TSC's frequency")
    })?;

    let balloon = match params.hints {
        Hints::Off => None,
        Hints::On => {
            let balloon = Balloon::start(tsc);
            Some(balloon.map_err(|why| give_up!("the virtio balloon that hints need: {why}"))?)
        }
    };
    let ram = paging::map(&boot.ram);
    let vcpus = smp::start(params.vcpus as usize, tsc, run) as u64;
    if vcpus < params.vcpus {
        say!(
            "error: {vcpus} of {} vCPUs came up; going on with {vcpus}",
            params.vcpus
        );
    }
    let plan = plan(&ram, vcpus, &params)?;
    let Params {
        ws,
        cold,
        rate,
        pattern,
        fill,
        cold_fill,
        seed,
        idle,
        hints,
        ..
    } = &params;
    say!(
        "start vcpus={vcpus} ws={} cold={} rate={rate} pattern={pattern} fill={fill} seed={seed} \
         tsc_khz={} cold_fill={cold_fill} sleep={idle} hints={hints}",
        ws * page::BYTES as u64,
        cold * page::BYTES as u64,
        tsc.khz
    );
    Ok(Shared {
        params,
        plan,
        vcpus,
        tsc,
        kvmclock,
        balloon,
        filled: Barrier::default(),
        done: Barrier::default(),
        totals: Totals::default(),
    })
}

fn plan(ram: &RamMap, vcpus: u64, params: &Params) -> Result<Plan, Reported> {
    let regions = ram
        .regions()
        .iter()
        .map(|region| (region.start, region.end));
    Plan::new(regions, vcpus, params.ws, params.cold).map_err(|shortage| {
        give_up!(
            "ws and cold need {} KiB, there are {} KiB of RAM",
            shortage.need >> 10,
            shortage.have >> 10
        )
    })
}

/// One vCPU, from the division of the memory to the end of the machine.
fn run(vcpu: usize) -> ! {
    let shared = SHARED.wait();
    let totals = &shared.totals;
    let counts = worker::Worker::new(shared, vcpu as u64).run();
    totals.written.fetch_add(counts.written, Ordering::Relaxed);
    totals
        .verified
        .fetch_add(counts.verified, Ordering::Relaxed);
    totals.corrupt.fetch_add(counts.corrupt, Ordering::Relaxed);
    shared.done.wait(shared.vcpus);
    if vcpu == 0 {
        say!(
            "done written={} verified={} corrupt={}",
            totals.written.load(Ordering::Relaxed),
            totals.verified.load(Ordering::Relaxed),
            totals.corrupt.load(Ordering::Relaxed)
        );
        traps::reset();
    }
    loop {
        traps::halt();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    serial::last_words(format_args!("{info}"));
    traps::reset()
}
