#!/usr/bin/env bash
# Evaluates a policy on a Kubernetes cluster such as GKE: an indexed job with a shard an index, then a job that merges.
#
#   launch/evaluate_gke.sh --shards=N --name=NAME --image=IMAGE --claim=CLAIM [--namespace=NS] [--accelerator=TYPE]
#                   [--gpus=N] [--cpus=N] [--memory=SIZE] [--at-once=N] [--restarts=N] [--timeout=24h] [--dry-run] -- --policy=DIR --suite=NAMES …
#
#   --shards       how many pods the episodes are dealt out to; shards are counted from 0
#   --name         of the job; /data/NAME/shard_K holds shard K, /data/NAME/merged the result
#   --image        a container with this repository as its working folder and its requirements installed
#   --claim        a persistent volume claim that many pods may write (ReadWriteMany), mounted at /data
#   --accelerator  kind of GPU, such as nvidia-l4 (default: any node)
#   --gpus         of a shard (default: 1; 0 for none)
#   --cpus, --memory  of a shard (default: 8, 32Gi); a LIBERO simulator takes about 2 GB
#   --at-once      how many shards may run at once (default: all)
#   --restarts     how often a shard that failed is started again (default: 3); one whose node was taken away always is
#   --timeout      how long to wait for the shards before merging (default: 24h)
#   --dry-run      print the jobs and the commands that would submit them
#
# What follows -- goes to python -m semanticvla_jax.evaluate run; paths lie under /data. 2,000 episodes of LIBERO:
#
#   launch/evaluate_gke.sh --shards=16 --name=libero --image=REGION-docker.pkg.dev/PROJECT/vla/evaluate --claim=results \
#       -- --policy=/data/policies/libero --suite=libero_spatial,libero_object,libero_goal,libero_10 --workers=4 --films=2

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

shards="" name="" image="" claim="" namespace=default accelerator="" gpus=1 cpus=8 memory=32Gi at_once="" restarts=3 timeout=24h
while (($#)); do
  case $1 in
    --shards=*) shards=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --memory=*) memory=${1#*=} ;;
    --at-once=*) at_once=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --timeout=*) timeout=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) help launch/evaluate_gke.sh; exit 0 ;;
    --) shift; break ;;
    *) fail "got '$1', expected a flag of this script, or -- before the evaluation's own arguments" ;;
  esac
  shift
done
label='^[a-z0-9]([-a-z0-9]*[a-z0-9])?$'
required --shards "$shards" "how many shards"
required --name "$name" "a name for the job"
required --image "$image" "a container image (launch/README.md shows its Dockerfile)"
required --claim "$claim" "a persistent volume claim of access mode ReadWriteMany"
whole --shards "$shards"
whole --cpus "$cpus"
[[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus: got '$gpus', expected a whole number"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts: got '$restarts', expected a whole number"
[[ -z $at_once ]] || whole --at-once "$at_once"
[[ $memory =~ ^[1-9][0-9]*[KMGT]i?$ ]] || fail "--memory: got '$memory', expected a size such as 32Gi"
[[ $timeout =~ ^[1-9][0-9]*[smh]$ ]] || fail "--timeout: got '$timeout', expected a time such as 24h"
[[ $image =~ ^[A-Za-z0-9._/:@-]+$ ]] || fail "--image: got '$image', expected the address of an image"
((${#name} <= 50)) || fail "--name: got ${#name} characters, expected at most 50"
for word in name claim namespace; do
  [[ ${!word} =~ $label ]] || fail "--$word: got '${!word}', expected small letters, digits and - such as libero-1"
done
[[ -z $accelerator || $accelerator =~ $label ]] || fail "--accelerator: got '$accelerator', expected a kind such as nvidia-l4"
evaluate_arguments "$@"
need kubectl "install it and run: gcloud container clusters get-credentials CLUSTER"

pod() {  # pod GPUS COMMAND: what both jobs run, a command for sh
  local line=${2//\'/\'\'}
  cat << JOB
  template:
    spec:
      restartPolicy: Never
JOB
  if (($1)) && [[ -n $accelerator ]]; then
    printf '      nodeSelector:\n        cloud.google.com/gke-accelerator: %s\n' "$accelerator"
  fi
  cat << JOB
      containers:
        - name: evaluate
          image: $image
          command: [sh, -c]
          args: ['exec $line']
          resources:
            requests: {cpu: "$cpus", memory: $memory}
JOB
  (($1 == 0)) || echo "            limits: {nvidia.com/gpu: \"$1\"}"
  cat << JOB
          volumeMounts:
            - {name: data, mountPath: /data}
      volumes:
        - name: data
          persistentVolumeClaim: {claimName: $claim}
JOB
}

shards_job() {  # a pod that its node took away counts as no failure
  cat << JOB
apiVersion: batch/v1
kind: Job
metadata: {name: $name, namespace: $namespace}
spec:
  completionMode: Indexed
  completions: $shards
  parallelism: ${at_once:-$shards}
  backoffLimitPerIndex: $restarts
  podFailurePolicy:
    rules:
      - action: Ignore
        onPodConditions: [{type: DisruptionTarget}]
JOB
  pod "$gpus" "$(quoted python -m semanticvla_jax.evaluate run "$@") \
--shard=\"\$JOB_COMPLETION_INDEX/$shards\" --out=/data/$name/shard_\"\$JOB_COMPLETION_INDEX\""
}

merge_job() {
  local folders=() i
  for ((i = 0; i < shards; i++)); do folders+=("/data/$name/shard_$i"); done
  cat << JOB
apiVersion: batch/v1
kind: Job
metadata: {name: $name-merge, namespace: $namespace}
spec:
  backoffLimit: $restarts
JOB
  pod 0 "$(quoted python -m semanticvla_jax.evaluate merge "${folders[@]}" "--out=/data/$name/merged")"
}

if [[ $DRY_RUN == 1 ]]; then
  shards_job "$@"
  echo ---
  merge_job
  echo ---
else
  shards_job "$@" > "$name.yaml"
  merge_job > "$name-merge.yaml"
fi
run kubectl apply -f "$name.yaml"
run kubectl wait --namespace "$namespace" --for=condition=complete "--timeout=$timeout" "job/$name"
run kubectl apply -f "$name-merge.yaml"
