//! Laws 1 and 3 when a sync, an arming, hints, and the VMM's own writes happen beside a pass.
//!
//! After everything that ran at once a last sync and a last pass follow, as after the guest was paused. What was then
//! sent last of each page must be what the page holds.

use std::sync::Arc;

use loom::thread;
use vmferry_dirty::log::{VmmWriteLog, WithVmmWrites};
use vmferry_dirty::{Discipline, PageRange};

use super::BOTH;
use super::guest::{Guest, Layout, Migration, check};

/// Both pages were sent and armed, and have been written since.
fn second_pass(discipline: Discipline, layout: Layout) -> (Migration, [u64; 2]) {
    let migration = Migration::start(discipline, layout);
    let mut sent = [0, 0];
    migration.pass(&mut sent);
    migration.guest.write(0, 1);
    migration.guest.write(1, 1);
    (migration, sent)
}

/// A sync brings two pages of one chunk, one after the other, while a pass runs. The pass may read the first one
/// before the sync is done, the guest writes to it again, and the chunk is armed for the second one: that must not
/// forget the write.
#[test]
fn a_sync_beside_a_pass() {
    check(&Discipline::ALL, 3, |discipline| {
        let (migration, mut sent) = second_pass(discipline, Layout::TwoWords);
        let other = migration.clone();
        let sync = thread::spawn(move || other.sync());
        let guest = &migration.guest;
        migration.pass_and_write(&mut sent, |page| guest.write(page, 2));
        sync.join().unwrap();
        migration.pass(&mut sent);
        migration.finish(&mut sent);
        assert_eq!(sent, [0, 1].map(|page| guest.read(page)), "a page was lost");
    });
}

/// The same with a round of hints that begins at any time, which arms everything; and the guest, asked for its free
/// pages, names one that it uses again at once.
#[test]
fn a_sync_and_a_round_of_hints_beside_a_pass() {
    check(&BOTH, 2, |discipline| {
        let (migration, mut sent) = second_pass(discipline, Layout::OneWord);
        let other = migration.clone();
        let sync = thread::spawn(move || other.sync());
        let other = migration.clone();
        let balloon = thread::spawn(move || {
            let round = other.begin_hints();
            other.guest.write(1, 3);
            other.hint(round, 1);
        });
        let guest = &migration.guest;
        migration.pass_and_write(&mut sent, |page| match page {
            0 => guest.write(0, 2),
            _ => (),
        });
        sync.join().unwrap();
        balloon.join().unwrap();
        migration.finish(&mut sent);
        assert_eq!(sent, [0, 1].map(|page| guest.read(page)), "a page was lost");
    });
}

/// A chunk is armed by one thread, after a write that no log sees, while another thread takes its pages. Page 0: whoever
/// finds the chunk armed sees the write. Page 1, to which the guest writes as soon as it was read: it was read after the
/// arming, so the next sync brings the write.
#[test]
fn an_arming_beside_a_pass() {
    check(&BOTH, 5, |discipline| {
        let migration = Migration::start(discipline, Layout::OneWord);
        let other = migration.clone();
        let arming = thread::spawn(move || {
            other.guest.write(0, 1);
            other.begin_hints();
        });
        let guest = &migration.guest;
        let mut sent = [0, 0];
        migration.pass_and_write(&mut sent, |page| match page {
            1 => guest.write(1, 1),
            _ => (),
        });
        arming.join().unwrap();
        migration.finish(&mut sent);
        assert_eq!(sent, [0, 1].map(|page| guest.read(page)), "a page was lost");
    });
}

/// A device of the VMM writes to a page while one thread syncs and another one sends what is dirty. Who sees the mark
/// of a write sees the write.
#[test]
fn a_write_of_the_vmm_beside_a_sync_and_a_pass() {
    check(&BOTH, 3, |discipline| {
        let guest = Guest::new(Layout::OneWord);
        let vmm = Arc::new(VmmWriteLog::new(2));
        let log = WithVmmWrites::new(guest.clone(), vec![vmm.clone()]);
        let migration = Migration::with_log(&guest, Arc::new(log), discipline);
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        let device = thread::spawn(move || {
            guest.write_unlogged(0, 1);
            vmm.mark(PageRange::new(0, 1));
        });
        let other = migration.clone();
        let sync = thread::spawn(move || other.sync());
        migration.pass(&mut sent);
        device.join().unwrap();
        sync.join().unwrap();
        migration.finish(&mut sent);
        assert_eq!(sent[0], 1, "a page was lost");
    });
}
