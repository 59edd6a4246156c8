"""What every policy does with its preparation and its compiled programs, wherever these come from."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from semanticvla_jax.errors import refuse
from semanticvla_jax.inference import Inference
from semanticvla_jax.preparation import Preparation
from semanticvla_jax.types import Observation


class BasePolicy:
  """Observation dicts in, chunks of actions out.

  Attributes:
    params: of the programs. preparation: from dicts to arrays, and back to the robot's units. inference: the programs.
    memories: by episode that was started and not reset: what its next query is given; stays empty for most policies.
  """

  params: Mapping
  preparation: Preparation
  inference: Inference
  memories: dict[Hashable, Any]

  @property
  def remembers(self) -> bool:
    """Whether an answer depends on earlier queries of the episode."""
    return self.inference.memory is not None

  def reset(self, episodes: Sequence[Hashable] | None = None) -> None:
    """Forgets these episodes (see `infer_batch`), or all: to a policy that `remembers` their next query is a first."""
    for episode in [*self.memories] if episodes is None else episodes:
      self.memories.pop(episode, None)

  @property
  def datasets(self) -> tuple[str, ...]:
    """Those whose statistics the policy knows; `of_dataset` changes to another."""
    name = self.metadata.get("dataset")
    return () if name is None else (name,)

  def infer(self, observation: Any) -> dict:
    """One observation → {"actions": f32[k a], "policy_timing": …}.

    Args:
      observation: a dict of u8[h w 3] images, f32[p] state in raw units and the instruction, under any name of
        observation_dict.ALIASES; other entries are ignored.

    Raises:
      ValueError: something is missing, ambiguous or of the wrong kind.
    """
    return self.infer_batch([observation])[0]

  def infer_batch(self, observations: Any, episodes: Sequence[Hashable] | None = None) -> list[dict]:
    """A list of observations at once, padded to a compiled size, in parts where there are more than the largest.

    Args:
      observations: dicts as for `infer`.
      episodes: which episode each belongs to, for a policy that `remembers`: any names, none twice. None for 0, 1, 2,
        …, the places in the list; `infer` asks in episode 0. Of no effect on other policies.
    """
    if isinstance(observations, Mapping | str) or not isinstance(observations, Sequence):
      raise refuse(
        "Observations",
        f"{type(observations).__name__}",
        "a list of observation dicts",
        "pass [observation], or call infer",
      )
    self._check_compiled()
    names = [*range(len(observations))] if episodes is None else [*episodes]
    if len({*names}) < len(names) or len(names) != len(observations):
      got = f"{len({*names})} episodes for {len(observations)} observations"
      raise refuse("Observations", got, "one episode each", "ask twice for two queries of an episode")
    largest, results = max(self.inference.sizes), []
    for first in range(0, len(observations), largest):
      part = slice(first, first + largest)
      results += self._infer(observations[part], names[part])
    return results

  def warm(self, instructions: Sequence[str]) -> None:
    """Remembers these sentences, so that the first call with one is as fast as later ones."""
    self._check_compiled()
    dummy = self.inference.dummy(1)
    for sentence in instructions:
      words = self.preparation.words([sentence])
      jax.block_until_ready(self.device_step(Observation(dummy.images, dummy.proprio, *words)))

  def observe(self, observations: Sequence[Any]) -> Observation:
    """Observation dicts → what the model reads, numpy arrays of batch len(observations)."""
    return self.preparation.observe(observations)

  def words(self, instructions: Sequence[str]) -> tuple[np.ndarray | None, ...]:
    """Instructions → (prompt, prompt_mask, instruction, instruction_mask), the last two None without an ID-Pruner."""
    return self.preparation.words(instructions)

  def device_step(self, observation: Observation) -> jax.Array:
    """What `observe` gave, or that on the device → normalized actions f32[size k a], not waited for.

    `size` is the smallest compiled batch size that holds the observation; further rows repeat the last. A policy that
    `remembers` answers as at the first query of an episode.
    """
    return self.inference(self.params, observation)[0]

  @property
  def executables(self) -> dict[tuple[str, int, int], jax.stages.Compiled]:
    """The compiled programs: ("sentence", 1, length), ("join", size, length) and ("actions", size, length)."""
    return self.inference.executables

  def _infer(self, observations: Sequence[Any], episodes: Sequence[Hashable]) -> list[dict]:
    n, begin = len(observations), time.perf_counter()
    observation = self.observe(observations)
    prepared = time.perf_counter()
    if self.remembers:
      before = [self.memories.get(episode, self.inference.memory) for episode in episodes]
      found, memory = jax.tree.map(np.asarray, self.inference(self.params, observation, before))
      self.memories |= {name: jax.tree.map(lambda x: x[i : i + 1], memory) for i, name in enumerate(episodes)}  # noqa: B023
    else:
      found = self.device_step(observation)
    actions = np.asarray(found)[:n]
    inferred = time.perf_counter()
    actions = self.preparation.actions(actions)
    timing = {"prepare_ms": prepared - begin, "infer_ms": inferred - prepared, "total_ms": time.perf_counter() - begin}
    timing = {name: 1e3 * seconds for name, seconds in timing.items()}
    return [{"actions": chunk, "policy_timing": dict(timing)} for chunk in actions]

  def _check_compiled(self) -> None:
    if not self.inference.sizes:
      raise refuse("Policy is not compiled", "batch_sizes=()", "a size to infer with", "pass (1,)")
