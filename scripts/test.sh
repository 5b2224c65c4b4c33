#!/bin/bash
# Sets up what the tests need beyond a Rust toolchain, and runs all of them.
#
#   scripts/test.sh             everything
#   scripts/test.sh --no-setup  without installing anything: tests whose peer is missing say so and are skipped
#
# The set-up installs QEMU from Debian's packages (bookworm: 10.x from backports), e2fsprogs and iproute2 if they are
# missing, and makes a Python environment for the qemu.qmp package below target/. It also gets Debian's kernel and
# busybox for tests with Linux guests; they are unpacked below target/rig, not installed.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { echo "SKIPPED: $*" >&2; }
step() { printf '\n== %s\n' "$*"; }

can_install() { command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; }
install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

install_qemu() {
    command -v qemu-system-x86_64 >/dev/null && return
    can_install || {
        skip "no qemu-system-x86_64, and no apt-get as root to install it"
        return
    }
    . /etc/os-release
    local release=()
    if [ "${VERSION_CODENAME:-}" = bookworm ]; then
        # The same mirror, with the suite that has the newer QEMU.
        sed -n '1,/^$/p' /etc/apt/sources.list.d/debian.sources \
            | sed 's/^Suites:.*/Suites: bookworm-backports/' \
            > /etc/apt/sources.list.d/vmferry-backports.sources
        release=(-t bookworm-backports)
    fi
    apt-get update -qq
    install "${release[@]}" qemu-system-x86 || skip "installing QEMU failed"
}

install_tools() {
    command -v mke2fs >/dev/null && command -v debugfs >/dev/null && command -v ip >/dev/null && return
    can_install || {
        skip "no e2fsprogs or no iproute2, and no apt-get as root to install them"
        return
    }
    apt-get update -qq
    install e2fsprogs iproute2 || skip "installing e2fsprogs and iproute2 failed"
}

get_linux() {
    local rig=(cargo run --quiet --release -p vmferry-rig -- image)
    "${rig[@]}" >/dev/null && return
    # The lists of packages may be missing, or older than what the mirror has.
    if can_install; then
        apt-get update -qq && "${rig[@]}" >/dev/null && return
    fi
    skip "no Debian kernel: no test with a Linux guest will run"
}

if [ "${1:-}" != --no-setup ]; then
    step "Set-up"
    install_qemu
    install_tools
    get_linux
    crates/vmferry-control/tests/setup-qemu-qmp.sh || skip "no Python environment with qemu.qmp"
fi
[ -w /dev/kvm ] || skip "/dev/kvm is missing or not writable: no guest will run"

step "Format, lints, documentation"
cargo fmt --all --check
cargo clippy --workspace --all-targets --release -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --release

step "Tests"
cargo test --workspace --release

step "Concurrency models"
RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom \
    cargo test -p vmferry-dirty --release --test loom

step "All tests have passed"
