#!/usr/bin/env bash
# Usage: scripts/train.sh [flags of unet_jax.main]
# Installs what is missing, then trains: configs/shapes.py (generated images) unless --config or --mode is given.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh

config=(--config=configs/shapes.py)
for flag in "$@"; do
  case $flag in
    --config | --config=* | -config | -config=* | --mode=eval | --help | --helpfull) config=() ;;
  esac
done
exec .venv/bin/python -m unet_jax.main ${config[@]+"${config[@]}"} "$@"
