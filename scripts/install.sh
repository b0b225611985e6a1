#!/usr/bin/env bash
# Usage: scripts/install.sh [EXTRA ...]   (extras of setup.cfg: test, notebook, convert, export, geo, pretrained, cuda12, cuda13, tpu)
# Makes .venv and installs the project in it, editable. Does nothing when it was already done with this setup.cfg.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=$(IFS=,; echo "$*")
stamp=".venv/installed-${extras:-base}.cfg"
cmp -s setup.cfg "$stamp" && exit 0

if [ ! -x .venv/bin/python ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old, Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2
    exit 1
  }
  echo "Making .venv with $("$python" --version) ..."
  "$python" -m venv .venv
fi
echo "Installing unet_jax${extras:+[$extras]} into .venv (about 2.5 GB, a minute or two) ..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}"
cp setup.cfg "$stamp"
