#!/usr/bin/env bash
# Measures a policy, its peers and training on one GPU in under eight minutes; each figure is printed as it comes.
#
#   [SIZE=7b] [DTYPE=bfloat16] [CALLS=200] [BATCHES=1,2,4,8] [PEER=eager] [OUT=runs/gpu] [PYTHON=python3] benchmark/on_gpu.sh
#
# Needs jax, flax, optax, orbax, einops and jaxtyping; PyTorch and transformers for the peer; sentencepiece to run the
# shipped policy. Weights are random and made on the device. Every step has a time limit (SLOWER=4 makes it four times as
# long) and its own process: what fails is said in one line, and the rest goes on. OUT holds what each step printed
# (.txt), its errors (.log), and its result (.json), to be read with `python -m semanticvla_jax.benchmark compare`.

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
SIZE=${SIZE:-7b} DTYPE=${DTYPE:-bfloat16} CALLS=${CALLS:-200} BATCHES=${BATCHES:-1,2,4,8} OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3} STEPS=${STEPS:-10} TRAIN_BATCH=${TRAIN_BATCH:-8} POLICY=${POLICY:-checkpoints/tabletop_small}
PEER=${PEER-eager} # PEER= leaves it out
mkdir -p "$OUT"

export PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # PyTorch shares the device
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$OUT/compiled} # steps share programs
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1

failed=0
# step NAME SECONDS VERB FLAG…: one verb of the benchmark, its figures in OUT/NAME.json.
step() {
  local name=$1 limit=$(($2 * ${SLOWER:-1})) began=$SECONDS
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  timeout --kill-after=5 "$limit" "$PYTHON" -m semanticvla_jax.benchmark "$@" --out="$OUT/$name.json" \
    2>"$OUT/$name.log" | tee "$OUT/$name.txt"
  local status=${PIPESTATUS[0]} why
  if ((status)); then
    failed=$((failed + 1))
    why=$(tail -n 1 "$OUT/$name.log" | cut -c1-200)
    ((status != 124 && status != 137)) || why="time limit of $limit s"
    printf 'failed: %s, status %s after %s s: %s\n' "$name" "$status" $((SECONDS - began)) "$why"
  fi
}

model=(--size="$SIZE" --dtype="$DTYPE")
step semanticvla 120 latency --row=full "${model[@]}" --calls="$CALLS" # copy and matmul rates come first
step oft 90 latency --row=oft "${model[@]}" --calls="$CALLS"
[ -z "$PEER" ] || step peer 100 latency --row=full "${model[@]}" --calls="$CALLS" --peer="$PEER"
for word in ${OPTIONS:-attention=triton prompt_lengths=(24,) remember=0 weights=int8 weights=fp8}; do # each against `semanticvla`
  step "option_${word//[^a-z0-9_]/}" 60 latency --row=full "${model[@]}" --calls="$CALLS" --option="$word"
done
step batches 90 latency --row=full "${model[@]}" --calls=$(((CALLS + 3) / 4)) --batch="$BATCHES"
step train 150 train --compare "${model[@]}" --batch="$TRAIN_BATCH" --calls="$STEPS"
step tabletop 60 evaluate --policy="$POLICY" --batch="${EPISODES:-256}" --host-episodes=2
printf '\n%s s, %s steps failed; results in %s\n' "$SECONDS" "$failed" "$OUT"
exit $((failed > 0))
