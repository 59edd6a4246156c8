#!/usr/bin/env bash
# Evaluates a policy on a SLURM cluster: an array job with a shard a task, then a job that merges the shards.
#
#   launch/evaluate_slurm.sh --shards=N --out=FOLDER [--name=NAME] [--time=D-HH:MM:SS] [--partition=P] [--account=A]
#                   [--gpus=N] [--cpus=N] [--memory=SIZE] [--at-once=N] [--python=PATH] [--sbatch=OPTION …] [--dry-run] -- --policy=DIR --suite=NAMES …
#
#   --shards     how many tasks the episodes are dealt out to; shards are counted from 0
#   --out        FOLDER/shard_K holds shard K, FOLDER/merged the result; on a file system that all nodes see
#   --time       limit of a shard (default: 0-12:00:00); what a preempted one has measured is kept
#   --gpus       of a shard (default: 1; 0 for none)
#   --cpus, --memory  of a shard (default: 8, 32G); a LIBERO simulator takes about 2 GB
#   --at-once    how many shards may run at once (default: all)
#   --python     the interpreter, on a file system that all nodes see (default: .venv/bin/python)
#   --sbatch     a further option for both sbatch calls; may be given again
#   --dry-run    print the job scripts and the commands that would submit them
#
# What follows -- goes to python -m semanticvla_jax.evaluate run. 2,000 episodes of LIBERO:
#
#   launch/evaluate_slurm.sh --shards=16 --out=/shared/runs/libero -- --policy=/shared/policies/libero \
#       --suite=libero_spatial,libero_object,libero_goal,libero_10 --workers=4 --films=2

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

shards="" out="" name=evaluate time=0-12:00:00 partition="" account="" gpus=1 cpus=8 memory=32G at_once="" python=.venv/bin/python more=()
while (($#)); do
  case $1 in
    --shards=*) shards=${1#*=} ;;
    --out=*) out=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --memory=*) memory=${1#*=} ;;
    --at-once=*) at_once=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help launch/evaluate_slurm.sh; exit 0 ;;
    --) shift; break ;;
    *) fail "got '$1', expected a flag of this script, or -- before the evaluation's own arguments" ;;
  esac
  shift
done
required --shards "$shards" "how many shards"
required --out "$out" "a folder for the shards and the result"
whole --shards "$shards"
whole --cpus "$cpus"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus: got '$gpus', expected a whole number"
[[ -z $at_once ]] || whole --at-once "$at_once"
[[ $memory =~ ^[1-9][0-9]*[KMGT]?$ ]] || fail "--memory: got '$memory', expected a size such as 32G"
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] || fail "--time: got '$time', expected D-HH:MM:SS such as 0-12:00:00"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name: got '$name', expected letters, digits, '.', '_' and '-'"
for word in ${more[@]+"${more[@]}"}; do
  [[ $word == -* ]] || fail "--sbatch: got '$word', expected an option of sbatch such as --sbatch=--qos=high"
done
evaluate_arguments "$@"
need sbatch "run this on a login node of the cluster"

head_of() {  # head_of NAME LOG: the lines that both jobs begin with
  cat << JOB
#!/usr/bin/env bash
#SBATCH --job-name=$1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=$cpus
#SBATCH --mem=$memory
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$2
JOB
  [[ -z $partition ]] || echo "#SBATCH --partition=$partition"
  [[ -z $account ]] || echo "#SBATCH --account=$account"
}

array_script() {
  head_of "$name" "$name-%A_%a.log"
  echo "#SBATCH --array=0-$((shards - 1))${at_once:+%$at_once}"
  ((gpus == 0)) || echo "#SBATCH --gpus-per-task=$gpus"
  cat << JOB

# A task that is requeued goes on in its folder.
exec srun $(quoted "$python" -m semanticvla_jax.evaluate run "$@") \\
  --shard="\$SLURM_ARRAY_TASK_ID/$shards" --out=$(quoted "$out")/shard_"\$SLURM_ARRAY_TASK_ID"
JOB
}

merge_script() {
  local folders=() i
  for ((i = 0; i < shards; i++)); do folders+=("$out/shard_$i"); done
  head_of "$name-merge" "$name-merge-%j.log"
  cat << JOB

exec $(quoted "$python" -m semanticvla_jax.evaluate merge "${folders[@]}" "--out=$out/merged")
JOB
}

options=(${more[@]+"${more[@]}"})
if [[ $DRY_RUN == 1 ]]; then
  array_script "$@"
  show sbatch --parsable ${options[@]+"${options[@]}"} "$name.sbatch"
  merge_script
  show sbatch --dependency=afterok:JOB ${options[@]+"${options[@]}"} "$name-merge.sbatch"
  exit
fi
array_script "$@" > "$name.sbatch"
merge_script > "$name-merge.sbatch"
show sbatch --parsable ${options[@]+"${options[@]}"} "$name.sbatch"
job=$(sbatch --parsable ${options[@]+"${options[@]}"} "$name.sbatch")
job=${job%%;*}  # the number comes before the cluster's name
run sbatch "--dependency=afterok:$job" ${options[@]+"${options[@]}"} "$name-merge.sbatch"
