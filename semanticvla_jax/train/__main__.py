"""python -m semanticvla_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Trains what the config says on all devices there are, resumes from the workdir when it is run again, and leaves a
policy folder `<workdir>/policy` for evaluation, serving and conversion. On several hosts, start it on each.

    --explain            prints mesh, shardings and bytes per device, and ends
    --profile_steps=a:b  writes a profiler trace of steps a … b to <workdir>/profile
    --replay=FILE        one update on a bad_batch_STEP.npz from the newest checkpoint: prints its metrics, and ends

Exit status: 0 finished; 1 an error, told on stderr; 75 told to stop (SIGTERM): saved, or still setting up, and nothing
is lost; goes on when run again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import operator
import statistics as numbers
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from semanticvla_jax import checkpoint
from semanticvla_jax.data import statistics, text
from semanticvla_jax.train import command_line, distributed, grounding, init, inputs, optimizer, program, sharding
from semanticvla_jax.train import explain as explaining
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.log import Metrics, Trace
from semanticvla_jax.train.partition import combine, count, partition
from semanticvla_jax.types import Batch, Observation

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, e.g. configs/libero.py:lite@7b")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and the final policy; local or gs://")
_EXPLAIN = flags.DEFINE_bool("explain", False, "Print mesh, shardings and bytes per device; allocate nothing; end")
_EXPLAIN_DEVICES = flags.DEFINE_integer("explain_devices", None, "With --explain: for so many devices, not those here")
_REPLAY = flags.DEFINE_string("replay", None, "A bad_batch_STEP.npz: one update on it, metrics printed; end")
_PROFILE = flags.DEFINE_string("profile_steps", None, "FIRST:LAST, the steps of a profiler trace")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where several hosts train")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are")
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0")
_MULTIHOST = flags.DEFINE_enum("multihost", "auto", distributed.METHODS, "Where to find the other hosts")
_HOST_DEADLINE = flags.DEFINE_float("host_deadline", 300.0, "Seconds that hosts wait for each other")

AHEAD = 2  # updates that may wait for the device: their batches take its memory

# Config fields that runs of earlier versions did not store, with the value they had.
LATER = {
  "frozen_dtype": None, "optim.ema": None, "data.starts": 0.0, "data.diagonal_crop": False, "data.dct": "accurate",
  "data.pruner_text_eval": None, "data.cache_dir": None, "data.jitter": [0.0, 0.0], "data.askew": 0.0,
}  # fmt: skip

# Config fields that may change when a run goes on, each with what lies below it: how long and where it runs, not what
# it computes. Base, tokenisers and data are known by what they hold (`origin`), wherever they lie.
MOVABLE = (
  "mesh", "model.remat", "model.scan_encoders", "init_from", "data.dir", "data.cache_dir", "data.tokenizers",
  "train.steps", "train.save_every", "train.keep_last", "train.keep_every", "train.log_every", "train.spike",
  "train.wandb",
)  # fmt: skip


class Diverged(RuntimeError):
  """The loss jumped."""


class NotFinite(Diverged):
  """Training met a NaN or Inf."""


class Preempted(Exception):
  """Told to stop; everything is saved."""


def plain(config: Any) -> dict:
  """A ConfigDict as JSON values."""
  return json.loads(config.to_json_best_effort())


def initial_params(config: Any, model: Any, bare: Any, mesh: Any) -> tuple[dict, dict | None]:
  """Parameters where they belong, and the statistics of the base they came from (None for a fresh draw)."""
  rule = sharding.rule_of(config.mesh)
  wanted = init.shapes(model, bare, config.trainable, config.frozen_dtype)
  sharding.check(wanted, mesh, rule)
  folders, random = init.bases(config.init_from)
  found = {folder: checkpoint.read_policy_shapes(folder) for folder in folders}  # before any weight is read
  taken, new = init.origins(wanted, found, config.trainable, random)
  params = init.draw(model, bare, config.seed, new, sharding.param_sharding(new, mesh, rule)) if new else {}
  stats = None
  for folder, paths in taken.items():
    base = load_base(folder, mesh, rule)
    stats = base.statistics if stats is None else stats  # of the first
    params = combine(params, init.cast(init.only(base.params, paths), init.only(wanted, paths)))
  return params, stats and {name: statistics.from_openvla(entry) for name, entry in stats.items()}


def load_base(folder: str, mesh: Any, rule: sharding.Rule) -> checkpoint.PolicyFiles:
  """A policy folder with its parameters on the mesh."""
  return checkpoint.load_policy(
    folder,
    sharding=lambda tree: sharding.param_sharding(tree, mesh, rule),
    verify=jax.process_count() == 1,  # hashing would gather every parameter on every host
  )


def resume(checkpointer: checkpoint.Checkpointer, state: Any, config: dict) -> tuple[Any, int, dict]:
  """(state, step, the JSON beside it) of the workdir's newest checkpoint, or (the state as it is, 0, {}).

  Raises:
    ValueError: in the workdir of another config.
  """
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  restored = checkpointer.restore({"train": abstract})
  if restored is None:
    return state, 0, {}
  if lines := differences(restored.json["config"], config):
    raise ValueError(
      f"workdir {checkpointer.folder.parent}: its run had another config, got {'; '.join(lines)} (before → now), "
      "expected the same; use a new --workdir, or the config it began with."
    )
  logging.info("resumed from step %d", restored.step)
  return restored.trees["train"], restored.step, restored.json


def differences(saved: dict, config: dict) -> list[str]:
  """ "optim.lr: 0.001 → 0.0005" for each field that differs and is not MOVABLE; see LATER for those it may lack."""
  before, now = LATER | flatten_dict(saved, sep="."), flatten_dict(config, sep=".")
  fixed = [name for name in now if not any(name == free or name.startswith(f"{free}.") for free in MOVABLE)]
  missing = object()
  return [
    f"{name}: {before.get(name, 'not there')} → {now[name]}"
    for name in sorted(fixed)
    if before.get(name, missing) != now[name]
  ]


def origin(config: Any, source: inputs.Source) -> dict:
  """What a run stands on beside its config, as JSON: hashes of its bases, tokenisers and data, and its statistics."""
  folders, _ = init.bases(config.init_from)
  tokenizers = epath.Path(config.data.tokenizers or text.EMBEDDED)
  words = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(tokenizers.glob("*.model"))))
  return {
    "base": [checkpoint.policy_hash(folder) for folder in folders],
    "tokenizers": words.hexdigest()[:16],
    "data": source.digests,
    "statistics": {name: statistics.to_openvla(entry) for name, entry in source.statistics.items()},
  }


def check_origin(saved: dict, now: dict, workdir: Path) -> None:
  """Compares `origin` now with that of the checkpoint a run goes on from; one that says nothing is taken, and told.

  Raises:
    ValueError: another base, other tokenisers or other data.
  """
  if unknown := sorted(set(now) - set(saved)):
    logging.warning("the checkpoint is of an earlier version: its %s cannot be compared", ", ".join(unknown))
  known = [name for name in now if name in saved and name != "config"]
  differing = [name for name in known if not (same if name == "statistics" else operator.eq)(saved[name], now[name])]
  if differing:
    told = {name: describe(saved[name]) + " → " + describe(now[name]) for name in differing}
    raise ValueError(
      f"workdir {workdir}: its run had another {' and '.join(differing)}, got "
      f"{'; '.join(f'{name} {change}' for name, change in told.items())} (before → now), expected the same under any "
      "path; pass the base (config.init_from), tokenisers and data it began with, or use a new --workdir."
    )


def same(a: Any, b: Any) -> bool:
  """Whether statistics are equal up to the rounding of another machine."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
  return np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-4, atol=1e-6)


def describe(value: Any) -> str:
  """Hashes as they are; of statistics the datasets and how many frames they have."""
  if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
    return str(value)
  return ", ".join(f"{name} ({entry.get('num_transitions')} frames)" for name, entry in value.items())


def check(recent: list[dict], history: deque, first: int, spike: float | None, trainable: dict) -> None:
  """Looks at the metrics of updates first, first + 1, … and adds their losses to `history`.

  Raises:
    NotFinite, Diverged: with the step and the parts of the model that broke, as `error.step` too.
  """
  for step, values in enumerate(recent, first):
    loss, norm = float(values["loss"]), float(values["grad_norm"])
    norms = {name.partition("/")[2]: float(x) for name, x in values.items() if name.startswith("grad_norm/")}
    if not (np.isfinite(loss) and np.isfinite(norm)):
      families = sorted(name for name, x in norms.items() if not np.isfinite(x)) or stepping.bad_families(trainable)
      error = NotFinite(
        f"step {step}: loss {loss}, gradient norm {norm}; not finite: {families or 'none yet'}. Expected finite "
        "numbers. Lower config.optim.lr, set config.optim.clip_norm, or check the statistics for degenerate ranges "
        "(python -m semanticvla_jax.data statistics). The last checkpoint is untouched."
      )
    elif spike is not None and len(history) >= 20 and loss > spike * numbers.median(history):
      largest = sorted(norms, key=norms.get, reverse=True)[:3]
      error = Diverged(
        f"step {step}: loss {loss:.4g} is {loss / numbers.median(history):.1f} times its recent median, expected at "
        f"most {spike:g} (config.train.spike); largest gradients: {largest}. Look at the batch, lower config.optim.lr, "
        "or set config.optim.clip_norm. The last checkpoint is untouched."
      )
    else:
      history.append(loss)
      continue
    error.step = step
    raise error


def save_batch(batch: Any, folder: Path, step: int) -> Path:
  """This process's examples of a placed batch as `bad_batch_<step>[_<process>].npz`, arrays named by their fields."""

  def local(x):
    parts = {part.index[0].start or 0: part.data for part in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

  flat, _ = jax.tree_util.tree_flatten_with_path(batch)
  named = {"".join(str(key) for key in path).strip("."): local(x) for path, x in flat}
  process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
  path = folder / f"bad_batch_{step}{process}.npz"
  contents = io.BytesIO()
  np.savez(contents, **named)
  path.write_bytes(contents.getvalue())
  return path


def load_batch(path: Path) -> Batch:
  """What `save_batch` wrote, as arrays: to look at, or to run a step on (`step.make_step`)."""
  with np.load(path) as file:
    arrays = dict(file)
  seen = {name.removeprefix("observation."): x for name, x in arrays.items() if name.startswith("observation.")}
  return Batch(Observation(**{"proprio": None} | seen), arrays["actions"], arrays["action_mask"])


class Prepared(NamedTuple):
  """What stands before the first step: the model, its state and the program's parts."""

  mesh: Any
  bare: Any
  tokenizers: text.Tokenizers
  base_statistics: dict | None
  state: stepping.State
  frozen: dict
  step: Callable


def prepare(config: Any, deadline: float) -> Prepared:
  """Draws or loads the parameters and puts them on the mesh. Raises ValueError for what a user can put right."""
  mesh = sharding.make_mesh(config.mesh)
  rule = sharding.rule_of(config.mesh)
  sharding.check_rows(config.data.batch_size, sharding.devices_of_rows(mesh), config.optim.accumulate)
  model, bare = init.make_model(config)
  tokenizers = inputs.load_tokenizers(config, bare)
  distributed.meet("start", deadline)
  params, base_statistics = initial_params(config, model, bare, mesh)
  trainable, frozen = partition(params, config.trainable)
  transform = optimizer.transform(config.optim)
  new = functools.partial(stepping.new_state, transform)
  where = stepping.state_sharding(jax.eval_shape(new, trainable), mesh, rule)
  state = jax.jit(new, out_shardings=where)(trainable)
  logging.info("%s trainable, %s frozen parameters on %s", f"{count(state.trainable):,}", f"{count(frozen):,}", mesh)
  rate, turns = optimizer.schedule(config.optim), config.optim.accumulate
  step = stepping.make_step(model, transform, rate, config.seed, config.train.grounding, turns)
  return Prepared(mesh, bare, tokenizers, base_statistics, state, frozen, step)


def open_checkpoints(config: Any, workdir: Path) -> checkpoint.Checkpointer:
  """The workdir's checkpoints, kept as the config says."""
  return checkpoint.Checkpointer(
    workdir, config.train.keep_last, config.train.save_every, config.train.get("keep_every")
  )


def replay(config: Any, workdir: Path, path: Path, deadline: float = 300.0) -> tuple[int, dict[str, float]]:
  """One update on a batch that `save_batch` wrote, from the workdir's newest checkpoint; nothing is saved.

  Returns:
    The step of that checkpoint, 0 for none, and the update's metrics: losses, and gradient norms by part of the model.

  Raises:
    ValueError: no such file, a batch of several processes or of another config, or a run whose batches come with
      hints, which are not saved.
  """
  if config.train.grounding is not None:
    raise ValueError(
      "--replay: got a config with train.grounding, whose batches come with hints that are not in the file; expected "
      "one without; look at the examples with load_batch of this module."
    )
  if not path.exists() or jax.process_count() > 1:
    raise ValueError(f"--replay: got {path} in {jax.process_count()} processes; expected a bad_batch_STEP.npz, in one.")
  batch = load_batch(path)
  size = len(batch.actions)
  if size != config.data.batch_size:
    raise ValueError(f"--replay: got {size} examples in {path}, expected {config.data.batch_size} (data.batch_size).")
  ready = prepare(config, deadline)
  with open_checkpoints(config, workdir) as checkpointer:
    state, start, _ = resume(checkpointer, ready.state, plain(config))
  run = stepping.compile_step(ready.step, ready.mesh, state, ready.frozen, sharding.rule_of(config.mesh), None)
  _, values = run(state, ready.frozen, *sharding.place_batch((batch, None), ready.mesh, size))
  return start, {name: float(x) for name, x in sorted(values.items())}


def train(config: Any, workdir: Path, profile: tuple[int, int] | None = None, deadline: float = 300.0) -> Path:
  """Runs the config to its end; returns the policy folder.

  Args:
    config, workdir: see the command. profile: first and last step of a trace. deadline: seconds hosts wait for hosts.

  Raises:
    ValueError: what a user can put right. NotFinite, Diverged: the loss broke. Preempted: after SIGTERM, all saved.
  """
  ready = prepare(config, deadline)
  with open_checkpoints(config, workdir) as checkpointer:
    state, start, saved = resume(checkpointer, ready.state, plain(config))
    sources = functools.partial(
      inputs.make_source, config, ready.bare, ready.tokenizers, ready.mesh, base=ready.base_statistics
    )
    source = sources(start)
    facts = {"config": plain(config)} | origin(config, source)
    if saved:
      check_origin(saved, facts, workdir)
    meet = functools.partial(distributed.meet, "compiled", deadline) if jax.process_count() > 1 else None
    frozen, rule = ready.frozen, sharding.rule_of(config.mesh)
    run = stepping.compile_step(ready.step, ready.mesh, state, frozen, rule, meet)
    ready = ready._replace(state=None)  # the step is given the state's buffers to write over
    distributed.meet("ready to train", deadline)
    history = deque(saved.get("losses", ()), maxlen=200)
    try:
      state = loop(config, workdir, checkpointer, run, source.batches, state, frozen, start, facts, history, profile)
    except Diverged as error:
      batch, _ = sources(error.step - 1).batches(error.step - 1)
      raise type(error)(f"{error} Its batch: {save_batch(batch, workdir, error.step)}") from error
  return write_policy(config, workdir, state, frozen, source.statistics, deadline)


def loop(
  config, workdir: Path, checkpointer, run: Callable, source: Callable, state, frozen, start: int, facts: dict,
  history: deque, profile=None,
):  # fmt: skip
  """Steps start … config.train.steps − 1, with metrics and checkpoints.

  Args:
    facts: JSON that checkpoints carry. history: losses of the last updates, to know a spike by; saved and added to.
  """
  rates = program.rates(config) if start < config.train.steps else {}
  metrics = Metrics(workdir, config.train.steps, config.train.log_every, start, config.data.batch_size, **rates)
  metrics.also_to_wandb(config.train.get("wandb"), plain(config))
  ahead: deque = deque()  # losses of updates that the device may still be busy with
  with (
    contextlib.closing(metrics),
    distributed.preemption() as preempted,
    Trace(workdir / "profile", profile) as trace,
  ):
    for step in range(start, config.train.steps):
      trace.before(step + 1)
      before = time.perf_counter()
      batch, hints = source(step)
      wait = time.perf_counter() - before
      state, values = run(state, frozen, batch, hints)
      trace.after(step + 1, values)
      ahead.append(values["loss"])
      if len(ahead) > AHEAD:
        jax.block_until_ready(ahead.popleft())
      stop = preempted(step + 1) and step + 1 < config.train.steps
      save = stop or checkpointer.due(step + 1) or step + 1 == config.train.steps
      means = metrics.add(step + 1, values, wait, flush=save)
      if means is not None:
        recent = metrics.recent
        check(recent, history, step + 2 - len(recent), config.train.get("spike"), state.trainable)
      if save:  # only what was found finite is kept
        checkpointer.save(step + 1, {"train": state}, facts | {"losses": list(history)})
      if stop:
        checkpointer.wait()
        raise Preempted(f"told to stop; saved at step {step + 1} of {config.train.steps}; run it again to go on")
  return state


def write_policy(config: Any, workdir: Path, state: Any, frozen: Any, stats: dict, deadline: float) -> Path:
  """`<workdir>/policy`: parameters, statistics, config and tokenisers in one folder; replaces the one of this run."""
  target = workdir / "policy"
  if jax.process_index() == 0 and target.exists():
    epath.Path(target).rmtree()
  distributed.meet("policy", deadline)
  return type(workdir)(
    checkpoint.save_policy(
      target,
      grounding.strip(combine(optimizer.average_of(state.optimizer, state.trainable), frozen)),
      config=plain(config),
      statistics={name: statistics.to_openvla(entry) for name, entry in stats.items()},
      metadata={"step": int(state.step)},
      tokenizers=Path(config.data.tokenizers or text.EMBEDDED),
    )
  )


def parse_steps(text: str | None) -> tuple[int, int] | None:
  """ "10:12" → (10, 12). Raises ValueError for anything else."""
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise ValueError(f"--profile_steps: got {text!r}, expected FIRST:LAST with 1 ≤ FIRST ≤ LAST, such as 10:12.")
  return int(first), int(last)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  distributed.leave_on_sigterm()
  try:
    profile = parse_steps(_PROFILE.value)
    if _EXPLAIN.value:
      print(explaining.explain(_CONFIG.value, _EXPLAIN_DEVICES.value))
      return
    if _WORKDIR.value is None:
      raise ValueError("--workdir: got nothing, expected a folder for checkpoints, metrics and the policy; name one.")
    who = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _MULTIHOST.value)
    distributed.initialize(*who, _HOST_DEADLINE.value, json.dumps([plain(_CONFIG.value), _WORKDIR.value]))
    distributed.set_up_logging()
    workdir = epath.Path(_WORKDIR.value) if "://" in _WORKDIR.value else Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    if _REPLAY.value:
      start, values = replay(_CONFIG.value, workdir, Path(_REPLAY.value), _HOST_DEADLINE.value)
      print(json.dumps({"checkpoint": start} | values, indent=2))
      return
    policy = train(_CONFIG.value, workdir, profile, _HOST_DEADLINE.value)
  except Preempted as notice:
    logging.warning("%s", notice)
    sys.exit(distributed.PREEMPTED)
  except (ValueError, Diverged) as error:
    sys.exit(f"error: {error}")
  if jax.process_index() == 0:
    print(f"policy: {policy}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=command_line.parse)
