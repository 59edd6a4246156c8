"""Both sides of a conversion on the same seeded input: PyTorch's classes with the source, our modules with the policy.

PyTorch's side gets its weights under names that are written out here and in torch_names.py and do not come from the
conversion rules, so that a wrong rule is not checked against itself. Both
sides compute in float32, one stage (an encoder, a layer of the language model, a head) in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict

from semanticvla_jax.convert import adapter, settings
from semanticvla_jax.convert.check.torch_models import (
  built,
  dinov2_config,
  libraries,
  llama_config,
  load_state,
  siglip_config,
  siglip_text_config,
)
from semanticvla_jax.convert.detect import Source, recognize
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder
from semanticvla_jax.errors import refuse
from semanticvla_jax.models import llama, lora, masks
from semanticvla_jax.models.coupler import ResNetHead
from semanticvla_jax.models.mlp import MLP
from semanticvla_jax.models.semanticvla import SemanticVLA, build
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import ViT

TOLERANCE = 5e-5
BATCH, WORDS = 2, 9  # of the made-up inputs
Pair = tuple[str, Any, Any]  # stage, ours, theirs
State = dict[str, Any]  # tensors of PyTorch by name

MLPS = {  # our path: PyTorch's layers, a GELU between two of them
  "sparse_fuser/projector": ("projector.fc1", "projector.fc2", "projector.fc3"),
  "sparse_fuser/dino_cue_projector": ("featurizer_sampler_proj.fc1", "featurizer_sampler_proj.fc2"),
  "sparse_fuser/siglip_cue_projector": ("fused_featurizer_sampler_proj.fc1", "fused_featurizer_sampler_proj.fc2"),
  "proprio_projector": ("proprio_projector.fc1", "proprio_projector.fc2"),
  **{
    f"{name}_id_pruner/text_projector": tuple(f"{source}_mm_sampler.text_post_projector.{i}" for i in (0, 2))
    for name, source in (("dino", "featurizer"), ("siglip", "fused_featurizer"))
  },
}
HEADS = {"trans": "model_trans", "rot": "model_rot", "grip": "model_grip", "all": "model"}


class Row(NamedTuple):
  """One compared stage: max |ours - theirs| / max(1, max |theirs|); inf where shapes differ or one is not finite."""

  stage: str
  error: float


def verify(
  sources: Sequence[str | Path],
  policy: str | Path,
  *,
  seed: int = 0,
  merged: bool | None = None,
  say: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], list[str]]:
  """Runs every stage that a policy has.

  Args:
    sources: what it was converted from (see detect.recognize).
    policy: the policy folder.
    seed: of the inputs.
    merged: see detect.recognize.
    say: is given each row as soon as it is known.

  Returns:
    (rows, paths of parameters that no stage ran). PyTorch's side follows the settings of the source's own files; each
    setting in which the policy's model differs is a row with an error of inf.

  Raises:
    ValueError: torch or transformers is missing, or the source lacks tensors of a stage.
  """
  torch, _ = libraries()
  sides = _Sides(recognize(sources, merged), PolicyFolder(policy))
  rows = [Row(f"{d.text}, expected {d.expected}", float("inf")) for d in sides.differences()]
  for row in rows:
    say(row)
  with jax.default_matmul_precision("highest"), torch.inference_mode():
    for stage in sides.stages():
      for name, ours, theirs in stage(np.random.default_rng(seed)):
        rows.append(Row(name, _error(ours, theirs)))
        say(rows[-1])
  return rows, [path for path in sides.policy.leaves if not path.startswith(tuple(sides.ran))]


def _error(ours: Any, theirs: Any) -> float:
  ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    return float("inf")
  return float(np.abs(ours - theirs).max(initial=0) / max(1.0, np.abs(theirs).max(initial=0)))


class _Sides:
  """A source and the policy made from it.

  Attributes:
    ran: beginnings of our paths that some stage has run.
  """

  def __init__(self, source: Source, policy: PolicyFolder):
    adapter.check(source)
    self.source, self.policy = source, policy
    self.model: SemanticVLA = build(dict(policy.config["model"]) | dict(dtype="float32", remat=None))
    self.lora = policy.config.get("lora") or policy.metadata.get("lora")
    own = adapter.DEFAULTS | (source.adapter or {})
    self.source_lora = self.lora if source.adapter is None else {"rank": own["r"], "alpha": own["lora_alpha"]}
    self.towers = {tower.name: tower for tower in source.layout.towers}
    self.ran: list[str] = []

  def differences(self) -> list[settings.Difference]:
    """The settings in which the source's own files and the policy's model differ, for the towers of the policy."""
    prefixes = self.source.prefixes
    if prefixes != ("",):
      prefixes = tuple(p for p in prefixes if any(path.startswith(p) for path in self.policy.leaves))
    return settings.differences(self.source, self.model, prefixes)

  def stages(self) -> Iterator[Callable[[np.random.Generator], Iterator[Pair]]]:
    """What can be run, one after the other."""
    towers = {"dino": self.image_tower, "siglip": self.image_tower, "text": self.text_tower, "llm": self.llm}
    for name, run in towers.items():
      if self._has(f"{name}/"):
        if name not in self.towers:
          raise self._lacks(f"a tower for {name}/")
        yield lambda rng, name=name, run=run: run(name, rng)
    fused = {
      f"dense_fuser/pair_{p}_{which}": tuple(f"cross_vit_model.aggregate_proj.{2 * p + v}.{i}" for i in (0, 2))
      for p in range(len(self.model.dense_fuser.pairs) if self.model.dense_fuser else 0)
      for v, which in enumerate(("first", "second"))
    }
    for path, keys in (MLPS | fused).items():
      if self._has(f"{path}/"):
        yield lambda rng, path=path, keys=keys: self.mlp(path, keys, rng)
    for ours, key in HEADS.items():
      if self._has(f"coupler/{ours}/"):
        yield lambda rng, ours=ours, key=key: self.head(f"coupler/{ours}", f"action_head.{key}", rng)

  def _has(self, prefix: str) -> bool:
    found = any(path.startswith(prefix) for path in self.policy.leaves)
    self.ran += [prefix] if found else []
    return found

  def params(self, prefix: str, layer: int | None = None) -> dict:
    """Our parameters below a prefix (of one layer of a stack), float32, adapters folded in."""
    paths = [path for path in self.policy.leaves if path.startswith(prefix)]
    flat = {path.removeprefix(prefix): self.policy.read(path, layer).astype(np.float32) for path in paths}
    tree = unflatten_dict(flat, sep="/")
    adapted = any(path.endswith("lora_a") for path in flat)
    return lora.merge(tree, self.lora["rank"], self.lora["alpha"]) if adapted else tree

  def state(self, prefix: str) -> State:
    """PyTorch's tensors below a prefix, float32, adapters folded in as peft does it."""
    keys = [key for key in self.source.tensors if key.startswith(prefix) and ".lora_" not in key]
    return {key.removeprefix(prefix): self._tensor(key) for key in keys}

  def _tensor(self, key: str) -> Any:
    torch, _ = libraries()
    if key not in self.source.tensors:
      raise self._lacks(key)
    stored = self.source.tensors[key]
    x = torch.from_numpy(stored.read().astype(np.float32))
    a, b = (self.source.tensors.get(key.removesuffix("weight") + f"lora_{ab}.weight") for ab in "AB")
    if a is None or b is None or not key.endswith(".weight"):
      return x
    if not self.source_lora:
      raise refuse(
        "Source has adapters",
        f"{stored.name} and a policy without `lora`",
        "the policy that was made from these files",
        "pass the same --source paths as in to-orbax",
      )
    a, b = (torch.from_numpy(y.read().astype(np.float32)) for y in (a, b))
    x = x + self.source_lora["alpha"] / self.source_lora["rank"] * (b.flatten(1) @ a.flatten(1)).reshape(x.shape)
    if self.policy.adapted:
      return x
    return torch.from_numpy(x.numpy().astype(stored.dtype).astype(np.float32))  # it was stored like this when merged

  def _lacks(self, what: str) -> ValueError:
    return refuse(
      f"Source lacks {what}",
      f"{self.source.kind} ({', '.join(path.name for path in self.source.paths[:4])})",
      "what the policy was converted from",
      "pass all of its --source paths",
    )

  def image_tower(self, name: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The blocks that the model runs, no final norm, on images of noise; FiLM by a random condition."""
    torch, transformers = libraries()
    vit: ViT = getattr(self.model, name).clone()
    depth = vit.depth - (self.model.vision_layer == "second_to_last")
    state, film = _apart(_blocks_below(self._hugging_face(name), depth))
    pixels = jnp.asarray(rng.standard_normal((BATCH, vit.image, vit.image, 3)), jnp.float32)
    widths = {x.shape[1] for x in film.values() if x.ndim == 2}
    condition = jnp.asarray(rng.standard_normal((BATCH, widths.pop())), jnp.float32) if film else None
    own = settings.fields(self.source, name)
    if name == "dino":
      theirs = built(transformers.Dinov2WithRegistersModel, dinov2_config(vit, depth), own)
      theirs.layernorm, layers, norm = torch.nn.Identity(), theirs.encoder.layer, "norm2"
    else:
      theirs = built(transformers.SiglipVisionModel, siglip_config(vit, depth), own)
      theirs.post_layernorm, layers, norm = torch.nn.Identity(), theirs.encoder.layers, "layer_norm2"
    load_state(theirs, state, name)
    for i, layer in enumerate(layers if film else ()):
      getattr(layer, norm).register_forward_pre_hook(_modulate(film, i, torch.from_numpy(np.array(condition))))
    expected = theirs(torch.from_numpy(rearrange(np.array(pixels), "b h w c -> b c h w"))).last_hidden_state

    def run(module, pixels, condition):
      return module.run(module.embed(pixels), 0, depth, condition)[0]

    yield name, vit.apply({"params": self.params(f"{name}/")}, pixels, condition, method=run), expected

  def _hugging_face(self, name: str) -> State:
    """The weights of a tower by the names of its class in transformers."""
    tower = self.towers[name]
    return tower.torch_names(self.state(tower.theirs))

  def text_tower(self, name: str, rng: np.random.Generator) -> Iterator[Pair]:
    torch, transformers = libraries()
    tower: TextEncoder = self.model.text.clone()
    theirs = built(transformers.SiglipTextModel, siglip_text_config(tower), settings.fields(self.source, name))
    theirs.head = torch.nn.Identity()  # the pooled vector is not used
    load_state(theirs, self._hugging_face(name), name)
    length = min(WORDS, tower.positions)
    ids = rng.integers(2, tower.vocab, (BATCH, length))
    words = np.arange(length) < np.array([[length], [length // 2 + 1]])
    states = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(words).long()).last_hidden_state
    ours = tower.apply({"params": self.params("text/")}, jnp.asarray(ids, jnp.int32), jnp.asarray(words))
    yield name, np.asarray(ours)[words], states.numpy()[words]

  def llm(self, name: str, rng: np.random.Generator) -> Iterator[Pair]:
    """Layer by layer, each side on its own states; the error is that after the last one."""
    torch, transformers = libraries()
    sizes, prefix = self.model.llm, self.towers[name].theirs
    valid = np.arange(WORDS) < np.array([[WORDS], [WORDS // 2 + 1]])
    ids = rng.integers(0, sizes.vocab, (BATCH, WORDS))
    x = self.params("llm/embed/")["embedding"][ids]
    noise = x.std() * rng.standard_normal(x.shape).astype(np.float32)  # rows that are alike would hide positions
    x, y = jnp.asarray(x + noise), self._tensor(f"{prefix}model.embed_tokens.weight")[ids] + torch.from_numpy(noise)
    one = built(transformers.LlamaModel, llama_config(sizes, depth=1, vocab=8), settings.fields(self.source, name))
    one.norm = torch.nn.Identity()
    block = llama.Block(sizes.num_heads, sizes.mlp_dim, sizes.eps, sizes.theta)
    positions = masks.positions(jnp.asarray(valid))
    allowed = masks.attention_mask(jnp.asarray(valid), jnp.zeros(WORDS, bool), "causal")
    run = jax.jit(lambda params, x: block.apply({"params": params}, x, positions, allowed, None, 0)[0])
    for i in range(sizes.depth):
      stacked = any(path.startswith("llm/layers/") for path in self.policy.leaves)
      x = run(self.params("llm/layers/", i) if stacked else self.params(f"llm/layers_{i}/"), x)
      load_state(one.layers[0], self.state(f"{prefix}model.layers.{i}."), f"layer {i}")
      y = one(inputs_embeds=y, attention_mask=torch.from_numpy(valid).long()).last_hidden_state
    x = nn.RMSNorm(epsilon=sizes.eps).apply({"params": self.params("llm/norm/")}, x)
    scale, eps = self._tensor(f"{prefix}model.norm.weight"), one.config.rms_norm_eps
    y = torch.nn.functional.rms_norm(y, y.shape[-1:], scale, eps)
    yield name, np.asarray(x)[valid], y.numpy()[valid]
    if self._has("llm/lm_head/"):
      logits = x @ self.params("llm/lm_head/")["kernel"]
      yield f"{name} logits", np.asarray(logits)[valid], (y @ self._tensor(f"{prefix}lm_head.weight").T).numpy()[valid]

  def mlp(self, path: str, keys: Sequence[str], rng: np.random.Generator) -> Iterator[Pair]:
    torch, _ = libraries()
    layers = [(self._tensor(f"{key}.weight"), self._tensor(f"{key}.bias")) for key in keys]
    y = torch.from_numpy(rng.standard_normal((BATCH, layers[0][0].shape[1])).astype(np.float32))
    ours = MLP(tuple(w.shape[0] for w, _ in layers)).apply({"params": self.params(f"{path}/")}, jnp.asarray(y))
    for i, (weight, bias) in enumerate(layers):
      y = torch.nn.functional.linear(y if i == 0 else torch.nn.functional.gelu(y), weight, bias)
    yield path, ours, y

  def head(self, path: str, key: str, rng: np.random.Generator) -> Iterator[Pair]:
    """LayerNorm, linear, ReLU, two residual [LayerNorm, linear, ReLU], LayerNorm, linear."""
    torch, _ = libraries()
    functional = torch.nn.functional

    def norm(y, name):
      return functional.layer_norm(y, y.shape[-1:], self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    def linear(y, name):
      return functional.linear(y, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    shape = self.source.tensors[f"{key}.fc1.weight"].shape
    x = rng.standard_normal((BATCH, 1, shape[1])).astype(np.float32)
    y = functional.relu(linear(norm(torch.from_numpy(x), f"{key}.layer_norm1"), f"{key}.fc1"))
    for i in range(2):
      block = f"{key}.mlp_resnet_blocks.{i}.ffn"
      y = y + functional.relu(linear(norm(y, f"{block}.0"), f"{block}.1"))
    y = linear(norm(y, f"{key}.layer_norm2"), f"{key}.fc2")
    head = ResNetHead(shape[0], y.shape[-1])
    yield path, head.apply({"params": self.params(f"{path}/")}, jnp.asarray(x)), y


def _apart(state: State) -> tuple[State, State]:
  """(weights of the class, FiLM's weights)."""
  film = {key: x for key, x in state.items() if re.search(r"\.(scale|shift)\.", key)}
  return {key: x for key, x in state.items() if key not in film}, film


def _blocks_below(state: State, depth: int) -> State:
  number = re.compile(r"encoder\.layers?\.(\d+)\.")
  return {key: x for key, x in state.items() if not (m := number.match(key)) or int(m[1]) < depth}


def _modulate(film: State, i: int, condition: Any) -> Callable:
  """A hook before a block's second norm: changes the residual stream itself, after the attention."""
  weights = {key.split(".", 3)[3]: x for key, x in film.items() if key.split(".")[2] == str(i)}
  gamma, beta = (condition @ weights[f"{n}.weight"].T + weights[f"{n}.bias"] for n in ("scale", "shift"))

  def hook(module, inputs):
    inputs[0].mul_(1 + gamma[:, None]).add_(beta[:, None])

  return hook
