//! Builds the payload guests: freestanding PVH ELF programs, compiled by the same `rustc` for the
//! same target as the crate, so that no other target or tool has to be installed.

use std::env;
use std::path::Path;
use std::process::Command;

/// The payload guests; `payload/NAME/main.rs` is the crate root of each.
const GUESTS: &[&str] = &["dirtier"];

fn main() {
    println!("cargo::rerun-if-changed=payload");
    for guest in GUESTS {
        build(guest);
    }
}

fn build(name: &str) {
    let target = env::var("TARGET").expect("cargo sets TARGET");
    assert!(
        target.starts_with("x86_64-") && target.contains("-linux-"),
        "payload guests are x86-64 ELF programs and cannot be built for {target}"
    );
    let payload =
        Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("payload");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join(name);

    let mut rustc = Command::new(env::var("RUSTC").expect("cargo sets RUSTC"));
    rustc
        .args(["--crate-type", "bin", "--edition", "2024"])
        .args(["--crate-name", name, "--target", &target])
        .args(["-C", "opt-level=3", "-C", "codegen-units=1"])
        .args(["-C", "panic=abort", "-C", "strip=debuginfo"])
        .args(["-C", "relocation-model=static"])
        // SSE2 and nothing newer: the guest enables no more (CR4.OSFXSR), and runs on any CPU
        // model. RUSTFLAGS are deliberately not passed on.
        .args(["-C", "target-cpu=x86-64"]);
    for arg in ["-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none"] {
        rustc.arg("-C").arg(format!("link-arg={arg}"));
    }
    let script = payload.join("linker.ld");
    rustc
        .arg("-C")
        .arg(format!("link-arg=-T{}", script.display()));
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    rustc
        .arg("-o")
        .arg(&out)
        .arg(payload.join(name).join("main.rs"));

    let output = rustc.output().expect("rustc starts");
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the payload guest {name} does not compile:\n{messages}"
    );
    for line in messages.lines() {
        println!("cargo::warning={line}");
    }
}
