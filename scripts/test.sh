#!/usr/bin/env bash
# Usage: scripts/test.sh [pytest arguments]
# Installs what is missing, then runs the whole test suite. Tests of real images read $UNET_JAX_TEST_DATA.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh test
# A process for each core; tests of one file share what they have trained.
exec .venv/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile "$@"
