//! Law 4: a guest says that a page is free, and uses it again.

use loom::thread;

use super::BOTH;
use super::guest::{Layout, Migration, check};

/// A guest says that page 0 is free, and, once that was heard, uses it again. Meanwhile the migration sends page 1,
/// which is in the same chunk, and may come to a sync. Whatever was overtaken by what, the last content of page 0
/// is sent.
#[test]
fn a_page_in_use_again_is_not_lost() {
    check(&BOTH, 3, |discipline| {
        let migration = Migration::start(discipline, Layout::OneWord);
        let round = migration.begin_hints();
        let other = migration.clone();
        let balloon = thread::spawn(move || {
            other.hint(round, 0);
            other.guest.write(0, 1);
        });
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        migration.sync();
        migration.pass(&mut sent);
        balloon.join().unwrap();
        migration.finish(&mut sent);
        assert_eq!(sent[0], 1, "the page was lost");
    });
}

/// The same, but the guest does not wait until it was heard.
#[test]
fn a_page_in_use_again_before_it_was_heard_is_not_lost() {
    check(&BOTH, 3, |discipline| {
        let migration = Migration::start(discipline, Layout::OneWord);
        let round = migration.begin_hints();
        let other = migration.clone();
        let balloon = thread::spawn(move || {
            other.guest.write(0, 1);
            other.hint(round, 0);
        });
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        migration.sync();
        migration.pass(&mut sent);
        balloon.join().unwrap();
        migration.finish(&mut sent);
        assert_eq!(sent[0], 1, "the page was lost");
    });
}

/// A guest has said that page 0 is free, but before that is heard a sync comes, the guest is told that its round is
/// over, and uses the page again. No other round follows: the migration is about to end.
#[test]
fn a_hint_that_comes_late_changes_nothing() {
    check(&BOTH, 3, |discipline| {
        let migration = Migration::start(discipline, Layout::OneWord);
        let round = migration.begin_hints();
        let other = migration.clone();
        let balloon = thread::spawn(move || other.hint(round, 0));
        let mut sent = [0, 0];
        migration.pass(&mut sent);
        migration.sync();
        migration.guest.write(0, 1);
        migration.sync();
        migration.pass(&mut sent);
        balloon.join().unwrap();
        migration.finish(&mut sent);
        assert_eq!(sent[0], 1, "the page was lost");
    });
}
