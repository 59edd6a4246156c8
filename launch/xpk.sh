#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk, which schedules, restarts and collects the logs.
#
#   launch/xpk.sh --cluster=NAME --workload=NAME --tpu-type=v5litepod-16 --image=IMAGE [--slices=N] [--project=P]
#                 [--zone=Z] [--restarts=N] [--priority=medium] [--dry-run] -- --config=FILE --workdir=gs://BUCKET/RUN …
#   launch/xpk.sh --cluster=NAME --workload=NAME --delete [--project=P] [--zone=Z] [--dry-run]
#
#   --image     a container with this repository as its working folder and requirements-tpu.txt installed
#   --slices    how many slices; more than one is mesh axis `replica` (default: 1)
#   --restarts  how often GKE starts it again after a preemption or a lost node (default: 10)
#   --dry-run   print what would be done
#
# What follows -- goes to python -m semanticvla_jax.train.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

cluster="" workload="" tpu="" image="" slices=1 project="" zone="" restarts=10 priority=medium delete=0
while (($#)); do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --workload=*) workload=${1#*=} ;;
    --tpu-type=*) tpu=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --priority=*) priority=${1#*=} ;;
    --delete) delete=1 ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help launch/xpk.sh; exit 0 ;;
    --) shift; break ;;
    *) fail "got '$1', expected a flag of this script, or -- before the training's own arguments" ;;
  esac
  shift
done
required --cluster "$cluster" "the name of the GKE cluster (xpk cluster list)"
required --workload "$workload" "a name for the job"
place=(--cluster "$cluster" --workload "$workload")
[[ -z $project ]] || place+=(--project "$project")
[[ -z $zone ]] || place+=(--zone "$zone")
need xpk "pip install xpk"
if [[ $delete == 1 ]]; then
  run xpk workload delete "${place[@]}"
  exit
fi
required --tpu-type "$tpu" "a slice such as v5litepod-16, v6e-16, v5p-16"
required --image "$image" "a container image (launch/README.md shows its Dockerfile)"
whole --slices "$slices"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts: got '$restarts', expected a whole number"
train_arguments "$@"
[[ " $*" == *" --workdir=gs://"* ]] || fail "--workdir: hosts of a slice share no disk, expected gs://BUCKET/FOLDER"
mesh=()
if ((slices > 1)) && [[ $* != *--config.mesh.replica=* ]]; then mesh=("--config.mesh.replica=$slices"); fi

run xpk workload create "${place[@]}" --tpu-type "$tpu" --num-slices "$slices" --docker-image "$image" \
  --priority "$priority" --max-restarts "$restarts" --restart-on-exit-codes 75 \
  --command "$(quoted python -m semanticvla_jax.train --multihost=tpu "${mesh[@]}" "$@")"
