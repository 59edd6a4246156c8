#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster, one task a GPU; the job requeues itself after a preemption.
#
#   launch/slurm.sh --nodes=N --gpus-per-node=N [--name=NAME] [--time=D-HH:MM:SS] [--partition=P] [--account=A]
#                   [--cpus-per-gpu=N] [--restarts=N] [--python=PATH] [--sbatch=OPTION …] [--dry-run] -- --config=FILE --workdir=FOLDER …
#
#   --nodes, --gpus-per-node  how many
#   --time                    limit (default: 1-00:00:00); two minutes before it the job saves and requeues
#   --cpus-per-gpu            for the input pipeline (default: 8)
#   --restarts                how often it requeues itself (default: 100)
#   --python                  the interpreter, on a file system that all nodes see (default: .venv/bin/python)
#   --sbatch                  a further option for sbatch; may be given again
#   --dry-run                 print the job script and the command that would submit it
#
# The workdir must lie on a file system that all nodes see. What follows -- goes to python -m semanticvla_jax.train.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

nodes="" gpus="" name=semanticvla time=1-00:00:00 partition="" account="" cpus=8 restarts=100 python=.venv/bin/python more=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus-per-node=*) gpus=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --cpus-per-gpu=*) cpus=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --sbatch=*) more+=("${1#*=}") ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help launch/slurm.sh; exit 0 ;;
    --) shift; break ;;
    *) fail "got '$1', expected a flag of this script, or -- before the training's own arguments" ;;
  esac
  shift
done
required --nodes "$nodes" "how many nodes"
required --gpus-per-node "$gpus" "how many GPUs a node has"
whole --nodes "$nodes"
whole --gpus-per-node "$gpus"
whole --cpus-per-gpu "$cpus"
whole --restarts "$restarts"
[[ $time =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] || fail "--time: got '$time', expected D-HH:MM:SS such as 1-00:00:00"
[[ $name =~ ^[A-Za-z0-9._-]+$ ]] || fail "--name: got '$name', expected letters, digits, '.', '_' and '-'"
for word in ${more[@]+"${more[@]}"}; do
  [[ $word == -* ]] || fail "--sbatch: got '$word', expected an option of sbatch such as --sbatch=--qos=high"
done
train_arguments "$@"
need sbatch "run this on a login node of the cluster"

script() {
  cat << JOB
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
status=0
srun --kill-on-bad-exit=0 $(quoted "$python" -m semanticvla_jax.train --multihost=slurm "$@") || status=\$?
if [[ \$status == 75 && \${SLURM_RESTART_COUNT:-0} -lt $restarts ]]; then  # stopped by SIGTERM, saved: resume when there is room
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
JOB
}

if [[ $DRY_RUN == 1 ]]; then
  script "$@"
  show sbatch "${more[@]}" "$name.sbatch"
else
  script "$@" > "$name.sbatch"
  run sbatch "${more[@]}" "$name.sbatch"
fi
