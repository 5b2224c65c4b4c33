#!/bin/sh
# Builds and runs one fuzz target with the stable toolchain: ./run.sh TARGET [libFuzzer options]
set -eu
cd "$(dirname "$0")"
target=$1
shift
host=$(rustc -vV | sed -n 's/^host: //p')
# What `cargo fuzz` passes without a sanitizer: coverage counters for libFuzzer, all of it on stable. The
# explicit --target keeps them out of build scripts.
RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
-Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --target "$host" --bin "$target"
mkdir -p "corpus/$target" "artifacts/$target"
exec "target/$host/release/$target" -artifact_prefix="artifacts/$target/" -rss_limit_mb=256 "$@" \
    "corpus/$target" "seeds/$target"
