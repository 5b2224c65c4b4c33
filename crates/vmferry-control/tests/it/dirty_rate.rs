//! `calc-dirty-rate` and `query-dirty-rate` on the wire.

use std::time::Duration;

use serde_json::{Value, json};
use vmferry_control::QmpClient;
use vmferry_control::schema::{CalcDirtyRate, DirtyRateInfo, DirtyRateMeasureMode};
use vmferry_engine::dirty_rate::Method;

use crate::fake::{PATIENCE, Rig};

fn request(arguments: Value) -> String {
    json!({"execute": "calc-dirty-rate", "arguments": arguments}).to_string()
}

#[test]
fn what_may_be_asked_for() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    for (arguments, time, method) in [
        (
            json!({"calc-time": 1}),
            1000,
            Method::PageSampling { pages_per_gib: 512 },
        ),
        (
            json!({"calc-time": 60, "calc-time-unit": "second", "sample-pages": 16384}),
            60_000,
            Method::PageSampling {
                pages_per_gib: 16384,
            },
        ),
        (
            json!({"calc-time": 50, "calc-time-unit": "millisecond", "sample-pages": 128, "mode": "page-sampling"}),
            50,
            Method::PageSampling { pages_per_gib: 128 },
        ),
        (
            json!({"calc-time": 60_000, "calc-time-unit": "millisecond", "mode": "dirty-bitmap"}),
            60_000,
            Method::DirtyBitmap,
        ),
        (
            json!({"calc-time": 2, "mode": "dirty-ring"}),
            2000,
            Method::DirtyRing,
        ),
    ] {
        assert_eq!(wire.ask(request(arguments)), json!({"return": {}}));
        let expected = CalcDirtyRate {
            calc_time: Duration::from_millis(time),
            method,
        };
        assert_eq!(rig.machine.measurement(), Some(expected));
    }
}

#[test]
fn what_may_not() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let time = "Parameter 'calc-time' expects a time in the range of 50 ms to 60 s";
    let sample = "Parameter 'sample-pages' expects an integer in the range of 128 to 16384";
    let only = "Parameter 'sample-pages' is for mode page-sampling only";
    for (arguments, expected) in [
        (json!({"calc-time": 0}), time),
        (json!({"calc-time": -1}), time),
        (json!({"calc-time": 61}), time),
        (json!({"calc-time": i64::MAX}), time),
        (
            json!({"calc-time": 49, "calc-time-unit": "millisecond"}),
            time,
        ),
        (
            json!({"calc-time": 60_001, "calc-time-unit": "millisecond"}),
            time,
        ),
        (json!({"calc-time": 1, "sample-pages": 127}), sample),
        (json!({"calc-time": 1, "sample-pages": 16385}), sample),
        (json!({"calc-time": 1, "sample-pages": -1}), sample),
        (
            json!({"calc-time": 1, "sample-pages": 512, "mode": "dirty-bitmap"}),
            only,
        ),
        (
            json!({"calc-time": 1, "sample-pages": 512, "mode": "dirty-ring"}),
            only,
        ),
    ] {
        let answer = wire.ask(request(arguments.clone()));
        assert_eq!(answer["error"]["class"], "GenericError");
        assert_eq!(answer["error"]["desc"], expected, "for {arguments}");
    }
    assert_eq!(rig.machine.measurement(), None);
}

#[test]
fn the_answer() {
    let rig = Rig::new();
    let mut wire = rig.negotiated();
    let query = r#"{"execute": "query-dirty-rate"}"#;
    assert_eq!(
        wire.ask(query),
        json!({"return": {
            "status": "unstarted", "start-time": 0, "calc-time": 0, "calc-time-unit": "second",
            "sample-pages": 0, "mode": "page-sampling",
        }})
    );
    wire.ask(request(
        json!({"calc-time": 1500, "calc-time-unit": "millisecond", "mode": "dirty-ring"}),
    ));
    assert_eq!(
        wire.ask(query),
        json!({"return": {
            "dirty-rate": 212, "status": "measured", "start-time": 1_700_000_000, "calc-time": 1,
            "calc-time-unit": "second", "sample-pages": 0, "mode": "dirty-ring",
            "vcpu-dirty-rate": [{"id": 0, "dirty-rate": 212}],
        }})
    );
    let mut client = QmpClient::connect(&rig.path, PATIENCE).unwrap();
    let DirtyRateInfo {
        calc_time, mode, ..
    } = client.query_dirty_rate().unwrap();
    assert_eq!((calc_time, mode), (1500, DirtyRateMeasureMode::DirtyRing));
}
