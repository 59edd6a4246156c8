"""A policy as one file: its programs in StableHLO, its parameters, statistics, tokenizers and conventions.

    policy.export("place.svla")                        # platforms=("cpu", "cuda", "tpu")
    ExportedPolicy.load("place.svla").infer(observation)

Who loads it needs jax, numpy, Pillow and sentencepiece, and of this package neither models nor Flax: the model may
change its source and the file still acts as on the day it was written (jax reads programs of at least six months ago).

The file is a ZIP without compression:

    policy.json             settings, statistics, what each parameter is (name, dtype, shape)
    programs/sentence_{t}   what a sentence alone decides, of prompts of t tokens (jax.export)
    programs/actions_{t}    the actions, for any batch size
    params/{number}         the parameters' bytes, in C order
    tokenizers/             tokenizer.model, spiece.model
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import semanticvla_jax
from semanticvla_jax import files, inference
from semanticvla_jax.base_policy import BasePolicy
from semanticvla_jax.data import robot, statistics, text
from semanticvla_jax.errors import refuse
from semanticvla_jax.preparation import Preparation
from semanticvla_jax.types import Observation

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT = 3  # 1 has no robot, 2 no memory
_KNOWN = (*PLATFORMS, "rocm")


def write(
  path: str | os.PathLike,
  policy: Any,
  programs: Mapping[str, Callable],
  lengths: Sequence[int],
  platforms: Sequence[str] = PLATFORMS,
) -> None:
  """Writes the file, whole or not at all.

  Args:
    path: of the file; one that exists is replaced.
    policy: a Policy. programs: its "sentence" and "actions" (`models.programs`).
    lengths: of prompts to export for, in tokens. platforms: that the programs shall run on.
  """
  unknown = [name for name in platforms if name not in _KNOWN]
  if unknown or not platforms:
    raise refuse("Export", f"platforms={(*platforms,)}", f"some of {_KNOWN}", "choose those it shall run on")
  target, flat = Path(path), {_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(policy.params)}
  if not target.parent.is_dir():
    raise refuse(f"Export to {target}", "a folder that does not exist", "an existing one", "create it")
  files.check_room(target, sum(leaf.nbytes for leaf in flat.values()))
  rebuild = jax.tree.structure(policy.params)
  with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as partial:
    try:
      with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("policy.json", json.dumps(_settings(policy, flat, lengths, platforms)))
        for length in lengths:
          for name, program in _lowered(policy, programs, flat, rebuild, length, platforms):
            archive.writestr(f"programs/{name}_{length}", program.serialize())
        for name, model in (("tokenizer", policy.tokenizers.language), ("spiece", policy.tokenizers.siglip)):
          if model is not None:
            archive.writestr(f"tokenizers/{name}.model", model.serialized_model_proto())
        for number, leaf in enumerate(flat.values()):
          archive.writestr(f"params/{number}", np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
      partial.flush()
      os.fsync(partial.fileno())
      os.chmod(partial.name, 0o644)
      os.replace(partial.name, target)
    except BaseException:
      os.unlink(partial.name)
      raise


def _lowered(policy: Any, programs: Mapping, flat: dict, rebuild: Any, length: int, platforms: Sequence[str]):
  """(name, exported program) of one prompt length. Arguments and results are dicts of arrays: no class goes along."""
  params = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
  nested = lambda given: jax.tree.unflatten(rebuild, [given[name] for name in flat])  # noqa: E731

  def sentence(given: dict, words: Sequence):
    return _fields(programs["sentence"](nested(given), words))

  def actions(given: dict, sentences: dict, images: Any, proprio: Any, *memory: dict):
    return programs["actions"](nested(given), policy.sentence_type(**sentences), images, proprio, *memory)

  dummy = policy.inference.dummy(1)
  words = jax.eval_shape(lambda: inference.words(dummy, length))
  how = dict(platforms=[*platforms])
  yield "sentence", jax.export.export(jax.jit(sentence), **how)(params, words)
  batch = jax.export.symbolic_shape("b")
  of_batch = lambda x: jax.ShapeDtypeStruct((*batch, *x.shape[1:]), x.dtype)  # noqa: E731
  memory = () if policy.inference.memory is None else (policy.inference.memory,)
  inputs = (jax.eval_shape(sentence, params, words), dummy.images, dummy.proprio, *memory)
  yield "actions", jax.export.export(jax.jit(actions), **how)(params, *jax.tree.map(of_batch, inputs))


def _settings(policy: Any, flat: Mapping, lengths: Sequence[int], platforms: Sequence[str]) -> dict:
  own, words, memory = policy.preparation, policy.tokenizers, policy.inference.memory
  remembered = {} if memory is None else {"memory": {name: [str(x.dtype), [*x.shape]] for name, x in memory.items()}}
  return {
    "format": FORMAT if remembered else 1 if own.robot is None else 2,
    "package_version": semanticvla_jax.__version__,
    "jax_version": jax.__version__,
    "platforms": [*platforms],
    "prompt_lengths": [*lengths],
    "parameters": [[name, str(leaf.dtype), [*leaf.shape]] for name, leaf in flat.items()],
    "statistics": statistics.to_openvla(own.stats),
    "tokenizers": {name: getattr(words, name) for name in ("prompt_length", "instruction_length", "pruner_text")},
    "preparation": {
      name: getattr(own, name) for name in ("picture", "name", "mode", "views", "proprio_dim", "reads_words", "gripper")
    },
    "metadata": policy.metadata,
    **remembered,
  }


class ExportedPolicy(BasePolicy):
  """A policy out of a file that `Policy.export` wrote: `infer`, `infer_batch`, `warm`, `metadata` as a Policy's."""

  def __init__(self, settings: dict, params: dict, tokenizers: text.Tokenizers, programs: dict, remember: Any):
    stats = statistics.from_openvla(settings["statistics"], "policy.json: statistics")
    self.params, self._settings, self.tokenizers, self.stats = params, settings, tokenizers, stats
    facts = settings["metadata"].get(robot.KEY)
    own = None if facts is None else robot.from_json("policy.json", facts)
    self.preparation = Preparation(stats, tokenizers, **settings["preparation"], robot=own)
    self.chunk, self.replan_steps = settings["metadata"]["chunk"], settings["metadata"]["replay"]
    by_length = lambda name: lambda params, words, *rest: programs[name, _length(words)].call(params, words, *rest)  # noqa: E731
    known = settings.get("memory")  # of one episode, by name: dtype and shape
    memory = None if known is None else {name: np.zeros(shape, dtype) for name, (dtype, shape) in known.items()}
    named = (by_length("sentence"), by_length("actions"))
    self.inference, self.memories = inference.Inference(*named, self._dummy, remember, memory), {}

  @classmethod
  def load(
    cls,
    path: str | os.PathLike,
    *,
    batch_sizes: Any = (1,),  # what comes from users is checked by value, not by type
    remember: Any = inference.SENTENCES,
  ) -> ExportedPolicy:
    """Reads the file, compiles its programs for these batch sizes, and runs each once.

    Raises:
      ValueError: it is not such a file, is damaged or of a later format, or has no program for this platform; a batch
        size that is not a positive integer.
    """
    sizes = inference.positive("batch_sizes", batch_sizes)
    try:
      with zipfile.ZipFile(path) as archive:
        settings = json.loads(archive.read("policy.json"))
        _check(path, settings)
        params = {name: _array(archive, i, *row) for i, (name, *row) in enumerate(settings["parameters"])}
        programs = {
          (name, length): jax.export.deserialize(bytearray(archive.read(f"programs/{name}_{length}")))
          for name in ("sentence", "actions")
          for length in settings["prompt_lengths"]
        }
        with tempfile.TemporaryDirectory() as folder:
          archive.extractall(folder, [name for name in archive.namelist() if name.startswith("tokenizers/")])
          tokenizers = text.load(Path(folder) / "tokenizers", **settings["tokenizers"])
    except (OSError, KeyError, zipfile.BadZipFile, json.JSONDecodeError) as error:
      raise refuse(
        f"Exported policy {path}",
        f"what cannot be read ({error})",
        "a file that Policy.export wrote",
        "check the path, or export it again",
      ) from None
    policy = cls(settings, params, tokenizers, programs, remember)
    policy.inference.compile(params, sizes, settings["prompt_lengths"])
    return policy

  @property
  def metadata(self) -> dict:
    """That of the policy when it was exported, with what is compiled here."""
    compiled = {"batch_sizes": [*self.inference.sizes], "prompt_lengths": [*self.inference.lengths]}
    return self._settings["metadata"] | compiled | {"exported_by": self._settings["package_version"]}

  def _dummy(self, size: int) -> Observation:
    own, words = self._settings["preparation"], self.tokenizers
    side, (t, m) = own["picture"]["size"], (words.prompt_length, words.instruction_length)
    read = (np.zeros((size, m), np.int32), np.ones((size, m), bool)) if own["reads_words"] else (None, None)
    proprio = None if own["proprio_dim"] is None else np.zeros((size, own["proprio_dim"]), np.float32)
    images = np.zeros((size, len(own["views"]), side, side, 3), np.uint8)
    return Observation(images, proprio, np.ones((size, t), np.int32), np.ones((size, t), bool), *read)


def _check(path: Any, settings: Mapping) -> None:
  if settings["format"] > FORMAT:
    raise refuse(
      f"Exported policy {path}", f"format {settings['format']}", f"at most {FORMAT}", "update semanticvla_jax"
    )
  platform = jax.default_backend().replace("gpu", "cuda")
  if platform not in settings["platforms"]:
    raise refuse(
      f"Exported policy {path}",
      f"programs for {settings['platforms']}",
      f"one for {platform}, on which it shall run here",
      f'export it with platforms=("{platform}", …)',
    )


def _array(archive: zipfile.ZipFile, number: int, dtype: str, shape: Sequence[int]) -> jax.Array:
  return jnp.asarray(np.frombuffer(archive.read(f"params/{number}"), jnp.dtype(dtype)).reshape(shape))


def _fields(sentence: Any) -> dict:
  return {field.name: getattr(sentence, field.name) for field in dataclasses.fields(sentence)}


def _length(words: Any) -> int:
  return (words["prompt"] if isinstance(words, Mapping) else words[0]).shape[1]


def _name(keys: Sequence) -> str:
  return "/".join(key.key for key in keys)
