//! One vCPU at work: writes its working set, sweeps over all it owns, and tells about it.
//!
//! The main loop turns often: a turn handles a few pages and prints a few bytes, so that the time
//! between two turns says for how long the vCPU did *not* run - in a migration, the downtime.

use core::fmt::Display;
use core::sync::atomic::{AtomicU64, Ordering};

use super::Shared;
use super::balloon::Balloon;
use super::churn::Churn;
use super::heartbeat::{Heartbeat, Hints};
use super::ledger::{BLOCK, Ledger, Mismatch};
use super::memory::{self, Pages};
use super::order::Order;
use super::pacer::{Pacer, Rate};
use super::page::{Fill, Identity};
use super::params::Idle;
use super::plan::part;
use super::random::Random;
use super::rt::serial::{LineQueue, say};
use super::rt::{cpu, lapic, traps};

/// Pages written, and pages swept, in one turn at most.
const PAGES_A_TURN: usize = 8;
/// Bytes printed in one turn at most; each costs an exit to the VMM.
const BYTES_A_TURN: usize = 4;
/// Timer interrupts a second, with `sleep=hlt`.
const TICKS: u32 = 1000;
/// Unless told otherwise, a sweep over all pages takes so many seconds.
const SWEEP_SECONDS: u64 = 20;
/// `CORRUPT` lines printed in all; later ones are only counted.
const MOST_REPORTS: u64 = 100;

static REPORTS: AtomicU64 = AtomicU64::new(0);

/// What a vCPU did, in total.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Pages rewritten.
    pub written: u64,
    /// Pages verified.
    pub verified: u64,
    /// Pages (or pages of the ledger) found wrong.
    pub corrupt: u64,
    /// Complete sweeps.
    pub sweeps: u64,
    /// Pages that the balloon was told are free.
    pub hinted: u64,
}

/// See the module's documentation.
pub struct Worker<'a> {
    shared: &'a Shared,
    vcpu: u64,
    pages: Pages<'a>,
    ledger: Ledger<'a>,
    /// Pages of the working set: the first ones.
    ws: usize,
    work: Work<'a>,
    /// Next page to sweep.
    swept: usize,
    counts: Counts,
    queue: LineQueue,
}

/// What becomes of the working set.
enum Work<'a> {
    /// Its pages are rewritten, in this order.
    Rewrite(Order),
    /// Its pages are freed and allocated, and the balloon is told which are free.
    ///
    /// A page that has changed an odd number of times is in use: freeing it counts as a change, too.
    Churn(Churn, &'a Balloon),
}

/// Times, in ticks of the time-stamp counter.
struct Times {
    start: u64,
    /// The start of the turn before this one.
    turn: u64,
    /// Added to the counter, so that time goes on if the counter went back.
    correction: u64,
    /// When the next heartbeat is due.
    heartbeat: u64,
    /// Longest turn since the last heartbeat.
    gap: u64,
    /// Longest turn.
    max_gap: u64,
    /// Pages written before the last heartbeat.
    written: u64,
    /// kvmclock at the last heartbeat.
    kvmclock_ns: u64,
}

impl<'a> Worker<'a> {
    /// Takes the vCPU's share of memory, writes all its pages once, and waits for the other vCPUs to
    /// have done the same.
    pub fn new(shared: &'a Shared, vcpu: u64) -> Self {
        let share = shared.plan.share(vcpu);
        // SAFETY: the plan was made from what `paging::map` mapped and returned as unused, and each
        // vCPU has a number of its own and comes here once.
        let (pages, ledger) = unsafe { memory::take(&shared.plan, &share) };
        let params = &shared.params;
        let ws = share.ws as usize;
        let random = |stream: u64| Random::new(params.seed ^ ((vcpu + 1) << 32) ^ (stream << 16));
        let order = Order::new(params.pattern, ws, random(0));
        let work = match &shared.balloon {
            None => Work::Rewrite(order),
            Some(balloon) => Work::Churn(Churn::new(order, random(1)), balloon),
        };
        let mut worker = Self {
            shared,
            vcpu,
            pages,
            ledger,
            ws,
            work,
            swept: 0,
            counts: Counts::default(),
            queue: LineQueue::new(),
        };
        for index in 0..worker.ledger.pages() {
            worker.write(index);
        }
        shared.filled.wait(shared.vcpus);
        if vcpu == 0 {
            say!("ready filled_pages={}", params.ws + params.cold);
        }
        worker
    }

    /// Works until the time is over, if it ever is.
    pub fn run(mut self) -> Counts {
        let params = &self.shared.params;
        let tsc = self.shared.tsc;
        if params.idle == Idle::Halt {
            lapic::start_ticks(TICKS);
        }
        let now = cpu::tsc();
        let rate = match params.rate {
            _ if self.ws == 0 => Rate::PerSecond(0),
            Rate::Unlimited => Rate::Unlimited,
            Rate::PerSecond(all) => Rate::PerSecond(part(all, self.vcpu, self.shared.vcpus)),
        };
        let owned = self.ledger.pages() as u64;
        let sweep = match params.sweep {
            _ if owned == 0 => 0,
            None => owned.div_ceil(SWEEP_SECONDS),
            Some(pages) => pages,
        };
        let mut writes = Pacer::new(rate, tsc.hz(), now);
        let mut sweeps = Pacer::new(Rate::PerSecond(sweep), tsc.hz(), now);
        let mut times = Times {
            start: now,
            turn: now,
            correction: 0,
            heartbeat: now + tsc.hz(),
            gap: 0,
            max_gap: 0,
            written: 0,
            kvmclock_ns: 0,
        };
        let end = params.seconds.map(|seconds| now + seconds * tsc.hz());

        loop {
            let now = self.turn(&mut times);
            let mut busy = false;
            if let Work::Churn(_, balloon) = self.work {
                balloon.listen(now);
            }
            for _ in 0..PAGES_A_TURN {
                if writes.take(now) {
                    self.work_on_next();
                    busy = true;
                }
                if sweeps.take(now) {
                    self.sweep_next();
                    busy = true;
                }
            }
            if end.is_some_and(|end| now >= end) {
                break;
            }
            if now >= times.heartbeat {
                self.heartbeat(&mut times, now);
            }
            busy |= self.queue.drain(BYTES_A_TURN);
            if !busy {
                match params.idle {
                    Idle::Halt => traps::halt(),
                    Idle::Spin => core::hint::spin_loop(),
                }
            }
        }
        self.sweep_all();
        // As of the last turn: the time of this sweep is no gap.
        let now = times.turn;
        self.heartbeat(&mut times, now);
        self.queue.flush();
        self.counts
    }

    /// Begins a turn: notes how long the one before took. The time it returns never goes backwards; a
    /// counter that does (a migration must not let it) is reported.
    fn turn(&mut self, times: &mut Times) -> u64 {
        let tsc = self.shared.tsc;
        let mut now = cpu::tsc().wrapping_add(times.correction);
        if now < times.turn {
            let back = times.turn - now;
            times.correction = times.correction.wrapping_add(back);
            now = times.turn;
            self.queue.push(format_args!(
                "CLOCK vcpu={} tsc went back by {} us",
                self.vcpu,
                tsc.us(back)
            ));
        }
        times.gap = times.gap.max(now - times.turn);
        times.turn = now;
        now
    }

    /// Prints the heartbeat, and begins a new second.
    fn heartbeat(&mut self, times: &mut Times, now: u64) {
        let tsc = self.shared.tsc;
        let seconds = (now - times.start) / tsc.hz();
        times.max_gap = times.max_gap.max(times.gap);
        let heartbeat = Heartbeat {
            vcpu: self.vcpu as u32,
            t: seconds,
            written: self.counts.written,
            verified: self.counts.verified,
            corrupt: self.counts.corrupt,
            gap_us: tsc.us(times.gap),
            maxgap_us: tsc.us(times.max_gap),
            sweeps: self.counts.sweeps,
            rate: self.counts.written - times.written,
            hints: match self.work {
                Work::Rewrite(_) => None,
                Work::Churn(_, balloon) => Some(Hints {
                    hinted: self.counts.hinted,
                    rounds: balloon.rounds(),
                }),
            },
        };
        self.queue.push(format_args!("{heartbeat}"));
        times.gap = 0;
        times.written = self.counts.written;
        times.heartbeat = times.start + (seconds + 1) * tsc.hz();

        // Only the boot processor switched kvmclock on, and it is vCPU 0.
        if let (Some(clock), 0) = (self.shared.kvmclock, self.vcpu) {
            let ns = clock.ns();
            if ns < times.kvmclock_ns {
                let back = (times.kvmclock_ns - ns) / 1000;
                self.queue
                    .push(format_args!("CLOCK vcpu=0 kvmclock went back by {back} us"));
            }
            times.kvmclock_ns = ns;
        }
    }

    /// Rewrites, frees or allocates the page whose turn it is in the working set. What is in use is verified before.
    fn work_on_next(&mut self) {
        let index = match &mut self.work {
            Work::Rewrite(order) => {
                let index = order.next();
                self.verify(index);
                index
            }
            Work::Churn(churn, balloon) => {
                let (index, wanted) = (churn.next(), churn.wants_it_again());
                let balloon = *balloon;
                if !self.is_free(index) {
                    self.free(index, balloon);
                    if !wanted {
                        return;
                    }
                }
                index
            }
        };
        self.write(index);
        self.counts.written += 1;
    }

    fn is_free(&self, index: usize) -> bool {
        matches!(self.work, Work::Churn(..))
            && index < self.ws
            && self.ledger.generation(index).is_multiple_of(2)
    }

    /// Verifies a page, frees it, and tells the balloon.
    fn free(&mut self, index: usize, balloon: &Balloon) {
        self.verify(index);
        self.ledger.advance(index);
        // SAFETY: a free page is not looked at until it is written to as a whole.
        if unsafe { balloon.hint(self.pages.address(index)) } {
            self.counts.hinted += 1;
        }
    }

    /// Verifies the next page of the sweep, if it is in use, and with the first page of each block the ledger's block.
    fn sweep_next(&mut self) {
        let index = self.swept;
        if index.is_multiple_of(BLOCK) {
            self.verify_block(index / BLOCK);
        }
        if !self.is_free(index) && !self.verify(index) {
            // Written anew, so that one damage is counted once. With two changes it stays in use.
            self.ledger.advance(index);
            self.write(index);
        }
        self.swept = index + 1;
        if self.swept == self.ledger.pages() {
            self.swept = 0;
            self.counts.sweeps += 1;
            if let Err(mismatch) = self.ledger.check_sums() {
                self.corrupt_ledger("all pages", mismatch);
            }
        }
    }

    /// Verifies everything once, from the first page to the last.
    fn sweep_all(&mut self) {
        self.swept = 0;
        for _ in 0..self.ledger.pages() {
            self.sweep_next();
        }
    }

    /// What page `index` must hold now, and how it is filled.
    fn wanted(&self, index: usize) -> (Identity, Fill) {
        let params = &self.shared.params;
        let identity = Identity {
            page: self.pages.number(index),
            generation: self.ledger.generation(index),
            seed: params.seed,
        };
        let fill = if index < self.ws {
            params.fill
        } else {
            params.cold_fill
        };
        (identity, fill)
    }

    /// Writes the next generation of a page.
    fn write(&mut self, index: usize) {
        self.ledger.advance(index);
        let (identity, fill) = self.wanted(index);
        self.pages.get(index).write(identity, fill);
    }

    /// Verifies a page; counts and reports it if it is wrong.
    fn verify(&mut self, index: usize) -> bool {
        let (identity, fill) = self.wanted(index);
        self.counts.verified += 1;
        let right = self.pages.get(index).is(identity);
        if !right {
            self.corrupt_page(index, identity, fill);
        }
        right
    }

    /// Verifies one block of the ledger.
    fn verify_block(&mut self, block: usize) {
        if let Err(mismatch) = self.ledger.check_block(block) {
            let first = self.pages.number(block * BLOCK);
            self.corrupt_ledger(format_args!("pages from {first}"), mismatch);
        }
    }

    #[cold]
    fn corrupt_page(&mut self, index: usize, identity: Identity, fill: Fill) {
        // If it is the ledger that is wrong, that is to be said first.
        self.verify_block(index / BLOCK);
        self.counts.corrupt += 1;
        if REPORTS.fetch_add(1, Ordering::Relaxed) < MOST_REPORTS {
            let damage = self.pages.get(index).damage(identity, fill);
            self.queue.push(format_args!(
                "CORRUPT vcpu={} page={} addr={:#x} {damage}",
                self.vcpu,
                identity.page,
                self.pages.address(index)
            ));
        }
    }

    #[cold]
    fn corrupt_ledger(&mut self, of: impl Display, Mismatch { expected, found }: Mismatch) {
        self.counts.corrupt += 1;
        if REPORTS.fetch_add(1, Ordering::Relaxed) < MOST_REPORTS {
            self.queue.push(format_args!(
                "CORRUPT vcpu={} ledger of {of}: expected sum={expected} found sum={found}",
                self.vcpu
            ));
        }
    }
}
