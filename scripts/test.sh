#!/usr/bin/env bash
# Usage: scripts/test.sh [pytest arguments]
# Installs what is missing, then runs the whole test suite. Tests of real images read $UNET_JAX_TEST_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh test
# One process more than cores, as many tests wait for others; tests of one file share what they have trained. Files are
# started in the order of tests/conftest.py, not by their number of tests.
workers=$(($(nproc) < 4 ? $(nproc) + 1 : 4))
exec .venv/bin/python -m pytest --numprocesses="$workers" --dist=loadfile --no-loadscope-reorder "$@"
