"""A policy's call in layers, from the compiled program alone to `Policy.infer`, against a roofline and a peer.

program: the compiled program on inputs that lie on the device, until its result is ready; the sentence is one that the
  policy has been asked before (its option remember=0 computes it at every call).
transfers: the same from host arrays to host actions.
infer: `Policy.infer_batch`: reading, resizing, tokenizing, normalizing; transfers; un-normalizing.
"""

from __future__ import annotations

import ast
import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from semanticvla_jax.benchmark import policies, roofline, timing
from semanticvla_jax.benchmark.record import Result
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import programs
from semanticvla_jax.policy import Policy
from semanticvla_jax.train import flops as counter

LOADING = ("weights", "attention")  # options of Policy.load that random policies have, too


class Settings(NamedTuple):
  """What is timed, and how often.

  Attributes:
    policy: a folder; None for random weights of `rows` at `size` in `dtype`.
    rows, size, dtype, prompt: see policies.random_policy.
    batches: sizes to time, each compiled separately.
    calls: timed calls of each layer, after one untimed call a block.
    option: "NAME=VALUE" of Policy's constructor, such as "remember=0", or of LOADING, such as "weights=int8".
    peer: which PyTorch programs run alongside: some of ("eager", "compile").
    seed: of weights and observations.
    smoke: small copies and products.
  """

  policy: str | None
  rows: Sequence[str]
  size: str
  dtype: str | None
  prompt: int
  batches: Sequence[int]
  calls: int
  option: Sequence[str] = ()
  peer: Sequence[str] = ()
  seed: int = 0
  smoke: bool = False


def executable(policy: Policy, observation: Any) -> Any:
  """The jax.stages.Compiled that goes from images and known sentences to actions for this Observation."""
  tokens = int(np.asarray(observation.prompt_mask).sum(axis=1).max())
  size = min(size for size in policy.inference.sizes if size >= len(observation.images))
  return policy.executables["actions", size, min(x for x in policy.inference.lengths if x >= tokens)]


def _inputs(policy: Policy, observation: Any) -> tuple:
  """What `executable` is given besides the parameters, as shapes: sentences, images, proprioception."""
  words = [observation.prompt, observation.prompt_mask, observation.instruction, observation.instruction_mask]
  sentences = jax.eval_shape(programs.sentence(policy.model), policy.params, words)
  return (sentences, *jax.eval_shape(lambda: (observation.images, observation.proprio)))


def options(given: Sequence[str]) -> dict[str, Any]:
  """{"replan_steps": 4} from ["replan_steps=4"]. Raises ValueError for what a Policy has no option of this name for."""
  known = [name for name, x in inspect.signature(Policy).parameters.items() if x.kind is x.KEYWORD_ONLY]
  known += LOADING
  found = {}
  for word in given:
    name, equals, value = word.partition("=")
    if not equals or name not in known:
      raise refuse("--option", repr(word), f"NAME=VALUE with a name of {', '.join(known)}", "choose one of them")
    try:
      found[name] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[name] = value  # a word
  return found


def measure(result: Result, settings: Settings) -> None:
  """Times every row, or the policy of a folder, at every batch size."""
  dtype = settings.dtype or "float32"
  rates = timing.rates(dtype, settings.smoke)
  result.add("copy", rates["copy"] / 1e9, "GB/s")
  result.add("matmul", rates["matmul"] / 1e12, "TFLOP/s")
  for row in settings.rows if settings.policy is None else ("policy",):
    begin = time.perf_counter()
    policy = _load(row, settings)
    jax.block_until_ready(policy.params)
    loaded = time.perf_counter() - begin
    result.add(f"{row} load", loaded, "s")
    result.models[row] = dict(policy.config["model"])
    for batch in settings.batches:
      _measure_batch(result, policy, row, batch, settings, rates)
    del policy


def _load(row: str, settings: Settings) -> Policy:
  own = {name: value for name, value in options(settings.option).items() if name in LOADING} | {"batch_sizes": ()}
  if settings.policy is not None:
    return Policy.load(settings.policy, dtype=settings.dtype, **own)
  own |= dict(prompt=settings.prompt, seed=settings.seed)
  return policies.random_policy(row, settings.size, settings.dtype or "float32", **own)


def _measure_batch(
  result: Result, cold: Policy, row: str, batch: int, settings: Settings, rates: Mapping[str, float]
) -> None:
  name = f"{row} batch {batch}" if len(settings.batches) > 1 else row
  given = {option: value for option, value in options(settings.option).items() if option not in LOADING}
  policy, seconds = policies.again(cold, batch_sizes=(batch,), **given)
  result.add(f"{name} compile", seconds, "s")
  result.add(f"{name} cold start", seconds + result.value(f"{row} load"), "s")
  observations = policies.observation_dicts(policy, batch, settings.seed)
  host = policy.observe(observations)
  # Words stay on the host, where they are looked up among the sentences that the device remembers.
  device = host.replace(images=jax.device_put(host.images), proprio=jax.device_put(host.proprio))
  layers = {
    "program": lambda: policy.device_step(device).block_until_ready(),
    "transfers": lambda: np.asarray(policy.device_step(host)),
    "infer": lambda: policy.infer_batch(observations),
  }
  found = timing.in_turns(layers, settings.calls)
  for layer, times in found.items():
    timing.add_quantiles(result, f"{name} {layer}", times)
  program, inputs = executable(policy, host), _inputs(policy, host)
  ops = counter.count(programs.actions(policy.model), policy.params, *inputs)
  ideal = roofline.add(result, name, roofline.program_bytes(program, policy.params, inputs), ops, rates)
  result.add(f"{name} share of the roofline", ideal / float(np.median(found["program"])), "ratio")
  result.add(f"{name} program rate", ops / float(np.median(found["program"])) / 1e12, "TFLOP/s")
  if settings.peer and settings.policy is None:
    _measure_peer(result, name, layers["program"], row, batch, settings)


def _measure_peer(result: Result, name: str, ours: Any, row: str, batch: int, settings: Settings) -> None:
  """Our program and the same architecture in PyTorch in turns, one PyTorch program after the other."""
  from semanticvla_jax.benchmark import peer

  model = peer.Peer(row, settings.size, settings.dtype or "float32", settings.prompt, batch)
  for kind in settings.peer:
    theirs, seconds = model.forward(kind)
    result.add(f"{name} PyTorch {kind} compile", seconds, "s")
    found = timing.in_turns({"ours": ours, "theirs": theirs}, settings.calls, settle=0.3)
    timing.add_quantiles(result, f"{name} PyTorch {kind}", found["theirs"])
    timing.add_quantiles(result, f"{name} ours beside PyTorch {kind}", found["ours"])
    result.add(f"{name} PyTorch {kind} / ours", float(np.median(found["theirs"]) / np.median(found["ours"])), "ratio")
    result.add(f"{name} PyTorch {kind} / ours, minima", float(found["theirs"].min() / found["ours"].min()), "ratio")
  result.note(peer.LEAVES_OUT)
