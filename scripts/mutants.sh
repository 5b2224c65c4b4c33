#!/bin/bash
# Mutation testing of the crates that hold the laws: cargo-mutants breaks the code in one place after another, and some test
# must notice. Takes hours, so it is for the night and not part of scripts/test.sh.
#
#   scripts/mutants.sh                         all files listed below
#   scripts/mutants.sh vmferry-dirty           the files of one crate
#   scripts/mutants.sh vmferry-dirty FILE...   these files of the crate (paths from the root of the repository)
#
# A mutant counts as noticed if a test of its own crate fails or waits for ever; for vmferry-dirty also if a loom model does.
# Fails if a mutant lives that docs/mutants.md does not list. cargo-mutants is built below target/ if it is not installed.
# Results are in target/mutants/CRATE.
set -euo pipefail
cd "$(dirname "$0")/.."

# The files of each crate that a law stands on.
files_of() {
    case $1 in
        vmferry-dirty) echo 'crates/vmferry-dirty/src/**/*.rs' ;;
        vmferry-engine)
            echo crates/vmferry-engine/src/{hints,ram,run_state,zero}.rs
            echo crates/vmferry-engine/src/destination/{populate,receiver}.rs
            echo crates/vmferry-engine/src/source/{driver,precopy,return_path,switchover}.rs
            ;;
        vmferry-vmm) echo crates/vmferry-vmm/src/{dirty_log,memory,reclaim}.rs ;;
        vmferry-wire) echo 'crates/vmferry-wire/src/**/*.rs' ;;
        *)
            echo "no files are listed for '$1'" >&2
            return 1
            ;;
    esac
}

# What of the crate's tests runs for each of its mutants.
tests_of() {
    case $1 in
        vmferry-vmm) echo --lib ;;
        *) echo --lib --tests ;;
    esac
}

export PATH="$PWD/target/tools/bin:$PATH"
cargo mutants --version >/dev/null 2>&1 ||
    cargo install cargo-mutants --locked --root target/tools --target-dir target/tools/build

# Runs cargo-mutants. That some mutants live (2) or wait for ever (3) is a result, not an error.
mutants() {
    local status=0
    cargo mutants "$@" || status=$?
    [ "$status" = 0 ] || [ "$status" = 2 ] || [ "$status" = 3 ]
}

check_crate() {
    local crate=$1 out=target/mutants/$1 args=() file
    shift
    for file in "$@"; do
        args+=(--file "$file")
    done
    mkdir -p "$out"
    args+=(--package "$crate" --output "$out" --jobs 1 --no-shuffle --colors never)
    # The copies of the tree that cargo-mutants makes share what they build.
    CARGO_TARGET_DIR=$PWD/target/mutants/build \
        mutants "${args[@]}" -- $(tests_of "$crate")
    if [ "$crate" = vmferry-dirty ]; then
        # The models see only those that the tests have not noticed.
        RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$PWD/target/mutants/loom \
            mutants "${args[@]}" --iterate -- --test loom
    fi
    # Lines move; what a mutant does to a function stays.
    local known=docs/mutants.md name unknown=0
    while read -r name; do
        name=$(sed -E 's/^([^:]+):[0-9]+:[0-9]+: /\1: /' <<<"$name")
        grep -qF "$name" "$known" || {
            echo "LIVES: $name"
            unknown=1
        }
    done < "$out/mutants.out/missed.txt"
    return $unknown
}

crates=(vmferry-dirty vmferry-engine vmferry-vmm vmferry-wire)
if [ $# -gt 1 ]; then
    check_crate "$@"
    exit
elif [ $# = 1 ]; then
    crates=("$1")
fi
failed=0
set -f # cargo-mutants expands the patterns
for crate in "${crates[@]}"; do
    check_crate "$crate" $(files_of "$crate") || failed=1
done
exit $failed
