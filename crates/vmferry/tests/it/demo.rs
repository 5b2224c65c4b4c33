//! `vmferry demo`.

use std::time::Duration;

use crate::common::command::{start, vmferry};
use crate::common::lab::Lab;

/// The guest verifies all its memory twice, in its own time.
const A_WHILE: Duration = Duration::from_secs(150);

#[test]
fn loses_nothing_and_says_so() {
    let Some(_lab) = Lab::new() else { return };
    let small = ["demo", "--memory", "160MiB", "--working-set", "32MiB"];
    let more = ["--rate", "5000", "--json"];
    let demo = start([&small[..], &more].concat()).finish_within(A_WHILE);
    assert!(demo.status.success(), "{demo:#?}");
    assert_eq!(demo.stderr, "");
    let answer = demo.json();
    assert_eq!(answer["migration"]["status"], "completed");
    let guest = &answer["guest"];
    assert_eq!(guest["pages-corrupt"], 0);
    assert!(guest["pages-verified"].as_u64().expect("a count") > 2 * (32 << 20) / 4096);
    let (felt, downtime) = (
        guest["felt-downtime-us"].as_u64().expect("a time"),
        answer["migration"]["x-vmferry-downtime-us"]
            .as_u64()
            .expect("a time"),
    );
    assert!(felt > 0 && downtime > 0);
}

#[test]
fn says_when_it_does_not_fit() {
    let words = vmferry(["demo", "--memory", "64MiB", "--working-set", "32MiB"]).failed();
    assert!(
        words.contains("is too small for a working set of 32.0 MiB"),
        "{words}"
    );
    assert!(words.contains("--memory 96.0 MiB or more"), "{words}");
}
