#!/usr/bin/env bash
# Trains on this host's NVIDIA GPUs, all of them or some, in one process.
#
#   launch/gpu.sh [--gpus=0,1] [--restarts=N] [--python=PATH] [--dry-run] -- --config=FILE --workdir=FOLDER …
#
#   --gpus      numbers of the GPUs to use (default: all)
#   --restarts  how often to start again after a preemption, exit status 75 (default: 3)
#   --python    the interpreter (default: .venv/bin/python)
#   --dry-run   print what would be done
#
# What follows -- goes to python -m semanticvla_jax.train. Give it --explain to see the layout first.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

gpus="" restarts=3 python=.venv/bin/python
while (($#)); do
  case $1 in
    --gpus=*) gpus=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help launch/gpu.sh; exit 0 ;;
    --) shift; break ;;
    *) fail "got '$1', expected --gpus, --restarts, --python, --dry-run, or -- before the training's own arguments" ;;
  esac
  shift
done
[[ -z $gpus || $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus: got '$gpus', expected numbers such as 0,1,2"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts: got '$restarts', expected a whole number"
train_arguments "$@"
need "$python" "make the environment: make venv, then .venv/bin/pip install -r requirements-cuda.txt"

settings=(XLA_PYTHON_CLIENT_MEM_FRACTION=0.95)
[[ -z $gpus ]] || settings+=("CUDA_VISIBLE_DEVICES=$gpus")
stopped=0 child=""
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child"' TERM INT  # the run saves, and then this script ends too
for ((attempt = 0; ; attempt++)); do
  status=0
  if [[ $DRY_RUN == 1 ]]; then
    run env "${settings[@]}" "$python" -m semanticvla_jax.train --multihost=none "$@"
    exit
  fi
  show env "${settings[@]}" "$python" -m semanticvla_jax.train --multihost=none "$@"
  env "${settings[@]}" "$python" -m semanticvla_jax.train --multihost=none "$@" &
  child=$!
  wait "$child" || status=$?
  [[ $stopped == 0 ]] || { status=0; wait "$child" || status=$?; }  # the signal ended the first wait, not the run
  ((status == 75 && attempt < restarts && stopped == 0)) || exit "$status"
  echo "preempted; starting again ($((attempt + 1)) of $restarts)"
done
