#!/usr/bin/env bash
# Trains on Cloud TPU VMs: a queued resource, this repository on all its workers, one run over all of them.
#
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [--project=P] [--dry-run] …
#
#   up       create (or reuse), install, start, and follow; after a preemption all of it again, until the run ends
#            --type=v5litepod-16 [--restarts=N] -- --config=FILE --workdir=gs://BUCKET/RUN …
#   create   ask for the queued resource and wait until it is there   --type=… [--runtime=…] [--slices=N] [--spot]
#   install  copy the committed files to all workers, with Python and requirements-tpu.txt
#   start    start training on all workers, if it is not running there   -- --config=FILE --workdir=gs://BUCKET/RUN …
#   logs     follow the log of worker 0 (--worker=N for another)
#   stop     SIGTERM: the run saves, and goes on with the next start; an `up` that follows it ends (75)
#   status   state of the queued resource, and of the run
#   delete   give everything back; asks first (--yes does not)
#
#   --runtime  image of the VMs (default: by --type)      --reserved, --spot  how to pay (default: on demand)
#   --slices   several slices, mesh axis `replica`        --dry-run           print what would be done
#   --restarts how often in a row `up` starts a run again that has left no new checkpoint (default: 5)
#
# What follows -- goes to python -m semanticvla_jax.train.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

verb=${1:-}
case $verb in
  up | create | install | start | logs | stop | status | delete) shift ;;
  -h | --help) help launch/tpu_vm.sh; exit 0 ;;
  *) fail "got verb '$verb', expected up, create, install, start, logs, stop, status or delete" ;;
esac
name="" zone="" project="" type="" runtime="" slices=1 pay="" worker=0 yes=0 restarts=5
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot | --reserved) pay=$1 ;;
    --yes) yes=1 ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help launch/tpu_vm.sh; exit 0 ;;
    --) shift; break ;;
    *) fail "got '$1', expected a flag of this script, or -- before the training's own arguments" ;;
  esac
  shift
done
required --name "$name" "a name for the queued resource"
required --zone "$zone" "a zone such as us-west4-a (gcloud compute tpus locations list)"
whole --slices "$slices"
whole --restarts "$restarts"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name: got '$name', expected small letters, digits and - such as vla-1"
[[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker: got '$worker', expected a number from 0, or all"
need gcloud "install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install"
case $verb in
  up | create)
    required --type "$type" "an accelerator such as v5litepod-16, v6e-16, v5p-16 (gcloud compute tpus accelerator-types list)"
    ;;
esac
case $verb in
  up | start)
    train_arguments "$@"
    [[ " $*" == *" --workdir=gs://"* ]] || fail "--workdir: workers share no disk, expected gs://BUCKET/FOLDER"
    ;;
esac
if [[ -z $runtime ]]; then
  case $type in
    v6e*) runtime=v2-alpha-tpuv6e ;;
    v5p*) runtime=v2-alpha-tpuv5 ;;
    v5lite*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
  esac
fi
place=(--zone "$zone")
[[ -z $project ]] || place+=(--project "$project")
folder=semanticvla_jax
pause=${TPU_VM_PAUSE:-30}  # seconds between two looks
stopped=76  # what following ends with after `stop`
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

state() {  # of the queued resource; NONE: there is none, UNKNOWN: the cloud did not answer
  local answer errors
  [[ $DRY_RUN == 1 ]] && { echo ACTIVE; return; }
  errors=$(mktemp)
  for _ in 1 2 3; do
    if answer=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2> "$errors"); then
      rm -f "$errors"
      echo "$answer"
      return
    fi
    ! grep -qi 'not.\?found' "$errors" || { rm -f "$errors"; echo NONE; return; }
    sleep "$pause"
  done
  cat "$errors" >&2
  rm -f "$errors"
  echo UNKNOWN
}

on_workers() {  # on_workers WHICH COMMAND: of every slice
  local node
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker="$1" --command="$2"
  done
}

ask() {
  local options=(--accelerator-type "$type" --runtime-version "$runtime")
  if ((slices > 1)); then options+=(--node-count "$slices" --node-prefix "$name"); else options+=(--node-id "$name"); fi
  [[ -z $pay ]] || options+=("$pay")
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${options[@]}"
}

create() {
  local now asked=0
  if [[ $DRY_RUN == 1 ]]; then
    ask
    return
  fi
  while true; do
    now=$(state)
    case $now in
      ACTIVE) ((asked)) || echo "$name is there already; using it"; return ;;
      NONE) ask; asked=1 ;;  # also where an old one was just being deleted
      FAILED)
        ((asked == 0)) || fail "$name: got FAILED, expected ACTIVE; gcloud compute tpus queued-resources describe $name says why"
        echo "$name is FAILED; asking for a new one"
        give_back
        ;;
      SUSPENDED)
        echo "$name is SUSPENDED; asking for a new one"
        give_back
        ;;
      *) echo "$name is $now; waiting" ;;
    esac
    sleep "$pause"
  done
}

give_back() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

install() {
  local archive node
  archive=$(mktemp -u "${TMPDIR:-/tmp}/$folder.XXXXXX").tar.gz
  [[ $DRY_RUN == 1 ]] && archive=/tmp/$folder.tar.gz
  run git archive --format=tar.gz -o "$archive" HEAD
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:$folder.tar.gz" "${place[@]}" --worker=all
  done
  run rm -f "$archive"
  on_workers all "mkdir -p $folder && tar xzf $folder.tar.gz -C $folder && cd $folder && pip install -q --user uv && \
python3 -m uv venv -q --allow-existing --python 3.11 .venv && \
python3 -m uv pip install -q --python .venv/bin/python -r requirements-tpu.txt"
}

start() {
  local mesh=() command
  if ((slices > 1)) && [[ $* != *--config.mesh.replica=* ]]; then mesh=("--config.mesh.replica=$slices"); fi
  command=$(quoted .venv/bin/python -m semanticvla_jax.train --multihost=tpu "${mesh[@]}" "$@")
  # The number of the run and its exit status lie beside its log.
  on_workers all "cd $folder && if [ -f train.pid ] && kill -0 \$(cat train.pid) 2> /dev/null; then echo running already; \
else rm -f train.status train.stop; setsid nohup sh -c $(quoted "$command >> train.log 2>&1; echo \$? > train.status") \
> /dev/null 2>&1 & echo \$! > train.pid; fi"
}

follow() {
  on_workers "$worker" "cd $folder && tail -n 100 -F train.log"
}

follow_to_the_end() {  # 0: the run ended well; 75: start it again; $stopped: `stop` ended it; anything else: an error
  local status ask
  # Without a status the machine went down under the run. Written after the status of a run: not yet, if it is a moment old.
  ask="cd $folder && tail -n 100 -F --pid=\$(cat train.pid) train.log; sleep 1; s=\$(cat train.status || echo 75); \
if [ \$s = 75 ] && [ -f train.stop ]; then s=$stopped; fi; exit \$s"
  if [[ $DRY_RUN == 1 ]]; then
    on_workers 0 "$ask"
    return 0
  fi
  while true; do
    status=0
    gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker=0 --command="$ask" || status=$?
    case $(state) in
      ACTIVE | UNKNOWN) [[ $status == 255 ]] || return "$status" ;;  # 255: ssh lost its connection, the run goes on
      *) return 75 ;;  # the machines are gone
    esac
    echo "lost the connection to $name; following again"
    sleep "$pause"
  done
}

newest() {  # newest ARGUMENTS…: step of the newest checkpoint in their --workdir, or nothing
  local word workdir=""
  for word in "$@"; do [[ $word != --workdir=* ]] || workdir=${word#*=}; done
  { gcloud storage ls "${workdir%/}/checkpoints/" 2> /dev/null || true; } | sed -n 's,.*/\([0-9]*\)/$,\1,p' | sort -n | tail -n 1
}

again_and_again() {  # the whole of `up`; ends the script
  local status=0 barren=0 before="" now
  [[ $DRY_RUN == 1 ]] || before=$(newest "$@")
  while true; do
    create
    install
    start "$@"
    status=0
    follow_to_the_end || status=$?
    if [[ $status == "$stopped" ]]; then
      echo "stopped by tpu_vm.sh stop; start or up goes on"
      exit 75
    fi
    [[ $status == 75 ]] || exit "$status"
    now=$(newest "$@")
    if [[ $now == "$before" ]]; then barren=$((barren + 1)); else barren=0; fi
    before=$now
    if ((barren >= restarts)); then
      fail "$name: got $barren starts in a row without a new checkpoint, expected progress; see tpu_vm.sh logs, and --config.train.save_every"
    fi
    echo "preempted; once more"
  done
}

stop() {
  # The shell in train.pid leads the group; its child is the run. The mark tells `up` not to start it again.
  on_workers all "cd $folder && touch train.stop && pkill -TERM -P \$(cat train.pid) || true"
}

case $verb in
  create) create ;;
  install) install ;;
  start) start "$@" ;;
  logs) follow ;;
  stop) stop ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)'
    on_workers 0 "cd $folder && if kill -0 \$(cat train.pid); then echo running; else echo ended: \$(cat train.status); fi"
    ;;
  delete)
    if [[ $yes == 0 && $DRY_RUN == 0 ]]; then
      read -r -p "give back $name in $zone and everything on its disks? [y/N] " answer
      [[ $answer == y ]] || exit 1
    fi
    give_back
    ;;
  up) again_and_again "$@" ;;
esac
