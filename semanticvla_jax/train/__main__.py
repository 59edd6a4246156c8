"""python -m semanticvla_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Trains what the config says on all devices there are, resumes from the workdir when it is run again, and leaves a
policy folder `<workdir>/policy` for evaluation, serving and conversion. On several hosts, start it on each.

    --config.FIELD=VALUE  changes a field, e.g. --config.optim.lr=1e-4; configs/common.py explains each
    --init-from=DIR       short for --config.init_from=DIR, the policy folder to start from
    --print-config        prints every field of the resolved config, and exits
    --explain             prints mesh, shardings and bytes per device, and exits
    --profile-steps=a:b   writes a profiler trace of steps a … b to <workdir>/profile
    --debug-batch=FILE    makes one update on a bad_batch_STEP.npz from the newest checkpoint: prints its metrics, exits

Exit status: 0 finished; 1 an error, with one line on stderr (--traceback shows the rest); 75 stopped by SIGTERM after
saving, or while still setting up: run the same command again to resume.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from semanticvla_jax import cli, policy_folder, sources
from semanticvla_jax.data import robot, statistics, text
from semanticvla_jax.errors import refuse
from semanticvla_jax.train import (
  base_settings,
  checkpoints,
  command_line,
  config_checks,
  distributed,
  diverged,
  from_specs,
  init,
  inputs,
  optimizer,
  program,
  resume,
  sharding,
)
from semanticvla_jax.train import explain as explaining
from semanticvla_jax.train import step as stepping
from semanticvla_jax.train.log import Metrics, Trace
from semanticvla_jax.train.partition import combine, count, partition

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file and its argument, e.g. configs/libero.py:lite@7b; --config.FIELD=VALUE changes a field"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and the final policy; local or gs://")
_PRINT_CONFIG = flags.DEFINE_bool("print-config", False, "Print every field of the resolved config as a flag, and exit")
_EXPLAIN = flags.DEFINE_bool("explain", False, "Print mesh, shardings and bytes per device, and exit")
_EXPLAIN_DEVICES = flags.DEFINE_integer("explain-devices", None, "Number of devices for --explain; none: those present")
_DEBUG_BATCH = flags.DEFINE_string(
  "debug-batch", None, "A bad_batch_STEP.npz: makes one update on it from the newest checkpoint, prints metrics, exits"
)
flags.DEFINE_alias("replay", "debug-batch")
_PROFILE = flags.DEFINE_string("profile-steps", None, "First and last step of a profiler trace, as FIRST:LAST")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Address of process 0, as HOST:PORT, where several hosts train")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0")
_MULTIHOST = flags.DEFINE_enum("multihost", "auto", distributed.METHODS, "Where to find the other hosts")
_HOST_DEADLINE = flags.DEFINE_float("host-deadline", 300.0, "Seconds that hosts wait for each other")

AHEAD = 2  # updates that may wait for the device: their batches take its memory


class Preempted(Exception):
  """Stopped by SIGTERM; everything is saved."""


def initial_params(config: Any, model: Any, bare: Any, mesh: Any) -> tuple[dict, dict | None]:
  """Parameters where they belong, and the statistics of the base they came from (None for a fresh draw)."""
  rule = sharding.rule_of(config.mesh)
  wanted = init.shapes(model, bare, config.trainable, config.frozen_dtype)
  sharding.check(wanted, mesh, rule)
  folders, random = init.bases(config.init_from)
  found = {folder: policy_folder.read_policy_shapes(folder) for folder in folders}  # before any weight is read
  own_robot, matching = bool(config.data.get("specs")), init.matching(config.init_from)
  taken, new = init.assign_sources(wanted, found, config.trainable, random, own_robot, matching)
  params = init.init_params(model, bare, config.seed, new, sharding.param_sharding(new, mesh, rule)) if new else {}
  check_bases(config, taken)
  stats = None
  for folder, paths in taken.items():
    base = load_base(folder, mesh, rule)
    stats = base.statistics if stats is None else stats  # of the first
    params = combine(params, init.cast_like(init.select(base.params, paths), init.select(wanted, paths)))
  return params, stats and {name: statistics.from_openvla(entry) for name, entry in stats.items()}


def check_bases(config: Any, taken: dict[str, list[str]]) -> None:
  """Raises ValueError where a base's own settings or tokenizers give what is taken from it another meaning."""
  here = inputs.tokenizer_files(config)
  for folder, paths in taken.items():
    base = policy_folder.read_policy_json(folder).config
    base_settings.check(folder, base, config, paths, init.matching(config.init_from))
    base_settings.check_tokenizers(folder, here, paths)


def load_base(folder: str, mesh: Any, rule: sharding.Rule) -> policy_folder.PolicyFiles:
  """A policy folder with its parameters on the mesh."""
  return policy_folder.load_policy(
    folder,
    sharding=lambda tree: sharding.param_sharding(tree, mesh, rule),
    verify=jax.process_count() == 1,  # hashing would gather every parameter on every host
  )


class Prepared(NamedTuple):
  """What is ready before the first step: the model, its state and the program's parts."""

  mesh: Any
  bare: Any
  tokenizers: text.Tokenizers
  base_statistics: dict | None
  state: stepping.State
  frozen: dict
  step: Callable


def prepare(config: Any, deadline: float, aux_loss: stepping.AuxLoss | None = None) -> Prepared:
  """Draws or loads the parameters and puts them on the mesh. Raises ValueError for what a user can put right."""
  config_checks.check(config)
  mesh = sharding.make_mesh(config.mesh)
  rule = sharding.rule_of(config.mesh)
  sharding.check_rows(config.data.batch_size, sharding.devices_of_rows(mesh), config.optim.accumulate)
  model, bare = init.make_model(config, aux_loss)
  tokenizers = inputs.load_tokenizers(config, bare)
  distributed.barrier("start", deadline)
  params, base_statistics = initial_params(config, model, bare, mesh)
  trainable, frozen = partition(params, config.trainable)
  tx = optimizer.transform(config.optim)
  new = functools.partial(stepping.new_state, tx)
  where = stepping.state_sharding(jax.eval_shape(new, trainable), mesh, rule)
  state = jax.jit(new, out_shardings=where)(trainable)
  logging.info("%s trainable, %s frozen parameters on %s", f"{count(state.trainable):,}", f"{count(frozen):,}", mesh)
  schedule = optimizer.schedule(config.optim)
  step = stepping.make_step(model, tx, schedule, config.seed, aux_loss, config.optim.accumulate)
  return Prepared(mesh, bare, tokenizers, base_statistics, state, frozen, step)


def open_checkpoints(config: Any, workdir: Path) -> checkpoints.Checkpointer:
  """The workdir's checkpoints, kept as the config says."""
  return checkpoints.Checkpointer(
    workdir, config.train.keep_last, config.train.save_every, config.train.get("keep_every")
  )


def debug_batch(config: Any, workdir: Path, path: Path, deadline: float = 300.0) -> tuple[int, dict[str, float]]:
  """One update on a batch that `diverged.save_batch` wrote, from the workdir's newest checkpoint; nothing is saved.

  Returns:
    The step of that checkpoint, 0 for none, and the update's metrics: losses, and gradient norms by part of the model.

  Raises:
    ValueError: no such file, a batch of several processes or of another config, or a run with an auxiliary loss, whose
      targets are not saved.
  """
  if sources.aux_loss(config) is not None:
    raise refuse(
      "--debug-batch",
      "a config with an auxiliary loss, whose targets are not in the file",
      "one without",
      "look at the examples with train.diverged.load_batch",
    )
  if not path.exists() or jax.process_count() > 1:
    raise refuse(
      "--debug-batch",
      f"{path} in {jax.process_count()} processes",
      "a bad_batch_STEP.npz that exists, in one process",
      "name the file that the failed run wrote",
    )
  batch = diverged.load_batch(path)
  size = len(batch.actions)
  if size != config.data.batch_size:
    raise refuse(
      "--debug-batch",
      f"{size} examples in {path}",
      f"{config.data.batch_size} (data.batch_size)",
      "pass the config of the run that wrote it",
    )
  ready = prepare(config, deadline)
  with open_checkpoints(config, workdir) as checkpointer:
    state, start, _ = resume.restore(checkpointer, ready.state, resume.plain(config))
  run = stepping.compile_step(ready.step, ready.mesh, state, ready.frozen, sharding.rule_of(config.mesh), None)
  _, values = run(state, ready.frozen, sharding.place_batch(batch, ready.mesh, size))
  return start, {name: float(x) for name, x in sorted(values.items())}


def train(config: Any, workdir: Path, profile: tuple[int, int] | None = None, deadline: float = 300.0) -> Path:
  """Runs the config to its end; returns the policy folder.

  Args:
    config, workdir: see the command. profile: first and last step of a trace. deadline: seconds hosts wait for hosts.

  Raises:
    ValueError: what a user can put right, another run in the workdir among it. NotFinite, Diverged: the loss broke.
      Preempted: after SIGTERM, all saved.
  """
  with distributed.alone(workdir):
    return _train(from_specs.resolve(config), workdir, profile, deadline)


def _train(config: Any, workdir: Path, profile: tuple[int, int] | None, deadline: float) -> Path:
  aux_loss, generator = sources.aux_loss(config), sources.generator(config)
  ready = prepare(config, deadline, aux_loss)
  with open_checkpoints(config, workdir) as checkpointer:
    state, start, saved = resume.restore(checkpointer, ready.state, resume.plain(config))
    source_from = functools.partial(
      inputs.make_source,
      config,
      ready.bare,
      ready.tokenizers,
      ready.mesh,
      base=ready.base_statistics,
      generator=generator,
    )
    source = source_from(start)
    specs = {} if generator is not None else inputs.dataset_specs(config, ready.bare)
    robots = {name: robot.of(spec).to_json() for name, spec in specs.items()}
    facts = {"config": resume.plain(config)} | resume.origin(config, source, robots)
    if saved:
      resume.check_origin(saved, facts, workdir)
    meet = functools.partial(distributed.barrier, "compiled", deadline) if jax.process_count() > 1 else None
    frozen, rule = ready.frozen, sharding.rule_of(config.mesh)
    step = stepping.compile_step(ready.step, ready.mesh, state, frozen, rule, meet)
    ready = ready._replace(state=None)  # the step's state is donated
    distributed.barrier("ready to train", deadline)
    history = deque(saved.get("losses", ()), maxlen=200)
    run = Run(config, workdir, checkpointer, step, source.batches, frozen, facts, history, aux_loss)
    try:
      state = loop(run, state, start, profile)
    except diverged.Diverged as error:
      batch = source_from(error.step - 1).batches(error.step - 1)
      raise type(error)(f"{error} Its batch: {diverged.save_batch(batch, workdir, error.step)}") from error
  distributed.barrier("policy", deadline)
  return write_policy(config, workdir, state, frozen, source.statistics, robots, aux_loss)


class Run(NamedTuple):
  """What stays the same from step to step.

  Attributes:
    step: (state, frozen, batch) → (state, metrics), compiled. batches: step → placed Batch.
    frozen: parameters without gradients.
    facts: JSON that checkpoints carry.
    history: losses of the last updates, to know a spike by; saved and added to.
    aux_loss: the auxiliary loss, for the count of operations; None without one.
  """

  config: Any
  workdir: Path
  checkpointer: checkpoints.Checkpointer
  step: Callable
  batches: Callable[[int], Any]
  frozen: dict
  facts: dict
  history: deque
  aux_loss: stepping.AuxLoss | None


def loop(run: Run, state: stepping.State, start: int, profile: tuple[int, int] | None = None) -> stepping.State:
  """Steps start … config.train.steps − 1, with metrics and checkpoints; returns the last state.

  Raises:
    NotFinite, Diverged: the loss broke. Preempted: after SIGTERM, all saved.
  """
  config, workdir, checkpointer, history = run.config, run.workdir, run.checkpointer, run.history
  rates = program.rates(config, run.aux_loss) if start < config.train.steps else {}
  metrics = Metrics(workdir, config.train.steps, config.train.log_every, start, config.data.batch_size, **rates)
  metrics.also_to_wandb(config.train.get("wandb"), resume.plain(config))
  ahead: deque = deque()  # losses of updates that the device may still be busy with
  with (
    contextlib.closing(metrics),
    distributed.preemption() as preempted,
    Trace(workdir / "profile", profile) as trace,
  ):
    for step in range(start, config.train.steps):
      trace.before(step + 1)
      before = time.perf_counter()
      batch = run.batches(step)
      wait = time.perf_counter() - before
      state, values = run.step(state, run.frozen, batch)
      trace.after(step + 1, values)
      ahead.append(values["loss"])
      if len(ahead) > AHEAD:
        jax.block_until_ready(ahead.popleft())
      stop = preempted(step + 1) and step + 1 < config.train.steps
      save = stop or checkpointer.due(step + 1) or step + 1 == config.train.steps
      means = metrics.add(step + 1, values, wait, flush=save)
      if means is not None:
        recent = metrics.recent
        diverged.check(recent, history, step + 2 - len(recent), config.train.get("spike"), state.trainable)
      if save:  # only what was found finite is kept
        checkpointer.save(step + 1, {"train": state}, run.facts | {"losses": list(history)})
      if stop:
        checkpointer.wait()
        raise Preempted(f"stopped by SIGTERM; saved at step {step + 1} of {config.train.steps}; run it again to resume")
  return state


def write_policy(
  config: Any,
  workdir: Path,
  state: Any,
  frozen: Any,
  stats: dict,
  robots: dict,
  aux_loss: stepping.AuxLoss | None = None,
) -> Path:
  """`<workdir>/policy`: parameters, statistics, config and tokenizers in one folder; replaces the one of this run."""
  target = workdir / "policy"
  params = combine(optimizer.average_of(state.optimizer, state.trainable), frozen)
  return type(workdir)(
    policy_folder.save_policy(
      target,
      params if aux_loss is None else aux_loss.strip(params),
      config=resume.plain(config) | ({robot.KEY: robots} if robots else {}),
      statistics={name: statistics.to_openvla(entry) for name, entry in stats.items()},
      metadata={"step": int(state.step)},
      tokenizers=inputs.tokenizer_files(config),
      replace=True,
    )
  )


def parse_steps(text: str | None) -> tuple[int, int] | None:
  """ "10:12" → (10, 12). Raises ValueError for anything else."""
  if text is None:
    return None
  first, _, last = text.partition(":")
  if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
    raise refuse("--profile-steps", f"{text!r}", "FIRST:LAST with 1 ≤ FIRST ≤ LAST", "give it such as 10:12")
  return int(first), int(last)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  distributed.exit_on_sigterm()
  try:
    profile = parse_steps(_PROFILE.value)
    if _PRINT_CONFIG.value:
      print(command_line.as_flags(_CONFIG.value))
      return
    config = from_specs.resolve(_CONFIG.value)
    if _EXPLAIN.value:
      print(explaining.explain(config, _EXPLAIN_DEVICES.value, sources.aux_loss(config)))
      return
    if _WORKDIR.value is None:
      raise refuse("--workdir", "nothing", "a folder for checkpoints, metrics and the policy", "name one")
    who = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _MULTIHOST.value)
    distributed.initialize(*who, _HOST_DEADLINE.value, json.dumps([resume.plain(config), _WORKDIR.value]))
    distributed.set_up_logging()
    workdir = epath.Path(_WORKDIR.value) if "://" in _WORKDIR.value else Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    if _DEBUG_BATCH.value:
      start, values = debug_batch(config, workdir, Path(_DEBUG_BATCH.value), _HOST_DEADLINE.value)
      print(json.dumps({"checkpoint": start} | values, indent=2))
      return
    policy = train(config, workdir, profile, _HOST_DEADLINE.value)
  except Preempted as notice:
    logging.warning("%s", notice)
    sys.exit(distributed.PREEMPTED)
  except (ValueError, diverged.Diverged) as error:
    sys.exit(f"error: {error}")
  if jax.process_index() == 0:
    print(f"policy: {policy}")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  cli.run(lambda _: app.run(main, flags_parser=command_line.parse))
