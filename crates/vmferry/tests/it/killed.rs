//! `kill -9` of the destination at random moments: the guest survives on the source.

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::outcome::{Outcome, Tally, Usual, conclude, migrate_until, phase};
use crate::common::{Random, say};

const ROUNDS: usize = 50;

#[test]
fn fifty_destinations_are_killed() {
    let Some(lab) = Lab::new() else { return };
    let mut random = Random::new("killed");
    let mut guest = Guest::boot(&lab, Shape::medium());
    let mut usual = Usual::of(&guest.hop());
    let mut tally = Tally::default();
    for round in 0..ROUNDS {
        let mut destination = guest.tcp_destination();
        let uri = destination.uri();
        migrate_until(&mut guest, &uri, phase(round), usual, &mut random);
        destination.kill();
        let outcome = conclude(&mut guest);
        tally.count(outcome);
        if outcome == Outcome::Arrived {
            // It was killed with its new host; nobody can save it.
            guest = Guest::boot(&lab, Shape::medium());
        }
        // Nothing is left behind that is in the way of the next migration.
        usual = Usual::of(&guest.hop());
    }
    guest.verifies_all();
    say(&format!("killed at {ROUNDS} moments: {tally:?}"));
    // How many of the others come before the hand-over depends on how fast this machine is just then.
    assert!(
        tally.ran_on >= ROUNDS / 3,
        "the moments while it connects lie before the hand-over: {tally:?}"
    );
}
