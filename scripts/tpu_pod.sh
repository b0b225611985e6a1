#!/usr/bin/env bash
# Usage: scripts/tpu_pod.sh [settings] -- FLAGS of unet_jax.main
#   scripts/tpu_pod.sh --zone=us-east5-b --spot -- --config=configs/carla.py --config.data.root=gs://B/carla \
#     --workdir=gs://B/runs/carla
#
# Trains on all hosts of a Cloud TPU node: creates the node if it does not exist, copies the last commit of this checkout,
# installs it, and runs python -m unet_jax.main on every worker. A preempted node is deleted and created again, and the
# training resumes from the same work directory. The script ends with the exit code of the training. Ctrl-C, SIGTERM and
# SIGHUP (a closed terminal) make the workers save and exit. Called again, it resumes on the existing node. The folder
# unet_jax of the workers is replaced.
#
#   --name=unet-jax             of the node
#   --type=v6e-16               accelerator type; v6e-16 are 4 hosts of 4 chips
#   --version=v2-alpha-tpuv6e   runtime; of v5e v2-alpha-tpuv5-lite, v5p v2-alpha-tpuv5, older tpu-ubuntu2204-base
#   --zone=ZONE                 default: gcloud's compute/zone
#   --project=PROJECT           default: gcloud's project
#   --spot                      cheaper, and preempted at any time
#   --delete                    delete the node at the end, failed or not; otherwise it stays, and is billed
#   --poll=30                   seconds between queries of the node's state
#   --dry-run                   print the commands of a first run; gcloud is not needed
#
# Needs gcloud, logged in, and a bucket that the workers may write to: work directory and images are gs:// paths, which
# every worker can see. It has to keep its connections open: start it in tmux, on a machine that stays on.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
trap '' PIPE

say() { # whether anybody still reads it or not
  echo "$*" >&2 || true
}

fail() {
  say "error: $*"
  exit 1
}

# ---- Settings

name=unet-jax type=v6e-16 version=v2-alpha-tpuv6e zone='' project='' spot='' delete='' poll=30 dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --version=?*) version=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --poll=?*) poll=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --help)
      awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "unexpected argument $1: settings are --name=VALUE, see --help; flags of the training follow after --" ;;
  esac
  shift
done
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll is not a number of seconds"

workdir=''
previous=''
for flag in "$@"; do
  case $flag in --workdir=*) workdir=${flag#*=} ;; esac
  if [ "$previous" = --workdir ]; then workdir=$flag; fi
  previous=$flag
done
[ -n "$workdir" ] || fail "--workdir is required: -- --workdir=gs://BUCKET/runs/NAME, which every worker can see"
[[ $workdir == gs://?* ]] || fail "--workdir=$workdir: every worker must see it, also those of the next node:" \
  "use gs://BUCKET/runs/NAME"
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not in PATH: install the Google Cloud CLI, or print the commands with --dry-run"
fi

# ---- One command each

quote() { # the arguments as a shell reads them, quoted where they must be
  local word escaped="'\\''" line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) line+="'${word//\'/$escaped}' " ;;
      *) line+="$word " ;;
    esac
  done
  printf '%s' "${line% }"
}

run() { # or print
  if [ -n "$dry_run" ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

tpu() { # VERB [ARGUMENT ...]
  run gcloud compute tpus tpu-vm "$@" ${zone:+"--zone=$zone"} ${project:+"--project=$project"}
}

on_workers() { # COMMAND
  # Without keep-alives the connection to a lost worker would never end.
  tpu ssh "$name" --worker=all "--command=$1" \
    --ssh-flag="-o ServerAliveInterval=30" --ssh-flag="-o ServerAliveCountMax=6"
}

# ---- Steps

look() { # sets `state`: READY, PREEMPTED, ...; empty if there is no such node
  local nodes
  nodes=$(tpu list '--format=value(name.basename(),state)') || return
  state=$(awk -v name="$name" '$1 == name { print $2 }' <<<"$nodes")
}

create() {
  tpu create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
}

delete() {
  tpu delete "$name" --quiet
}

copy() {
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD &&
    tpu scp "$archive" "$name:unet_jax.tar.gz" --worker=all
}

# Processes left by an interrupted call of this script hold the TPU. The brackets keep pkill from finding itself.
end_old() {
  on_workers "pkill -KILL -f '[u]net_jax[.]main' || true"
}

# The images have Python 3.10. uv brings a newer one without administrator's rights; install.sh finds it in .venv.
install() {
  on_workers 'set -e
mkdir -p unet_jax
find unet_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +
tar -xzf unet_jax.tar.gz -C unet_jax
cd unet_jax
if [ ! -x .venv/bin/python ] && ! python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python=3.11 .venv
fi
scripts/install.sh tpu'
}

# The connection to the workers is in a process group of its own, which Ctrl-C and a closed terminal do not reach: they
# would cut it while the workers save.
train() { # FLAG ...
  local pid code=0 command
  command="cd unet_jax && exec .venv/bin/python -u -m unet_jax.main $(quote "$@")"
  if [ -n "$dry_run" ]; then
    on_workers "$command"
    return
  fi
  trap 'stop INT' INT
  trap 'stop TERM' TERM
  trap 'stop HUP' HUP
  set -m
  on_workers "$command" </dev/null &
  set +m
  pid=$!
  wait "$pid" || true
  while kill -0 "$pid" 2>/dev/null; do # it was a signal that ended the wait
    wait "$pid" || true
  done
  wait "$pid" || code=$? # bash remembers it
  trap - INT TERM
  [ -n "$stopped" ] || trap - HUP # which shells repeat
  return "$code"
}

# shellcheck disable=SC2329 # called by traps
stop() { # SIGNAL
  stopped=$1
  say "Stopping the workers, which save first ..."
  # In a subshell, which leaves $! alone; also in a group of its own.
  (
    set -m
    on_workers "pkill -$1 -f '[u]net_jax[.]main' || true" </dev/null &
  )
}

end() { # CODE
  if [ -n "$delete" ]; then
    delete
  else
    say "The node $name still exists, and is billed. To delete it:"
    dry_run=yes delete >&2 || true
  fi
  exit "$1"
}

# ---- Main

if [ -n "$dry_run" ]; then
  archive=unet_jax.tar.gz
  create
  copy
  end_old
  install
  train "$@"
  if [ -n "$delete" ]; then delete; fi
  exit
fi

if [ -n "$(git -C "$root" status --porcelain)" ]; then
  say "Uncommitted changes are not copied; the workers get the last commit."
fi
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT

stopped=''
state=''
ours='' # whether this call has created the node before
while true; do
  look || fail "gcloud cannot list the nodes, see above"
  case $state in
    READY) ;;
    PREEMPTED | TERMINATED) # final: such a node can only be deleted
      say "The node $name is $state and is created again."
      delete || sleep "$poll"
      ours=yes
      continue
      ;;
    '')
      if ! create; then
        # A node that could be created once lacks capacity now; the first time it may be the settings.
        [ -n "$ours" ] || fail "the node could not be created, see above"
        say "No node yet; trying again."
        sleep "$poll"
        continue
      fi
      ours=yes
      ;;
    CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | DELETING)
      say "The node $name is $state; waiting."
      sleep "$poll"
      continue
      ;;
    *) fail "the node $name is $state: start or delete it by gcloud compute tpus tpu-vm" ;;
  esac

  code=0
  { copy && end_old && install && train "$@"; } || code=$?
  if [ "$code" -eq 0 ] || [ -n "$stopped" ]; then end "$code"; fi

  # The node's state may change after its processes have ended, so look three times. 143: something else stopped the
  # training, as a host does when it is shut down.
  lost=''
  for _ in 1 2 3; do
    sleep "$poll"
    if look && [ "$state" != READY ]; then
      lost=yes
      break
    fi
  done
  if [ -z "$lost" ] && [ "$code" -ne 143 ]; then
    say "error: the training ended with exit code $code; once that is fixed, the same command resumes it"
    end "$code"
  fi
  say "The training was interrupted and is resumed."
done
