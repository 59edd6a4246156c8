"""A policy: an observation dict in, a chunk of actions in the robot's units out.

    policy = Policy.load("runs/place/policy")
    policy.infer({"observation/image": …, "observation/wrist_image": …, "observation/state": …, "prompt": "pick up …"})
    {"actions": f32[k a], "policy_timing": {"prepare_ms": …, "infer_ms": …, "total_ms": …}}

Images, text and numbers take the same path here as in training (`preparation`), the model runs in compiled programs
(`inference`). Evaluation and serving use nothing else; evaluation on the device uses the same parts inside jit.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from semanticvla_jax import action_tokens, exported, inference, policy_folder
from semanticvla_jax.base_policy import BasePolicy
from semanticvla_jax.data import images, robot, statistics, text
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import checks, lora, programs, serving
from semanticvla_jax.models.semanticvla import SemanticVLA, abstract_params, build, dummy_observation
from semanticvla_jax.observation_dict import VIEWS
from semanticvla_jax.preparation import Preparation
from semanticvla_jax.types import Observation, Sentence

NORMALIZATIONS = {"q99": "bounds_q99", "bounds_q99": "bounds_q99", "bounds": "bounds"}
GRIPPERS = ("command", "raw")
ADAPTERS = ("merge", "keep")
WEIGHTS = ("full", *serving.KINDS)
_PIXELS = re.compile(r"(dino|siglip)/embedding/(kernel|lora_b)")  # what every pixel goes through


class Policy(BasePolicy):
  """Parameters with all they need to act. Compiled for its batch sizes, and warm, when the constructor returns.

  Args:
    model: of `build`, or that wrapped in LoRA where `params` holds adapters.
    params: of that model.
    stats: of the dataset whose units the actions are in.
    tokenizers: of the policy; their lengths are what it is compiled for.
    config: {"model": …, "data": …, "lora": …}. Of data this reads normalisation ("q99" or "bounds"), crop_area (share
      of the image that a policy trained on random crops sees, or None), jpeg_quality (None: no round trip) and dct
      (how JPEGs are decoded, "accurate" unless it says otherwise). "robot" has the cameras, groups and grippers of each
      dataset (data/robot.py); a config without it means openpi's and OpenVLA-OFT's names and a binary gripper.
    batch_sizes: sizes to compile for; () for none, when it only runs inside another program.
    prompt_lengths: lengths of the prompt (tokens) to compile for besides the tokenizers' own: an instruction runs at
      the shortest that holds it. `warm` finds them from instructions.
    remember: how many sentences the device keeps the model's states of; 0 computes them at every call.
    replan_steps: actions of a chunk to execute before asking again, for those who ask; None for the whole chunk.
    gripper: "command" gives the gripper in the robot's values (-1 open, +1 closed for LIBERO, and where the config has
      no robot), "raw" as it was learned: 1 open, 0 closed (what clients of OpenVLA expect, who convert it themselves).
    metadata: added to `metadata`.

  Raises:
    ValueError: the parts do not fit together.
  """

  sentence_type = Sentence  # what its sentence program returns

  def __init__(
    self,
    model: nn.Module,
    params: Mapping,
    stats: statistics.DatasetStatistics,
    tokenizers: text.Tokenizers,
    config: Mapping,
    *,
    batch_sizes: Any = (1,),  # what comes from users is checked by value, not by type
    prompt_lengths: Any = (),
    remember: Any = inference.SENTENCES,
    replan_steps: Any = None,
    gripper: str = "command",
    metadata: Mapping | None = None,
  ):
    self.model, self.params, self.stats, self.tokenizers, self.config = model, params, stats, tokenizers, config
    self.bare: SemanticVLA = programs.bare(model)
    data = config.get("data") or {}
    sizes, lengths = (
      inference.positive("batch_sizes", batch_sizes),
      inference.positive("prompt_lengths", prompt_lengths),
    )
    self.mode = NORMALIZATIONS[_choice("normalisation", data.get("normalisation", "q99"), NORMALIZATIONS)]
    self.gripper = _choice("gripper", gripper, GRIPPERS)
    self._picture = dict(
      size=self.image_size,
      crop_area=data.get("crop_area"),
      jpeg_quality=data.get("jpeg_quality"),
      dct=_choice("dct", data.get("dct", "accurate"), images.DCTS),
    )
    self.chunk = self.bare.chunk
    self.replan_steps = self.chunk if replan_steps is None else replan_steps
    self._extra = dict(metadata or {})
    self.robot = robot.select(config, self._extra.get("dataset", ""))
    self._check()
    self._statistics: Mapping[str, statistics.DatasetStatistics] = {}  # of all datasets that it was trained on
    self.preparation = self._make_preparation()
    named = (programs.sentence(model), programs.actions(model))
    memory = programs.empty_memory(model, params, self._dummy(1))
    self.inference, self.memories = inference.Inference(*named, self._dummy, remember, memory), {}
    if sizes:
      longest = tokenizers.prompt_length
      self.inference.compile(params, sizes, {self._prompt_length(length) for length in (longest, *lengths)})

  @classmethod
  def load(
    cls,
    folder: str | os.PathLike,
    *,
    dataset: str | None = None,
    adapters: str = "merge",
    dtype: str | None = None,
    weights: str = "full",
    attention: str = "xla",
    sharding: jax.sharding.Sharding | Callable[[dict], dict] | None = None,
    verify: bool = True,
    **options: Any,
  ) -> Policy:
    """Reads a policy folder (see `policy_folder`).

    Args:
      folder: local or gs://.
      dataset: whose statistics to use; needed where the policy was trained on several.
      adapters: "merge" folds LoRA into the kernels, "keep" runs it beside them; of no effect on a merged policy.
      dtype: of parameters and computation; None for the ones it was trained with.
      weights: "int8" or "fp8" rounds the decoder's kernels to 8 bits, one scale per output channel: half of bfloat16's
        bytes. Products stay in `dtype`.
      attention: "triton", on a GPU: one kernel a layer, which keeps logits out of memory (models/attention_kernel.py).
      sharding, verify: see `policy_folder.load_policy`.
      **options: batch_sizes, prompt_lengths, remember, replan_steps and gripper of the constructor.

    Raises:
      ValueError: the folder is missing or damaged, does not say which statistics or tokenizers to use, lacks its action
        tokens, or a dtype, weights or attention that do not exist here.
    """
    if dtype not in (None, *checks.CHOICES["dtype"]):
      raise refuse("Policy", f"dtype={dtype!r}", f"one of {checks.CHOICES['dtype']}", "choose one, or None")
    laid_out = serving.layout(jax.default_backend(), attention)
    files = policy_folder.load_policy(folder, sharding=sharding, dtype=dtype, verify=verify)
    run = {"scan_encoders": False} | ({} if dtype is None else {"dtype": dtype})
    config = files.config | {"model": files.config["model"] | run | _codec(files)}
    serving.log_choices(config["model"].get("dtype"), attention, jax.default_backend())
    model, params = _adapted(build(config["model"]), files.params, config, _choice("adapters", adapters, ADAPTERS))
    files = files._replace(params={})  # nothing else holds the arrays while they are laid out anew
    if isinstance(model, lora.LoRA):
      if (weights, attention) != (WEIGHTS[0], serving.ATTENTION[0]):
        problem = f"weights={weights!r}, attention={attention!r} with unmerged adapters"
        raise refuse("Policy", problem, "merged ones", "load with adapters='merge'")
    else:
      check_params(params, _parameter_shapes(model))
      config |= {"model": config["model"] | laid_out}
      model, flat = build(config["model"]), flatten_dict(params, sep="/")
      del params
      params = serving.lay_out(flat)
    if _choice("weights", weights, WEIGHTS) != "full":
      model, params = serving.Quantized(model, weights), serving.quantize(params, weights)
    bare = programs.bare(model)
    if files.tokenizers is None:
      raise refuse(
        f"Policy {files.folder} has no tokenizers",
        "no folder tokenizers/",
        "tokenizer.model in it",
        "copy it from the base checkpoint (save_policy(tokenizers=…) does so)",
      )
    names = [*files.statistics]
    if dataset is None and len(names) != 1:
      raise refuse(
        f"Policy {files.folder} knows several datasets",
        f"{names}, no choice",
        "one of them as `dataset`",
        "actions are in its units",
      )
    key = names[0] if dataset is None else dataset
    entries = {name: statistics.from_openvla(one, f"statistics.json: {name}") for name, one in files.statistics.items()}
    facts = {k: files.metadata.get(k) for k in ("package_version", "created", "step", "merged", "parameters")}
    facts |= {"policy_hash": policy_folder.policy_hash(folder), "dataset": key, "folder": str(files.folder)}
    stats, tokenizers = statistics.select(entries, key), _tokenizers(files.tokenizers, config, bare)
    policy = cls(model, params, stats, tokenizers, config, metadata=facts, **options)
    policy._statistics = entries
    return policy

  def variant(self, **fields: Any) -> Policy:
    """The same parameters in a model with other values of `config["model"]`, e.g. anchor_rule; compiled as this one."""
    config = {**self.config, "model": {**self.config["model"], **fields}}
    model = build(config["model"])
    if self.model is not self.bare:
      model = self.model.clone(model=model)
    return Policy(
      model,
      self.params,
      self.stats,
      self.tokenizers,
      config,
      batch_sizes=self.inference.sizes,
      prompt_lengths=self.inference.lengths,
      remember=self.inference.remember,
      replan_steps=self.replan_steps,
      gripper=self.gripper,
      metadata={**self._extra, "variant": fields},
    )

  @property
  def datasets(self) -> tuple[str, ...]:
    """Those whose statistics the policy knows."""
    return tuple(self._statistics) or super().datasets

  def of_dataset(self, name: str) -> Policy:
    """The same parameters and programs in the units of another dataset that it was trained on: statistics and robot.

    Raises:
      ValueError: the policy knows no such dataset, or its robot does not fit the model.
    """
    other = copy.copy(self)
    other.stats, other._extra = statistics.select(self._statistics, name), {**self._extra, "dataset": name}
    other.robot, other.memories = robot.select(self.config, name), {}
    other._check()
    other.preparation = other._make_preparation()
    return other

  def blind(self) -> Policy:
    """A copy of the policy that ignores images: every pixel maps to each encoder's mean color.

    Done in the parameters (the patch embedding's kernel is zero), so that it runs in the program compiled for this one.
    """
    grey = flatten_dict(self.params, sep="/")
    grey |= {name: jnp.zeros_like(grey[name]) for name in grey if _PIXELS.fullmatch(name)}
    other = copy.copy(self)
    other.params, other._extra = unflatten_dict(grey, sep="/"), {**self._extra, "variant": {"images": "grey"}}
    other.memories = {}
    return other

  def warm(self, instructions: Sequence[str]) -> None:
    """Makes the first call with any of these as fast as later ones: compiles for their length, and remembers them.

    The sequence's length changes, by padding that nothing reads, and with it the last bits of the actions.
    """
    self._check_compiled()
    prompts = [self.preparation.words([sentence])[1] for sentence in instructions]
    self.inference.compile(
      self.params, self.inference.sizes, {self._prompt_length(int(mask.sum())) for mask in prompts}
    )
    super().warm(instructions)

  def export(self, path: str | os.PathLike, platforms: Sequence[str] = exported.PLATFORMS) -> None:
    """Writes the policy as one file that runs without this package's models or Flax: see `exported`.

    The programs of its prompt lengths, for any batch size.

    Raises:
      ValueError: a platform that does not exist, attention by a GPU's kernel, or no room on the disk.
    """
    if (kernel := self.bare.llm.kernel) != serving.ATTENTION[0]:
      expected = f"{serving.ATTENTION[0]!r}, which runs on every platform with any batch"
      raise refuse("export", f"attention={kernel!r}", expected, "load the policy with it")
    named = {"sentence": programs.sentence(self.model), "actions": programs.actions(self.model)}
    lengths = self.inference.lengths or (self.tokenizers.prompt_length,)
    exported.write(path, self, named, lengths, platforms)

  @property
  def image_size(self) -> int:
    """Pixels of a side of the model's images."""
    return next(vit.image for vit in (self.bare.dino, self.bare.siglip) if vit is not None)

  @property
  def metadata(self) -> dict:
    """What a client or a report needs to know, as JSON values."""
    return {
      **self._extra,
      "image_size": self.image_size,
      "views": [*self._views],
      "proprio_dim": self.bare.proprio_dim,
      "action_dim": len(self.stats.action.mask),
      "chunk": self.chunk,
      "replay": self.replan_steps,
      "gripper": self.gripper,
      "normalisation": self.mode,
      "dtype": str(jnp.dtype(self.bare.llm.dtype)),
      "weights": self.model.kind if isinstance(self.model, serving.Quantized) else "full",
      **({} if self.bare.llm.kernel == serving.ATTENTION[0] else {"attention": self.bare.llm.kernel}),
      **{name: self._picture[name] for name in ("crop_area", "jpeg_quality", "dct")},
      "pruner_text": None if self.bare.text is None else self.tokenizers.pruner_text,
      "batch_sizes": [*self.inference.sizes],
      "prompt_lengths": [*self.inference.lengths],
      **({} if self.robot is None else {robot.KEY: self.robot.to_json()}),
    }

  def _make_preparation(self) -> Preparation:
    """From dicts to arrays and back, for the policy's dataset."""
    return Preparation(
      self.stats,
      self.tokenizers,
      self._picture,
      name=self._extra.get("dataset", "the policy"),
      mode=self.mode,
      views=self._views,
      proprio_dim=self.bare.proprio_dim,
      reads_words=self.bare.text is not None,
      gripper=self.gripper,
      robot=self.robot,
    )

  @property
  def _views(self) -> tuple[str, ...]:
    """Names of the model's images, in its order."""
    return VIEWS[self.bare.num_views] if self.robot is None else tuple(self.robot.views)

  def _dummy(self, size: int) -> Observation:
    """An observation of zeros of the shapes that `observe` gives."""
    observation = dummy_observation(self.bare, size, self.tokenizers.prompt_length)
    if observation.instruction is not None:
      shape = (size, self.tokenizers.instruction_length)
      observation = observation.replace(instruction=np.zeros(shape, np.int32), instruction_mask=np.ones(shape, bool))
    return jax.tree.map(np.asarray, observation)

  @functools.cached_property
  def _other_positions(self) -> int:
    return programs.positions_besides_prompt(self.model, self.params, self._dummy(1))

  def _prompt_length(self, tokens: int) -> int:
    """The length to compile for prompts of so many tokens: it gives the sequence a multiple of 8 positions.

    Beyond the tokenizers' own length only where a GPU's libraries would pad every product instead.
    """
    most, fills = self.tokenizers.prompt_length, self.config["model"].get("token_multiple", 1) > 1
    if tokens > most:
      raise refuse(
        "Policy", f"a prompt length of {tokens}", f"at most {most}, the tokenizers' own", "choose shorter ones"
      )
    if tokens == most and not fills:
      return most
    whole = tokens + -(self._other_positions + tokens) % serving.MULTIPLE
    return whole if fills else min(whole, most)

  def _check(self) -> None:
    check_params(self.params, _parameter_shapes(self.model))
    serving.verify_attention(self.bare.llm.kernel, self.bare.llm.dtype)
    action_dim = self.config["model"].get("action_dim", len(self.stats.action.mask))
    statistics.check(
      self._extra.get("dataset", "policy"),
      self.stats,
      action_dim=action_dim,
      proprio_dim=self.bare.proprio_dim,
      mode=self.mode,
      openings=None if self.robot is None else [one.dimension for one in self.robot.grippers],
    )
    if self.robot is None and self.bare.num_views not in VIEWS:
      raise refuse("Policy", f"{self.bare.num_views} views", f"{sorted(VIEWS)}", "train it with a DatasetSpec")
    if self.robot is not None and len(self.robot.views) != self.bare.num_views:
      raise refuse(
        "Policy", f"a robot with the views {[*self.robot.views]}", f"{self.bare.num_views} views", "save it again"
      )
    if not inference.is_whole(self.replan_steps) or not 1 <= self.replan_steps <= self.chunk:
      raise refuse("Policy", f"replan_steps={self.replan_steps!r}", f"1 to {self.chunk}, the chunk", "choose another")
    need, have = self.tokenizers.pad_id + 1, self.bare.llm.vocab
    if need > have:
      raise refuse(
        "Policy",
        f"a tokenizer of {need} ids with padding",
        f"at most {have}, the rows of the model's embedding",
        "use the tokenizer it was trained with",
      )
    if self.bare.text is not None and self.tokenizers.instruction_length > self.bare.text.positions:
      raise refuse(
        "Policy",
        f"instructions of {self.tokenizers.instruction_length} tokens",
        f"at most {self.bare.text.positions}, the positions of the text tower",
        "lower instruction_length",
      )
    if self.bare.text is not None and self.tokenizers.siglip is None:
      raise refuse(
        "Policy",
        "no SigLIP tokenizer",
        "spiece.model, for this model prunes by the instruction",
        "copy it next to tokenizer.model",
      )


@functools.lru_cache(maxsize=16)
def _parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
  observation = dummy_observation(programs.bare(model))
  return {name: x.shape for name, x in flatten_dict(abstract_params(model, observation), sep="/").items()}


def check_params(params: Mapping, wanted: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError, with a list of ± lines, unless names and shapes of `params` are the `wanted` ones."""
  have = {f"{name} {tuple(x.shape)}" for name, x in flatten_dict(params, sep="/").items()}
  need = {f"{name} {tuple(shape)}" for name, shape in wanted.items()}
  lines = [f"+ {line}" for line in sorted(need - have)] + [f"- {line}" for line in sorted(have - need)]
  if lines:
    listing = "\n  ".join(lines[:12]) + (f"\n  … and {len(lines) - 12} more" if len(lines) > 12 else "")
    raise ValueError(
      "Parameters do not fit the model: got those marked -, expected those marked +; use the config they were trained "
      f"with (adapters need LoRA, or a merge).\n  {listing}"
    )


def _adapted(model: SemanticVLA, params: dict, config: Mapping, adapters: str) -> tuple[nn.Module, dict]:
  """The model and parameters to run: without adapters, with adapters folded in, or wrapped."""
  if not any(name.endswith("/lora_a") for name in flatten_dict(params, sep="/")):
    return model, params
  settings = config.get("lora")
  if not settings:
    raise refuse(
      "Policy holds LoRA adapters",
      "no `lora` in its config",
      "rank and alpha",
      "save it with the config of its training",
    )
  if adapters == "merge":
    return model, jax.jit(lambda p: lora.merge(p, settings["rank"], settings["alpha"]))(params)
  targets = settings.get("targets", "release")
  return lora.LoRA(model, settings["rank"], settings["alpha"], lora.TARGETS.get(targets, targets)), params


def _tokenizers(folder: Any, config: Mapping, model: SemanticVLA) -> text.Tokenizers:
  data = config.get("data") or {}
  positions = 64 if model.text is None else model.text.positions
  return text.load(
    str(folder),
    prompt_length=data.get("prompt_length") or 64,
    instruction_length=data.get("instruction_length") or min(64, positions),
    pruner_text=data.get("pruner_text_eval") or data.get("pruner_text", "question"),
  )


def _codec(files: policy_folder.PolicyFiles) -> dict:
  """The field of the model config that holds a policy's action tokens, {} for one without."""
  if files.config["model"].get("codec", "bins") == "bins":
    return {}
  return {"codec": action_tokens.load(files.folder / "tokenizers" / action_tokens.NAME).to_json()}


def _choice(name: str, value: Any, allowed: Sequence | Mapping) -> Any:
  if value not in allowed:
    raise refuse("Policy", f"{name}={value!r}", f"one of {(*allowed,)}", "choose one of them")
  return value
