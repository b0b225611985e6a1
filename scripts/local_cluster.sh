#!/usr/bin/env bash
# Usage: scripts/local_cluster.sh N [--dry-run] [flags of unet_jax.main]
# Installs what is missing, then trains with N processes on this machine that talk over loopback, as those of N hosts
# would: to try on CPUs what will run on many machines. Without --config or --mode it is configs/shapes.py.
#
# Every line of output begins with its process, "[0] ". SIGTERM and SIGINT go to all processes, which save and end. The
# exit code is the first one that is not 0: 143 after SIGTERM, 130 after SIGINT. Where a process dies, the others end by
# themselves within a minute; what is left after LOCAL_CLUSTER_GRACE seconds (90) is killed.
# JAX_NUM_CPU_DEVICES=4 gives each process four devices; JAX_PLATFORMS is cpu unless set.
# --dry-run prints the commands. Needs bash and Python 3.11 or newer.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
  echo "error: $*" >&2
  exit 1
}

count=${1:-}
if [ "$count" = --help ]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit
fi
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "say how many processes: scripts/local_cluster.sh 2 --config=configs/shapes.py"
shift
flags=()
dry_run=''
for flag in "$@"; do
  if [ "$flag" = --dry-run ]; then dry_run=yes; else flags+=("$flag"); fi
done
grace=${LOCAL_CLUSTER_GRACE:-90}
[[ $grace =~ ^[0-9]+$ ]] || fail "LOCAL_CLUSTER_GRACE=$grace is not a number of seconds"

port=PORT
if [ -z "$dry_run" ]; then
  "$root/scripts/install.sh"
  port=$("$root/.venv/bin/python" -c \
    'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}
export JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port # JAX would listen to the whole network
export PYTHONUNBUFFERED=1                           # a pipe would hold lines back

command_of() { # PROCESS; sets `command`
  command=("$root/scripts/train.sh" "--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$1")
  command+=(${flags[@]+"${flags[@]}"})
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    printf 'JAX_PLATFORMS=%q JAX_COORDINATOR_BIND_ADDRESS=%q' "$JAX_PLATFORMS" "$JAX_COORDINATOR_BIND_ADDRESS"
    printf ' %q' "${command[@]}"
    echo
  done
  exit
fi

signal=''
trap 'signal=INT' INT
trap 'signal=TERM' TERM HUP
pids=()
readers=()
pipe=$(mktemp -u)
# Job control gives each process a group of its own and lets it have SIGINT, which bash otherwise makes background
# processes ignore: Ctrl-C in a terminal reaches this script alone, and is passed on once.
set -m
for ((i = 0; i < count; i++)); do
  mkfifo -m 600 "$pipe"
  sed -u "s/^/[$i] /" <"$pipe" &
  readers+=($!)
  command_of "$i"
  exec 3>"$pipe" # opens when sed has it open too; then it needs no name any more
  rm -f "$pipe"
  "${command[@]}" </dev/null >&3 2>&1 3>&- & # train.sh becomes Python, so this is Python's process id
  pids+=($!)
  exec 3>&-
done
set +m

first=0
deadline=''
while [ ${#pids[@]} -gt 0 ]; do
  if [ -n "$signal" ]; then
    kill -s "$signal" "${pids[@]}" 2>/dev/null || true
    signal=''
  fi
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    unset "pids[i]"
    if [ "$code" -ne 0 ] && [ "$first" -eq 0 ]; then
      first=$code
      deadline=$((SECONDS + grace))
      echo "process $i ended with exit code $code" >&2
    fi
  done
  if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    for i in "${!pids[@]}"; do
      echo "process $i did not end within $grace s of the first, and is killed" >&2
      kill -KILL "-${pids[i]}" 2>/dev/null || true # the whole group: with what it has started
    done
    deadline=''
  fi
  sleep 0.1
done
wait "${readers[@]}" || true
exit "$first"
