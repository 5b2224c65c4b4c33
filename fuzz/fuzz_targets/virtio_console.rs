//! Any bytes as what the driver of this device does: see `vmferry_vmm::fuzz`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_vmm::fuzz::{Target, drive};

fuzz_target!(|input: &[u8]| drive(Target::Console, input));
