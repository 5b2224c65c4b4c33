//! Any bytes as a return path: messages or an error, never a panic; what was read can be sent again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_wire::ReturnPathMessage;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(message) = ReturnPathMessage::read_from(&mut rest) {
        let mut out = Vec::new();
        message.encode(&mut out);
        let again = ReturnPathMessage::read_from(&mut out.as_slice()).expect("our own message");
        assert_eq!(again, message);
    }
});
