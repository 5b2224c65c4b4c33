#!/bin/sh
# Makes a Python environment with QEMU's QMP library, for the test that drives the server with it.
# Usage: setup-qemu-qmp.sh [DIRECTORY]; the default is where that test looks, below the workspace's target directory.
set -eu
workspace=$(cd "$(dirname "$0")/../../.." && pwd)
directory=${1:-${CARGO_TARGET_DIR:-$workspace/target}/tmp/qemu-qmp}
python3 -m venv "$directory"
"$directory/bin/pip" install --quiet 'qemu.qmp==0.0.6'
echo "qemu.qmp is in $directory"
