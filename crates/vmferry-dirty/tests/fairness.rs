//! Under `SliceLock` whoever waits for the end of a slice is next, however fast slices follow each other.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use vmferry_dirty::{Cursor, DirtySet, Discipline};

/// Threads that wait at once.
const WAITING: usize = 6;

/// Waits until the kernel says that the thread `tid` sleeps.
fn wait_until_asleep(tid: &AtomicI32) {
    let start = Instant::now();
    loop {
        assert!(start.elapsed() < Duration::from_secs(30), "nobody waits");
        let tid = tid.load(Ordering::Acquire);
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat"));
        // "tid (name) state ..."; the name may hold anything.
        let state = stat.ok().and_then(|stat| {
            let (_, rest) = stat.rsplit_once(") ")?;
            rest.chars().next()
        });
        if state == Some('S') {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Threads wait for a slice to end. Each of them then has two slices, without a pause between them: its second one comes
/// only after the first one of everybody who has waited.
///
/// A lock that is not handed over goes to the thread that asks first, and that is the one which has just released it, as
/// the others are still asleep. (`parking_lot` hands an ordinary lock over about once in a millisecond. So one thread that
/// waits, or slices that last longer, would show nothing.)
#[test]
fn who_waits_for_a_slice_comes_before_the_next_one() {
    let set = DirtySet::new(&[64], Discipline::SliceLock);
    let turns = Mutex::new(Vec::new());
    let tids = [const { AtomicI32::new(0) }; WAITING];
    std::thread::scope(|scope| {
        let mut cursor = Cursor::default();
        let slice = set.slice(&mut cursor);
        for (number, tid) in tids.iter().enumerate() {
            let (set, turns) = (&set, &turns);
            scope.spawn(move || {
                // SAFETY: the call takes no argument and cannot fail.
                tid.store(unsafe { libc::gettid() }, Ordering::Release);
                for _ in 0..2 {
                    let mut cursor = Cursor::default();
                    let _slice = set.slice(&mut cursor);
                    turns.lock().unwrap().push(number);
                }
            });
            wait_until_asleep(tid);
        }
        drop(slice);
    });
    let first: Vec<usize> = turns.into_inner().unwrap()[..WAITING].to_vec();
    let expected: Vec<usize> = (0..WAITING).collect();
    assert_eq!(first, expected, "somebody was passed by");
}
