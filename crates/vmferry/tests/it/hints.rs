//! Free-page hints while the guest allocates and frees as fast as it can (law 4): nothing is lost, round after round.
//!
//! It notices when law 4 is broken, under each discipline in its first 100 rounds: with hints that count across a sync
//! (neither the balloon nor the tracker ends a round) the guest found 11 to 15 pages wrong, with hints into chunks that
//! are not armed (`begin_hints` arms nothing) more than 700.

use std::time::Instant;

use serde_json::json;
use vmferry_control::schema::{MigrationStatus, RunState};
use vmferry_guests::Hints;

use crate::common::guest::{Guest, Shape};
use crate::common::lab::Lab;
use crate::common::{eventually, say};

/// Rounds of hints under each discipline, at least.
const ROUNDS: u64 = 200;
/// Rounds in one migration. What is lost in it shows after it.
const ROUNDS_A_MIGRATION: u64 = 100;
/// Where the guest hardly gets a processor, a pass may leave nothing, and the migration ends early.
const MOST_MIGRATIONS: u64 = 20;

/// What the guest has told its balloon so far, on all hosts.
fn told(guest: &Guest) -> Hints {
    let story = guest.story();
    let of_vcpu = |vcpu| story.last(vcpu)?.hints;
    let each = (0..guest.shape.cpus).filter_map(of_vcpu);
    each.fold(Hints::default(), |all, one| Hints {
        hinted: all.hinted + one.hinted,
        rounds: all.rounds.max(one.rounds),
    })
}

/// Moves the guest when it has answered so many more questions, or before if a pass happened to leave nothing. Gives
/// back how many pages were spared.
fn migrate_after(guest: &mut Guest, rounds: u64) -> u64 {
    // No pass leaves so little.
    guest.vm.set_parameters(json!({"downtime-limit": 0}));
    let before = told(guest);
    let mut destination = guest.tcp_destination();
    let uri = destination.uri();
    guest.vm.execute("migrate", json!({"uri": uri}));
    eventually("so many rounds of hints", || {
        let enough = told(guest).rounds >= before.rounds + rounds;
        (enough || guest.vm.info().status == Some(MigrationStatus::Completed)).then_some(())
    });
    guest.vm.set_parameters(json!({"downtime-limit": 10_000}));
    let info = guest.vm.migration_ends();
    assert_eq!(info.status, Some(MigrationStatus::Completed), "{info:?}");
    destination.wait_for_state(RunState::Running);
    guest.moved_to(destination);
    guest.verifies_all();
    let ram = info.ram.expect("it is known at the end");
    ram.x_vmferry_hinted_pages
}

fn nothing_is_lost_under(discipline: &str) {
    let Some(lab) = Lab::new() else { return };
    let start = Instant::now();
    let mut guest = Guest::boot(
        &lab,
        Shape {
            memory: "128M",
            cpus: 2,
            more: vec!["--balloon".to_owned()],
            load: "ws=64M rate=0 hints=on pattern=random sweep=50000".to_owned(),
            ..Shape::small()
        },
    );
    let (mut spared, mut migrations) = (0, 0);
    while told(&guest).rounds < ROUNDS {
        assert!(migrations < MOST_MIGRATIONS, "{:?}", told(&guest));
        guest.vm.set_parameters(json!({
            "x-vmferry-discipline": discipline,
            // Many chunks, each armed by itself.
            "x-vmferry-arming-chunk": 256 << 10,
            // Less than is dirty in a pass, so that hints come while there is something left to spare.
            "max-bandwidth": 64 << 20,
        }));
        spared += migrate_after(&mut guest, ROUNDS_A_MIGRATION);
        migrations += 1;
    }
    let Hints { hinted, rounds } = told(&guest);
    assert!(
        hinted > rounds && spared > rounds,
        "{hinted} pages hinted, {spared} spared"
    );
    say(&format!(
        "{discipline}: {rounds} rounds of hints in {migrations} migrations, {hinted} pages hinted, {spared} times \
         a page was not sent for it, corrupt 0, {:.0} s",
        start.elapsed().as_secs_f64()
    ));
}

#[test]
fn nothing_is_lost_while_hints_flow_under_per_bit_lock() {
    nothing_is_lost_under("per-bit-lock");
}

#[test]
fn nothing_is_lost_while_hints_flow_under_slice_lock() {
    nothing_is_lost_under("slice-lock");
}

#[test]
fn nothing_is_lost_while_hints_flow_under_lock_free() {
    nothing_is_lost_under("lock-free");
}
