#!/usr/bin/env bash
# The paper's Tables 4 to 6 on the tabletop, three trainings a row, on one GPU. Stops after LIMIT seconds with what it has
# in OUT (tables.md after every row), and continues from there when it is run again.
#
#   [SEEDS=3] [JOBS=8] [TABLES=4,5,6] [EPISODES=256] [LIMIT=480] [OUT=runs/tables_gpu] [PYTHON=python3] benchmark/on_gpu_tables.sh
#
# Needs all of requirements.txt. JOBS rows train at once, each in a process: models of a million parameters leave most of
# a GPU idle, and start-up and compilation take longer than training. FLAGS adds flags of `evaluate table`.

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-runs/tables_gpu}
mkdir -p "$OUT"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/$OUT/compiled} # the seeds of a row share programs
export TF_CPP_MIN_LOG_LEVEL=2 PYTHONUNBUFFERED=1
# shellcheck disable=SC2086  # FLAGS are several words
timeout --signal=INT --kill-after=10 "${LIMIT:-480}" "${PYTHON:-python3}" -m semanticvla_jax.evaluate table \
  --table="${TABLES:-4,5,6}" --seeds="${SEEDS:-3}" --jobs="${JOBS:-8}" --episodes="${EPISODES:-256}" --out="$OUT" ${FLAGS:-}
status=$?
((status != 124 && status != 130)) || echo "stopped after $SECONDS s; the same command continues"
exit $status
