#!/usr/bin/env bash
# Usage: scripts/train.sh [flags of unet_jax.main]
# Installs what is missing, then trains: configs/shapes.py (generated images) unless --config or --mode is given.
# Paths in the flags, and runs/, are relative to the folder that you call it from.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
"$root/scripts/install.sh"

config=("--config=$root/configs/shapes.py")
for flag in "$@"; do
  case $flag in
    --config | --config=* | --mode=eval | --mode=report | --mode=predict | --help | --helpfull) config=() ;;
  esac
done
exec "$root/.venv/bin/python" -m unet_jax.main ${config[@]+"${config[@]}"} "$@"
